"""The figures of a published task: which ones there are, and the offline ones.

`figure5` draws the paper's figure 5 from our own run: the sampled tokens' probabilities under both engines, and the
sequence log-ratio against length with its least-squares line. Dots are the published sample (plot_points.parquet);
every number printed in a panel is exact, from the sums over all tokens (evidence_summary.parquet).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from suite.archive.points import read_points
from suite.measure.mismatch import concat_sums, estimates
from suite.record.run import Run
from suite.report.figures.fall import lead_text, plot_fall
from suite.report.figures.rl import paper_curve, plot_rl
from suite.report.figures.svg import LINE_STYLES, MARKERS, STYLE, colour, dots, note, plt, scientific, to_svg
from suite.report.tables import PRECISIONS, Matrix, matrices, point_label, precision_pair
from suite.spec.kinds import Kind

MIN_TOKENS_PER_BIN = 100  # fewer tokens than this say nothing about a mean as heavy-tailed as k3
PANEL_PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True)
class Figure:
    name: str
    svg: bytes
    caption: str


@dataclass(frozen=True)
class Arm:
    """All seeds of one precision at one grid point: exact estimates, and the points to draw."""

    precision: str
    estimates: dict[str, float]
    points: dict[str, dict[str, np.ndarray]]
    num_seeds: int
    num_tokens: int
    num_sequences: int


def figures(kind: Kind, runs: list[Run]) -> list[Figure]:
    """Every figure that the published runs of one task of this kind on one fingerprint allow, sorted by name."""
    with plt.rc_context(STYLE):
        mismatch = _offline(runs) + _matrix(runs) if kind.has_trainer else []
        return sorted(mismatch + (_rl(runs) if kind.trains else []), key=lambda figure: figure.name)


def _offline(runs: list[Run]) -> list[Figure]:
    found = []
    scored = [run for run in runs if run.summary is not None]  # runs that came to their end
    for point, arms in offline_arms(scored).items():
        suffix, where = (f"-{point}", f" Grid point {point}.") if point else ("", "")
        drawn = [arms[name] for name in PANEL_PRECISIONS if name in arms]
        if drawn:
            text = "The paper's figure 5 from our own run: token probabilities of sampler (μ) and trainer (π), and the "
            text += f"log-ratio of whole responses against their length.{where}"
            found.append(Figure(f"figure5{suffix}", figure5(drawn), text))
        text = "Mismatch per token by position in the response, length of the response, entropy of the trainer's "
        text += f"distribution and the sampler's probability of the token.{where}"
        found.append(Figure(f"resolved{suffix}", resolved(list(arms.values())), text))
    return found


def _matrix(runs: list[Run]) -> list[Figure]:
    text = "Mismatch for every pair of rollout and training precision (k3, and mean |π − μ|)."
    return [
        Figure(
            f"matrix-{m.point}" if m.point else "matrix",
            heat_map(m),
            text + (f" Grid point {m.point}." if m.point else ""),
        )
        for m in matrices(runs)
    ]


def _rl(runs: list[Run]) -> list[Figure]:
    chosen = [run for run in runs if not run.is_control and run.metrics]
    if not chosen:
        return []
    algorithms = {(r.record["cell"]["settings"].get("algorithm") or {}).get("name") or "" for r in chosen}
    curve = paper_curve(*algorithms) if len(algorithms) == 1 else None
    text = "Training reward, mismatch before each update, and the largest probability differences, per iteration."
    text += " Dotted: the paper's smoothed curve, on the upper axis." if curve else ""
    found = [Figure("training", plot_rl(chosen, curve), text)]
    if leads := lead_text(chosen):
        found.append(Figure("fall", plot_fall(chosen), f"What moves when the reward falls. {leads}"))
    return found


def offline_arms(runs: list[Run]) -> dict[str, dict[str, Arm]]:
    """{grid point: {precision: Arm}} of the arms that sample and train in one precision, bf16 first; seeds pooled."""
    groups = defaultdict(list)
    for run in runs:
        rollout, train = precision_pair(run)
        if not run.is_control and rollout == train in PRECISIONS and (run.folder / "plot_points.parquet").exists():
            groups[point_label(run), rollout].append(run)
    points = sorted({point for point, _ in groups})
    return {pt: {p: _pool(p, groups[pt, p]) for p in PRECISIONS if (pt, p) in groups} for pt in points}


def _pool(precision: str, runs: list[Run]) -> Arm:
    sums = concat_sums([run.summary for run in runs])
    each = [read_points(run.folder / "plot_points.parquet") for run in runs]
    points = {
        kind: {
            name: np.concatenate([p[kind][name] for p in each if kind in p])
            for name in next(p for p in each if kind in p)[kind]
        }
        for kind in dict.fromkeys(kind for p in each for kind in p)
    }
    tokens, sequences = int(sums["num_response_tokens"].sum()), int(sums["num_rollouts"].sum())
    return Arm(precision, estimates(sums), points, len({run.seed for run in runs}), tokens, sequences)


# --- figure 5 --------------------------------------------------------------------------------------------------------


def figure5(arms: list[Arm]) -> bytes:
    """Two rows: token probabilities (mu on x, pi on y), sequence log-ratio against length; one column per precision."""
    figure, axes = plt.subplots(2, len(arms), figsize=(3.7 * len(arms), 7.0), squeeze=False, layout="constrained")
    limits = _sequence_limits(arms)
    for column, arm in enumerate(arms):
        _token_panel(axes[0, column], arm)
        _sequence_panel(axes[1, column], arm, limits)
    axes[0, 0].set_ylabel("trainer probability π")
    axes[1, 0].set_ylabel("sequence log-ratio (nats)\nlog π(y) − log μ(y)")
    return to_svg(figure)


def _token_panel(axes, arm: Arm) -> None:
    tokens = arm.points["token"]
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="sampler probability μ", aspect="equal")
    axes.set_title(f"{arm.precision}: {arm.num_tokens:,} tokens, {arm.num_seeds} seeds", color=colour(arm.precision))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, zorder=1)
    dots(axes, tokens["mu"], tokens["pi"], colour(arm.precision), size=2.4, alpha=0.75)
    shown = f"mean |π − μ| = {scientific(arm.estimates['prob_diff_mean'])}\n"
    shown += f"max |π − μ| = {max(arm.estimates['prob_diff_max'], -arm.estimates['prob_diff_min']):.2f}\n"
    note(axes, shown + f"k3 = {scientific(arm.estimates['k3_nats_per_token'])} nats/token")


def _sequence_limits(arms: list[Arm]) -> tuple[tuple[float, float], tuple[float, float]]:
    """One range of length (thousands of tokens) and one of log-ratio (nats) for all panels, so that they compare."""
    length = np.concatenate([arm.points["sequence"]["num_tokens"] for arm in arms]) / 1000
    ratio = np.concatenate([arm.points["sequence"]["seq_log_ratio"] for arm in arms])
    pad_x, pad_y = 0.04 * np.ptp(length) + 1e-3, 0.06 * np.ptp(ratio) + 1e-3
    top = ratio.max() + pad_y + 0.24 * np.ptp(ratio)  # room for the note
    return (length.min() - pad_x, length.max() + pad_x), (ratio.min() - pad_y, top)


def _sequence_panel(axes, arm: Arm, limits) -> None:
    sequences, e = arm.points["sequence"], arm.estimates
    length = sequences["num_tokens"] / 1000
    axes.set(xlim=limits[0], ylim=limits[1], xlabel="response length (thousand tokens)")
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
    dots(axes, length, sequences["seq_log_ratio"], colour(arm.precision), size=2.6, alpha=0.65)
    ends = np.array([length.min(), length.max()])
    slope = e["seq_slope_nats_per_1k_tokens"]
    if slope is not None:
        axes.plot(ends, e["seq_intercept_nats"] + slope * ends, color="black", linewidth=1.4, zorder=4)
    note(axes, f"slope = {'none, all lengths are alike' if slope is None else _signed(slope) + ' nats per 1K tokens'}\n"
               f"KL[μ|π] = {_signed(e['seq_kl_k1_nats'])} nats/sequence\n{arm.num_sequences:,} responses")  # fmt: skip


def _signed(value: float) -> str:
    return scientific(value).replace("-", "−")


# --- mismatch resolved, and the matrix -------------------------------------------------------------------------------


RESOLVED = (
    ("by_position", "position in the response (tokens)"),
    ("by_length", "length of the response (tokens)"),
    ("by_entropy", "entropy of π where the token was drawn (nats)"),
    ("by_prob", "sampler probability μ of the token (logit scale)"),
)


def resolved(arms: list[Arm]) -> bytes:
    """k3 per token (log axis) by position in the response, by its length, by entropy, and by the sampler's probability of
    the token; panels without a recorded property are left out."""
    panels = [(kind, label) for kind, label in RESOLVED if all(_has(arm, kind) for arm in arms)]
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(7.4, 6.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (kind, label) in zip(axes.flat, panels):
        axis.set(yscale="log", xlabel=label)
        for arm in arms:
            low, high, k3 = _binned(arm.points[kind])
            style = {"linestyle": LINE_STYLES[arm.precision], "marker": MARKERS[arm.precision], "markersize": 4}
            axis.plot(_middle(kind, low, high), k3, color=colour(arm.precision), linewidth=1.3, label=arm.precision, **style)
        if kind == "by_prob":
            ticks = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
            axis.set_xticks(_stretched(ticks), [f"{tick:g}" for tick in ticks])
        else:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if kind == "by_length" else (1,)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("k3 (nats per token)")
    axes[0, 0].legend(title="precision", loc="best")
    return to_svg(figure)


def _has(arm: Arm, kind: str) -> bool:
    return "count" in arm.points.get(kind, {})


def _middle(kind: str, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where a bin is drawn."""
    if kind == "by_prob":
        return _stretched((low + np.minimum(high, 1)) / 2)
    if kind == "by_entropy":
        return np.sqrt(np.maximum(low, high / 2) * high)
    return np.sqrt((low + 1) * high)


