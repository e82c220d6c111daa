"""Grading: every value, every reason, every order of precedence, on runs whose outcome is known beforehand."""

import json
import math

import numpy as np
import pytest
from fakes import (
    COMPARE, OFFLINE, RL, TOLERANCE, claim, curve, jittered, offline_run, prompt_table, run_of, series_run, task_of,
)  # fmt: skip

from suite.errors import UserError
from suite.grade import EXIT_CODES, design_power, grade_by_fingerprint, grade_task, summarise_headline, verdict_line, write_verdict
from suite.launches import reduced

RATIO = f"estimand: k3_nats_per_token, contrast: {{ratio: [bf16, fp16]}}, interval: {{method: student_t}}, accept: [16, 128], min_seeds: 3, {TOLERANCE}"
NOISE = {"bf16": 2.0**-5, "fp16": 2.0**-8, "control-aa": 2.0**-5}


@pytest.fixture
def ratio_task(tmp_path):
    return task_of(tmp_path, OFFLINE, claim("ratio", RATIO, paper=", paper: {value: 64, unit: ratio, source: here, level: P4, baseline: C1.theory_k3_ratio}"))


def runs_for(task, noise=NOISE, seeds=(0, 1, 2), **changes):
    return [offline_run(task, arm, seed, noise[arm], **changes) for arm in task.arms for seed in seeds]


def only(verdict):
    (row,) = verdict["claims"]
    return row


# ---- three values -------------------------------------------------------------------------------------------------------------

def test_a_ratio_near_64_passes_and_the_verdict_has_every_field_of_the_interface(ratio_task):
    verdict = grade_task(ratio_task, runs_for(ratio_task))
    row = only(verdict)
    assert verdict["verdict"] == row["verdict"] == "PASS"
    assert 50 < row["interval"][0] < row["estimate"] < row["interval"][1] < 80
    assert row["display_interval"][0] < row["estimate"] < row["display_interval"][1]
    assert [seed["seed"] for seed in row["per_seed"]] == [0, 1, 2] and row["num_seeds"] == 3 and row["consistent_with_paper"] is True
    top = {"schema", "task", "task_version", "grade_version", "tier", "fingerprint", "verdict", "reason", "claims", "controls", "runs",
           "environment", "suite"}  # fmt: skip
    fields = {"id", "kind", "statement", "estimand", "unit", "estimator", "paper_value", "paper_source", "estimate", "interval",
              "interval_method", "accept", "num_seeds", "verdict", "reason", "consistent_with_paper"}  # fmt: skip
    assert set(verdict) == top and fields <= set(row)
    assert row["unit"] == "ratio" and row["paper_value"] == 64 and row["accept"] == [16, 128]


def test_the_ratio_is_the_paired_geometric_mean_with_a_t_interval_on_the_log_scale(ratio_task):
    runs = runs_for(ratio_task)
    k3 = {(run.arm, run.seed): run.summary["sum_k3"].sum() / run.summary["num_response_tokens"].sum() for run in runs}
    logs = np.log([k3["bf16", s] / k3["fp16", s] for s in (0, 1, 2)])
    half = 2.9199855803537 * logs.std(ddof=1) / math.sqrt(3)  # t(0.95; 2)
    row = only(grade_task(ratio_task, runs))
    assert row["estimate"] == pytest.approx(math.exp(logs.mean()))
    assert row["interval"] == pytest.approx([math.exp(logs.mean() - half), math.exp(logs.mean() + half)])


def test_no_effect_fails_and_a_ratio_beyond_the_region_fails(ratio_task):
    for fp16 in (2.0**-5, 2.0**-9):
        verdict = grade_task(ratio_task, runs_for(ratio_task, NOISE | {"fp16": fp16}))
        assert verdict["verdict"] == "FAIL" and "disjoint" in only(verdict)["reason"] and only(verdict)["consistent_with_paper"] is False


