"""What grading adds for RL series: horizons, first passages, events of the loss and of the scaler, drifts, controls."""

import math

import numpy as np
import pytest
from fakes import RL, block, claim, event_grade, only, run_of, series_run, task_of

from suite.grade.verdict import grade_task
from suite.measure import stats

FOUR_UPDATES = RL.replace("minibatches: 1", "minibatches: 4")
FLAT = np.full(40, 0.8)


def rows(values, name="reward_mean", **more):
    """Metrics rows from step 0, as the loop writes them."""
    return [{"step": i, name: v, **{k: s[i] for k, s in more.items()}} for i, v in enumerate(values)]


def per_seed(tmp_path, grade, runs, kind="threshold", text=RL, seeds=(0, 1, 2), steps=40):
    """The per-launch values of a claim over runs made by `runs(task)`."""
    task = task_of(tmp_path, text, claim(kind, grade), seeds=seeds, steps=steps)
    return [row["value"] for row in only(grade_task(task, runs(task)))["per_seed"]]


# --- horizons and first passages ------------------------------------------------------------------------------------


def test_until_is_the_horizon_a_value_is_taken_at(tmp_path):
    grade = block("reward_mean", "arm: fp16", "[0.1, 0.2]", "reducer: last_k_mean, window: 2, until: 10")
    ramp = np.arange(40) / 100
    values = per_seed(tmp_path, grade, lambda task: [run_of(task, "fp16", s, metrics=rows(ramp)) for s in (0, 1)])
    assert values == [pytest.approx((0.08 + 0.09) / 2)] * 2


@pytest.mark.parametrize(("status", "skipped", "until", "value", "said"), [
    ("success", 0, "until: 30", None, "20 of 30 iterations are recorded"),
    ("success", 0, "", None, "20 of 40 iterations are recorded"),
    ("diverged", 0, "", None, "diverged at iteration 20 (log-probs that are not finite): it has no value at iteration 39"),
    ("diverged", 1, "", 0.185, None),
    ("diverged", 0, "until: 20", 0.185, None),
])  # fmt: skip
def test_a_run_that_ended_early_has_no_value_at_its_end_unless_its_weights_stand_still(tmp_path, status, skipped, until, value, said):
    """Of a run that skipped every step of its last ten iterations one knows what it would have been."""
    grade = block("reward_mean", "arm: fp16", "[0.1, 0.2]", ", ".join(filter(None, ["reducer: last_k_mean, window: 2", until])))
    short = rows(np.arange(20) / 100, step_skipped=[0] * 10 + [skipped] * 10, loss_scale=[64.0] * 20)
    task = task_of(tmp_path, RL, claim("threshold", grade), steps=40)
    more = {"status": status, "diverged": {"step": 20, "reason": "log-probs that are not finite"}}
    found = only(grade_task(task, [run_of(task, "fp16", 0, metrics=short, **more)]))["per_seed"]
    assert found[0]["value"] == (None if value is None else pytest.approx(value))
    assert found[0].get("problem") == (said and f"fp16 seed 0: {said}")


def test_a_collapse_after_the_horizon_is_none_and_one_before_it_counts(tmp_path):
    falls_at_20 = np.where(np.arange(40) < 20, 0.8, 0.2)
    for until, expected in ((15, 0.0), (35, 1.0)):
        grade = event_grade("bf16", "collapses", hold=5).replace("min_seeds: 5", f"min_seeds: 5, until: {until}")
        runs = lambda task: [run_of(task, "bf16", 0, metrics=rows(falls_at_20))]  # noqa: E731
        assert per_seed(tmp_path, grade, runs, "event") == [expected]


