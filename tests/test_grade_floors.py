"""What keeps a PASS from being empty: a level that shows that something was learned, steps that were taken, controls that
can fail, falls that are seen wherever they are, and an error rate that holds for the task.
"""

import math

import numpy as np
import pytest
from fakes import RL, block, claim, event_grade, only, run_of, series_run, task_of

from suite.grade.contrasts import Levels, share_of_trials, shares_of
from suite.grade.judge import num_pairs
from suite.grade.launches import Launch
from suite.grade.verdict import grade_task
from suite.measure import stats
from suite.spec.kinds import KINDS
from suite.spec.reading import load_all
from suite.spec.validate_controls import guard_errors, margin_of, unguarded

FLOOR = "floor: {at_least: 0.7, derivation: test}"
NOISE = np.array([0.01, -0.01, 0.0, 0.005, -0.005])


# --- a run that learned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "verdict"), [(0.8, "PASS"), (0.02, "INCONCLUSIVE"), (0.0, "INCONCLUSIVE")])
def test_a_run_that_never_learned_is_not_stable(tmp_path, level, verdict):
    task = task_of(tmp_path, RL, claim("event", f"{event_grade('fp16', 'stable')}, {FLOOR}"), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "fp16", s, [level]) for s in range(5)]))
    assert row["verdict"] == verdict
    assert verdict == "PASS" or row["reason"].startswith(f"below_floor: fp16 seed 0 ends at {level:g}, a floor of 0.7")


@pytest.mark.parametrize(("level", "verdict"), [(0.8, "PASS"), (0.02, "INCONCLUSIVE")])
def test_two_arms_that_learned_nothing_are_not_equivalent(tmp_path, level, verdict):
    grade = block("reward_mean", "difference: [bf16, fp16]", "[-0.03, 0.03]", f"reducer: last_k_mean, window: 4, {FLOOR}")
    task = task_of(tmp_path, RL, claim("equivalence", grade), seeds=range(5))
    runs = [series_run(task, arm, s, [level + NOISE[s] * (arm == "bf16")]) for arm in task.arms for s in range(5)]
    assert only(grade_task(task, runs))["verdict"] == verdict


