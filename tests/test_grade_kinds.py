"""Grading kind by kind: events, thresholds, orders, equivalence, ratios without a logarithm, censored times."""

import math

import numpy as np
import pytest
from fakes import RL, block, claim, event_grade, only, series_run, task_of, time_grade

from suite.grade.launches import reduced
from suite.grade.verdict import grade_task

FALLS = np.concatenate([np.linspace(0.5, 0.8, 60), np.linspace(0.8, 0.4, 60)])
RISES = np.linspace(0.5, 0.9, 120)


@pytest.mark.parametrize(("num", "ends"), [(5, (0.549, 1.0)), (0, (0.0, 0.451))])
def test_collapse_is_the_exact_share_of_seeds(tmp_path, num, ends):
    task = task_of(tmp_path, RL, claim("event", event_grade("bf16", "collapses")), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "bf16", seed, FALLS if seed < num else RISES) for seed in range(5)]))
    assert row["interval"] == pytest.approx(ends, abs=5e-4) and row["estimate"] == num / 5
    assert row["verdict"] == ("PASS" if num == 5 else "FAIL")
    if num == 0:
        assert row["reason"].startswith("not_reproduced_on_this_hardware")


def test_three_collapses_of_five_decide_nothing(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("bf16", "collapses")), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "bf16", seed, FALLS if seed < 3 else RISES) for seed in range(5)]))
    assert row["verdict"] == "INCONCLUSIVE" and row["consistent_with_paper"] is True