def test_the_first_passage_is_the_first_window_mean_at_the_level_and_censored_without_one(tmp_path):
    grade = block("reward_mean", "arm: fp16", "[1, 25]", "reducer: time_to_event, window: 4, level: 0.95")
    climbs = np.array([0.5] * 10 + [1.0] * 30)  # the window of steps 10..13 is the first whose mean is 1.0
    runs = lambda task: [run_of(task, "fp16", s, metrics=rows(v)) for s, v in enumerate((climbs, FLAT))]  # noqa: E731
    assert per_seed(tmp_path, grade, runs) == [14.0, 40.0]
    task = task_of(tmp_path, RL, claim("threshold", grade), seeds=(0, 1), steps=40)
    row = only(grade_task(task, runs(task)))
    assert [one["censored"] for one in row["per_seed"]] == ["", "high"] and row["unit"] == "iterations"
    assert row["verdict"] == "INCONCLUSIVE"


# --- events ---------------------------------------------------------------------------------------------------------


def test_a_relative_drop_is_a_share_of_the_peak(tmp_path):
    falls = np.array([0.4] * 10 + [0.25] * 30)  # by 0.15: 37.5 % of the peak
    for drop, expected in ((0.3, 1.0), (0.5, 0.0)):
        grade = event_grade("bf16", "collapses", drop, hold=5).replace("drop:", "relative: true, drop:")
        runs = lambda task: [run_of(task, "bf16", 0, metrics=rows(falls))]  # noqa: E731
        assert per_seed(tmp_path, grade, runs, "event") == [expected]


def test_a_loss_that_is_not_finite_is_an_event_at_its_step(tmp_path):
    loss = [0.1] * 40
    loss[17] = math.nan
    grade = event_grade("fp16", "stable").replace("fraction_of_seeds", "time_to_event")
    runs = lambda task: [run_of(task, "fp16", 0, metrics=rows(FLAT, loss=loss))]  # noqa: E731
    assert per_seed(tmp_path, grade, runs, "event") == [18.0]


@pytest.mark.parametrize(("num_rows", "expected"), [(3, 0.0), (4, 1.0)])
def test_ten_skips_in_a_row_at_the_smallest_scale_are_counted_in_optimizer_steps(tmp_path, num_rows, expected):
    """Four updates per iteration; the first stuck iteration may have begun above the smallest scale and counts once:
    1 + 4 + 4 = 9 is too few, one iteration more is enough."""
    skipped = [0] * 20 + [4] * num_rows + [0] * (20 - num_rows)
    metrics = rows(FLAT, step_skipped=skipped, loss_scale=[1.0] * 40)
    runs = lambda task: [run_of(task, "fp16", 0, metrics=metrics)]  # noqa: E731
    assert per_seed(tmp_path, event_grade("fp16", "stable"), runs, "event", FOUR_UPDATES) == [expected]


def test_skips_are_a_share_of_optimizer_steps_and_not_of_iterations(tmp_path):
    """One skip in every tenth iteration of four updates is 2.5 %, below the 5 % that bar a pass; three are 7.5 %."""
    task = task_of(tmp_path, FOUR_UPDATES, claim("event", event_grade("fp16", "stable")), seeds=range(5), steps=40)
    for skips, verdict in ((1, "PASS"), (3, "INCONCLUSIVE")):
        more = {"step_skipped": [skips if i % 10 == 0 else 0 for i in range(40)], "loss_scale": [64.0] * 40}
        runs = [run_of(task, "fp16", s, metrics=rows(FLAT, **more)) for s in range(5)]
        row = only(grade_task(task, runs))
        assert row["verdict"] == verdict and (verdict == "PASS" or row["reason"].startswith("skipped_steps: fp16"))


# --- drift, ratios, shares ------------------------------------------------------------------------------------------


def test_drift_is_the_log_of_the_last_quarter_over_the_first(tmp_path):
    grade = block("prob_diff_mean", "arm: bf16", "[0.6931, null]", "reducer: log_ratio")
    series = [0.004] * 10 + [0.006] * 20 + [0.010] * 10
    runs = lambda task: [run_of(task, "bf16", 0, metrics=rows(series, "prob_diff_mean"))]  # noqa: E731
    assert per_seed(tmp_path, grade, runs) == [pytest.approx(math.log(2.5))]


