"""Task files: what is read, what is refused, and that every refusal names file, key, found and allowed."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from suite.errors import TaskError, UserError
from suite.spec.checkout import find_repo
from suite.spec.json_schema import json_schema
from suite.spec.reading import deep_merge, load_all, load_task, read_task
from suite.spec.strict_yaml import TaskErrors, parse_yaml, read_yaml
from suite.spec.task import axis_label
from suite.spec.validate import check, contrast_range, require_valid, validate_file

REPO = Path(__file__).resolve().parents[1]
GOOD = """\
schema: 1
id: tiny
version: 1
grade_version: 1
tier: desk
title: A task for tests
protocol: offline_mismatch
claims:
  - id: C1-k3
    about: C1
    statement: k3 is smaller in fp16
    kind: ratio
    paper: {value: 64, unit: ratio, source: theory, level: P4, baseline: C1.ratio}
model: {path: here, sha256: SHA, family: qwen2}
data: {id: desk, template: desk}
rollout: {engine: hf, samples_per_prompt: 4, temperature: 1.0, top_p: 1.0, max_tokens: 64}
train: {engine: dense, score_batch_size: 8}
arms:
  bf16: {precision: {rollout: bf16, train: bf16}}
  fp16: {precision: {rollout: fp16, train: fp16}}
vary: [precision]
grid:
  data.num_terms: [[4, 24], [60, 120]]
seeds: [0, 1, 2]
metrics: [k3_nats_per_token]
grade:
  C1-k3:
    estimand: k3_nats_per_token
    at: {data.num_terms: 4-24}
    contrast: {ratio: [bf16, fp16]}
    interval: {method: student_t, level: 0.90, unit: seed}
    accept: [16, 128]
    min_seeds: 3
    tolerance: {level: P4, derivation: theory, date: 2026-01-01}
controls:
  - name: control-aa
    kind: aa
    like: bf16
    seeds: [10, 11]
    at: {data.num_terms: 4-24}
    estimand: k3_nats_per_token
    contrast: {ratio: [bf16, control-aa]}
    accept: [0.5, 2.0]
