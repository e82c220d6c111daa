"""Grading: every value, every reason, every order of precedence, on runs whose outcome is known beforehand."""

import json
import math

import numpy as np
import pytest
from fakes import (
    OFFLINE,
    RL,
    block,
    claim,
    executed_as,
    offline_run,
    only,
    prompt_table,
    run_of,
    series_run,
    task_of,
)

from suite.errors import UserError
from suite.grade.arms import arm_metrics
from suite.grade.judge import ends_text, region_text
from suite.grade.launches import unit_of
from suite.grade.verdict import EXIT_CODES, design_power, grade_by_fingerprint, grade_task, verdict_line, write_verdict
from suite.spec.precision import contract_breaches

RATIO = block("k3_nats_per_token", "ratio: [bf16, fp16]", "[16, 128]", "min_seeds: 3")
NOISE = {"bf16": 2.0**-5, "fp16": 2.0**-8, "control-aa": 2.0**-5}


@pytest.fixture
def ratio_task(tmp_path):
    paper = ", paper: {value: 64, unit: ratio, source: here, level: P4, baseline: C1.theory_k3_ratio}"
    return task_of(tmp_path, OFFLINE, claim("ratio", RATIO, paper=paper))


def runs_for(task, noise=NOISE, seeds=(0, 1, 2), **changes):
    return [offline_run(task, arm, seed, noise[arm], **changes) for arm in task.arms for seed in seeds]


def test_a_ratio_near_64_passes_and_the_verdict_has_every_field_of_the_interface(ratio_task):
    verdict = grade_task(ratio_task, runs_for(ratio_task))
    row = only(verdict)
    assert verdict["verdict"] == row["verdict"] == "PASS"
    assert 50 < row["interval"][0] < row["estimate"] < row["interval"][1] < 80
    assert row["display_interval"][0] < row["estimate"] < row["display_interval"][1]
    assert (
        [seed["seed"] for seed in row["per_seed"]] == [0, 1, 2]
        and row["num_seeds"] == 3
        and row["consistent_with_paper"] is True
    )
    top = (
        "schema task task_version grade_version tier fingerprint verdict reason claims metrics controls runs environment "
        "suite"
    )
    fields = (
        "id kind statement estimand unit estimator paper_value paper_source estimate interval interval_method accept"
    )
    fields += " num_seeds verdict reason consistent_with_paper"
    assert set(verdict) == set(top.split()) and set(fields.split()) <= set(row)
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
        assert (
            verdict["verdict"] == "FAIL"
            and "disjoint" in only(verdict)["reason"]
            and only(verdict)["consistent_with_paper"] is False
        )


def test_an_interval_across_the_end_of_the_region_is_inconclusive_and_says_how_many_seeds_it_takes(ratio_task):
    noise = {0: 2.0**-7.2, 1: 2.0**-6.8, 2: 2.0**-7.4}
    runs = [offline_run(ratio_task, "bf16", s, 2.0**-5) for s in noise] + [
        offline_run(ratio_task, "fp16", s, n) for s, n in noise.items()
    ]
    row = only(grade_task(ratio_task, runs))
    assert row["verdict"] == "INCONCLUSIVE" and row["reason"].startswith("straddles") and "seeds" in row["resolve"]


def test_one_seed_is_inconclusive_and_says_beside_it_whether_it_fits(ratio_task):
    row = only(grade_task(ratio_task, runs_for(ratio_task, seeds=(0,))))
    assert (
        row["verdict"] == "INCONCLUSIVE"
        and row["reason"].startswith("too_few_seeds")
        and row["consistent_with_paper"] is True
    )
    assert row["interval"] is None and row["display_interval"][0] < row["estimate"] < row["display_interval"][1]
    row = only(grade_task(ratio_task, runs_for(ratio_task, NOISE | {"fp16": 2.0**-5}, seeds=(0,))))
    assert row["verdict"] == "INCONCLUSIVE" and row["consistent_with_paper"] is False


def test_shares_that_agree_exactly_get_the_exact_interval_and_copies_of_a_launch_none(ratio_task):
    """Five launches that solved everything may agree; log-probs that agree to the last bit are one launch."""
    same = [
        run_of(ratio_task, arm, seed, summary=prompt_table(NOISE[arm], 7))
        for arm in ("bf16", "fp16")
        for seed in (0, 1, 2)
    ]
    verdict = grade_task(ratio_task, same)
    assert verdict["verdict"] == "INVALID" and "one and the same run: 6 of 6 problems agree to the last bit" in verdict["reason"]