def test_the_ratio_of_geometric_means_is_the_geometric_mean_of_the_steps_ratios(tmp_path):
    grade = block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]", "reducer: geo_mean")
    bf16, fp16 = np.array([1e-3, 4e-3, 1.0]), np.array([1e-5, 1e-4, 1e-2])  # ratios 100, 40, 100
    runs = lambda task: [  # noqa: E731
        run_of(task, arm, 0, metrics=rows(v, "k3_nats_per_token")) for arm, v in (("bf16", bf16), ("fp16", fp16))
    ]
    assert per_seed(tmp_path, grade, runs, "ratio", steps=3) == [pytest.approx((100 * 40 * 100) ** (1 / 3))]


def test_launches_that_all_solved_everything_get_the_exact_interval_of_their_rollouts(tmp_path):
    grade = block("reward_mean", "arm: fp16", "[0.95, 1.0]", "reducer: epoch_mean, window: 4, min_seeds: 3")
    task = task_of(tmp_path, RL, claim("threshold", grade), steps=8)
    ones = rows(np.ones(8), num_rollouts=[512.0] * 8)
    row = only(grade_task(task, [run_of(task, "fp16", s, metrics=ones) for s in range(3)]))
    assert row["verdict"] == "PASS" and row["interval"] == [pytest.approx(0.05 ** (1 / 2048)), 1.0]


def test_the_drift_interval_by_hand():
    first, last = [1.0, 3.0], [4.0, 4.0]  # means 2 and 4; only the first varies: relative error^2 = 2 / 2 / 2^2 = 0.25
    found = stats.drift_interval(first, last)
    half = 6.313752 * 0.5  # t of one degree of freedom at 95 %
    assert found[:3] == pytest.approx((math.log(2), math.log(2) - half, math.log(2) + half))
    assert stats.drift_interval([1.0], [1.0, 2.0]) is None and stats.drift_interval([1.0, 1.0], [1.0, 1.0]) is None
    assert stats.drift_interval([0.0, 0.0], [1.0, 2.0]) is None


def test_one_launch_against_many_by_hand():
    many, one = [math.e, math.e**3], math.e  # logs 1 and 3: mean 2, sd sqrt(2), n = 2
    found = stats.one_against_many(one, many)
    half = 6.313752 * math.sqrt(2) * math.sqrt(1.5)
    assert np.log(found[:3]) == pytest.approx([1.0, 1.0 - half, 1.0 + half])
    assert stats.one_against_many(0.0, many) is None and stats.one_against_many(1.0, [1.0, 1.0]) is None


# --- controls -------------------------------------------------------------------------------------------------------

PASSING = claim("ratio", block("prob_diff_mean", "ratio: [bf16, fp16]", "[4, 16]"))


def control_outcome(tmp_path, control, runs):
    """(outcome, row) of one control, with arms that pass: 8 times apart, a little noise."""
    task = task_of(tmp_path, RL, PASSING + "controls:\n  - {" + control + "}\n", steps=40)
    rng = np.random.default_rng(0)
    arms = [
        run_of(task, arm, s, metrics=rows(level * np.exp(0.05 * rng.standard_normal(40)), "prob_diff_mean"))
        for arm, level in (("bf16", 8e-4), ("fp16", 1e-4))
        for s in range(3)
    ]
    verdict = grade_task(task, arms + runs(task))
    assert (only(verdict)["verdict"] == "INVALID") == (verdict["controls"][0]["outcome"] == "broken")
    return verdict["controls"][0]["outcome"], verdict["controls"][0]


FLOOR = (
    "name: control-floor, kind: floor, like: bf16, set: {precision: {rollout: fp32, train: fp32}, schedule: {steps: 4}}, seeds: [0], "
    "estimand: k3_nats_per_token, contrast: {arm: control-floor}, accept: [0.0, 1.0e-9]"
)


