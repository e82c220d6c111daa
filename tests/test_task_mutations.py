"""Task files that somebody or something spoilt: each still is a task, or is refused with file, key and what is allowed.
Never a traceback, never a wait.

Mutations are drawn from a fixed seed; SUITE_MUTATIONS=300 makes as many as an independent check wants (default 40).
"""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml

from suite.cli.main import main
from suite.cli.show import print_task, summary
from suite.spec.plan import resolve_task
from suite.spec.reading import read_task
from suite.spec.validate import validate_file

REPO = Path(__file__).resolve().parents[1]
NUM = int(os.environ.get("SUITE_MUTATIONS", 40))
CPU_SECONDS = 20.0  # for one file; a tenth of a second is usual
NASTY = [
    None, True, 0, -1, 3, 2**63, 10**40, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "64", "1e-9", "6.5e1", "yes", "~",
    "../../../x", "/etc/passwd", "[/red]", "a b", "x" * 300, "\ud800", "\x00", "\x1b[31m", "é" * 90, "4-24", "unknown", "null",
    [], [1], [1, 2, 3], ["4", 24], [None, None], [[[]]], {}, {"a": 1}, {"../x": {}}, {"": 1}, {"precision": {"train": "bf16"}},
]  # fmt: skip
WORDS = ["1e-9", "6.5e1", "'64'", "yes", "-", "[", "}", "&a x", "*a", "!!python/name:os.system", "? x", "2026-13-40", "0x10", ".inf"]


def places(value, at=()):
    """Every (path, value) of a tree."""
    yield at, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*at, key))


def in_the_tree(draw: random.Random, text: str) -> bytes:
    """One to three values replaced, left out, renamed, given twice or cut short; written as JSON, which is YAML."""
    tree = yaml.safe_load(text)
    for _ in range(draw.randint(1, 3)):
        if not tree:
            break
        *above, last = draw.choice([at for at, _ in places(tree) if at])
        holder = tree
        for part in above:
            holder = holder[part]
        match draw.choice(["replace", "replace", "replace", "leave out", "rename", "twice", "shorten"]):
            case "leave out":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[draw.choice(["x", "../x", "a b", "[/red]", "y" * 300, "1", last + "s"])] = holder.pop(last)
            case "twice" if isinstance(holder, list):
                holder.insert(draw.randint(0, len(holder)), holder[last])
            case "shorten" if isinstance(holder[last], list) and holder[last]:
                del holder[last][draw.randrange(len(holder[last]))]
            case _:
                holder[last] = draw.choice(NASTY)
    return json.dumps(tree, default=str).encode()