def test_runs_that_diverged_before_their_end_are_not_equivalent(tmp_path):
    grade = block("reward_mean", "difference: [bf16, fp16]", "[-0.03, 0.03]", "reducer: last_k_mean, window: 4")
    task = task_of(tmp_path, RL, claim("equivalence", grade), seeds=range(5))
    runs = [series_run(task, arm, s, [0.9 + NOISE[s] * (arm == "bf16")] * 12, cut=True, status="diverged") for arm in task.arms for s in range(5)]
    row = only(grade_task(task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and "bf16 seed 0: diverged at iteration 12" in row["reason"]


@pytest.mark.parametrize(("every", "verdict"), [(40, "PASS"), (2, "INCONCLUSIVE")])
def test_skipped_steps_bar_a_pass_of_any_claim_about_a_trained_arm(tmp_path, every, verdict):
    """A norm that is unknown in every second iteration is smaller in fp16 for all one knows."""
    task = task_of(tmp_path, RL, claim("ratio", block("grad_norm", "ratio: [fp16, bf16]", "[null, 1.0]")))
    runs = [series_run(task, "bf16", s, [1.0 + NOISE[s]] * 100, "grad_norm") for s in range(3)]
    skipped = [float(i % every == 0) for i in range(100)]
    runs += [series_run(task, "fp16", s, [math.nan if skip else 0.5 for skip in skipped], "grad_norm", step_skipped=skipped) for s in range(3)]
    row = only(grade_task(task, runs))
    assert row["verdict"] == verdict and (verdict == "PASS" or row["reason"].startswith("skipped_steps: fp16 seed"))


# --- falls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.6, 0.6] + [0.02] * 30, [0.8] * 6 + [0.2] * 26, [0.6] + [0.0] * 31])
def test_a_fall_within_the_first_window_is_seen(values):
    assert stats.collapse_time(range(32), values, drop=0.1, window=12, hold=8).step is not None


def test_a_series_that_stands_still_shows_a_fall_as_rarely_as_before():
    """128 rollouts at 0.85, a drop of 0.04 and a window of 12: under 1 %, first values included."""
    rng = np.random.default_rng(0)
    noisy = rng.binomial(128, 0.85, size=(1500, 32)) / 128
    share = np.mean([not stats.collapse_time(range(32), row, 0.04, 12, 8).censored if stats.collapse_time(range(32), row, 0.04, 12, 8) else 0 for row in noisy])
    assert share < 0.01


def test_a_fall_that_is_not_yet_held_is_called_that(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable", hold=10)), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "fp16", s, [0.8] * 95 + [0.2] * 5) for s in range(5)]))
    assert row["reason"] == "no_interval: fp16 seed 0: it ends in a fall that is not yet held for 10 iterations"


# --- counts ---------------------------------------------------------------------------------------------------------


def test_kept_problems_have_the_exact_interval_of_all_problems():
    found = [Launch(1, 44.0, 512), Launch(2, 48.0, 512)]
    finding = share_of_trials("kept", found, "num_kept", Levels(0.90, 0.90))
    by_hand = stats.clopper_pearson(92, 1024)
    assert finding.estimate == 46 and finding.interval == pytest.approx((512 * by_hand.lo, 512 * by_hand.hi))
    share = share_of_trials("share", [Launch(1, 0.25, 48)], "overlap_share", Levels(0.90, 0.90))
    assert share.interval == pytest.approx(stats.clopper_pearson(12, 48)[1:3])


# --- error rates ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    return load_all()


def test_the_claims_of_no_task_use_more_than_its_five_percent(tasks):
    """Each claim is charged what its interval lets through at the end of its region; a sequence costs its first step."""
    for task in tasks.values():
        shares = shares_of(task)
        noisy = [claim.id for claim in task.claims if claim.id in shares and task.grade[claim.id].interval.method != "exact"]
        assert sum(shares[name] for name in noisy) <= 1.0 + 1e-4, task.id


def test_a_second_share_of_seeds_can_fail_only_after_the_first_has(tasks):
    task = tasks["desk-sanity-grpo"]
    before, after = shares_of(task), shares_of(task, ("C8-bf16-collapses",))
    assert before["C8-bf16-collapses"] == after["C8-bf16-collapses"] == after["C6-fp16-stable"] > 0.6 > before["C6-fp16-stable"]
    for share, can_fail in ((before["C6-fp16-stable"], False), (after["C6-fp16-stable"], True)):
        assert (stats.clopper_pearson(5, 5, Levels.of(0.90, share).strict).lo > 0.5) == can_fail


def test_pairs_inside_a_claim_share_its_part(tasks):
    grade = tasks["sanity-order"].grade["C14-fp16-together"]
    assert num_pairs(grade) == 10
    assert Levels.of(0.90, 0.5, 10).strict == pytest.approx(1 - 0.10 * 0.5 / 10)


# --- controls -------------------------------------------------------------------------------------------------------

RATIO = claim("ratio", block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]", "reducer: geo_mean"))
AA = ("controls:\n  - {name: control-aa, kind: aa, like: bf16, seeds: [100], estimand: prob_diff_mean, accept: [0.6666, 1.5],\n"
      "     contrast: {ratio: [bf16, control-aa]}, also: [{estimand: k3_nats_per_token, reducer: geo_mean, accept: [0.5, 2.0],\n"
      "     contrast: {ratio: [bf16, control-aa]}}]}\n")  # fmt: skip


def guarded_runs(task, control_k3):
    rng = np.random.default_rng(3)
    level = {"bf16": 6.4e-4, "fp16": 1e-5, "control-aa": control_k3}
    return [
        series_run(task, arm, s, level[arm] * np.exp(0.1 * rng.standard_normal(100)), "k3_nats_per_token", prob_diff_mean=1e-3 * np.exp(0.1 * rng.standard_normal(100)))
        for arm, seeds in (("bf16", range(3)), ("fp16", range(3)), ("control-aa", [100])) for s in seeds
    ]  # fmt: skip


@pytest.mark.parametrize(("k3", "outcome", "verdict"), [(6.4e-4, "holds", "PASS"), (6.4e-3, "broken", "INVALID"), (math.inf, "broken", "INVALID")])
def test_further_checks_of_a_control_guard_further_claims_and_infinity_breaks_them(tmp_path, k3, outcome, verdict):
    task = task_of(tmp_path, RL, RATIO + AA)
    found = grade_task(task, guarded_runs(task, k3))
    assert [(row["name"], row["outcome"]) for row in found["controls"]] == [("control-aa", "holds"), ("control-aa-k3_nats_per_token", outcome)]
    assert found["verdict"] == verdict


def test_one_infinite_iteration_bars_a_pass_with_its_place(tmp_path):
    task = task_of(tmp_path, RL, RATIO)
    runs = [run for run in guarded_runs(task_of(tmp_path, RL, RATIO + AA, name="with"), 6.4e-4) if not run.is_control]
    runs = [run_of(task, run.arm, run.seed, metrics=run.metrics) for run in runs]
    runs[4].metrics[17]["k3_nats_per_token"] = math.inf
    row = only(grade_task(task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and "fp16 seed 1: k3_nats_per_token is inf at iteration 17" in row["reason"]


def test_columns_that_are_equal_are_called_that(tmp_path):
    task = task_of(tmp_path, RL, RATIO)
    runs = [series_run(task, arm, s, [level], "k3_nats_per_token") for arm, level in (("bf16", 1e-4), ("fp16", 0.0)) for s in range(3)]
    runs = [run_of(task, run.arm, run.seed, metrics=run.metrics) for run in runs]
    mean = task.model_copy(update={"grade": {"C1-x": task.grade["C1-x"].model_copy(update={"reducer": "mean"})}})
    assert "fp16 seed 0: k3_nats_per_token is exactly 0: log-probs of sampler and trainer are equal" in only(grade_task(mean, runs))["reason"]


def test_every_graded_claim_of_the_checkout_has_a_control_and_a_floor_where_it_needs_one(tasks):
    for task in tasks.values():
        assert guard_errors(task) == [] and unguarded(task, [tasks[name] for name in task.needs]) == [], task.id


@pytest.mark.parametrize(("rest", "key", "found"), [
    (RATIO + AA.replace("[0.5, 2.0]", "[0.3, 3.0]"), "controls.control-aa-k3_nats_per_token.accept", [0.3, 3.0]),
    (claim("event", event_grade("fp16", "stable")), "grade.C1-x.floor", "nothing"),
])  # fmt: skip
def test_a_claim_without_a_floor_and_a_control_that_cannot_fail_are_refused(tmp_path, rest, key, found):
    assert (key, found) in [(error.key, error.found) for error in guard_errors(task_of(tmp_path, RL, rest))]


def test_a_claim_without_a_guard_is_named_with_what_it_needs(tmp_path):
    aa = AA.split(", also: ")[0] + "}\n"
    for rest, said in ((RATIO, ["no control guards C1-x: add one on k3_nats_per_token"]), (RATIO + aa, ["no control guards C1-x: add one on k3_nats_per_token"]), (RATIO + AA, [])):
        assert unguarded(task_of(tmp_path, RL, rest), []) == said


def test_the_margin_of_a_claim_is_half_its_region():
    ratio = block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 64]")
    assert margin_of(grade_of(ratio)) == pytest.approx(math.log(2))
    assert margin_of(grade_of(block("reward_mean", "difference: [bf16, fp16]", "[-0.03, 0.03]"))) == pytest.approx(0.03)
    assert margin_of(grade_of(block("reward_mean", "difference: [bf16, fp16]", "[0.0, null]"))) is None, "a sign"


def grade_of(text: str):
    from yaml import safe_load

    from suite.spec.task import Grade

    raw = safe_load("{" + text + "}")
    raw["tolerance"]["date"] = str(raw["tolerance"]["date"])
    return Grade.model_validate(raw | {"contrast": {k: tuple(v) for k, v in raw["contrast"].items()}, "accept": tuple(raw["accept"])})


# --- estimands of a protocol ----------------------------------------------------------------------------------------


def test_a_task_without_a_trainer_has_no_mismatch_to_name():
    assert "k3_nats_per_token" not in KINDS["offline_accuracy"].estimands and "reward_mean" in KINDS["offline_accuracy"].estimands
    assert "grad_norm" not in KINDS["offline_mismatch"].estimands and "grad_norm" in KINDS["rl"].estimands