resources: {gpus: 0, gpu_mem_gib: 0, disk_gib: 1, cpu_ok: true}
""".replace("SHA", "a" * 64)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout with one baseline; the function it gives writes a task, edited, and returns its path."""
    for folder in ("tasks/_base", "tasks/desk", "baselines"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('name = "fp16-mismatch-suite"\n')
    (tmp_path / "baselines" / "paper.yaml").write_text("C1: {ratio: 64}\n")
    monkeypatch.chdir(tmp_path)

    def write(*edits: tuple[str, str], text: str = GOOD, name: str = "tiny") -> Path:
        for old, new in edits:
            assert old in text, old
            text = text.replace(old, new, 1)
        path = tmp_path / "tasks" / "desk" / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


def errors_of(path) -> list[TaskError]:
    return validate_file(path)[0]


def test_a_good_task_loads_validates_and_is_frozen(checkout):
    task = load_task(checkout())
    assert check(task) == ([], [])
    assert (task.model.sha256, task.grade["C1-k3"].accept, task.seeds) == ("a" * 64, (16, 128), (0, 1, 2))
    assert load_task("tiny").id == "tiny"
    with pytest.raises(ValidationError):
        task.version = 2


# What is edited, the key the error must name, and words that must stand among what it says is allowed.
BROKEN = {
    "unknown key": (("seeds: [0", "sead: [0"), "sead", "seeds"),
    "unknown key in a section": (("max_tokens: 64", "max_token: 64"), "rollout.max_token", "did you mean max_tokens?"),
    "unknown key in an arm": (
        ("fp16: {precision: {rollout", "fp16: {precision: {rolout"),
        "arms.fp16.precision.rolout",
        "rollout",
    ),
    "duplicate key": (("max_tokens: 64", "max_tokens: 64, max_tokens: 65"), "rollout.max_tokens", "each key once"),
    "duplicate top-level key": (("vary: [precision]", "vary: [precision]\nvary: []"), "vary", "each key once"),
    "text for a number": (("max_tokens: 64", "max_tokens: many"), "rollout.max_tokens", "a whole number"),
    "number for text": (("title: A task for tests", "title: 5"), "title", "text"),
    "a fraction for a count": (("max_tokens: 64", "max_tokens: 64.5"), "rollout.max_tokens", "a whole number"),
    "a boolean for a number": (("version: 1\n", "version: true\n"), "version", "a whole number"),
    "yes for true": (("cpu_ok: true", "cpu_ok: yes"), "resources.cpu_ok", "true or false"),
    "octal digits": (("max_tokens: 64", "max_tokens: 064"), "rollout.max_tokens", "a number"),
    "1e-6 as text": (("temperature: 1.0", "temperature: 1e-6"), "rollout.temperature", "write 1.0e-6"),
    "1.5E3 as text": (("temperature: 1.0", "temperature: 1.5E3"), "rollout.temperature", "write 1.5e+3"),
    "not a number": (("temperature: 1.0", "temperature: .nan"), "rollout.temperature", "a finite number"),
    "out of range": (("top_p: 1.0", "top_p: 1.5"), "rollout.top_p", "less than or equal to 1"),
    "python tag": (("max_tokens: 64", "max_tokens: !!python/object/apply:os.system [id]"), "(line", "no tags"),
    "a core tag": (("max_tokens: 64", "max_tokens: !!int '64'"), "(line", "no tags"),
    "an alias": (("seeds: [0, 1, 2]", "seeds: &s [0, 1, 2]\nneeds: *s"), "(line", "no anchors or aliases"),
    "a key that is a number": (("vary:", "1: 2\nvary:"), "1", "keys that are text"),
    "id and file name": (("id: tiny", "id: other"), "id", "tiny (the file name)"),
    "tier and folder": (("tier: desk", "tier: paper"), "tier", "desk (the folder)"),
    "unknown protocol": (("offline_mismatch", "offline_magic"), "protocol", "offline_mismatch"),
    "unknown reducer": (("accept: [16", "reducer: max\n    accept: [16"), "grade.C1-k3.reducer", "last_k_mean"),
    "unknown estimand": (
        ("  C1-k3:\n    estimand: k3_nats", "  C1-k3:\n    estimand: k4_nats"),
        "grade.C1-k3.estimand",
        "k3_nats_per_token",
    ),
    "unknown metric": (("metrics: [k3", "metrics: [k9"), "metrics", "k3_nats_per_token"),
    "accept covers everything": (
        ("accept: [16, 128]", "accept: [0, null]"),
        "grade.C1-k3.accept",
        "some outcome can miss",
    ),
    "accept is open on both ends": (
        ("accept: [16, 128]", "accept: [null, null]"),
        "grade.C1-k3.accept",
        "some outcome can miss",
    ),
    "accept meets nothing": (("accept: [16, 128]", "accept: [-9, -1]"), "grade.C1-k3.accept", "some outcome can meet"),
    "accept upside down": (("accept: [16, 128]", "accept: [128, 16]"), "grade.C1-k3.accept", "low <= high"),
    "accept of three": (("accept: [16, 128]", "accept: [16, 32, 128]"), "grade.C1-k3.accept", "2"),
    "accept of one": (("accept: [16, 128]", "accept: [16]"), "grade.C1-k3.accept", "a list of 2 entries"),
    "accept of none": (("accept: [16, 128]", "accept: []"), "grade.C1-k3.accept", "a list of 2 entries"),
    "accept with text in it": (("accept: [16, 128]", "accept: ['16', 128]"), "grade.C1-k3.accept.0", "a number"),
    "accept with 1e-9 in it": (("accept: [16, 128]", "accept: [1e-9, 128]"), "grade.C1-k3.accept.0", "write 1.0e-9"),
    "a pair in a control": (("accept: [0.5, 2.0]", "accept: [0.5, 1e-9]"), "controls.0.accept.1", "write 1.0e-9"),
    "a ratio of a number": (("{ratio: [bf16, fp16]}", "{ratio: [1, fp16]}"), "grade.C1-k3.contrast.ratio.0", "text"),
    "a difference of one": (("{ratio: [bf16, fp16]}", "{difference: [bf16]}"), "grade.C1-k3.contrast.difference", "2 entries"),
    "text in a grid value": (("[[4, 24], [60", "[['4', 24], [60"), "arms.bf16.data.num_terms.0", "a whole number"),
    "a grid value cut short": (("[[4, 24], [60", "[[4], [60"), "arms.bf16.data.num_terms", "a list of 2 entries"),
    "6.5e1 in paper.value": (("value: 64", "value: 6.5e1"), "claims.0.paper.value", "write 6.5e+1"),
    "64 in quotes in paper.value": (("value: 64", "value: '64'"), "claims.C1-k3.paper.value", "without quotes"),
    "a list of them": (("value: 64", "value: [64, '1e-9']"), "claims.C1-k3.paper.value", "without quotes"),
    "true in paper.value": (("value: 64", "value: true"), "claims.C1-k3.paper.value", "64 (baselines/paper.yaml)"),
    "yes in paper.value": (("value: 64", "value: yes"), "claims.0.paper.value", "true or false"),
    "1_000 in a title": (("title: A task for tests", "title: 1_000"), "title", "as text: '1_000'"),
    "a sexagesimal number": (("title: A task for tests", "title: 1:30"), "title", "a number"),
    "hexadecimal digits": (("max_tokens: 64", "max_tokens: 0x40"), "rollout.max_tokens", "a number"),
    "an infinite number": (("value: 64", "value: .inf"), "claims.0.paper.value", "a finite number"),
    "a number that overflows": (("value: 64", "value: 1.0e+999"), "claims.0.paper.value", "a finite number"),
    "an integer of 65 bits": (("version: 1\n", "version: 18446744073709551616\n"), "version", "at most 63 bits"),
    "a lone surrogate": (("title: A task for tests", 'title: "\\ud800"'), "(line", "one well-formed YAML document"),
    "an escape code of a terminal": (("title: A task for tests", 'title: "\\e[31m"'), "title", "control characters"),
    "a key with a control character": (("vary:", '"va\\0ry": 1\nvary:'), "va\\x00ry", "control characters"),
    "an arm that is a path": (("  bf16: {prec", "  ../../x: {prec"), "arms.../../x", "text that matches"),
    "an arm with markup": (("  bf16: {prec", "  '[/red]': {prec"), "arms.[/red]", "text that matches"),
    "an arm of 81 letters": (("  bf16: {prec", f"  bf16-{'x' * 76}: {{prec"), "arms.bf16-x", "at most 80"),
    "an axis that is a path": (("  data.num_terms: [[4", "  ../num_terms: [[4"), "grid.../num_terms", "text that matches"),
    "vary with markup": (("vary: [precision]", "vary: ['[/red]']"), "vary.0", "text that matches"),
    "a data file that is a path": (
        ("template: desk}", "template: desk, files: [{name: ../x.parquet, sha256: unknown}]}"),
        "data.files.0.name",
        "text that matches",
    ),
    "more cells than anybody could list": (
        ("seeds: [0, 1, 2]", f"seeds: {list(range(2000))}"),
        "grid",
        "at most 100 arms and controls, 5000 cells",
    ),
    "a cell name too long for a folder": (
        ("  data.num_terms: [[4, 24]", f"  data.revision: [{'r' * 250}]\n  data.num_terms: [[4, 24]"),
        "grid",
        "at most 200 letters",
    ),
    "no grade": (("  C1-k3:\n    estimand", "  C1-k4:\n    estimand"), "grade.C1-k3", "kind ratio is graded"),
    "no tolerance": (
        ("    tolerance: {level: P4, derivation: theory, date: 2026-01-01}\n", ""),
        "grade.C1-k3.tolerance",
        "a value",
    ),
    "missing baseline": (("baseline: C1.ratio", "baseline: C1.ration"), "claims.C1-k3.paper.baseline", "ratio"),
    "another value than the baseline": (
        ("value: 64", "value: 65"),
        "claims.C1-k3.paper.value",
        "64 (baselines/paper.yaml)",
    ),
    "contrast of an unknown arm": (
        ("ratio: [bf16, fp16]", "ratio: [bf16, fp8]"),
        "grade.C1-k3.contrast.ratio",
        "bf16, fp16",
    ),
    "two contrasts": (
        ("{ratio: [bf16, fp16]}", "{ratio: [bf16, fp16], arm: bf16}"),
        "grade.C1-k3.contrast",
        "exactly one of",
    ),
    "no contrast": (("{ratio: [bf16, fp16]}", "{}"), "grade.C1-k3.contrast", "exactly one of"),
    "contrast of another kind": (
        ("{ratio: [bf16, fp16]}", "{arm: bf16}"),
        "grade.C1-k3.contrast",
        "ratio (kind ratio)",
    ),
    "a point outside the grid": (
        ("at: {data.num_terms: 4-24}", "at: {data.num_terms: 5-6}"),
        "grade.C1-k3.at.data.num_terms",
        "60-120",
    ),
    "an axis outside the grid": (
        ("at: {data.num_terms: 4-24}", "at: {data.rows: 1}"),
        "grade.C1-k3.at.data.rows",
        "an axis",
    ),
    "no point named": (
        ("    at: {data.num_terms: 4-24}\n    contrast: {ratio: [bf16, fp16]}", "    contrast: {ratio: [bf16, fp16]}"),
        "grade.C1-k3.at.data.num_terms",
        "one of: 4-24, 60-120",
    ),
    "control without its prefix": (("name: control-aa", "name: aa"), "controls.aa.name", "begins with control-"),
    "control like no arm": (("like: bf16", "like: int8"), "controls.control-aa.like", "an arm: bf16"),
    "A/A that differs": (
        ("seeds: [10, 11]", "seeds: [10, 11]\n    set: {data: {num_prompts: 3}}"),
        "controls.control-aa.set",
        "seeds only",
    ),
    "A/A with the same seeds": (("seeds: [10, 11]", "seeds: [0, 11]"), "controls.control-aa.seeds", "do not use"),
    "arm without a precision": (("  fp16: {precision", "  half: {precision"), "arms.half", "begins with"),
    "arm of another precision": (
        ("fp16: {precision: {rollout: fp16", "fp16: {precision: {rollout: bf16"),
        "arms.fp16.precision.rollout",
        "fp16",
    ),
    "arms differ outside vary": (
        ("fp16: {precision: ", "fp16: {rollout: {max_tokens: 65}, precision: "),
        "arms.fp16.rollout.max_tokens",
        "arms that differ only in vary: precision",
    ),
    "equal arms": (
        ("  fp16: {precision", "  bf16-bf16: {precision: {rollout: bf16, train: bf16}}\n  fp16: {precision"),
        "arms.bf16-bf16",
        "differ",
    ),
    "a setting the protocol needs": (
        (", max_tokens: 64", ""),
        "arms.bf16.rollout.max_tokens",
        "offline_mismatch needs it",
    ),
    "a task that is not there": (("metrics:", "needs: [nothing]\nmetrics:"), "needs", "a task"),
    "a block that is not there": (
        ("protocol:", "extends: [nowhere]\nprotocol:"),
        "extends.0",
        "a block in tasks/_base",
    ),
    "a block outside _base": (
        ("protocol:", "extends: [../../secret]\nprotocol:"),
        "extends.0",
        "a block in tasks/_base",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_task_is_refused_with_file_key_found_and_allowed(checkout, name):
    edit, key, allowed = BROKEN[name]
    errors = errors_of(checkout(edit))
    matching = [error for error in errors if error.key.startswith(key)]
    assert matching, [str(error) for error in errors]
    assert allowed in str(matching[0]) and matching[0].file.endswith("tiny.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# only a comment\n",
        b"\x00\xff\xfe\x80garbage",
        "käse".encode("latin-1"),
        b"- a\n- list\n",
        b"just text\n",
        b"a: [1, 2\n",
        b"a: 1\n---\nb: 2\n",
        b"\t- tab",
        b"a: b: c\n",
        b"{" * 5000,
        b"? [a, b]\n: c\n",
        b"<<: {a: 1}\n",
        b"a: 1\n" * 300_000,
    ],
)
def test_files_that_are_no_task_are_refused_and_never_crash(checkout, content):
    path = checkout()
    path.write_bytes(content)
    with pytest.raises(TaskErrors) as caught:
        load_task(path)
    assert all(error.file.endswith("tiny.yaml") and error.allowed for error in caught.value.errors)


def test_what_is_no_file_is_refused_and_never_waited_for(checkout):
    path = checkout()
    path.unlink()
    os.mkfifo(path)
    (error,) = errors_of(path)
    assert (error.key, error.allowed) == ("(file)", "a regular file")
    path.unlink()
    path.mkdir()
    assert errors_of(path)[0].allowed == "a regular file"
    path.rmdir()
    assert errors_of(path)[0].found == "No such file or directory"


def test_an_alias_bomb_is_refused_before_it_is_expanded(checkout):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    errors = errors_of(checkout(text="\n".join(lines)))
    assert errors[0].allowed.startswith("no anchors or aliases") and len(errors) <= 12


def test_every_error_of_a_file_comes_at_once(checkout):
    names = [
        "duplicate key",
        "1e-6 as text",
        "unknown metric",
        "accept covers everything",
        "unknown reducer",
        "missing baseline",
        "control without its prefix",
        "id and file name",
    ]
    edits = [BROKEN[name][0] for name in names]
    edits = [
        edit if edit[0] != "accept: [16" else ("accept: [0, null]", "reducer: max\n    accept: [0, null]")
        for edit in edits
    ]
    keys = [error.key for error in errors_of(checkout(*edits))]
    for name in names:
        assert any(key.startswith(BROKEN[name][1]) for key in keys), (name, keys)


def test_task_errors_read_as_one_error_and_list_all(checkout):
    with pytest.raises(TaskError) as caught:
        load_task(checkout(("max_tokens: 64", "max_tokens: many"), ("title: A task for tests", "title: 5")))
    assert len(caught.value.errors) == 2 and str(caught.value).count("\n") == 1
    assert caught.value.key == caught.value.errors[0].key


def test_blocks_merge_in_order_lists_replace_and_the_task_wins(checkout):
    base = Path("tasks/_base")
    (base / "one.yaml").write_text(
        "rollout: {max_tokens: 1, top_p: 0.5}\nmetrics: [k1_nats_per_token, k2_nats_per_token]\n"
    )
    (base / "two.yaml").write_text("rollout: {top_p: 0.7}\nmetrics: [prob_diff_mean]\n")
    path = checkout(
        ("protocol:", "extends: [one, two]\nprotocol:"), ("metrics: [k3_nats_per_token]\n", ""), (", top_p: 1.0", "")
    )
    task = load_task(path)
    assert (task.rollout.max_tokens, task.rollout.top_p, task.metrics) == (64, 0.7, ("prob_diff_mean",))


def test_an_error_inside_a_block_names_the_block(checkout):
    Path("tasks/_base/one.yaml").write_text("rollout: {top_p: wide}\n")
    errors = errors_of(checkout(("protocol:", "extends: [one]\nprotocol:"), (", top_p: 1.0", "")))
    assert errors[0].key == "rollout.top_p" and errors[0].file.endswith("one.yaml")


@pytest.mark.parametrize("key", ["grade", "claims", "id"])
def test_a_block_cannot_hand_down_a_grade(checkout, key):
    Path("tasks/_base/one.yaml").write_text(f"{key}: {{}}\n")
    errors = errors_of(checkout(("protocol:", "extends: [one]\nprotocol:")))
    assert (errors[0].key, errors[0].hint) == (key, "it is never inherited")


def test_warnings_say_what_a_verdict_cannot_be(checkout):
    def warnings(*edits):
        return "\n".join(validate_file(checkout(*edits))[1])

    assert "model.sha256: unknown" in warnings(("a" * 64, "unknown"))
    assert "it cannot reach PASS" in warnings(("min_seeds: 3", "min_seeds: 4"))
    assert "it cannot reach FAIL" in warnings(("seeds: [0, 1, 2]", "seeds: [0]"), ("min_seeds: 3", "min_seeds: 1"))
    assert "P5 (judgement)" in warnings(("tolerance: {level: P4", "tolerance: {level: P5"))


def test_the_range_of_a_contrast_follows_from_the_range_of_its_levels(checkout):
    contrast = load_task(checkout()).grade["C1-k3"].contrast
    difference = contrast.model_copy(update={"ratio": None, "difference": ("bf16", "fp16")})
    assert contrast_range((0.0, 1.0), contrast) == (0.0, float("inf"))
    assert contrast_range((0.0, 1.0), difference) == (-1.0, 1.0)
    assert contrast_range((0.0, 1.0), difference, "fraction_of_seeds") == (0.0, 1.0)


def test_require_valid_raises_what_check_finds(checkout):
    with pytest.raises(TaskErrors, match="some outcome can miss"):
        require_valid(load_task(checkout(("accept: [16, 128]", "accept: [0, null]"))))


def test_grid_labels_stand_for_grid_values(checkout):
    assert load_task(checkout()).grade["C1-k3"].at == {"data.num_terms": [4, 24]}
    assert axis_label([60, 120]) == "60-120" and axis_label(8192) == "8192" and axis_label(0.5) == "0p5"
    assert axis_label([{"name": "amc.parquet"}, {"name": "aime.parquet"}]) == "amc+aime"
    assert axis_label({"name": "../[/red] x.parquet"}) == "red_x" and axis_label("../../x") == "pp_pp_x"


def test_names_of_a_task_that_runs_no_engine_are_checked_as_well(checkout):
    """`dataset` takes arms of any name: they are folders all the same."""
    text = GOOD.replace("offline_mismatch", "dataset").replace("arms:\n", "arms:\n  ../../../../../../x: {}\n")
    (error, *_) = [error for error in errors_of(checkout(text=text)) if error.key.startswith("arms.")]
    assert (error.key, error.found) == ("arms.../../../../../../x", "../../../../../../x")


def test_the_tasks_that_a_comparison_needs_are_read_once_each(checkout, monkeypatch):
    reads = []
    for module in ("validate", "plan"):
        monkeypatch.setattr(f"suite.spec.{module}.read_task", lambda path: reads.append(path.stem) or read_task(path))
    checkout()
    claims = "".join(f"  - {{id: C1-{i}, about: C1, statement: s, kind: report}}\n" for i in range(9))
    grades = "".join(f"  C1-{i}: {{estimand: k3_nats_per_token, contrast: {{arm: tiny-bf16}}}}\n" for i in range(9))
    head = "schema: 1\nid: both\nversion: 1\ngrade_version: 1\ntier: desk\ntitle: t\nprotocol: compare\nneeds: [tiny]\nseeds: [0]\n"
    last = "resources: {gpus: 0, gpu_mem_gib: 0, disk_gib: 1, cpu_ok: true}\n"
    path = checkout(text=f"{head}claims:\n{claims}grade:\n{grades}{last}", name="both")
    assert errors_of(path) == [] and reads == ["both", "tiny"]


def test_a_file_that_changed_is_read_again_and_nobody_can_spoil_what_was_read(checkout):
    first, _ = read_yaml(checkout())
    first["rollout"]["max_tokens"] = 1
    assert read_yaml(checkout())[0]["rollout"]["max_tokens"] == 64
    assert read_yaml(checkout(("max_tokens: 64", "max_tokens: 65")))[0]["rollout"]["max_tokens"] == 65


def test_deep_merge_leaves_its_arguments_alone():
    base, top = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}}
    assert deep_merge(base, top) == {"a": {"b": 1, "c": [2]}}
    assert (base, top) == ({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}})