def test_a_diverged_run_is_an_event_and_so_are_ten_skips_in_a_row_at_the_smallest_scale(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable")), seeds=range(5))
    stuck = {"step_skipped": [0.0] * 100 + [1.0] * 10 + [0.0] * 10, "loss_scale": [1.0] * 120}
    for kind in ({"status": "diverged"}, stuck):
        row = only(grade_task(task, [series_run(task, "fp16", seed, RISES, **kind) for seed in range(5)]))
        assert row["estimate"] == 1.0 and row["verdict"] == "FAIL"
    high = stuck | {"loss_scale": [1024.0] * 120}
    assert (
        only(grade_task(task, [series_run(task, "fp16", seed, RISES, **high) for seed in range(5)]))["estimate"] == 0.0
    )


def test_a_run_that_skips_many_steps_cannot_pass_as_stable(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable")), seeds=range(5))
    for every, verdict in ((40, "PASS"), (10, "INCONCLUSIVE")):
        skipped = [float(i % every == 0) for i in range(120)]
        runs = [
            series_run(task, "fp16", seed, RISES, step_skipped=skipped, loss_scale=[64.0] * 120) for seed in range(5)
        ]
        row = only(grade_task(task, runs))
        assert row["verdict"] == verdict and (verdict == "PASS" or row["reason"].startswith("skipped_steps"))


def test_a_series_too_short_to_show_the_event_is_no_evidence_of_stability(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable", hold=10)), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "fp16", seed, RISES[:5], cut=True) for seed in range(5)]))
    assert row["verdict"] == "INCONCLUSIVE" and row["estimate"] is None


def test_a_threshold_is_the_mean_of_the_last_pass_never_its_best_step(tmp_path):
    grade = block("reward_mean", "arm: fp16", "[0.95, 1.0]", "reducer: epoch_mean, window: 20, min_seeds: 3")
    task = task_of(tmp_path, RL, claim("threshold", grade))
    rng = np.random.default_rng(0)
    for level, expected in ((0.97, "PASS"), (0.92, "FAIL")):
        series = {seed: level + 0.02 * rng.standard_normal(100) for seed in range(3)}
        assert all(values.max() > 0.95 for values in series.values())
        rows = [series_run(task, "fp16", seed, values, num_rollouts=[512.0] * 100) for seed, values in series.items()]
        row = only(grade_task(task, rows))
        assert row["verdict"] == expected
        assert row["estimate"] == pytest.approx(np.mean([values[-20:].mean() for values in series.values()]), abs=1e-3)


def test_accuracy_of_exactly_one_in_every_launch_is_finite_on_the_logit_scale(tmp_path):
    grade = block("reward_mean", "arm: fp16", "[0.95, 1.0]", "reducer: last_k_mean, window: 4")
    task = task_of(tmp_path, RL, claim("threshold", grade))
    ends = [1.0, 1.0, 0.9990234375]
    row = only(
        grade_task(task, [series_run(task, "fp16", s, [v] * 4, num_rollouts=[512.0] * 4) for s, v in enumerate(ends)])
    )
    assert row["verdict"] == "PASS" and 0.99 < row["interval"][0] < row["interval"][1] <= 1.0


ORDER = block("entropy_nats", "order: [a, b, c, d], margin: 0.10", more="min_seeds: 3")


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((1.0, 1.5, 1.5, 2.0), "PASS"),
        ((1.0, 1.5, 1.42, 2.0), "PASS"),
        ((1.0, 1.5, 1.2, 2.0), "FAIL"),
        ((1.0, 1.0, 1.0, 1.0), "FAIL"),
        ((1.0, 1.5, 1.5, 1.5), "FAIL"),
        ((1.0, 1.1, 2.0, 4.0), "INCONCLUSIVE"),
    ],
)
def test_in_an_order_the_ends_must_stand_apart_and_inner_neighbours_may_tie(tmp_path, levels, expected):
    head, rest = RL.split("arms:\n")
    arms = "".join(f"  {arm}: {{{{train: {{{{head_chunk_tokens: {i + 1}}}}}}}}}\n" for i, arm in enumerate("abcd"))
    rest = rest.split("vary: ")[1].split("\n", 1)[1]
    text = f"{head}precision: {{{{rollout: bf16, train: bf16}}}}\narms:\n{arms}vary: [train.head_chunk_tokens]\n{rest}"
    task = task_of(tmp_path, text, claim("ordering", ORDER))
    rng = np.random.default_rng(1)
    noisy = [
        (arm, s, level * math.exp(0.004 * rng.standard_normal()))
        for arm, level in zip("abcd", levels)
        for s in range(3)
    ]
    runs = [series_run(task, arm, seed, [value] * 4, name="entropy_nats") for arm, seed, value in noisy]
    row = only(grade_task(task, runs))
    assert row["verdict"] == expected and [pair["label"] for pair in row["pairs"]] == ["b / a", "c / b", "d / c"]


def test_equivalence_needs_the_interval_of_the_difference_inside_the_margin(tmp_path):
    grade = block("reward_mean", "difference: [bf16, fp16]", "[-0.03, 0.03]", "reducer: last_k_mean, window: 4")
    task = task_of(tmp_path, RL, claim("equivalence", grade))
    for gap, noise, expected in ((0.0, 0.004, "PASS"), (0.1, 0.004, "FAIL"), (0.0, 0.08, "INCONCLUSIVE")):
        shifts = noise * np.array([-1.0, 0.2, 1.0])
        runs = [series_run(task, "bf16", s, [0.5 + gap + shift] * 4) for s, shift in enumerate(shifts)]
        runs += [series_run(task, "fp16", s, [0.5] * 4) for s in range(3)]
        row = only(grade_task(task, runs))
        assert row["verdict"] == expected and row["estimate"] == pytest.approx(gap + shifts.mean())


def test_a_ratio_of_values_that_are_not_positive_has_no_estimate_and_no_verdict(tmp_path):
    grade = block("k1_nats_per_token", "ratio: [bf16, fp16]", "[4, 16]")
    task = task_of(tmp_path, RL, claim("ratio", grade))
    runs = [
        series_run(task, arm, s, [v] * 3, name="k1_nats_per_token")
        for arm, v in (("bf16", 1e-3), ("fp16", -1e-5))
        for s in range(3)
    ]
    row = only(grade_task(task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and row["estimate"] is None
    assert row["reason"] == "no_interval: fp16 seed 0: k1_nats_per_token is -1e-05, which has no logarithm"


def test_a_time_that_is_censored_cannot_carry_a_verdict_past_the_horizon(tmp_path):
    grade = time_grade("arm: bf16", "[50, 130]")
    task = task_of(tmp_path, RL, claim("threshold", grade))
    runs = [series_run(task, "bf16", s, v) for s, v in enumerate((FALLS, FALLS[2:], RISES))]
    row = only(grade_task(task, runs))
    assert row["per_seed"][2]["censored"] == "high" and row["per_seed"][2]["value"] == 120
    assert row["verdict"] == "INCONCLUSIVE"
    brief = task_of(tmp_path, RL, claim("threshold", grade), steps=45, name="brief")
    late = only(grade_task(brief, [series_run(brief, "bf16", s, RISES[:45]) for s in range(3)]))
    assert late["verdict"] == "INCONCLUSIVE" and late["reason"].startswith("censored")


def test_reducers_by_hand():
    series = np.array([1.0, 2.0, 4.0, 8.0])
    expected = {
        ("mean", None): 3.75,
        ("last_k_mean", 2): 6.0,
        ("median", None): 3.0,
        ("geo_mean", None): 8**0.5,
        ("log_ratio", 2): math.log(4.0),
        ("auc", None): (1.5 + 3 + 6) / 3,
    }
    for (reducer, window), value in expected.items():
        assert reduced(series, reducer, window) == (pytest.approx(value), "")
    for values, reducer, window in (([1.0], "last_k_mean", 5), ([], "mean", None), ([-1.0, 1.0], "geo_mean", None)):
        assert reduced(np.array(values), reducer, window)[0] is None


HOLE, OVERFLOW = [1.0, math.nan, 3.0, 5.0], [1.0, 2.0, math.inf, 2.0]


@pytest.mark.parametrize("reducer", ["mean", "geo_mean", "median", "auc", "log_ratio", "last_k_mean", "epoch_mean"])
def test_an_infinite_value_makes_every_reducer_infinite_and_a_missing_one_leaves_none(reducer):
    assert reduced(np.array(OVERFLOW), reducer, 2) == (math.inf, "is inf at iteration 2")
    assert reduced(np.array([math.nan, *HOLE[1:]]), reducer, None if reducer == "auc" else 1 if reducer == "log_ratio" else 4)[0] is None
    assert reduced(np.array(HOLE[::-1]), "mean", None) == (None, "has no value at iteration 2")


def test_a_series_with_gaps_by_right_is_reduced_over_what_it_has_if_that_is_half():
    assert reduced(np.array(HOLE), "mean", None, gaps=True) == (3.0, "")
    assert reduced(np.array([math.nan, math.nan, 3.0]), "mean", None, gaps=True)[0] is None
