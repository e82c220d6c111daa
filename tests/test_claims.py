"""Claims as one map: what follows from what, what the library of types makes of its parameters, and that whatever is wrong
is said under the key that stands in the file."""

import json
from pathlib import Path

import pytest
import yaml

from suite.errors import TaskError
from suite.spec.checkout import find_repo
from suite.spec.claim_library import TYPES, claim_type, names
from suite.spec.claims import Form, as_written, written_key
from suite.spec.json_schema import json_schema
from suite.spec.reading import load_all, load_task, read_task, read_task_text
from suite.spec.settings import SECTIONS
from suite.spec.strict_yaml import parse_yaml
from suite.spec.task import Claim, Grade, Task
from suite.spec.validate import validate_file

TASK = """\
schema: 1
id: tiny
version: 1
grade_version: 1
tier: desk
title: A task for tests
extends: [block]
protocol: offline_mismatch
model: {path: here, sha256: SHA, family: qwen2}
data: {id: desk, template: desk}
rollout: {engine: hf, samples_per_prompt: 4, temperature: 1.0, top_p: 1.0, max_tokens: 64}
train: {engine: dense, score_batch_size: 8}
arms:
  bf16: {precision: {rollout: bf16, train: bf16}}
  fp16: {precision: {rollout: fp16, train: fp16}}
vary: [precision]
seeds: [0, 1, 2, 3, 4]
fixed: 2026-01-01
claims:
  C1-ratio:
    statement: k3 is smaller in fp16
    kind: ratio
    paper: C1.theory
    estimand: k3_nats_per_token
    contrast: {ratio: [bf16, fp16]}
    accept: [16, 128]
    tolerance: {level: P4, derivation: theory}
  C2-level: {use: level, arm: fp16, at_most: 0.25}
  C3-shown: {use: shown, arm: bf16, paper: {baseline: C1.measured.k3, source: read by hand}}
resources: {gpus: 0, gpu_mem_gib: 0, disk_gib: 1, cpu_ok: true}
""".replace("SHA", "a" * 64)
LEDGER = """\
C1:
  unit: ratio
  source: section 1
  level: P0
  theory: 64
  measured: {k3: 50.5, k1: 7}
  units: {measured: nats, measured.k1: bits}
  sources: {measured.k3: {source: figure 2, level: P1}}
"""
LEVEL = """\
parameters:
  arm: arm
  at_most: share
  window: {type: count, default: 1200}
  why: {type: text, default: the claim is the level}
claim:
  statement: In $arm the share is at most $at_most over $window steps.
  kind: threshold
  estimand: prob_diff_mean
  contrast: {arm: $arm}
  window: $window
  accept: [0.0, $at_most]
  tolerance: {level: P4, derivation: $why}
"""
SHOWN = """\
parameters: {arm: arm}
claim: {statement: The level in $arm., kind: report, estimand: prob_diff_mean, contrast: {arm: $arm}}
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Edits of the files of a small checkout in which one stands: (file, old, new) -> the path of its task."""
    files = {
        "tasks/desk/tiny.yaml": TASK, "tasks/_base/block.yaml": "claim_defaults: {why: for the block}\n", "baselines/paper.yaml": LEDGER,
        "tasks/_claims/level.yaml": LEVEL, "tasks/_claims/shown.yaml": SHOWN, "pyproject.toml": 'name = "fp16-mismatch-suite"\n',
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def write(*edits: tuple[str, str, str]) -> Path:
        texts = dict(files)
        for name, old, new in edits:
            key = next(key for key in files if Path(key).stem == name)
            assert old in texts[key], old
            texts[key] = texts[key].replace(old, new, 1)
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "tasks" / "desk" / "tiny.yaml"

    return write


def same(one: Task, other: Task) -> bool:
    return one.model_dump(exclude={"extends"}) == other.model_dump(exclude={"extends"})


def errors_of(path) -> list[TaskError]:
    return validate_file(path)[0]


def test_a_claim_takes_from_its_id_its_kind_and_the_ledger_what_it_does_not_say(checkout):
    task = load_task(checkout())
    claim, grade = task.claims[0], task.grade["C1-ratio"]
    assert (claim.id, claim.about, claim.kind) == ("C1-ratio", "C1", "ratio")
    assert claim.paper.model_dump() == {"value": 64, "unit": "ratio", "source": "section 1", "level": "P0", "baseline": "C1.theory"}
    assert (grade.interval.method, grade.interval.level, grade.interval.unit, grade.min_seeds) == ("student_t", 0.90, "seed", 3)
    assert (grade.accept, grade.tolerance.date) == ((16, 128), "2026-01-01")
    assert errors_of(task.file) == []


def test_the_nearest_unit_and_source_of_a_number_hold_and_what_the_claim_says_wins(checkout):
    shown = load_task(checkout()).claims[2].paper
    assert (shown.value, shown.unit, shown.source, shown.level) == (50.5, "nats", "read by hand", "P1")
    shown = load_task(checkout(("tiny", "{baseline: C1.measured.k3, source: read by hand}", "C1.measured.k1"))).claims[2].paper
    assert (shown.value, shown.unit, shown.source, shown.level) == (7, "bits", "section 1", "P0")


@pytest.mark.parametrize("kind, method, seeds", [("event", "clopper_pearson", 5), ("count", "exact", 1), ("threshold", "student_t", 3),
                                                 ("ordering", "student_t", 3), ("equivalence", "student_t", 3), ("report", "student_t", 1)])
def test_interval_and_number_of_seeds_follow_from_the_kind(checkout, kind, method, seeds):
    grade = read_task(checkout(("tiny", "kind: ratio", f"kind: {kind}")))[0].grade["C1-ratio"]
    assert (grade.interval.method, grade.min_seeds) == (method, seeds)


def test_what_a_claim_says_of_its_interval_is_not_overruled(checkout):
    said = "    interval: {method: clopper_pearson, unit: prompt}\n    min_seeds: 2\n    tolerance: {level: P4, derivation: theory, date: 2025-02-03}\n"
    grade = load_task(checkout(("tiny", "    tolerance: {level: P4, derivation: theory}\n", said))).grade["C1-ratio"]
    assert (grade.interval.method, grade.interval.unit, grade.min_seeds, grade.tolerance.date) == ("clopper_pearson", "prompt", 2, "2025-02-03")
    nothing = load_task(checkout(("tiny", "accept: [16, 128]", "accept: [16, 128]\n    interval: null"), ("tiny", "kind: ratio", "kind: report")))
    assert nothing.grade["C1-ratio"].interval is None and nothing.grade["C2-level"].interval is not None


def test_a_type_is_filled_with_parameters_of_the_claim_the_task_and_its_own_in_that_order(checkout):
    task = load_task(checkout())
    assert task.claims[1].statement == "In fp16 the share is at most 25 % over 1,200 steps."
    grade = task.grade["C2-level"]
    assert (grade.contrast.arm, grade.accept, grade.window, grade.tolerance.derivation) == ("fp16", (0.0, 0.25), 1200, "for the block")
    defaults = ("tiny", "fixed: 2026-01-01", "fixed: 2026-01-01\nclaim_defaults: {why: for the task, window: 7}")
    grade = load_task(checkout(defaults)).grade["C2-level"]
    assert (grade.window, grade.tolerance.derivation) == (7, "for the task")
    grade = load_task(checkout(defaults, ("tiny", "at_most: 0.25", "at_most: 0.25, window: 9, why: for the claim"))).grade["C2-level"]
    assert (grade.window, grade.tolerance.derivation) == (9, "for the claim")


def test_beside_its_parameters_a_claim_may_say_a_few_things_otherwise(checkout):
    said = "at_most: 0.25, statement: As we say., min_seeds: 4, until: 50, tolerance: {level: P5}, about: C9"
    task = load_task(checkout(("tiny", "at_most: 0.25", said)))
    claim, grade = task.claims[1], task.grade["C2-level"]
    assert (claim.statement, claim.about, grade.min_seeds, grade.until) == ("As we say.", "C9", 4, 50)
    assert (grade.tolerance.level, grade.tolerance.derivation, grade.tolerance.date) == ("P5", "for the block", "2026-01-01")


def test_a_null_parameter_leaves_the_key_out_and_no_sentence_can_name_it(checkout):
    nullable = ("level", "{type: count, default: 1200}", "{type: count, default: null}")
    (error,) = errors_of(checkout(nullable))
    assert error.key == "claims.C2-level.window" and "a whole number from 1: the statement of level names it" in error.allowed
    task = load_task(checkout(nullable, ("tiny", "at_most: 0.25", "at_most: 0.25, statement: At most a quarter.")))
    assert task.grade["C2-level"].window is None


BROKEN = {
    "unknown type": (("tiny", "use: level", "use: levl"), "tiny.yaml", "claims.C2-level.use", "level, shown (did you mean level?)"),
    "type outside the library": (("tiny", "use: level", "use: ../_base/block"), "tiny.yaml", "claims.C2-level.use", "a type in tasks/_claims: level, shown"),
    "type that is no text": (("tiny", "use: level", "use: [level]"), "tiny.yaml", "claims.C2-level.use", "a type in tasks/_claims"),
    "unknown parameter": (("tiny", "at_most: 0.25", "at_most: 0.25, windw: 3"), "tiny.yaml", "claims.C2-level.windw", "one of the keys of level: arm, at_most, window"),
    "what a type settles": (("tiny", "at_most: 0.25", "at_most: 0.25, accept: [0, 1]"), "tiny.yaml", "claims.C2-level.accept", "one of the keys of level"),
    "missing parameter": (("tiny", ", at_most: 0.25", ""), "tiny.yaml", "claims.C2-level.at_most", "a number from 0 to 1 (level needs it)"),
    "parameter of another type": (("tiny", "at_most: 0.25", "at_most: '0.25'"), "tiny.yaml", "claims.C2-level.at_most", "a number from 0 to 1"),
    "share above 1": (("tiny", "at_most: 0.25", "at_most: 25"), "tiny.yaml", "claims.C2-level.at_most", "a number from 0 to 1"),
    "true as a number": (("tiny", "at_most: 0.25", "at_most: true"), "tiny.yaml", "claims.C2-level.at_most", "a number from 0 to 1"),
    "count with a fraction": (("tiny", "at_most: 0.25", "at_most: 0.25, window: 2.5"), "tiny.yaml", "claims.C2-level.window", "a whole number from 1"),
    "no such arm": (("tiny", "use: level, arm: fp16", "use: level, arm: fp61"), "tiny.yaml", "claims.C2-level.arm", "an arm or control: bf16, fp16"),
    "default of the wrong type": (("block", "why: for the block", "window: many"), "block.yaml", "claim_defaults.window", "a whole number from 1"),
    "default of no parameter": (("block", "why: for", "wy: for"), "block.yaml", "claim_defaults.wy", "a parameter of a type in tasks/_claims: arm, at_most, why, window"),
    "defaults that are no mapping": (("block", "{why: for the block}", "[why]"), "block.yaml", "claim_defaults", "a mapping of parameters to values"),
    "fixed in a block": (("block", "claim_defaults:", "fixed: 2026-01-01\nclaim_defaults:"), "block.yaml", "fixed", "only in a task file"),
    "unknown key": (("tiny", "accept: [16", "acept: [16"), "tiny.yaml", "claims.C1-ratio.acept", "accept"),
    "bad region": (("tiny", "accept: [16, 128]", "accept: [0, null]"), "tiny.yaml", "claims.C1-ratio.accept", "a region that some outcome can miss"),
    "bad kind": (("tiny", "kind: ratio", "kind: ratios"), "tiny.yaml", "claims.C1-ratio.kind", "ratio"),
    "bad estimand": (("tiny", "estimand: k3_nats_per_token", "estimand: k4"), "tiny.yaml", "claims.C1-ratio.estimand", "k3_nats_per_token"),
    "no statement": (("tiny", "    statement: k3 is smaller in fp16\n", ""), "tiny.yaml", "claims.C1-ratio.statement", "required"),
    "no region": (("tiny", "    accept: [16, 128]\n", ""), "tiny.yaml", "claims.C1-ratio.accept", "kind ratio is graded"),
    "no tolerance date": (("tiny", "fixed: 2026-01-01\n", ""), "tiny.yaml", "fixed", "as 2026-11-20 (or tolerance.date in C1-ratio, C2-level)"),
    "fixed that is no date": (("tiny", "fixed: 2026-01-01", "fixed: January"), "tiny.yaml", "fixed", "as 2026-11-20"),
    "no key of the ledger": (("tiny", "paper: C1.theory", "paper: C1.theories"), "tiny.yaml", "claims.C1-ratio.paper", "at this place: unit, source"),
    "a value that the ledger does not say": (("tiny", "paper: C1.theory", "paper: {baseline: C1.theory, value: 65}"), "tiny.yaml", "claims.C1-ratio.paper.value", "64 (baselines/paper.yaml)"),
    "no claim of the paper": (("tiny", "  C1-ratio:", "  mine-ratio:"), "tiny.yaml", "claims.mine-ratio.about", "C("),
    "an id that is no name": (("tiny", "  C1-ratio:", "  C1 ratio:"), "tiny.yaml", "claims.C1 ratio", "an id that matches"),
    "a claim that is no mapping": (("tiny", "  C2-level: {use: level, arm: fp16, at_most: 0.25}", "  C2-level: level"), "tiny.yaml", "claims.C2-level", "a mapping"),
    "grades apart": (("tiny", "fixed: 2026-01-01", "fixed: 2026-01-01\ngrade: {}"), "tiny.yaml", "grade", "each holds its grade"),
    "type with an unknown parameter": (("level", "contrast: {arm: $arm}", "contrast: {arm: $arms}"), "level.yaml", "claim.contrast.arm", "a parameter: arm, at_most"),
    "type with a parameter that nothing uses": (("level", "  arm: arm", "  arm: arm\n  other: arm"), "level.yaml", "parameters.other", "as $other"),
    "type of no type": (("level", "at_most: share", "at_most: percent"), "level.yaml", "parameters.at_most", "one of arm, number, share"),
    "type with a bad default": (("level", "default: 1200", "default: 0"), "level.yaml", "parameters.window.default", "a whole number from 1"),
    "type that claims with an unknown key": (("level", "  window: $window", "  windw: $window"), "level.yaml", "claim.windw", "window"),
    "type that uses another": (("shown", "claim: {", "claim: {use: level, "), "shown.yaml", "claim.use", "one of the keys about"),
    "type with a bad region": (("level", "accept: [0.0, $at_most]", "accept: [$at_most, 0.0]"), "tiny.yaml", "claims.C2-level.accept", "said by tasks/_claims/level.yaml"),
    "type with a bad kind": (("level", "kind: threshold", "kind: thresh"), "tiny.yaml", "claims.C2-level.kind", "said by tasks/_claims/level.yaml"),
    "no claims": (("tiny", TASK[TASK.index("claims:"):TASK.index("resources:")], "claims: {}\n"), "tiny.yaml", "claims", "at least 1 entries"),
    "type with a key too many": (("level", "parameters:", "if: x\nparameters:"), "level.yaml", "if", "parameters and claim"),
}  # fmt: skip


@pytest.mark.parametrize("edit, file, key, allowed", BROKEN.values(), ids=BROKEN)
def test_each_mistake_is_said_once_with_the_file_and_the_key_that_stand_there(checkout, edit, file, key, allowed):
    found = errors_of(checkout(edit))
    assert [(Path(error.file).name, error.key) for error in found] == [(file, key)], "\n".join(map(str, found))
    assert allowed in str(found[0]).split("allowed: ")[1]


def test_every_mistake_is_found_in_one_go(checkout):
    found = errors_of(checkout(("tiny", "use: level, arm: fp16", "use: level, arm: fp61"), ("tiny", "kind: ratio", "kind: ratios"), ("tiny", "use: shown", "use: show")))
    assert {error.key for error in found} == {"claims.C2-level.arm", "claims.C1-ratio.kind", "claims.C3-shown.use"}


def test_a_library_has_no_language(checkout):
    """What looks like an expression is text, and what is given as a parameter is never looked at again."""
    task = load_task(checkout(("tiny", "at_most: 0.25", 'at_most: 0.25, why: "$arm {{ 1 + 1 }} ${window}"')))
    assert task.grade["C2-level"].tolerance.derivation == "$arm {{ 1 + 1 }} ${window}"


def test_keys_of_errors_are_those_of_the_form_in_which_the_file_is_written():
    form = Form(["C1", "C2"], {"C2": ("level", frozenset({"use", "arm"}))})
    assert written_key("grade.C1.accept", form) == "claims.C1.accept" and written_key("grade.C1.accept", None) == "grade.C1.accept"
    assert [written_key(key, form) for key in ("claims.1.kind", "claims.1", "claims.7.kind", "claims", "grades.x")] == [
        "claims.C2.kind", "claims.C2", "claims.7.kind", "claims", "grades.x"]  # fmt: skip
    assert str(as_written(TaskError("f", "claims.0.kind", 1, "2", "h"), form)) == "f: claims.C1.kind: found 1, allowed: 2 (h)"
    assert as_written(TaskError("f", "grade.C2.accept", 1, "2"), form).hint == "said by tasks/_claims/level.yaml"
    assert as_written(TaskError("f", "grade.C2.arm", 1, "2"), form).hint is None and as_written(TaskError("f", "grade", 1, "2"), form).hint is None


def test_claims_and_grades_apart_are_read_too_and_come_to_the_same(checkout):
    path = checkout()
    task = load_task(path)
    apart = yaml.safe_load(path.read_text().replace("2026-01-01", "'2026-01-01'"))
    apart = {name: part for name, part in apart.items() if name not in ("claims", "fixed", "claim_defaults")}
    dump = json.loads(task.model_dump_json(exclude_none=True))
    path.write_text(json.dumps(apart | {"claims": dump["claims"], "grade": dump["grade"]}))
    assert same(load_task(path), task)
    assert errors_of(path) == []


def test_the_text_of_a_task_is_a_task_that_comes_to_the_same_and_to_the_same_text(checkout):
    task = load_task(checkout())
    again, errors, _ = read_task_text(task.text, task.file)
    assert errors == [] and again.text == task.text
    assert same(again, task)
    plain, problems = parse_yaml(task.text, "x")
    assert problems == [] and not {"extends", "fixed", "claim_defaults", "grade"} & plain.keys()
    assert all("use" not in claim and claim["interval"] and claim["min_seeds"] for claim in plain["claims"].values())


NASTY = ["1e-9", "yes", "2026-01-01", "~", "null", "a: b", "# x", "- x", "0x10", "1:30", "é", "'", '"', "5b04485", ".5", "a\nb", "$arm", "on", "%", "@x", "inf", "+1", " x "]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_comes_back_from_the_written_out_task_as_the_text_it_was(checkout, text):
    path = checkout(("tiny", "title: A task for tests", f"title: {json.dumps(text)}"))
    task = load_task(path)
    again, errors, _ = read_task_text(task.text, path)
    assert errors == [] and again.title == task.title == text


@pytest.fixture(scope="module")
def repository():
    patch = pytest.MonkeyPatch()
    patch.chdir(Path(__file__).resolve().parents[1])
    yield load_all()
    patch.undo()


def test_every_task_written_out_comes_to_the_same_task(repository):
    for task in repository.values():
        again, errors, _ = read_task_text(task.text, task.file)
        assert errors == [] and same(again, task) and again.text == task.text, task.id


def test_task_files_are_short(repository):
    lines = {task.id: len(task.file.read_text().splitlines()) for task in repository.values()}
    assert sorted(lines.values())[len(lines) // 2] <= 40
    long = {name: number for name, number in lines.items() if number > 80 and f"# {number} lines" not in repository[name].file.read_text()}
    assert long == {}, "over 80 lines, and no comment `# N lines: why`"


def test_every_type_of_the_library_is_used_and_says_what_it_is_for(repository):
    folder = find_repo() / "tasks" / "_claims"
    used = {claim["use"] for task in repository.values() for claim in _written_claims(task) if "use" in claim}
    assert set(names(folder)) == used
    assert [name for name in used if not (folder / f"{name}.yaml").read_text().startswith("# ")] == []


def _written_claims(task: Task) -> list[dict]:
    claims = parse_yaml(task.file.read_text(), task.file)[0]["claims"]
    return list(claims.values()) if isinstance(claims, dict) else claims


def test_no_parameter_has_the_name_of_something_else(repository):
    """A parameter called `estimand` would read as the key of a claim in full."""
    folder = find_repo() / "tasks" / "_claims"
    taken = {*Claim.model_fields, *Grade.model_fields, *SECTIONS, "use"} - {"window", "until"}
    for name in names(folder):
        assert not taken & claim_type(folder / f"{name}.yaml")[0].parameters.keys(), name


def test_editors_complete_the_parameters_of_each_type(repository):
    folder = find_repo() / "tasks"
    shapes = json.loads(json_schema(folder))["properties"]["claims"]["anyOf"][0]["additionalProperties"]["anyOf"]
    shown = {shape["properties"]["use"]["const"]: shape["properties"].keys() for shape in shapes if "use" in shape["properties"]}
    assert set(shown) == set(names(folder / "_claims"))
    assert {"arm", "at_least", "window", "why", "statement", "paper"} <= shown["accuracy-at-least"] and "accept" not in shown["accuracy-at-least"]
    assert {"estimand", "accept", "paper", "statement"} <= shapes[-1]["properties"].keys()


def test_types_of_parameters_fit_what_they_say():
    fitting = {"arm": "bf16", "number": -0.5, "share": 0.965, "count": 1700, "text": "x"}
    assert {name: TYPES[name].fits(value) for name, value in fitting.items()} == dict.fromkeys(TYPES, True)
    assert {name: TYPES[name].words(value) for name, value in fitting.items()} == {
        "arm": "bf16", "number": "-0.5", "share": "96.5 %", "count": "1,700", "text": "x"}  # fmt: skip
    assert not any(kind.fits(None) for kind in TYPES.values())