def test_without_prompt_sums_launches_that_agree_exactly_decide_nothing(tmp_path):
    grade = block("entropy_nats", "arm: bf16", "[0.5, 1.5]")
    task = task_of(tmp_path, RL, claim("threshold", grade))
    row = only(grade_task(task, [series_run(task, "bf16", seed, [1.0] * 5, name="entropy_nats") for seed in range(3)]))
    assert row["verdict"] == "INCONCLUSIVE" and "agree exactly" in row["reason"] and row["interval"] is None


def test_fail_needs_the_interval_with_the_split_error_and_pass_the_stated_one(tmp_path):
    """One claim: t(0.95; 2) = 2.92 excludes the region. The same numbers in four: t(0.9875; 2) = 6.2 does not."""
    one = block("entropy_nats", "arm: bf16", "[1.4, 2.0]")
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
        assert verdict["claims"][0]["interval"] == pytest.approx(
            [math.exp(values.mean() - 2.92 * half), math.exp(values.mean() + 2.92 * half)], rel=1e-3
        )


def test_a_weak_tolerance_and_an_unpinned_input_cap_both_ways(tmp_path):
    weak = task_of(tmp_path, OFFLINE, claim("ratio", RATIO.replace("level: P4", "level: P5")))
    unpinned = task_of(tmp_path, OFFLINE, claim("ratio", RATIO), sha="unknown", name="unpinned")
    for task, word in ((weak, "weak_tolerance"), (unpinned, "unpinned_input")):
        for noise, otherwise in ((NOISE, "PASS"), (NOISE | {"fp16": 2.0**-5}, "FAIL")):
            row = only(grade_task(task, runs_for(task, noise)))
            assert (
                row["verdict"] == "INCONCLUSIVE"
                and row["reason"].startswith(word)
                and f"otherwise {otherwise}" in row["reason"]
            )


def test_an_engine_in_another_precision_than_its_arm_makes_the_task_invalid(ratio_task):
    runs = runs_for(ratio_task)
    runs[4] = offline_run(
        ratio_task, "fp16", 1, NOISE["fp16"],
        precision_executed=executed_as({"rollout": "fp16", "train": "fp16"}) | {"rollout_weights": "bf16"},
    )  # fmt: skip
    verdict = grade_task(ratio_task, runs)
    assert verdict["verdict"] == "INVALID" and "rollout_weights: ran in bf16" in verdict["reason"]


@pytest.mark.parametrize("said", [{}, {"compute": "fp16", "rollout_weights": "fp16"}])
def test_an_engine_that_does_not_say_what_it_ran_in_makes_the_task_invalid(ratio_task, said):
    runs = runs_for(ratio_task)
    runs[4] = offline_run(ratio_task, "fp16", 1, NOISE["fp16"], precision_executed=said)
    verdict = grade_task(ratio_task, runs)
    assert verdict["verdict"] == "INVALID" and "kv_cache: not recorded" in verdict["reason"] + str(verdict["claims"])


@pytest.mark.parametrize("point", ["master_weights", "gradient_reduction", "optimizer_state"])
def test_sixteen_bit_masters_gradients_or_moments_are_a_breach(point):
    asked = {"rollout": "bf16", "train": "bf16"}
    assert contract_breaches(asked, executed_as(asked)) == []
    assert contract_breaches(asked, executed_as(asked) | {point: "bf16"}) == [f"{point}: ran in bf16, the arm asks for fp32"]


def test_metrics_of_an_arm_are_means_over_its_launches_and_leave_controls_out(ratio_task):
    task = ratio_task.model_copy(update={"metrics": ("k3_nats_per_token", "grad_norm")})
    runs = [run_of(task, "bf16", seed, series_summary={"k3_nats_per_token": seed + 1.0},
                   metrics=[{"grad_norm": 2.0}, {"grad_norm": float("nan")}, {"grad_norm": 4.0}]) for seed in (0, 1)]  # fmt: skip
    assert arm_metrics(task, [*runs, run_of(task, "fp16", 0, status="failed")]) == [
        {"arm": "bf16", "at": {}, "num_launches": 2, "values": {"k3_nats_per_token": 1.5, "grad_norm": 3.0}}
    ]


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
    assert {name: verdict["verdict"] for name, verdict in verdicts.items()} == {
        "cpu-test_none-0_torch-0": "PASS",
        "gpu-other": "FAIL",
    }


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
    return [
        offline_run(task, "control-floor", 0, floor),
        *(offline_run(task, "control-aa", seed, aa) for seed in (100, 101, 102)),
    ]


