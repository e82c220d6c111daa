"""Tasks of protocol compare: graded from the runs of the tasks they need, with the controls and versions of those."""

import pytest
from fakes import COMPARE, RL, block, claim, only, series_run, task_of, time_grade

from suite.grade.verdict import Needed, grade_task
from suite.spec.validate import check

FLOOR = (
    "controls:\n  - {name: control-floor, kind: floor, like: bf16, set: {precision: {rollout: fp32, train: fp32}, schedule: {steps: 4}}, "
    "seeds: [0], estimand: k3_nats_per_token, contrast: {arm: control-floor}, accept: [0.0, 1.0e-9]}\n"
)
ENDS = block("reward_mean", "difference: [one-fp16, two-bf16]", "[0.05, null]", "reducer: last_k_mean, window: 4, min_seeds: 3")


def needed_task(tmp_path, name, floor=1e-13, sha="a" * 64, **levels):
    """A task with a floor control and five launches of each arm, whose accuracy stays at a level each."""
    report = claim("report", "estimand: reward_mean, contrast: {arm: bf16}", name="C1-report")
    task = task_of(tmp_path, RL, report + FLOOR, name=name, sha=sha, seeds=range(5))
    runs = [series_run(task, arm, s, [level + 0.002 * s * level] * 100) for arm, level in levels.items() for s in range(5)]
    runs.append(series_run(task, "control-floor", 0, [floor] * 4, "k3_nats_per_token"))
    return Needed(task, runs)


def verdict_of(tmp_path, grade=ENDS, kind="threshold", two=None, **one):
    needed = {
        "one": needed_task(tmp_path, "one", **({"fp16": 0.9, "bf16": 0.8} | one)),
        "two": needed_task(tmp_path, "two", **({"fp16": 0.9, "bf16": 0.8} | (two or {}))),
    }
    task = task_of(tmp_path, COMPARE, claim(kind, grade), name="both", needs=list(needed))
    return grade_task(task, [], needed)


def test_arms_of_two_tasks_are_compared_and_the_controls_of_both_are_shown(tmp_path):
    verdict = verdict_of(tmp_path)
    assert verdict["verdict"] == "PASS" and only(verdict)["estimate"] == pytest.approx(0.1, abs=1e-3)
    assert [(c["name"], c["outcome"]) for c in verdict["controls"]] == [
        ("one-control-floor", "holds"), ("two-control-floor", "holds"),
    ]  # fmt: skip
    assert len(verdict["runs"]) == 22


def test_a_broken_control_of_a_needed_task_makes_the_comparison_invalid(tmp_path):
    verdict = verdict_of(tmp_path, two={"floor": 1e-3})
    assert verdict["verdict"] == "INVALID" and "two-control-floor" in only(verdict)["reason"]


def test_a_claim_rests_only_on_the_needed_tasks_whose_arms_it_names(tmp_path):
    needed = {name: needed_task(tmp_path, name, floor, sha, fp16=0.9, bf16=0.8)
              for name, floor, sha in (("one", 1e-13, "a" * 64), ("two", 1e-13, "a" * 64), ("three", 1e-3, "unknown"))}  # fmt: skip
    task = task_of(tmp_path, COMPARE, claim("threshold", ENDS), name="both", needs=list(needed))
    verdict = grade_task(task, [], needed)
    assert only(verdict)["verdict"] == "PASS" and verdict["verdict"] == "INVALID", "the task as a whole has a broken control"


def test_an_unpinned_input_of_a_needed_task_caps_the_comparison(tmp_path):
    row = only(verdict_of(tmp_path, two={"sha": "unknown"}))
    assert row["verdict"] == "INCONCLUSIVE" and "unpinned_input" in row["reason"]


def test_runs_of_another_version_of_a_needed_task_are_left_out(tmp_path):
    needed = {name: needed_task(tmp_path, name, fp16=0.9, bf16=0.8) for name in ("one", "two")}
    for run in needed["two"].runs:
        run.record["task"]["version"] = 0
    task = task_of(tmp_path, COMPARE, claim("threshold", ENDS), name="both", needs=list(needed))
    verdict = grade_task(task, [], needed)
    assert verdict["verdict"] == "NOT_RUN" and "two-bf16" in only(verdict)["reason"]
    assert only(verdict)["resolve"] == "suite run two"