def _binned(bins: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean k3 per bin over all seeds; bins with fewer than MIN_TOKENS_PER_BIN tokens, or with k3 of 0, are left out."""
    low, index = np.unique(bins["bin_low"], return_inverse=True)
    count, total = (np.bincount(index, weights=bins[name]) for name in ("count", "sum_k3"))
    high = np.zeros(len(low))
    high[index] = bins["bin_high"]
    kept = (count >= MIN_TOKENS_PER_BIN) & (total > 0)
    return low[kept], high[kept], total[kept] / count[kept]


def _stretched(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability, 2e-4, 1 - 2e-4)
    return np.log(clipped / (1 - clipped))


def heat_map(matrix: Matrix) -> bytes:
    """Two 3 x 3 maps, k3 and mean |pi - mu|: rows are the rollout's precision, columns the trainer's; log colours."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 4.1), layout="constrained")
    panels = ((matrix.k3_nats_per_token, "k3 (nats per token)"), (matrix.prob_diff_mean, "mean |π − μ|"))
    for panel, (values, title) in zip(axes, panels):
        _map_panel(panel, values, title)
    axes[0].set_ylabel("rollout precision (μ)")
    return to_svg(figure)


def _map_panel(axes, values: np.ndarray, title: str) -> None:
    logs = np.log10(np.where(values > 0, values, np.nan))
    low, high = np.nanmin(logs), np.nanmax(logs)
    shade = (logs - low) / (high - low) if high > low else np.zeros_like(logs)
    for (i, j), value in np.ndenumerate(values):
        face = plt.get_cmap("cividis")(0.0 if np.isnan(shade[i, j]) else float(shade[i, j]))
        axes.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5))
        ink = "white" if np.isnan(shade[i, j]) or shade[i, j] < 0.55 else "black"
        axes.text(j, i, scientific(value), ha="center", va="center", color=ink, fontsize=10)
    axes.set(xlim=(-0.5, 2.5), ylim=(2.5, -0.5), aspect="equal", title=title, xlabel="training precision (π)")
    axes.set_xticks(range(3), PRECISIONS)
    axes.set_yticks(range(3), PRECISIONS)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
