"""Which records count: all planned launches and nothing else, each of them once, with the task's settings and problems."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import COMPARE, OFFLINE, RL, block, claim, event_grade, offline_run, only, prompt_table, run_of, series_run, task_of

from suite.grade.sameness import same_runs
from suite.grade.verdict import Needed, grade_task

NOISE = {"bf16": 2.0**-5, "fp16": 2.0**-8}
RATIO = block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]", "min_seeds: 3")


@pytest.fixture
def five(tmp_path):
    """A task of five launches whose claim passes with three already, as far as min_seeds goes."""
    return task_of(tmp_path, OFFLINE, claim("ratio", RATIO), seeds=range(5))


def launches(task, noise=NOISE, seeds=range(5)):
    return [offline_run(task, arm, seed, noise[arm]) for arm in task.arms for seed in seeds]


def changed(run, path: str, value):
    """The run with another value at a dotted path of its settings, its run key left alone."""
    run = copy.deepcopy(run)
    *above, name = path.split(".")
    place = run.record["cell"]["settings"]
    for part in above:
        place = place[part]
    place[name] = value
    return run


# --- planned, and there ---------------------------------------------------------------------------------------------


def test_all_planned_launches_pass_and_fail(five):
    assert grade_task(five, launches(five))["verdict"] == "PASS"
    assert grade_task(five, launches(five, NOISE | {"fp16": 2.0**-5}))["verdict"] == "FAIL"


@pytest.mark.parametrize("status", ["killed", "running", "invalidated", "planned", None])
@pytest.mark.parametrize(("fp16", "otherwise"), [(2.0**-8, "PASS"), (2.0**-5, "FAIL")])
def test_a_launch_that_did_not_finish_caps_the_verdict_by_name_however_it_ended(five, status, fp16, otherwise):
    runs = launches(five, NOISE | {"fp16": fp16})
    gone = [offline_run(five, "fp16", seed, fp16, status=status) for seed in (3, 4)] if status else []
    row = only(grade_task(five, runs[:8] + gone))
    word = status or "not run"
    assert row["verdict"] == "INCONCLUSIVE"
    assert row["reason"].startswith(f"missing_launches: fp16.s3 ({word}), fp16.s4 ({word}); otherwise {otherwise}")


@pytest.mark.parametrize("num", [2, 3, 4])
def test_looks_before_the_last_planned_launch_decide_nothing(five, num):
    for fp16 in (2.0**-8, 2.0**-5):
        assert grade_task(five, launches(five, NOISE | {"fp16": fp16}, range(num)))["verdict"] == "INCONCLUSIVE"


def test_an_attempt_that_was_begun_and_stopped_counts_as_missing_beside_a_finished_one(five):
    stopped = offline_run(five, "fp16", 2, 0.1, status="killed", started_utc="2026-01-02T00:00:00Z")
    assert "fp16.s2 (killed)" in only(grade_task(five, [*launches(five), stopped]))["reason"]


def test_a_control_needs_its_planned_launches_too(tmp_path):
    control = ("controls:\n  - {name: control-aa, kind: aa, like: bf16, seeds: [100, 101, 102], estimand: k3_nats_per_token,\n"
               "     contrast: {ratio: [bf16, control-aa]}, accept: [0.6666, 1.5]}\n")  # fmt: skip
    task = task_of(tmp_path, OFFLINE, claim("ratio", RATIO) + control)
    runs = launches(task, seeds=range(3)) + [offline_run(task, "control-aa", seed, NOISE["bf16"]) for seed in (100, 101)]
    verdict = grade_task(task, runs)
    assert verdict["controls"][0]["outcome"] == "inconclusive" and "control-aa.s102 (not run)" in verdict["reason"]


def test_cells_that_the_task_does_not_plan_are_listed_and_not_counted(five):
    more = [offline_run(five, arm, seed, 0.3) for arm in five.arms for seed in range(5, 30)]
    verdict = grade_task(five, [*launches(five), *more])
    assert only(verdict)["num_seeds"] == 5 and verdict["verdict"] == "PASS"
    assert sum("not_counted" in row for row in verdict["runs"]) == 50


# --- settings, problems, samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "value"), [("model.id", "other"), ("rollout.max_tokens", 1), ("rollout.temperature", 0.5), ("data.sha256", "b" * 64)])
def test_runs_of_other_settings_under_the_same_task_and_version_are_invalid(five, path, value):
    verdict = grade_task(five, [changed(run, path, value) for run in launches(five)])
    assert verdict["verdict"] == "INVALID" and f"bf16.s0: {path} is {value!r}, the task says" in verdict["reason"]


def test_a_setting_that_an_older_record_does_not_know_is_as_good_as_null(five):
    runs = launches(five)
    for run in runs:
        run.record["cell"]["settings"] = {k: dict(v) if isinstance(v, dict) else v for k, v in run.record["cell"]["settings"].items()}
        del run.record["cell"]["settings"]["train"]["lora"]
    assert grade_task(five, runs)["verdict"] == "PASS"


def test_a_run_that_asked_for_no_precision_is_held_to_that_of_its_arm(five):
    runs = launches(five)
    runs[0] = offline_run(five, "bf16", 0, NOISE["bf16"], precision_asked={}, precision_executed={"rollout_weights": "fp32"})
    verdict = grade_task(five, runs)
    assert verdict["verdict"] == "INVALID" and "rollout_weights: ran in fp32" in verdict["reason"] + only(verdict)["reason"]


@pytest.mark.parametrize(("num_prompts", "said"), [(2, "2 problems, 6 planned"), (7, "7 problems, 6 planned")])
def test_fewer_or_more_problems_than_planned_are_invalid(five, num_prompts, said):
    runs = [run_of(five, run.arm, run.seed, summary=prompt_table(NOISE[run.arm], run.seed, num_prompts)) for run in launches(five)]
    assert said in grade_task(five, runs)["reason"]


def test_fewer_samples_than_planned_are_invalid(five):
    runs = launches(five)
    runs[3].summary["num_rollouts"][4] = 1
    assert "bf16.s3: a problem has 1 rollouts, 2 planned" in grade_task(five, runs)["reason"]


def test_iterations_of_fewer_rollouts_than_planned_are_invalid(tmp_path):
    task = task_of(tmp_path, RL, claim("threshold", block("reward_mean", "arm: fp16", "[0.95, 1.0]")), steps=4)
    runs = [series_run(task, "fp16", s, [0.97, 0.98, 0.97, 0.96 + s / 100], num_rollouts=[512.0] * 3 + [8.0 if s else 512.0]) for s in range(3)]
    assert "8.0 rollouts at iteration 3, 512 planned" in grade_task(task, runs)["reason"]


def test_arms_that_saw_other_problems_are_invalid(five):
    runs = launches(five)
    for run in runs[5:]:
        run.summary["prompt_id"] = np.array([f"q{i}" for i in range(6)], dtype=object)
    verdict = grade_task(five, runs)
    assert verdict["verdict"] == "INVALID" and "saw other problems: 0 in common" in verdict["reason"]


# --- one run under two names ----------------------------------------------------------------------------------------


def drop_problem(table: dict, index: int) -> dict:
    return {name: np.delete(column, index) for name, column in table.items()}


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t | {"prompt_id": np.array([f"z{i}" for i in range(6)])},
                                    lambda t: drop_problem(t, 2)], ids=["whole", "renamed", "one problem left out"])  # fmt: skip
def test_a_copy_of_a_launch_under_another_seed_is_found(five, change):
    runs = launches(five)
    for arm, place in (("bf16", 4), ("fp16", 9)):
        runs[place] = run_of(five, arm, 4, summary=change(dict(runs[place - 1].summary)))
    verdict = grade_task(five, runs)
    assert verdict["verdict"] == "INVALID" and "bf16 seed 3 and bf16 seed 4 are one and the same run" in only(verdict)["reason"]


def test_a_copy_of_an_arm_under_another_arm_and_of_a_control_is_found(tmp_path):
    control = ("controls:\n  - {name: control-aa, kind: aa, like: bf16, seeds: [100], estimand: k3_nats_per_token,\n"
               "     contrast: {ratio: [bf16, control-aa]}, accept: [0.6666, 1.5]}\n")  # fmt: skip
    task = task_of(tmp_path, OFFLINE, claim("ratio", RATIO) + control)
    runs = launches(task, seeds=range(3)) + [offline_run(task, "control-aa", 100, NOISE["bf16"])]
    assert grade_task(task, runs)["verdict"] == "PASS"
    as_arm = [*runs[:3], *(run_of(task, "fp16", run.seed, summary=run.summary) for run in runs[:3]), runs[6]]
    assert "bf16 seed 0 and fp16 seed 0 are one" in grade_task(task, as_arm)["reason"]
    as_control = [*runs[:6], run_of(task, "control-aa", 100, summary=runs[1].summary)]
    assert "bf16 seed 1 and control-aa seed 100 are one" in only(grade_task(task, as_control))["reason"]


def rl_rows(seed, num=8):
    rng = np.random.default_rng(seed)
    names = ("entropy_nats", "k3_nats_per_token", "grad_norm", "reward_mean")
    return [{"step": i, "num_response_tokens": 4000 + i, **{name: float(rng.uniform(0.4, 0.6)) for name in names}} for i in range(num)]


@pytest.mark.parametrize(("shared", "verdict"), [(8, "INVALID"), (3, "INVALID"), (1, "PASS")])
def test_series_that_agree_to_the_last_bit_are_one_run_but_a_first_iteration_may_be_shared(tmp_path, shared, verdict):
    """Arms of one seed sample the same rollouts until the first step parts them."""
    grade = block("reward_mean", "difference: [bf16, fp16]", "[-1.0, 0.9]")
    task = task_of(tmp_path, RL, claim("threshold", grade), steps=8)
    rows = {(arm, s): rl_rows([s, i]) for i, arm in enumerate(task.arms) for s in range(3)}
    rows["fp16", 1] = rows["bf16", 1][:shared] + rows["fp16", 1][shared:]
    runs = [run_of(task, arm, s, metrics=found) for (arm, s), found in rows.items()]
    assert grade_task(task, runs)["verdict"] == verdict


def test_attempts_of_one_cell_and_runs_without_chance_may_agree(five):
    again = [run_of(five, run.arm, run.seed, summary=run.summary, started_utc="2026-01-02T00:00:00Z") for run in launches(five)]
    assert grade_task(five, launches(five) + again)["verdict"] == "PASS"


def scored(arm, seed, sums, replay=None):
    settings = {"rollout": {"temperature": 1.0}, "train": {"routing_replay": replay}}
    record = {"task": {"id": "t"}, "cell": {"settings": settings}}
    table = {name: np.array(sums) for name in ("sum_k1", "sum_k2", "sum_k3", "sum_abs_prob_diff")}
    return SimpleNamespace(record=record, status="success", arm=arm, seed=seed, point={}, metrics=[], summary=table)


@pytest.mark.parametrize(("replay", "seed", "sums", "is_one"), [
    (None, 0, [1.0, 2.0, 7.0, 8.0], True),  # half of the problems to the last bit
    ("rollout", 0, [1.0, 2.0, 7.0, 8.0], False),  # where no expert differs, following the sampler's changes nothing
    ("rollout", 1, [1.0, 2.0, 7.0, 8.0], True),  # another seed has other rollouts
    ("rollout", 0, [1.0, 2.0, 3.0, 4.0], True),  # a replay that is none
])  # fmt: skip
def test_a_replay_arm_may_share_problems_with_its_partner_but_not_all_of_them(replay, seed, sums, is_one):
    found = same_runs([scored("bf16", 0, [1.0, 2.0, 3.0, 4.0]), scored("bf16-b", seed, sums, replay)])
    assert bool(found) == is_one


# --- attempts -------------------------------------------------------------------------------------------------------

FALLS, STAYS = np.repeat([0.8, 0.2], 50), np.full(100, 0.8)


@pytest.mark.parametrize(("falls", "collapses", "stable"), [(1, 0.0, 1.0), (2, 0.0, 1.0), (3, 1.0, 1.0), (0, 0.0, 0.0)])
def test_a_launch_collapses_if_most_of_its_attempts_do_and_is_stable_if_none_does(tmp_path, falls, collapses, stable):
    for expect, share in (("collapses", collapses), ("stable", stable)):
        task = task_of(tmp_path, RL, claim("event", event_grade("bf16", expect)), seeds=range(5), name=expect)
        runs = [series_run(task, "bf16", s, FALLS if i < falls else STAYS, started_utc=str(i)) for s in range(5) for i in range(5)]
        assert only(grade_task(task, runs))["estimate"] == share


def test_an_attempt_without_a_value_leaves_its_launch_without_one(five):
    overflow = dict(prompt_table(NOISE["fp16"], 9))
    overflow["sum_k3"] = np.full(6, math.inf)
    again = run_of(five, "fp16", 3, summary=overflow, started_utc="2026-01-02T00:00:00Z")
    row = only(grade_task(five, [*launches(five), again]))
    assert row["verdict"] == "INCONCLUSIVE" and row["reason"] == "no_interval: fp16 seed 3: k3_nats_per_token is inf"
    assert row["per_seed"][3]["values"][1] is None, "JSON has no infinity"


# --- across tasks ---------------------------------------------------------------------------------------------------


def two_tasks(tmp_path, rows_of):
    """A comparison of two tasks with a control each, whose metrics are `rows_of(task name, arm, seed)`."""
    report = claim("report", "estimand: reward_mean, contrast: {arm: bf16}", name="C1-report")
    lr_0 = ("controls:\n  - {name: control-lr-0, kind: null_drift, like: bf16, set: {train: {optimizer: {lr: 0.0}}}, seeds: [7], window: 4,\n"
            "     estimand: reward_mean, contrast: {arm: control-lr-0}, accept: [-0.7, 0.7]}\n")  # fmt: skip
    needed = {}
    for name in ("one", "two"):
        task = task_of(tmp_path, RL, report + lr_0, name=name, steps=8)
        cells = [("bf16", s) for s in range(3)] + [("fp16", s) for s in range(3)] + [("control-lr-0", 7)]
        needed[name] = Needed(task, [run_of(task, arm, s, metrics=rows_of(name, arm, s)) for arm, s in cells])
    grade = block("reward_mean", "difference: [one-bf16, two-bf16]", "[-0.5, 0.5]")
    return grade_task(task_of(tmp_path, COMPARE, claim("threshold", grade), name="both", needs=["one", "two"]), [], needed)


def number_of(arm, seed):
    return 10 * ["bf16", "fp16", "control-lr-0"].index(arm) + seed


def test_two_algorithms_may_take_the_same_steps_but_a_control_that_is_the_same_run_says_so(tmp_path):
    verdict = two_tasks(tmp_path, lambda name, arm, seed: rl_rows(number_of(arm, seed)))
    assert only(verdict)["verdict"] != "INVALID"
    assert [("the same run as one-control-lr-0" in row["reason"]) for row in verdict["controls"]] == [False, True]


def test_the_same_run_under_another_seed_of_another_task_is_found(tmp_path):
    verdict = two_tasks(tmp_path, lambda name, arm, seed: rl_rows(number_of(arm, (seed + (name == "two")) % 3 if arm != "control-lr-0" else seed)))
    assert only(verdict)["verdict"] == "INVALID" and "one and the same run" in only(verdict)["reason"]
