"""The graders as tests in the statistical sense: how often they pass and fail on data whose truth is known. Numbers
with their own error bars.
"""

import math

import false_verdicts
import numpy as np
import pytest
from fakes import COMPARE, OFFLINE, RL, block, claim, event_grade, run_of, series_run, task_of

from suite.grade.contrasts import Levels
from suite.grade.verdict import Needed, design_power, grade_task
from suite.spec.reading import load_task

REPEATS = 300
SD = 0.25  # of the log-ratio between launches: what power.py supposes for k3
RATIO = block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]", "min_seeds: 3")


def ceiling(rate: float, repeats: int = REPEATS) -> float:
    """`rate` plus three standard errors of a share estimated from so many repeats."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / repeats)


def ratio_runs(task, rng, truth: float, seeds, sd: float = SD) -> list:
    """Launches whose paired log-ratio is normal around `truth` with sd `sd`; half of the noise is shared by the two
    arms of a seed.
    """
    runs = []
    for seed in seeds:
        shared, log_ratio = math.exp(0.1 * rng.standard_normal()), math.log(truth) + sd * rng.standard_normal()
        for arm, value in (("bf16", 4e-4 * shared), ("fp16", 4e-4 * shared / math.exp(log_ratio))):
            runs.append(run_of(task, arm, seed, series_summary={"k3_nats_per_token": value}))
    return runs


def verdicts(task, make, seed: int, repeats: int = REPEATS) -> dict[str, float]:
    """Share of each verdict over repeats."""
    rng = np.random.default_rng(seed)
    words = [grade_task(task, make(rng))["verdict"] for _ in range(repeats)]
    return {word: words.count(word) / repeats for word in ("PASS", "FAIL", "INCONCLUSIVE")}


@pytest.fixture(scope="module")
def ratio_task(tmp_path_factory):
    return task_of(tmp_path_factory.mktemp("ratio"), OFFLINE, claim("ratio", RATIO))


def test_a_truth_at_the_end_of_the_region_passes_and_fails_at_most_as_often_as_stated(ratio_task):
    for seed, edge in enumerate((16.0, 128.0)):
        share = verdicts(ratio_task, lambda rng, edge=edge: ratio_runs(ratio_task, rng, edge, (0, 1, 2)), seed)
        assert 0 < share["PASS"] <= ceiling(0.05) and 0 < share["FAIL"] <= ceiling(0.05), (edge, share)


def test_a_truth_outside_passes_less_than_stated_and_no_effect_always_fails(ratio_task):
    aa = verdicts(ratio_task, lambda rng: ratio_runs(ratio_task, rng, 1.0, (0, 1, 2)), 2)
    outside = verdicts(ratio_task, lambda rng: ratio_runs(ratio_task, rng, 12.0, (0, 1, 2)), 3)
    assert aa["PASS"] == 0 and aa["FAIL"] > 0.95
    assert outside["PASS"] <= ceiling(0.05)


def test_the_theoretical_value_passes_at_the_planned_seeds_as_often_as_plan_says(ratio_task):
    supposed = design_power(ratio_task)["C1-x"]
    right = verdicts(ratio_task, lambda rng: ratio_runs(ratio_task, rng, 64.0, (0, 1, 2)), 4)
    wrong = verdicts(ratio_task, lambda rng: ratio_runs(ratio_task, rng, 1.0, (0, 1, 2)), 5)
    error = 3 * math.sqrt(0.25 / REPEATS)
    assert right["PASS"] == pytest.approx(supposed["p_pass_if_true"], abs=error) and right["PASS"] > 0.8
    assert wrong["FAIL"] == pytest.approx(supposed["p_fail_if_null"], abs=error) and right["FAIL"] <= ceiling(0.01)


def test_adding_seeds_only_helps(tmp_path):
    five = task_of(tmp_path, OFFLINE, claim("ratio", RATIO), seeds=range(5))
    share = verdicts(five, lambda rng: ratio_runs(five, rng, 64.0, range(5)), 6, 150)
    assert share["PASS"] > 0.99
    assert design_power(five)["C1-x"]["p_pass_if_true"] > 0.99


def test_repeating_the_same_seeds_does_not_make_an_interval_narrower(ratio_task):
    """Five attempts of every cell: still three launches, so a truth at the end still passes at most 5 % of the
    time.
    """

    def repeated(rng):
        return [run for _ in range(3) for run in ratio_runs(ratio_task, rng, 16.0, (0, 1, 2), 1e-3)] + ratio_runs(
            ratio_task, rng, 16.0, (0, 1, 2)
        )

    rows = [grade_task(ratio_task, repeated(np.random.default_rng(seed)))["claims"][0] for seed in range(60)]
    assert {row["num_seeds"] for row in rows} == {3}
    assert sum(row["verdict"] == "PASS" for row in rows) / 60 <= ceiling(0.05, 60)


def test_several_true_claims_together_fail_a_task_at_most_as_often_as_one(tmp_path):
    """Four claims, each with its truth at the end of its region: the task fails for any of them in at most 5 % of
    all cases.
    """
    one = block("entropy_nats", "arm: bf16", "[1.0, 4.0]")
    names = ("entropy_nats", "k3_nats_per_token", "grad_norm", "loss_scale")
    claims = "claims:\n" + "".join(f"  - {{id: C1-{i}, about: C1, kind: threshold, statement: s}}\n" for i in range(4))
    task = task_of(
        tmp_path,
        RL,
        claims
        + "grade:\n"
        + "".join(f"  C1-{i}: {{{one.replace('entropy_nats', name)}}}\n" for i, name in enumerate(names)),
        steps=1,
    )

    def make(rng):
        return [
            run_of(
                task, "bf16", seed, metrics=[{"step": 0, **{n: math.exp(0.2 * rng.standard_normal()) for n in names}}]
            )
            for seed in (0, 1, 2)
        ]

    assert verdicts(task, make, 7)["FAIL"] <= ceiling(0.05)


def test_events_pass_and_fail_at_most_as_often_as_stated_when_half_of_all_seeds_collapse(tmp_path):
    grade = event_grade("bf16", "collapses", hold=2, window=2)
    task = task_of(tmp_path, RL, claim("event", grade), seeds=range(5), steps=8)
    falls, stays = [0.5, 0.7, 0.8, 0.8, 0.5, 0.4, 0.4, 0.4], [0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    cached = {
        (seed, fell): series_run(task, "bf16", seed, falls if fell else stays)
        for seed in range(5)
        for fell in (True, False)
    }

    def make(rate):
        return lambda rng: [cached[seed, bool(rng.random() < rate)] for seed in range(5)]

    half = verdicts(task, make(0.5), 8)
    assert half["PASS"] <= ceiling(0.05) and half["FAIL"] <= ceiling(0.05)
    always, never = verdicts(task, make(0.95), 9), verdicts(task, make(0.05), 10)
    supposed, error = design_power(task)["C1-x"], 3 * math.sqrt(0.25 / REPEATS)
    assert (
        always["PASS"] == pytest.approx(supposed["p_pass_if_true"], abs=error)
        and always["PASS"] > 0.7
        and always["FAIL"] == 0
    )
    assert never["FAIL"] == pytest.approx(supposed["p_fail_if_null"], abs=error) and never["PASS"] == 0


def test_an_equivalence_at_its_margin_passes_at_most_five_percent(tmp_path):
    grade = block("reward_mean", "difference: [bf16, fp16]", "[-0.03, 0.03]")
    task = task_of(tmp_path, RL, claim("equivalence", grade), seeds=range(5), steps=1)

    def make(gap):
        return lambda rng: [
            run_of(task, arm, seed, metrics=[{"step": 0, "reward_mean": 0.5 + shift + 0.01 * rng.standard_normal()}])
            for arm, shift in (("bf16", gap), ("fp16", 0.0))
            for seed in range(5)
        ]

    assert verdicts(task, make(0.03), 11)["PASS"] <= ceiling(0.05)
    assert verdicts(task, make(0.0), 12, 150)["PASS"] > 0.85 and verdicts(task, make(0.10), 13, 150)["FAIL"] > 0.95


def test_an_order_of_arms_without_any_difference_never_passes(tmp_path):
    grade = block("k3_nats_per_token", "order: [t-fp16, t-bf16], margin: 0.10", more="min_seeds: 3")
    need = task_of(tmp_path, RL, claim("report", "estimand: reward_mean, contrast: {arm: bf16}"), name="t", steps=1)
    task = task_of(tmp_path, COMPARE, claim("ordering", grade), name="c", needs=["t"])

    def share(ratio, seed):
        rng, words = np.random.default_rng(seed), []
        for _ in range(150):
            runs = [
                run_of(
                    need,
                    arm,
                    s,
                    metrics=[{"step": 0, "k3_nats_per_token": level * math.exp(0.03 * rng.standard_normal())}],
                )
                for arm, level in (("fp16", 1.0), ("bf16", ratio))
                for s in range(3)
            ]
            words.append(grade_task(task, [], {"t": Needed(need, runs)})["verdict"])
        return words.count("PASS") / 150, words.count("FAIL") / 150

    assert share(1.0, 14)[0] <= ceiling(0.05, 150) and share(1.0, 15)[1] > 0.2
    assert share(1.10, 16)[0] <= ceiling(0.05, 150)
    assert share(1.5, 17)[0] > 0.9


def test_an_aa_control_rarely_breaks_a_sound_harness_and_a_fault_of_a_factor_three_does(tmp_path):
    control = (
        "controls:\n  - {name: control-aa, kind: aa, like: bf16, seeds: [100, 101, 102], estimand: k3_nats_per_token,\n"
        "     contrast: {ratio: [bf16, control-aa]}, accept: [0.6666, 1.5]}\n"
    )
    task = task_of(tmp_path, OFFLINE, claim("ratio", RATIO) + control)

    def outcomes(fault, seed):
        rng, found = np.random.default_rng(seed), []
        for _ in range(100):
            runs = ratio_runs(task, rng, 64.0, (0, 1, 2), 0.1)
            runs += [
                run_of(
                    task,
                    "control-aa",
                    s,
                    series_summary={"k3_nats_per_token": fault * 4e-4 * math.exp(0.1 * rng.standard_normal())},
                )
                for s in (100, 101, 102)
            ]
            found.append(grade_task(task, runs)["controls"][0]["outcome"])
        return found.count("holds") / 100, found.count("broken") / 100

    assert outcomes(1.0, 18)[0] > 0.9 and outcomes(1.0, 19)[1] == 0
    assert outcomes(3.0, 20)[1] > 0.9


@pytest.mark.parametrize("name", ["desk-sanity-grpo", "desk-sanity-filter", "desk-sanity-order"])
def test_no_claim_of_a_task_passes_and_no_task_fails_by_mistake_more_often_than_stated(name):
    """A sample of tests/false_verdicts.py: kinds of claims as they stand together in tasks, truths at the ends."""
    task, repeats = load_task(name), 120
    found = false_verdicts.rates(task, {claim.id: 0.1 for claim in false_verdicts.noisy_claims(task)}, repeats)
    assert found["end"] <= ceiling(0.05, repeats) + 0.02, "the largest of several shares"
    assert found["none"] <= ceiling(0.05, repeats) and found["task_fail"] <= ceiling(0.05, repeats)


def test_stopping_at_the_first_pass_would_pass_about_twice_as_often_and_is_not_counted(ratio_task):
    rng, claim_ = np.random.default_rng(1), ratio_task.claims[0]
    grade, one = ratio_task.grade[claim_.id], Levels.of(0.90, 1.0)
    looks = [false_verdicts.draw_prefix(claim_, grade, 16.0, SD, 5, one, rng) for _ in range(600)]
    assert np.mean([row[-1] for row in looks]) <= ceiling(0.05, 600) < np.mean([any(row) for row in looks])
    five = ratio_task.model_copy(update={"seeds": (0, 1, 2, 3, 4)})
    assert {verdicts(five, lambda rng, n=n: ratio_runs(five, rng, 64.0, range(n)), n, 20)["INCONCLUSIVE"] for n in (3, 4)} == {1.0}
