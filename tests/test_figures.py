"""What the figures show, asked of the figures themselves before they become SVG."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import RL, block, claim, series_run, task_of
from published import evidence, sums_of

from suite.archive import points
from suite.measure.mismatch import estimates
from suite.record.run import EVIDENCE_SCHEMA
from suite.report.figures import plots
from suite.report.figures import rl as plots_rl

STEPS = 12


@pytest.fixture
def drawn(monkeypatch):
    """The figure object in place of its SVG."""
    monkeypatch.setattr(plots_rl, "to_svg", lambda figure: figure)
    monkeypatch.setattr(plots, "to_svg", lambda figure: figure)


@pytest.fixture
def rl_task(tmp_path):
    return task_of(tmp_path, RL, claim("threshold", block("reward_mean", "arm: fp16", "[0.9, 1]", "reducer: epoch_mean, window: 2")))


def rl_runs(task, arms=("bf16", "fp16"), seeds=(0, 1)):
    ramp = np.linspace(0.2, 0.9, STEPS)
    return [
        series_run(task, arm, seed, ramp + 0.01 * seed, k3_nats_per_token=np.full(STEPS, 1e-4 if arm == "bf16" else 1e-6),
                   prob_diff_mean=np.full(STEPS, 1e-3), prob_diff_max=np.full(STEPS, 0.3), prob_diff_min=np.full(STEPS, -0.2),
                   grad_norm=np.ones(STEPS), cut=True)
        for arm in arms for seed in seeds
    ]  # fmt: skip


def test_an_rl_figure_has_reward_mismatch_on_log_axes_largest_differences_and_the_papers_curve(drawn, rl_task):
    figure = plots_rl.plot_rl(rl_runs(rl_task), plots_rl.paper_curve("GRPO"))
    reward, k3, diff, extremes, above = figure.axes
    assert [axes.get_yscale() for axes in (reward, k3, diff, extremes)] == ["linear", "log", "log", "linear"]
    labels = [text.get_text() for text in reward.get_legend().get_texts()]
    assert labels == ["bf16 (2 seeds)", "fp16 (2 seeds)", "paper, bf16", "paper, fp16"]
    assert {line.get_linestyle() for line in above.lines} == {":"} and len(above.lines) == 2
    thick = [line for line in reward.lines if line.get_linewidth() == 2.0]
    np.testing.assert_allclose(thick[0].get_ydata(), np.linspace(0.2, 0.9, STEPS) + 0.005)
    assert {float(line.get_ydata()[0]) for line in k3.lines} == {1e-4, 1e-6}
    low, high = extremes.get_ylim()
    assert low == -high and low < -0.2 and high > 0.3, "both ends of pi - mu, around 0"


def test_a_mixture_s_rl_figure_has_a_panel_of_other_experts_as_long_as_the_others(drawn, rl_task):
    runs = rl_runs(rl_task)
    for run in runs:
        share = 0.02 if run.arm == "bf16" else 0.0
        run.metrics[:] = [row | {"routing_disagreement": share} for row in run.metrics]
    *_, extremes, experts = plots_rl.plot_rl(runs, None).axes
    assert experts.get_ylabel() == "other experts (share)" and experts.get_xlabel() == "iteration" and not extremes.get_xlabel()
    assert {float(line.get_ydata()[0]) for line in experts.lines} == {0.02, 0.0} and experts.get_ylim()[0] == 0


def test_several_arms_of_one_precision_have_colours_of_their_own():
    styles = plots_rl.styles_of(["bf16", "fp16", "fp16-a", "fp16-b", "fp16-c"])
    assert len({style["color"] for style in styles.values()}) == 5
    dosed = plots_rl.styles_of(["fp32", "fp32-m1", "fp32-m1-tis"])
    assert len({style["color"].lower() for style in dosed.values()}) == 3
    assert dosed["fp32"]["linestyle"] != dosed["fp32-m1"]["linestyle"]
    assert plots_rl.styles_of(["fp16", "fp16-unscaled"])["fp16-unscaled"]["color"] == plots_rl.styles_of(["fp16"])["fp16"]["color"]


def test_the_papers_curve_is_found_by_the_algorithms_name_and_no_other_is_taken_for_it():
    names = ("GRPO", "GRPO-Token-TIS", "GRPO-Seq-MIS", "GSPO", "PG-Seq-IS", "PG-Seq-MIS")
    found = [plots_rl.paper_curve(name).stem.removeprefix("fig1_train_smoothed_")[0] for name in names]
    assert "".join(found) == "abcdef" and plots_rl.paper_curve("REINFORCE") is None


def arm_of(precision, noise, folder):
    rows = evidence(noise, seed=1).to_pylist()
    for row in rows:
        row["trainer_entropies"] = np.linspace(0.0, 2.0, len(row["rollout_logprobs"]))
    table = pa.Table.from_pylist(rows, schema=EVIDENCE_SCHEMA)
    (folder / precision).mkdir()
    pq.write_table(table, folder / precision / "part-00000.parquet")
    sums = sums_of(table)
    return plots.Arm(precision, estimates(sums), points.plot_points(folder / precision), 3,
                     int(sums["num_response_tokens"].sum()), int(sums["num_rollouts"].sum()))  # fmt: skip


def test_figure_5_prints_the_slope_and_the_kl_of_the_evidence(drawn, tmp_path):
    arms = [arm_of("bf16", 2.0**-5, tmp_path), arm_of("fp16", 2.0**-8, tmp_path)]
    figure = plots.figure5(arms)
    for column, arm in enumerate(arms):
        tokens, sequences = ([text.get_text() for text in figure.axes[row * 2 + column].texts] for row in (0, 1))
        e = arm.estimates
        assert any(f"slope = {plots._signed(e['seq_slope_nats_per_1k_tokens'])} nats" in text for text in sequences)
        assert any(f"KL[μ|π] = {plots._signed(e['seq_kl_k1_nats'])} nats" in text for text in sequences)
        assert any(f"k3 = {plots.scientific(e['k3_nats_per_token'])}" in text for text in tokens)
        line = next(line for line in figure.axes[2 + column].lines if line.get_linewidth() == 1.4)
        (x0, x1), (y0, y1) = line.get_xdata(), line.get_ydata()
        assert (y1 - y0) / (x1 - x0) == pytest.approx(e["seq_slope_nats_per_1k_tokens"])


def test_a_run_whose_responses_are_all_of_one_length_is_drawn_without_a_slope(drawn, tmp_path):
    arm = arm_of("bf16", 2.0**-5, tmp_path)
    arm.estimates.update(seq_slope_nats_per_1k_tokens=None, seq_intercept_nats=None)
    notes = [text.get_text() for axes in plots.figure5([arm]).axes for text in axes.texts]
    assert any("slope = none, all lengths are alike" in text for text in notes)


def test_the_resolved_figure_has_a_panel_for_each_property_that_was_recorded(drawn, tmp_path):
    arms = [arm_of("bf16", 2.0**-5, tmp_path), arm_of("fp16", 2.0**-8, tmp_path)]
    shown = [axes for axes in plots.resolved(arms).axes if axes.get_visible()]
    assert [axes.get_xlabel().split(" of ")[0].split(" in ")[0] for axes in shown] == ["position", "length", "entropy", "sampler probability μ"]
    assert all(axes.get_yscale() == "log" and len(axes.lines) == 2 for axes in shown)
    for arm in arms:
        del arm.points["by_entropy"]
    assert len([axes for axes in plots.resolved(arms).axes if axes.get_visible()]) == 3
