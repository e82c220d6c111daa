"""tasks/_resolved: what each task comes to, written out in full; stale locks are refused, and so is another grade under an
old grade_version. The published records hold the comparison with how tasks were written when they were run."""

import json
from pathlib import Path

import published as miniature
import pytest

from suite.archive.ties import _meaning
from suite.cli.main import main
from suite.spec.lock import lock_errors, write_lock
from suite.spec.plan import differing_paths, plan
from suite.spec.reading import load_all, load_task, read_task_text
from suite.spec.strict_yaml import parse_yaml
from suite.spec.validate import check, check_unlocked, validate_file

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A checkout with one task and its lock; the function it gives writes the task edited and loads it."""
    miniature.checkout(tmp_path)
    monkeypatch.chdir(tmp_path)

    def edited(*edits: tuple[str, str]):
        text = miniature.TASK
        for old, new in edits:
            assert old in text, old
            text = text.replace(old, new, 1)
        miniature.checkout(tmp_path, text)
        return load_task("desk-tiny")

    assert write_lock(edited()) and not write_lock(edited())
    return edited


def test_a_current_lock_says_nothing_and_is_the_text_that_records_keep(task):
    lock = Path("tasks/_resolved/desk-tiny.yaml")
    assert lock_errors(task()) == [] and lock.read_text() == task().text
    again, errors, _ = read_task_text(lock.read_text(), lock)
    assert errors == [] and again.model_dump() == task().model_dump()


def test_a_stale_lock_is_an_error_that_names_its_file_the_key_and_the_command(task):
    (error,) = check(task(("max_tokens: 400", "max_tokens: 200")))[0]
    assert (Path(error.file).name, error.key, error.found) == ("desk-tiny.yaml", "rollout.max_tokens", 400)
    assert "_resolved" in error.file and "200: the lock is stale; run: suite lock desk-tiny" in error.allowed
    assert check_unlocked(task(("max_tokens: 400", "max_tokens: 200")))[0] == []


def test_a_lock_that_is_not_there_or_was_edited_is_an_error(task):
    lock = Path("tasks/_resolved/desk-tiny.yaml")
    lock.write_text(lock.read_text() + "# a note\n")
    assert [error.key for error in lock_errors(task())] == ["(file)"]
    for spoilt in (b"not: [a task", b"", b"\xff\xfe", b"- a list"):
        lock.write_bytes(spoilt)
        assert "the lock is stale" in lock_errors(task())[0].allowed
    lock.unlink()
    assert "run: suite lock desk-tiny" in lock_errors(task())[0].allowed


@pytest.mark.parametrize("edit, key", [
    (("accept: [16.0, 128.0]", "accept: [8.0, 128.0]"), "claims.C1-k3-ratio.accept"),
    (("min_seeds: 3", "min_seeds: 2"), "claims.C1-k3-ratio.min_seeds"),
    (("level: P4", "level: P5"), "claims.C1-k3-ratio.tolerance.level"),
    (("estimand: seq_kl_k1_nats", "estimand: prob_diff_mean"), "claims.C2-seq.estimand"),
    (("kind: ratio", "kind: report"), "claims.C1-k3-ratio.kind"),
])  # fmt: skip
def test_another_grade_under_the_same_grade_version_is_neither_valid_nor_written(task, edit, key, capsys):
    before = Path("tasks/_resolved/desk-tiny.yaml").read_text()
    (error,) = lock_errors(task(edit))
    assert (error.key, error.found) == ("grade_version", 1) and error.allowed.startswith("2:") and key in error.hint
    assert Path(error.file).parent.name == "desk"
    assert main(["lock", "desk-tiny"]) == 2 and "grade_version: found 1, allowed: 2" in capsys.readouterr().err
    assert Path("tasks/_resolved/desk-tiny.yaml").read_text() == before
    assert write_lock(task(edit, ("grade_version: 1", "grade_version: 2"))) and lock_errors(load_task("desk-tiny")) == []


def test_a_grade_version_does_not_fall(task):
    assert write_lock(task(("grade_version: 1", "grade_version: 3")))
    for edits in ((("grade_version: 1", "grade_version: 2"),), (("grade_version: 1", "grade_version: 2"), ("min_seeds: 3", "min_seeds: 2"))):
        (error,) = lock_errors(task(*edits))
        assert (error.key, error.found) == ("grade_version", 2) and error.allowed[0] in "34"


@pytest.mark.parametrize("edit", [
    ('statement: "k3 in bf16 is', 'statement: "The k3 in bf16 is'),
    ('derivation: "three more', 'derivation: "just three more'),
    ("title: A task", "title: Another task"),
    ("budget: {minutes: 1.0}", "budget: {minutes: 2.0}"),
    ("max_tokens: 400", "max_tokens: 200"),
])  # fmt: skip
def test_what_judges_nothing_needs_no_grade_version(task, edit):
    assert write_lock(task(edit)) and lock_errors(load_task("desk-tiny")) == []


def test_a_checkout_without_the_folder_and_a_file_outside_tasks_have_no_locks(tmp_path, monkeypatch):
    miniature.checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert validate_file("desk-tiny")[0] == []
    (tmp_path / "tasks" / "_resolved").mkdir()
    assert [error.key for error in validate_file("desk-tiny")[0]] == ["(file)"]
    (tmp_path / "desk-tiny.yaml").write_text(miniature.TASK)
    assert validate_file(tmp_path / "desk-tiny.yaml")[0] == []


def test_the_verb_writes_all_removes_strays_and_changes_nothing_twice(task, capsys):
    task(("max_tokens: 400", "max_tokens: 200"))
    stray = Path("tasks/_resolved/gone.yaml")
    stray.write_text("x: 1\n")
    assert main(["validate"]) == 2
    err = capsys.readouterr().err
    assert "gone.yaml: (file): found 'gone.yaml', allowed: the lock of a task" in err and "run: suite lock desk-tiny" in err
    assert main(["lock"]) == 0 and not stray.exists() and json.loads(Path("tasks/schema.json").read_text())
    assert capsys.readouterr().out.splitlines() == ["desk-tiny: written out", "gone.yaml: removed, there is no such task"]
    assert main(["lock"]) == 0 and capsys.readouterr().out == "no lock changed\n"
    assert main(["lock", "desk-tiny"]) == 0 and main(["validate"]) == 0


def test_the_verb_refuses_an_unknown_task_and_one_that_is_not_valid(task, capsys):
    assert main(["lock", "no-such"]) == 2 and "there are: desk-tiny" in capsys.readouterr().err
    before = Path("tasks/_resolved/desk-tiny.yaml").read_text()
    task(("accept: [16.0, 128.0]", "accept: [0, null]"))
    assert main(["lock"]) == 2 and "accept" in capsys.readouterr().err
    assert Path("tasks/_resolved/desk-tiny.yaml").read_text() == before


def test_a_bad_task_holds_up_no_other(task, capsys):
    miniature.checkout(Path.cwd(), miniature.TASK.replace("desk-tiny", "desk-bad").replace("kind: ratio", "kind: ratios"), "desk-bad")
    task(("max_tokens: 400", "max_tokens: 200"))
    assert main(["lock"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "desk-tiny: written out\n" and "desk-bad.yaml: claims.0.kind: found 'ratios'" in shown.err
    assert main(["lock", "desk-tiny"]) == 0 and not Path("tasks/_resolved/desk-bad.yaml").exists()


@pytest.fixture(scope="module")
def repository():
    patch = pytest.MonkeyPatch()
    patch.chdir(REPO)
    yield load_all()
    patch.undo()


def test_every_lock_of_the_repository_is_current_and_belongs_to_a_task(repository):
    assert {path.stem for path in (REPO / "tasks" / "_resolved").glob("*")} == set(repository)
    assert [str(error) for task in repository.values() for error in lock_errors(task)] == []


def test_published_records_are_of_the_tasks_that_the_files_come_to_now(repository):
    """However a task is written: each record at its present version is of a cell that it still has, and is judged as its text
    says where that is at the present grade_version."""
    cells, grades = set(), set()
    for name, task in repository.items():
        keys = {cell.name: cell.run_key() for cell in plan(task)}
        records = [json.loads(path.read_text()) for path in sorted((REPO / "results" / name).glob("*/*/*/record.json"))]
        for record in (one for one in records if one["task"]["version"] == task.version):
            assert keys[record["cell"]["name"]] == record["run_key"], (name, record["cell"]["name"])
            cells.add((name, record["cell"]["name"]))
        for text in {one["task"]["text"] for one in records if one["task"]["grade_version"] == task.grade_version}:
            old, errors, _ = read_task_text(text, task.file)
            assert errors == [] and differing_paths(*(_meaning(one.model_dump(mode="json")) for one in (old, task))) == [], name
            grades.add(name)
    assert len(cells) >= 100 and len(grades) >= 2, (len(cells), grades)


def test_a_lock_is_plain_yaml_with_nothing_left_to_look_up(repository):
    for name in repository:
        plain, errors = parse_yaml((REPO / "tasks" / "_resolved" / f"{name}.yaml").read_text(), name)
        assert errors == [] and not {"extends", "fixed", "claim_defaults", "grade"} & plain.keys()
        assert [claim for claim in plain["claims"].values() if "use" in claim] == []