def in_the_text(draw: random.Random, text: str) -> bytes:
    """Lines left out, given twice or moved, words replaced, bytes flipped, the end cut off."""
    lines = text.splitlines(keepends=True)
    where = draw.randrange(len(lines))
    match draw.choice(["line out", "line twice", "indent", "word", "word", "flip", "flip", "cut"]):
        case "line out":
            del lines[where]
        case "line twice":
            lines.insert(draw.randrange(len(lines)), lines[where])
        case "indent":
            lines[where] = draw.choice([" ", "   ", "\t"]) + lines[where]
        case "word":
            words = lines[where].split(" ")
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            lines[where] = " ".join(words).rstrip("\n") + "\n"
        case "cut":
            return text.encode()[: draw.randrange(len(text))]
        case "flip":
            data = bytearray(text.encode())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return bytes(data)
    return "".join(lines).encode()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout of task files and the paper's numbers, in which one stands. Without locks: any change makes one stale."""
    shutil.copytree(REPO / "tasks", tmp_path / "tasks", ignore=shutil.ignore_patterns("_resolved"))
    (tmp_path / "baselines").mkdir()
    shutil.copy(REPO / "baselines" / "paper.yaml", tmp_path / "baselines")
    (tmp_path / "pyproject.toml").write_text('name = "fp16-mismatch-suite"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(path: Path) -> str:
    """`valid`, or `refused`; anything else is raised."""
    started = time.process_time()
    errors, _ = validate_file(path)
    assert all(error.file and error.key and error.allowed and str(error).encode() for error in errors)
    task, found, _ = read_task(path)
    if task is not None and not found:
        try:
            resolved = resolve_task(task)
            print_task(resolved), json.dumps(summary(resolved))
        except Exception as problem:
            assert errors and type(problem).__name__ == "TaskErrors", problem
    assert time.process_time() - started < CPU_SECONDS
    return "refused" if errors else "valid"


@pytest.mark.parametrize("how", [in_the_tree, in_the_text])
def test_a_mutated_task_file_is_valid_or_refused_with_its_key(tree, how, capsys):
    draw, found = random.Random(20261125), {"valid": 0, "refused": 0}
    files = [path for path in sorted(tree.glob("tasks/*/*.yaml")) if not path.parent.name.startswith("_")]
    for _ in range(NUM // 2):
        path = draw.choice(files)
        intact = path.read_bytes()
        path.write_bytes(how(draw, intact.decode()))
        try:
            found[outcome(path)] += 1
        except Exception as problem:
            raise AssertionError(f"{path.name}: {path.read_bytes()!r}") from problem
        finally:
            path.write_bytes(intact)
    print(how.__name__, found)
    assert found["refused"] > found["valid"] and (found["valid"] > 0 or NUM < 300), found  # about one in twelve is valid
    assert outcome(files[0]) == "valid"


@pytest.mark.parametrize("block", ["paper-sanity-verl", "desk-sanity", "bf16-fp16"])
def test_a_mutated_block_is_refused_where_it_is_used(tree, block, capsys):
    draw, path = random.Random(7), tree / "tasks" / "_base" / f"{block}.yaml"
    users = [file for file in sorted(tree.glob("tasks/*/*.yaml")) if block in file.read_text().split("extends: ")[-1].split("]")[0]]
    intact = path.read_text()
    for how in (in_the_tree, in_the_text) * max(1, NUM // 40):
        path.write_bytes(how(draw, intact))
        outcome(users[0])


@pytest.mark.parametrize("name", ["never-falls", "accuracy-at-least", "k3-ratio"])
def test_a_mutated_type_of_claims_is_refused_where_it_is_used(tree, name):
    draw, path, user = random.Random(11), tree / "tasks" / "_claims" / f"{name}.yaml", tree / "tasks" / "desk" / "desk-sanity-gspo.yaml"
    intact, found = path.read_text(), set()
    for how in (in_the_tree, in_the_text) * max(2, NUM // 20):
        path.write_bytes(how(draw, intact))
        found.add(outcome(user))
    assert "refused" in found


def test_one_bad_file_hides_no_other_task(tree, capsys):
    path = tree / "tasks" / "desk" / "desk-offline-mismatch.yaml"
    spoilt = path.read_text().replace("accept: [null, 0.0]", "accept: [16]", 1)
    assert spoilt != path.read_text()
    path.write_text(spoilt)
    for arguments, shown in ((["list"], "desk-sanity-grpo"), (["show", "C5"], "sanity-data"), (["list", "--json"], "[")):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert shown in out and "accept: found [16], allowed: a list of 2 entries" in err and "Traceback" not in err
    assert main(["validate", "sanity-data"]) == 0 and main(["show", "sanity-data"]) == 0


@pytest.mark.parametrize(("before", "after", "says"), [
    ("fixed: 2026-11-20", "fixed: 2026-13-40", "fixed: found '2026-13-40', allowed: the date"),
    ("title: Mismatch", "title: \u202eMismatch", "title: found"),
    ("title: Mismatch", "title: \u2066Mismatch", "allowed: text without control characters"),
], ids=["a day that no calendar has", "right to left", "isolated"])  # fmt: skip
def test_what_a_person_would_read_otherwise_is_refused_once(tree, before, after, says):
    path = tree / "tasks" / "desk" / "desk-offline-mismatch.yaml"
    text = path.read_text()
    path.write_text(text.replace(before, after))
    errors, _ = validate_file(path)
    assert text != path.read_text() and len(errors) == 1 and says in str(errors[0])