def test_plain_files_mean_what_a_yaml_1_1_reader_makes_of_them():
    text = "a: [1, -2, 0, 1.5, 1.0e-6, -1.5e+3, true, false, null, ~, '5', word]\nb: {c: 'x y', d: z}\n"
    value, errors = parse_yaml(text, "x")
    assert errors == [] and value == yaml.safe_load(text)


def test_a_task_outside_a_checkout_needs_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no checkout"):
        find_repo()


def test_the_json_schema_in_the_repository_is_current():
    assert (REPO / "tasks" / "schema.json").read_text() == json_schema(REPO / "tasks"), "run: suite lock"


def test_every_task_of_the_repository_is_valid(monkeypatch):
    monkeypatch.chdir(REPO)
    tasks = load_all()
    assert {"desk-offline-mismatch", "desk-precision-matrix", "desk-offline-accuracy", "offline-mismatch"} <= set(tasks)
    assert [str(error) for task in tasks.values() for error in check(task)[0]] == []


def test_a_repository_task_breaks_when_its_baselines_go(tmp_path, monkeypatch):
    for folder in ("tasks", "baselines"):
        shutil.copytree(
            REPO / folder, tmp_path / folder, ignore=shutil.ignore_patterns("desk" if folder == "baselines" else "-")
        )
    (tmp_path / "baselines" / "paper.yaml").write_text("C2: {}\n")
    keys = {error.key for error in errors_of(tmp_path / "tasks" / "paper" / "offline-mismatch.yaml")}
    assert "claims.C1.paper" in keys