@pytest.mark.parametrize(("levels", "word"), [((0.90, 0.91, 0.92), "PASS"), ((0.90, 0.92, 0.94), "FAIL")])
def test_an_equivalence_of_several_arms_is_about_every_pair(tmp_path, levels, word):
    """Neighbours are 0.02 apart in the second case, the ends 0.04: outside a margin of 0.03."""
    first, second, third = levels
    grade = block("reward_mean", "order: [one-fp16, one-bf16, two-fp16]", "[-0.03, 0.03]", "reducer: last_k_mean, window: 4, min_seeds: 3")
    row = only(verdict_of(tmp_path, grade, "equivalence", two={"fp16": third}, fp16=first, bf16=second))
    assert row["verdict"] == word and len(row["pairs"]) == 3


def test_an_engine_of_a_needed_task_that_ran_in_another_dtype_makes_it_invalid(tmp_path):
    needed = {name: needed_task(tmp_path, name, fp16=0.9, bf16=0.8) for name in ("one", "two")}
    wrong = next(run for run in needed["two"].runs if run.arm == "bf16")
    wrong.record["precision_executed"]["compute"] = "fp32"
    task = task_of(tmp_path, COMPARE, claim("threshold", ENDS), name="both", needs=list(needed))
    verdict = grade_task(task, [], needed)
    assert verdict["verdict"] == "INVALID" and "compute: ran in fp32" in only(verdict)["reason"]


def test_an_order_of_collapses_that_nobody_saw_is_censored(tmp_path):
    grade = time_grade("order: [one-bf16, two-bf16], margin: 0.05", "")
    row = only(verdict_of(tmp_path, grade, "ordering"))
    assert row["verdict"] == "INCONCLUSIVE" and row["reason"].startswith("censored: ")
    assert row["resolve"] == "a longer horizon"


@pytest.mark.parametrize("wrong", ["one-fp32", "three-fp16", "fp16"])
def test_a_name_that_no_needed_task_has_is_refused_before_anything_is_graded(checkout_of_two, wrong):
    task = checkout_of_two(ENDS.replace("one-fp16", wrong))
    (error,) = check(task)[0]
    assert error.key == "grade.C1-x.contrast.difference" and error.found == wrong
    assert error.allowed == "an arm or control: one-bf16, one-fp16, two-bf16, two-fp16"


@pytest.mark.parametrize(("change", "key", "said"), [
    ("until: 300", "grade.C1-x.until", "at most schedule.steps, 100"),
    ("reducer: epoch_mean", "grade.C1-x.window", "the iterations of one full pass"),
    ("reducer: last_k_mean, window: 200", "grade.C1-x.window", "a window that fits into 100 steps"),
])  # fmt: skip
def test_windows_and_horizons_must_fit_the_needed_runs(checkout_of_two, change, key, said):
    plain = block("reward_mean", "difference: [one-fp16, two-bf16]", "[0.05, null]", change)
    (error,) = check(checkout_of_two(plain))[0]
    assert error.key == key and error.allowed == said


def test_a_comparison_of_several_arms_may_be_an_equivalence(checkout_of_two):
    pairs = block("reward_mean", "order: [one-fp16, two-fp16, one-bf16]", "[-0.03, 0.03]", "reducer: mean, min_seeds: 3, floor: {at_least: 0.5, derivation: test}")
    assert check(checkout_of_two(pairs, "equivalence"))[0] == []


@pytest.fixture
def checkout_of_two(tmp_path):
    """A folder of tasks with `one` and `two`, and a function that puts a comparison beside them."""
    folder = tmp_path / "tasks" / "desk"
    folder.mkdir(parents=True)
    (tmp_path / "tasks" / "_base").mkdir()
    (tmp_path / "pyproject.toml").write_text('name = "fp16-mismatch-suite"\n')
    report = claim("report", "estimand: reward_mean, contrast: {arm: bf16}", name="C1-report")
    for name in ("one", "two"):
        task_of(folder, RL, report, name=name)
    return lambda grade, kind="threshold": task_of(folder, COMPARE, claim(kind, grade), name="both", needs=["one", "two"])