def test_controls_that_hold_let_a_pass_stand(guarded):
    verdict = grade_task(guarded, runs_for(guarded) + control_runs(guarded))
    assert verdict["verdict"] == "PASS" and [control["outcome"] for control in verdict["controls"]] == [
        "holds",
        "holds",
    ]
    assert verdict["controls"][1]["interval"][0] < 1 < verdict["controls"][1]["interval"][1]


def test_a_broken_control_makes_every_claim_invalid(guarded):
    for broken in ({"floor": 2.0**-8}, {"aa": 2.0**-7}):
        verdict = grade_task(guarded, runs_for(guarded) + control_runs(guarded, **broken))
        assert verdict["verdict"] == only(verdict)["verdict"] == "INVALID" and "broken" in [
            c["outcome"] for c in verdict["controls"]
        ]


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


def test_a_verdict_is_the_same_in_any_order_of_runs_and_has_no_nan(ratio_task, tmp_path):
    runs = runs_for(ratio_task)
    verdict = grade_task(ratio_task, runs)
    assert json.dumps(verdict, allow_nan=False) == json.dumps(grade_task(ratio_task, runs[::-1]), allow_nan=False)
    path = write_verdict(verdict, tmp_path / "runs")
    assert path == tmp_path / "runs" / "tiny" / "verdict.json"
    assert (
        json.loads(path.read_text())
        == json.loads((tmp_path / "runs" / "last.json").read_text())
        == json.loads(json.dumps(verdict))
    )
    assert verdict_line(verdict, path) == f"VERDICT task=tiny verdict=PASS claims=1/1 verdict_file={path}"


def test_reported_claims_have_no_verdict_and_are_not_counted(tmp_path):
    both = "claims:\n  - {id: C1-x, about: C1, kind: ratio, statement: s}\n"
    both += "  - {id: C2-r, about: C2, kind: report, statement: r}\n"
    both += f"  - {{id: C27, about: C27, kind: report, statement: t}}\ngrade:\n  C1-x: {{{RATIO}}}\n"
    task = task_of(tmp_path, OFFLINE, both + "  C2-r: {estimand: seq_kl_k1_nats, contrast: {arm: bf16}}\n")
    verdict = grade_task(task, runs_for(task))
    assert [row["verdict"] for row in verdict["claims"]] == ["PASS", None, None] and verdict["claims"][1][
        "estimate"
    ] is not None
    assert verdict["verdict"] == "PASS" and "claims=1/1" in verdict_line(verdict, "x")


def test_units_of_runs_that_count():
    assert unit_of("overlap_share", "arm", "mean") == "share"
    assert unit_of("num_rows", "arm", "mean") == "rows"
    assert unit_of("k3_nats_per_token", "ratio", "mean") == "ratio"


def test_counts_stand_in_full_in_a_reason():
    assert ends_text((11680.0, 11680.0)) == "[11680, 11680]"
    assert ends_text((0.0123456, math.inf)) == "[0.01235, inf]"
    assert region_text([None, 11680]) == "[-inf, 11680]"


def test_exit_codes():
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 10, "ERROR": 11, "NOT_RUN": 12, "INVALID": 13}


def test_design_power_tells_a_design_that_cannot_decide(tmp_path, ratio_task):
    good = design_power(ratio_task)["C1-x"]
    assert 0.85 < good["p_pass_if_true"] < 0.95 and good["p_fail_if_null"] > 0.95
    few = task_of(tmp_path, OFFLINE, claim("ratio", RATIO), seeds=[0], name="few")
    assert design_power(few)["C1-x"]["p_pass_if_true"] == design_power(few)["C1-x"]["p_fail_if_null"] == 0.0
    seen = design_power(ratio_task, runs_for(ratio_task))["C1-x"]
    assert seen["sd_source"].startswith("spread between launches") and seen["sd"] < 0.1