def test_an_interval_across_the_end_of_the_region_is_inconclusive_and_says_how_many_seeds_it_takes(ratio_task):
    noise = {0: 2.0**-7.2, 1: 2.0**-6.8, 2: 2.0**-7.4}
    runs = [offline_run(ratio_task, "bf16", s, 2.0**-5) for s in noise] + [offline_run(ratio_task, "fp16", s, n) for s, n in noise.items()]
    row = only(grade_task(ratio_task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and row["reason"].startswith("straddles") and "seeds" in row["resolve"]


def test_one_seed_is_inconclusive_and_says_beside_it_whether_it_fits(ratio_task):
    row = only(grade_task(ratio_task, runs_for(ratio_task, seeds=(0,))))
    assert row["verdict"] == "INCONCLUSIVE" and row["reason"].startswith("too_few_seeds") and row["consistent_with_paper"] is True
    assert row["interval"] is None and row["display_interval"][0] < row["estimate"] < row["display_interval"][1]
    row = only(grade_task(ratio_task, runs_for(ratio_task, NOISE | {"fp16": 2.0**-5}, seeds=(0,))))
    assert row["verdict"] == "INCONCLUSIVE" and row["consistent_with_paper"] is False


def test_two_seeds_can_fail_but_not_pass_where_three_are_asked(ratio_task):
    assert only(grade_task(ratio_task, runs_for(ratio_task, NOISE | {"fp16": 2.0**-5}, seeds=(0, 1))))["verdict"] == "FAIL"
    row = only(grade_task(ratio_task, runs_for(ratio_task, seeds=(0, 1))))
    assert row["verdict"] == "INCONCLUSIVE"


def test_launches_that_agree_exactly_get_the_interval_over_prompts_and_never_a_point(ratio_task):
    same = [run_of(ratio_task, arm, seed, summary=prompt_table(NOISE[arm], 7)) for arm in ("bf16", "fp16") for seed in (0, 1, 2)]
    row = only(grade_task(ratio_task, same))
    assert row["interval_method"] == "within_run" and row["interval"][0] < row["estimate"] < row["interval"][1] and row["verdict"] == "PASS"


def test_without_prompt_sums_launches_that_agree_exactly_decide_nothing(tmp_path):
    grade = f"estimand: entropy_nats, contrast: {{arm: bf16}}, interval: {{method: student_t}}, accept: [0.5, 1.5], {TOLERANCE}"
    task = task_of(tmp_path, RL, claim("threshold", grade))
    row = only(grade_task(task, [series_run(task, "bf16", seed, [1.0] * 5, name="entropy_nats") for seed in range(3)]))
    assert row["verdict"] == "INCONCLUSIVE" and "agree exactly" in row["reason"] and row["interval"] is None


# ---- the 5 % ------------------------------------------------------------------------------------------------------------------

def test_fail_needs_the_interval_with_the_split_error_and_pass_the_stated_one(tmp_path):
    """With one claim, t(0.95; 2) = 2.92 excludes the region; the same numbers beside three more claims, t(0.9875; 2) = 6.2, do not."""
    one = f"estimand: entropy_nats, contrast: {{arm: bf16}}, interval: {{method: student_t}}, accept: [1.4, 2.0], {TOLERANCE}"
    claims = "claims:\n" + "".join(f"  - {{id: C1-{i}, about: C1, kind: threshold, statement: s}}\n" for i in range(4))
    four = task_of(tmp_path, RL, claims + "grade:\n" + "".join(f"  C1-{i}: {{{one}}}\n" for i in range(4)), name="four")
    single = task_of(tmp_path, RL, claim("threshold", one))
    values = np.log([1.00, 1.10, 1.20])
    half = values.std(ddof=1) / math.sqrt(3)
    assert math.exp(values.mean() + 2.92 * half) < 1.4 < math.exp(values.mean() + 6.2 * half)
    for task, expected in ((single, "FAIL"), (four, "INCONCLUSIVE")):
        runs = [series_run(task, "bf16", s, [v] * 4, name="entropy_nats") for s, v in enumerate((1.00, 1.10, 1.20))]
        verdict = grade_task(task, runs)
        assert {row["verdict"] for row in verdict["claims"]} == {expected}
        assert verdict["claims"][0]["interval"] == pytest.approx([math.exp(values.mean() - 2.92 * half), math.exp(values.mean() + 2.92 * half)], rel=1e-3)


# ---- what caps, voids or precedes ---------------------------------------------------------------------------------------------

def test_a_weak_tolerance_and_an_unpinned_input_cap_both_ways(tmp_path):
    weak = task_of(tmp_path, OFFLINE, claim("ratio", RATIO.replace("P4", "P5")))
    unpinned = task_of(tmp_path, OFFLINE, claim("ratio", RATIO), sha="unknown", name="unpinned")
    for task, word in ((weak, "weak_tolerance"), (unpinned, "unpinned_input")):
        for noise, otherwise in ((NOISE, "PASS"), (NOISE | {"fp16": 2.0**-5}, "FAIL")):
            row = only(grade_task(task, runs_for(task, noise)))
            assert row["verdict"] == "INCONCLUSIVE" and row["reason"].startswith(word) and f"otherwise {otherwise}" in row["reason"]


def test_an_engine_in_another_precision_than_its_arm_makes_the_task_invalid(ratio_task):
    runs = runs_for(ratio_task)
    runs[4] = offline_run(ratio_task, "fp16", 1, NOISE["fp16"], precision_executed={"rollout_weights": "bf16", "compute": "fp16"})
    verdict = grade_task(ratio_task, runs)
    assert verdict["verdict"] == "INVALID" and "rollout_weights: ran in bf16" in verdict["reason"]


def test_arms_that_differ_in_a_second_factor_make_the_task_invalid(ratio_task):
    runs = runs_for(ratio_task)
    settings = json.loads(json.dumps(runs[0].record["cell"]["settings"]))
    settings["rollout"]["temperature"] = 0.6
    for index in (0, 1, 2):
        runs[index].record["cell"] = runs[index].record["cell"] | {"settings": settings}
    verdict = grade_task(ratio_task, runs)
    assert verdict["verdict"] == "INVALID" and "rollout.temperature, which is not in vary" in verdict["reason"]


def test_where_a_checkpoint_lies_is_not_a_factor(ratio_task):
    runs = runs_for(ratio_task)
    settings = json.loads(json.dumps(runs[0].record["cell"]["settings"]))
    settings["model"]["path"] = "elsewhere"
    runs[0].record["cell"] = runs[0].record["cell"] | {"settings": settings}
    assert grade_task(ratio_task, runs)["verdict"] == "PASS"


def test_a_seed_under_two_run_keys_is_refused_but_a_fresh_attempt_is_the_same_launch_again(ratio_task):
    runs = runs_for(ratio_task)
    again = run_of(ratio_task, "bf16", 0, summary=prompt_table(NOISE["bf16"], 50), started_utc="2026-01-02T00:00:00Z")
    row = only(grade_task(ratio_task, [*runs, again]))
    first, second = (r.summary["sum_k3"].sum() / r.summary["num_response_tokens"].sum() for r in (runs[0], again))
    assert row["verdict"] == "PASS" and row["num_seeds"] == 3
    assert row["per_seed"][0]["values"][0] == pytest.approx((first + second) / 2)
    verdict = grade_task(ratio_task, [*runs, run_of(ratio_task, "bf16", 0, summary=again.summary, run_key="f" * 64)])
    assert verdict["verdict"] == "INVALID" and "different run keys" in verdict["reason"]


def test_a_failed_cell_is_an_error_a_missing_arm_not_run_and_a_later_success_heals(ratio_task):
    runs = runs_for(ratio_task)
    crash = {"class": "RuntimeError", "phase": "sample", "message": "out of memory"}
    failed = offline_run(ratio_task, "fp16", 2, NOISE["fp16"], status="failed", error=crash)
    verdict = grade_task(ratio_task, [*runs[:5], failed])
    assert verdict["verdict"] == "ERROR" and "RuntimeError in sample: out of memory" in verdict["reason"]
    assert grade_task(ratio_task, [*runs, failed])["verdict"] == "PASS"
    verdict = grade_task(ratio_task, runs[:3])
    assert verdict["verdict"] == "NOT_RUN" and "no finished run of fp16" in verdict["reason"]
    assert grade_task(ratio_task, [])["verdict"] == "NOT_RUN"
    assert only(grade_task(ratio_task, runs[:3]))["estimate"] is None


def test_runs_of_an_older_task_version_do_not_count(ratio_task):
    stale = runs_for(ratio_task, NOISE | {"fp16": 0.1})
    for run in stale:
        run.record["task"] = run.record["task"] | {"version": 0}
    assert grade_task(ratio_task, stale)["verdict"] == "NOT_RUN"
    assert only(grade_task(ratio_task, [*stale, *runs_for(ratio_task)]))["num_seeds"] == 3


def test_machines_are_never_mixed(ratio_task):
    here, there = runs_for(ratio_task), runs_for(ratio_task, NOISE | {"fp16": 2.0**-5}, fingerprint="gpu-other")
    with pytest.raises(UserError, match="cpu-test.*gpu-other"):
        grade_task(ratio_task, [*here, *there])
    verdicts = grade_by_fingerprint(ratio_task, [*here, *there])
    assert {name: verdict["verdict"] for name, verdict in verdicts.items()} == {"cpu-test_none-0_torch-0": "PASS", "gpu-other": "FAIL"}


# ---- controls -----------------------------------------------------------------------------------------------------------------

CONTROLS = """\
controls:
  - {name: control-floor, kind: floor, like: bf16, set: {precision: {rollout: fp32, train: fp32}}, seeds: [0],
     estimand: k3_nats_per_token, contrast: {arm: control-floor}, accept: [0.0, 1.0e-9]}
  - {name: control-aa, kind: aa, like: bf16, seeds: [100, 101, 102],
     estimand: k3_nats_per_token, contrast: {ratio: [bf16, control-aa]}, accept: [0.6666, 1.5]}
"""
FLOOR = 2.0**-20


@pytest.fixture
def guarded(tmp_path):
    return task_of(tmp_path, OFFLINE, claim("ratio", RATIO) + CONTROLS)


def control_runs(task, floor=FLOOR, aa=2.0**-5):
    return [offline_run(task, "control-floor", 0, floor), *(offline_run(task, "control-aa", seed, aa) for seed in (100, 101, 102))]


def test_controls_that_hold_let_a_pass_stand(guarded):
    verdict = grade_task(guarded, runs_for(guarded) + control_runs(guarded))
    assert verdict["verdict"] == "PASS" and [control["outcome"] for control in verdict["controls"]] == ["holds", "holds"]
    assert verdict["controls"][1]["interval"][0] < 1 < verdict["controls"][1]["interval"][1]


def test_a_broken_control_makes_every_claim_invalid(guarded):
    for broken in ({"floor": 2.0**-8}, {"aa": 2.0**-7}):
        verdict = grade_task(guarded, runs_for(guarded) + control_runs(guarded, **broken))
        assert verdict["verdict"] == only(verdict)["verdict"] == "INVALID" and "broken" in [c["outcome"] for c in verdict["controls"]]


def test_a_control_that_is_missing_or_unsure_caps_a_pass_and_leaves_a_fail(guarded):
    unsure = control_runs(guarded)
    unsure[2] = offline_run(guarded, "control-aa", 101, 2.0**-5.6)
    for controls, word in (([], "not_run"), (unsure, "inconclusive")):
        row = only(grade_task(guarded, runs_for(guarded) + controls))
        assert row["verdict"] == "INCONCLUSIVE" and word in row["reason"] and "otherwise PASS" in row["reason"]
        assert only(grade_task(guarded, runs_for(guarded, NOISE | {"fp16": 2.0**-5}) + controls))["verdict"] == "FAIL"


def test_a_control_that_differs_in_more_than_it_sets_is_invalid(guarded):
    controls = control_runs(guarded)
    settings = json.loads(json.dumps(controls[0].record["cell"]["settings"]))
    settings["rollout"]["top_p"] = 0.95
    controls[0].record["cell"] = controls[0].record["cell"] | {"settings": settings}
    verdict = grade_task(guarded, runs_for(guarded) + controls)
    assert verdict["verdict"] == "INVALID" and "control-floor differs from bf16 in rollout.top_p" in verdict["reason"]


# ---- events, thresholds, orders, equivalence, counts -----------------------------------------------------------------------------

def event_grade(arm, expect, drop=0.10, window=1, hold=10, min_seeds=5, reducer="fraction_of_seeds"):
    return (f"estimand: reward_mean, reducer: {reducer}, contrast: {{arm: {arm}}}, event: {{drop: {drop}, window: {window}, hold: {hold}, "
            f"expect: {expect}}}, interval: {{method: clopper_pearson}}, accept: {'[0.5, 1.0]' if expect == 'collapses' else '[0.0, 0.5]'}, "
            f"min_seeds: {min_seeds}, {TOLERANCE}")  # fmt: skip


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
    assert only(grade_task(task, [series_run(task, "fp16", seed, RISES, **high) for seed in range(5)]))["estimate"] == 0.0


def test_a_run_that_skips_many_steps_cannot_pass_as_stable(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable")), seeds=range(5))
    for every, verdict in ((40, "PASS"), (10, "INCONCLUSIVE")):
        skipped = [float(i % every == 0) for i in range(120)]
        runs = [series_run(task, "fp16", seed, RISES, step_skipped=skipped, loss_scale=[64.0] * 120) for seed in range(5)]
        row = only(grade_task(task, runs))
        assert row["verdict"] == verdict and (verdict == "PASS" or row["reason"].startswith("skipped_steps"))


def test_a_series_too_short_to_show_the_event_is_no_evidence_of_stability(tmp_path):
    task = task_of(tmp_path, RL, claim("event", event_grade("fp16", "stable", hold=10)), seeds=range(5))
    row = only(grade_task(task, [series_run(task, "fp16", seed, RISES[:5]) for seed in range(5)]))
    assert row["verdict"] == "INCONCLUSIVE" and row["estimate"] is None


def test_a_threshold_is_the_mean_of_the_last_pass_never_its_best_step(tmp_path):
    grade = f"estimand: reward_mean, reducer: epoch_mean, window: 20, contrast: {{arm: fp16}}, interval: {{method: student_t}}, accept: [0.95, 1.0], min_seeds: 3, {TOLERANCE}"
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
    grade = f"estimand: reward_mean, reducer: last_k_mean, window: 4, contrast: {{arm: fp16}}, interval: {{method: student_t}}, accept: [0.95, 1.0], {TOLERANCE}"
    task = task_of(tmp_path, RL, claim("threshold", grade))
    ends = [1.0, 1.0, 0.9990234375]
    row = only(grade_task(task, [series_run(task, "fp16", s, [v] * 4, num_rollouts=[512.0] * 4) for s, v in enumerate(ends)]))
    assert row["verdict"] == "PASS" and 0.99 < row["interval"][0] < row["interval"][1] <= 1.0


ORDER = f"estimand: entropy_nats, contrast: {{order: [a, b, c, d], margin: 0.10}}, interval: {{method: student_t}}, min_seeds: 3, {TOLERANCE}"


@pytest.mark.parametrize(("levels", "expected"), [
    ((1.0, 1.5, 1.5, 2.0), "PASS"), ((1.0, 1.5, 1.42, 2.0), "PASS"), ((1.0, 1.5, 1.2, 2.0), "FAIL"),
    ((1.0, 1.0, 1.0, 1.0), "FAIL"), ((1.0, 1.5, 1.5, 1.5), "FAIL"), ((1.0, 1.1, 2.0, 4.0), "INCONCLUSIVE"),
])  # fmt: skip
def test_in_an_order_the_ends_must_stand_apart_and_inner_neighbours_may_tie(tmp_path, levels, expected):
    arms = "arms: {a: {train: {head_chunk_tokens: 1}}, b: {train: {head_chunk_tokens: 2}}, c: {train: {head_chunk_tokens: 3}}, d: {train: {head_chunk_tokens: 4}}}\n"
    text = RL.split("arms:\n")[0] + "precision: {{rollout: bf16, train: bf16}}\n" + arms.replace("{", "{{").replace("}", "}}")
    text += "vary: [train.head_chunk_tokens]\nseeds: {seeds}\nresources: {{gpus: 0, gpu_mem_gib: 0.0, disk_gib: 1.0, cpu_ok: true}}\n"
    task = task_of(tmp_path, text, claim("ordering", ORDER))
    rng = np.random.default_rng(1)
    runs = [series_run(task, arm, seed, [level * math.exp(0.004 * rng.standard_normal())] * 4, name="entropy_nats")
            for arm, level in zip("abcd", levels, strict=True) for seed in range(3)]  # fmt: skip
    row = only(grade_task(task, runs))
    assert row["verdict"] == expected and [pair["label"] for pair in row["pairs"]] == ["b / a", "c / b", "d / c"]


def test_equivalence_needs_the_interval_of_the_difference_inside_the_margin(tmp_path):
    grade = f"estimand: reward_mean, reducer: last_k_mean, window: 4, contrast: {{difference: [bf16, fp16]}}, interval: {{method: student_t}}, accept: [-0.03, 0.03], {TOLERANCE}"
    task = task_of(tmp_path, RL, claim("equivalence", grade))
    for gap, noise, expected in ((0.0, 0.004, "PASS"), (0.1, 0.004, "FAIL"), (0.0, 0.08, "INCONCLUSIVE")):
        shifts = noise * np.array([-1.0, 0.2, 1.0])
        runs = [series_run(task, "bf16", s, [0.5 + gap + shift] * 4) for s, shift in enumerate(shifts)]
        runs += [series_run(task, "fp16", s, [0.5] * 4) for s in range(3)]
        row = only(grade_task(task, runs))
        assert row["verdict"] == expected and row["estimate"] == pytest.approx(gap + shifts.mean())


def test_a_ratio_of_values_that_are_not_positive_has_no_estimate_and_no_verdict(tmp_path):
    grade = f"estimand: k1_nats_per_token, reducer: mean, contrast: {{ratio: [bf16, fp16]}}, interval: {{method: student_t}}, accept: [4, 16], {TOLERANCE}"
    task = task_of(tmp_path, RL, claim("ratio", grade))
    runs = [series_run(task, arm, s, [v] * 3, name="k1_nats_per_token") for arm, v in (("bf16", 1e-3), ("fp16", -1e-5)) for s in range(3)]
    row = only(grade_task(task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and row["estimate"] is None and "log scale" in row["reason"]


def test_a_time_that_is_censored_cannot_carry_a_verdict_past_the_horizon(tmp_path):
    grade = event_grade("bf16", "collapses", reducer="time_to_event", min_seeds=3).replace("[0.5, 1.0]", "[50, 130]").replace("clopper_pearson", "student_t")
    task = task_of(tmp_path, RL, claim("threshold", grade))
    runs = [series_run(task, "bf16", s, v) for s, v in enumerate((FALLS, FALLS[2:], RISES))]
    row = only(grade_task(task, runs))
    assert row["per_seed"][2]["censored"] == "high" and row["per_seed"][2]["value"] == 120 and row["verdict"] == "INCONCLUSIVE"
    late = only(grade_task(task, [series_run(task, "bf16", s, RISES[: 45 + s]) for s in range(3)]))
    assert late["verdict"] == "INCONCLUSIVE" and late["reason"].startswith("censored")


def test_reducers_by_hand():
    series = np.array([1.0, 2.0, 4.0, 8.0])
    expected = {("mean", None): 3.75, ("last_k_mean", 2): 6.0, ("median", None): 3.0, ("geo_mean", None): 8**0.5,
                ("log_ratio", 2): math.log(4.0), ("auc", None): (1.5 + 3 + 6) / 3}  # fmt: skip
    for (reducer, window), value in expected.items():
        assert reduced(series, reducer, window) == pytest.approx(value)
    assert reduced(series, "last_k_mean", 5) is None and reduced(np.array([math.nan, math.nan, 1.0]), "mean", None) is None
    assert reduced(np.array([]), "mean", None) is None and reduced(np.array([-1.0, 1.0]), "geo_mean", None) is None


# ---- the verdict as a file ---------------------------------------------------------------------------------------------------------

def test_a_verdict_is_the_same_in_any_order_of_runs_and_has_no_nan(ratio_task, tmp_path):
    runs = runs_for(ratio_task)
    verdict = grade_task(ratio_task, runs)
    assert json.dumps(verdict, allow_nan=False) == json.dumps(grade_task(ratio_task, runs[::-1]), allow_nan=False)
    path = write_verdict(verdict, tmp_path / "runs")
    assert path == tmp_path / "runs" / "tiny" / "verdict.json"
    assert json.loads(path.read_text()) == json.loads((tmp_path / "runs" / "last.json").read_text()) == json.loads(json.dumps(verdict))
    assert verdict_line(verdict, path) == f"VERDICT task=tiny verdict=PASS claims=1/1 verdict_file={path}"


def test_reported_claims_have_no_verdict_and_are_not_counted(tmp_path):
    both = "claims:\n  - {id: C1-x, about: C1, kind: ratio, statement: s}\n  - {id: C2-r, about: C2, kind: report, statement: r}\n"
    both += f"  - {{id: C27, about: C27, kind: report, statement: t}}\ngrade:\n  C1-x: {{{RATIO}}}\n"
    task = task_of(tmp_path, OFFLINE, both + "  C2-r: {estimand: seq_kl_k1_nats, contrast: {arm: bf16}}\n")
    verdict = grade_task(task, runs_for(task))
    assert [row["verdict"] for row in verdict["claims"]] == ["PASS", None, None] and verdict["claims"][1]["estimate"] is not None
    assert verdict["verdict"] == "PASS" and "claims=1/1" in verdict_line(verdict, "x")
    assert summarise_headline([verdict, grade_task(task, [])]).startswith("1 PASS, 0 FAIL, 0 INCONCLUSIVE, 1 NOT_RUN of 2 claims")


def test_exit_codes():
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 10, "ERROR": 11, "NOT_RUN": 12, "INVALID": 13}


# ---- the paper's own curves ----------------------------------------------------------------------------------------------------

SANITY = {"a": "GRPO", "b": "GRPO-Token-TIS", "c": "GRPO-Seq-MIS", "d": "GSPO", "e": "PG-Seq-IS", "f": "PG-Seq-MIS"}
END = "estimand: reward_mean, reducer: last_k_mean, window: 23, interval: {method: student_t}, min_seeds: 3, " + TOLERANCE


def curve_rows(tmp_path, kind, grade, curves, min_seeds=3):
    """(row of one seed, row of five jittered seeds) for a claim fed with {arm: curve}."""
    task = task_of(tmp_path, RL, claim(kind, grade), seeds=range(5))
    one = only(grade_task(task, [series_run(task, arm, 0, values) for arm, values in curves.items()]))
    many = [series_run(task, arm, s, jittered(values, [s, i])) for i, (arm, values) in enumerate(curves.items()) for s in range(5)]
    return one, only(grade_task(task, many))


def assert_paper(rows):
    one, five = rows
    assert one["verdict"] == "INCONCLUSIVE" and one["consistent_with_paper"] is True and ("too_few_seeds" in one["reason"] or "straddles" in one["reason"])
    assert five["verdict"] == "PASS", five["reason"]


@pytest.mark.parametrize("panel", SANITY)
def test_c6_every_fp16_curve_passes_95_percent_and_no_bf16_curve_does(tmp_path, panel):
    grade = END + ", contrast: {arm: fp16}, accept: [0.95, 1.0]"
    rows = curve_rows(tmp_path, "threshold", grade, {"fp16": curve(panel, "FP16")})
    assert_paper(rows)
    assert rows[0]["estimate"] == pytest.approx(curve(panel, "FP16")[-1], abs=0.003)
    assert curve_rows(tmp_path, "threshold", grade, {"fp16": curve(panel, "BF16")})[0]["consistent_with_paper"] is False


@pytest.mark.parametrize(("panel", "drop", "earliest", "latest"), [("a", 0.10, 488, 622), ("b", 0.04, 714, 793), ("d", 0.035, 1177, 1503),
                                                                   ("h", 0.25, 620, 821), ("g", 0.25, 168, 446)])  # fmt: skip
def test_c8_c9_c10_c20_c21_the_bf16_curve_collapses_and_the_fp16_curve_does_not(tmp_path, panel, drop, earliest, latest):
    rows = curve_rows(tmp_path, "event", event_grade("bf16", "collapses", drop=drop), {"bf16": curve(panel, "BF16")})
    assert rows[0]["estimate"] == 1.0
    assert_paper(rows)
    assert_paper(curve_rows(tmp_path, "event", event_grade("fp16", "stable", drop=drop), {"fp16": curve(panel, "FP16")}))
    when = event_grade("bf16", "collapses", drop=drop, reducer="time_to_event").replace("[0.5, 1.0]", f"[{earliest}, {latest}]")
    when = when.replace("clopper_pearson", "student_t")
    one, five = curve_rows(tmp_path, "threshold", when, {"bf16": curve(panel, "BF16")})
    assert earliest <= one["estimate"] <= latest and one["consistent_with_paper"] is True


@pytest.mark.parametrize("panel", ["c", "f"])
def test_c11_seq_mis_in_bf16_is_stable_and_ends_below_fp16(tmp_path, panel):
    assert_paper(curve_rows(tmp_path, "event", event_grade("bf16", "stable", drop=0.03), {"bf16": curve(panel, "BF16")}))
    grade = END + ", contrast: {difference: [fp16, bf16]}, accept: [0.02, null]"
    assert_paper(curve_rows(tmp_path, "threshold", grade, {arm: curve(panel, arm.upper()) for arm in ("fp16", "bf16")}))


@pytest.mark.parametrize(("claim_id", "panel", "last", "least", "gap"), [
    ("C12", "e", 1800, 0.10, 0.206), ("C22", "i", 151, 0.03, 0.05), ("C22", "j", 191, 0.03, 0.095), ("C22", "k", 141, -0.005, 0.009),
    ("C23", "l", 81, 0.01, 0.025)])  # fmt: skip
def test_c12_c22_c23_fp16_ends_above_bf16_by_what_the_figure_shows(tmp_path, claim_id, panel, last, least, gap):
    grade = END.replace("23", "3") + f", contrast: {{difference: [fp16, bf16]}}, accept: [{least}, null]"
    curves = {arm: curve(panel, arm.upper(), last) for arm in ("fp16", "bf16")}
    one, five = curve_rows(tmp_path, "threshold", grade, curves)
    assert one["estimate"] == pytest.approx(gap, abs=0.01) and one["consistent_with_paper"] is True, claim_id
    assert five["verdict"] in (("PASS",) if gap - least > 0.02 else ("PASS", "INCONCLUSIVE"))


def compared(tmp_path, kind, grade, jitter):
    """The row of a compare task fed with all six panels of figure 1, each its own task."""
    tasks = {panel: task_of(tmp_path, RL, claim("report", "estimand: reward_mean, contrast: {arm: bf16}"), name=f"s-{panel}", seeds=range(5)) for panel in SANITY}
    seeds = range(5) if jitter else (0,)
    runs = {
        f"s-{panel}": [
            series_run(task, arm, s, jittered(v, [s, ord(panel), len(v)]) if jitter else v)
            for arm, v in (("bf16", curve(panel, "BF16")), ("fp16", curve(panel, "FP16", 1830))) for s in seeds
        ] for panel, task in tasks.items()
    }  # fmt: skip
    task = task_of(tmp_path, COMPARE, claim(kind, grade), name="order", needs=[f"s-{p}" for p in SANITY], seeds=range(5))
    return only(grade_task(task, [], runs))


@pytest.mark.parametrize(("kind", "grade"), [
    ("ordering", event_grade("x", "collapses", drop=0.03, reducer="time_to_event").replace("{arm: x}", "{order: [s-a-bf16, s-b-bf16, s-d-bf16], margin: 0.05}")
     .replace("accept: [0.5, 1.0], ", "").replace("clopper_pearson", "student_t")),
    ("threshold", END + ", contrast: {difference: [s-e-fp16, s-c-bf16]}, accept: [0.015, null]"),
    ("threshold", END + ", contrast: {difference: [s-e-fp16, s-f-bf16]}, accept: [0.015, null]"),
    ("equivalence", END + ", contrast: {order: [s-a-fp16, s-b-fp16, s-c-fp16, s-d-fp16, s-e-fp16]}, accept: [-0.03, 0.03]"),
], ids=["C9-C10-order", "C13-seq-mis", "C13-pg-seq-mis", "C14"])  # fmt: skip
def test_c9_c10_c13_c14_claims_across_tasks(tmp_path, kind, grade):
    assert_paper((compared(tmp_path, kind, grade, False), compared(tmp_path, kind, grade, True)))


def test_a_compare_task_refuses_an_arm_of_a_task_that_it_does_not_need(tmp_path):
    with pytest.raises(UserError, match="grade.contrast.*s-z-fp16"):
        compared(tmp_path, "threshold", END + ", contrast: {difference: [s-e-fp16, s-z-fp16]}, accept: [0.015, null]", False)


def test_design_power_tells_a_design_that_cannot_decide(tmp_path, ratio_task):
    good = design_power(ratio_task)["C1-x"]
    assert 0.85 < good["p_pass_if_true"] < 0.95 and good["p_fail_if_null"] > 0.95
    few = task_of(tmp_path, OFFLINE, claim("ratio", RATIO), seeds=[0], name="few")
    assert design_power(few)["C1-x"]["p_pass_if_true"] == design_power(few)["C1-x"]["p_fail_if_null"] == 0.0
    seen = design_power(ratio_task, runs_for(ratio_task))["C1-x"]
    assert seen["sd_source"].startswith("spread between launches") and seen["sd"] < 0.1