@pytest.mark.parametrize(("value", "outcome"), [(0.0, "holds"), (1e-12, "holds"), (1e-7, "broken")])
def test_a_floor_of_exactly_zero_holds(tmp_path, value, outcome):
    runs = lambda task: [run_of(task, "control-floor", 0, metrics=rows([value] * 4, "k3_nats_per_token"))]  # noqa: E731
    found, row = control_outcome(tmp_path, FLOOR, runs)
    assert found == outcome and row["estimate"] == value


LR_0 = (
    "name: control-lr-0, kind: null_drift, like: fp16, set: {train: {optimizer: {lr: 0.0}}, schedule: {steps: 8}}, seeds: [0], window: 4, "
    "estimand: prob_diff_mean, contrast: {arm: control-lr-0}, accept: [-0.405, 0.405]"
)


@pytest.mark.parametrize(
    ("series", "outcome"),
    [
        ([1.00, 1.02, 0.98, 1.01, 0.99, 1.00, 1.02, 0.98], "holds"),
        ([1.00, 1.02, 0.98, 1.01, 1.99, 2.00, 2.02, 1.98], "broken"),
        ([0.20, 2.00, 0.50, 1.30, 0.30, 1.90, 0.60, 1.20], "inconclusive"),
        ([1.00, 1.00], "inconclusive"),
    ],
)
def test_mismatch_must_not_drift_at_learning_rate_zero(tmp_path, series, outcome):
    metrics = rows(1e-4 * np.array(series), "prob_diff_mean")
    runs = lambda task: [run_of(task, "control-lr-0", 0, metrics=metrics)]  # noqa: E731
    assert control_outcome(tmp_path, LR_0, runs)[0] == outcome


SHUFFLED = (
    "name: control-shuffled, kind: null_drift, like: fp16, set: {algorithm: {shuffle_rewards: true}, schedule: {steps: 8}}, seeds: [0], "
    "window: 4, estimand: reward_mean, contrast: {arm: control-shuffled}, accept: [null, 0.1823]"
)


@pytest.mark.parametrize(("last", "outcome"), [(0.50, "holds"), (0.40, "holds"), (0.90, "broken")])
def test_accuracy_must_not_rise_on_shuffled_rewards(tmp_path, last, outcome):
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    metrics = rows(np.concatenate([0.5 + noise, last - noise]))
    runs = lambda task: [run_of(task, "control-shuffled", 0, metrics=metrics)]  # noqa: E731
    assert control_outcome(tmp_path, SHUFFLED, runs)[0] == outcome


AA = (
    "name: control-aa, kind: aa, like: fp16, seeds: [100], estimand: prob_diff_mean, "
    "contrast: {ratio: [fp16, control-aa]}, accept: [0.6667, 1.5]"
)


@pytest.mark.parametrize(("level", "outcome"), [(1e-4, "holds"), (3e-4, "broken")])
def test_one_launch_of_an_aa_control_is_read_against_the_spread_of_the_arm(tmp_path, level, outcome):
    metrics = rows([level] * 40, "prob_diff_mean")
    found, row = control_outcome(tmp_path, AA, lambda task: [run_of(task, "control-aa", 100, metrics=metrics)])
    assert found == outcome and row["interval"][0] < 1e-4 / level < row["interval"][1]


def test_series_of_fakes_and_of_the_loop_agree(tmp_path):
    """Counting steps from 0 or from 1 moves times by one and changes no share."""
    task = task_of(tmp_path, RL, claim("event", event_grade("bf16", "collapses", hold=5)), seeds=(0, 1), steps=40)
    falls = np.where(np.arange(40) < 20, 0.8, 0.2)
    runs = [series_run(task, "bf16", 0, falls), run_of(task, "bf16", 1, metrics=rows(falls))]
    assert [row["value"] for row in only(grade_task(task, runs))["per_seed"]] == [1.0, 1.0]
