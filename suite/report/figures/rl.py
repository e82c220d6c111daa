"""The figure of an RL task: reward, mismatch, and the largest probability differences, per iteration and precision."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import numpy as np

from suite.record.run import Run
from suite.report.figures.svg import LINE_STYLES, colour, plt, to_svg
from suite.spec.checkout import find_repo

MORE_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a5a00")  # readable beside those of the precisions

ROUTING = "routing_disagreement"


def paper_curve(algorithm: str) -> Path | None:
    """The digitised training curve (figure 1 a-f) of an algorithm named as in the paper, if there is one."""
    wanted = re.sub(r"[^a-z]", "", algorithm.lower())
    for path in sorted((find_repo() / "baselines" / "curves").glob("fig1_train_smoothed_[a-f]_*.csv")):
        if re.sub(r"[^a-z]", "", path.stem.split("_", 4)[4].lower()) == wanted:
            return path
    return None


def plot_rl(runs: list[Run], curve_csv: Path | None) -> bytes:
    """Four panels over iterations: reward; k3 and mean |pi - mu|, each on a log axis; max and min of pi - mu. Of a mixture of
    experts a fifth: the share of token-layer pairs for which sampler and trainer choose other experts.

    Thin lines are seeds, thick ones their mean over the iterations that all seeds reached. With `curve_csv` (columns
    precision, step, reward) the paper's curve is dotted into the reward panel, on an axis of its own above.
    """
    panels = [("reward_mean",), ("k3_nats_per_token",), ("prob_diff_mean",), ("prob_diff_max", "prob_diff_min")]
    if series_of(runs, ROUTING):
        panels.append((ROUTING,))
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.2, 2.4 * len(panels)), sharex=True, layout="constrained")
    styles = styles_of(sorted({run.arm for run in runs}))
    for panel, names in zip(axes, panels):
        for name in names:
            for arm, series in series_of(runs, name).items():
                draw_series(panel, arm, series, styles[arm], label=name == names[0])
    axes[0].set(ylabel="training reward", ylim=(0, 1.02))
    axes[1].set(ylabel="k3 (nats per token)", yscale="log")
    axes[2].set(ylabel="mean |π − μ|", yscale="log")
    reach = min(1.05, 1.1 * max(abs(end) for end in axes[3].get_ylim()))  # a difference of probabilities ends at 1
    axes[3].set(ylabel="max and min of π − μ", ylim=(-reach, reach))
    axes[3].axhline(0, color="#999999", linewidth=0.8)
    for panel in axes[4:]:
        panel.set(ylabel="other experts (share)", ylim=(0, None))
    axes[-1].set(xlabel="iteration")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    if curve_csv is not None:
        _paper_axis(axes[0], read_curve(curve_csv))
    axes[0].legend(loc="lower right", ncols=3, fontsize="small")
    return to_svg(figure)


def read_curve(path: Path) -> dict[str, np.ndarray]:
    """{precision: (N, 2) of step and value} of a digitised figure; points left of step 0 are reading error, dropped."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    value = next(name for name in rows[0] if name not in ("precision", "step"))
    names = dict.fromkeys(row["precision"].lower() for row in rows)
    curves = {n: [(float(r["step"]), float(r[value])) for r in rows if r["precision"].lower() == n] for n in names}
    return {name: np.array([point for point in points if point[0] >= 0]) for name, points in curves.items()}


def series_of(runs: list[Run], name: str) -> dict[str, list[np.ndarray]]:
    """{arm: one (steps, 2) array of step and value per run}, bf16 first; runs without the metric are left out."""
    found = {}
    for run in sorted(runs, key=lambda run: (run.arm, run.seed)):
        points = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
        if points:
            found.setdefault(run.arm, []).append(np.array(points, dtype=float))
    return found


def styles_of(arms: list[str]) -> dict[str, dict]:
    """How each arm is drawn: in the colour of its precision, the first word of its name, dashed if the name has more words.
    Of several such arms of one precision each has a colour of its own."""
    styles = {}
    for precision in dict.fromkeys(arm.split("-")[0] for arm in arms):
        named = [arm for arm in arms if arm.startswith(f"{precision}-")]
        others = [one for one in MORE_COLOURS if one.lower() != colour(precision).lower()]
        own = [colour(precision)] if len(named) == 1 else itertools.cycle(others)
        dashes = "-" if len(named) > 1 and LINE_STYLES.get(precision) == "--" else "--"  # unlike the precision itself
        styles |= {arm: {"color": its, "linestyle": dashes} for arm, its in zip(named, own)}
        styles[precision] = {"color": colour(precision), "linestyle": LINE_STYLES.get(precision, "-")}
    return styles


def draw_series(axes, arm: str, series: list[np.ndarray], style: dict, label: bool) -> None:
    """Every seed as a thin line, their mean as a thick one."""
    for points in series:
        axes.plot(points[:, 0], points[:, 1], color=style["color"], linewidth=0.7, alpha=0.45)
    length = min(len(points) for points in series)
    mean = np.mean([points[:length, 1] for points in series], axis=0)
    text = f"{arm} ({len(series)} seed{'s' if len(series) > 1 else ''})"
    axes.plot(series[0][:length, 0], mean, label=text if label else None, linewidth=2.0, **style)


def _paper_axis(axes, curves: dict[str, np.ndarray]) -> None:
    above = axes.twiny()
    above.grid(False)
    above.spines["top"].set_visible(True)
    for precision, points in curves.items():
        above.plot(points[:, 0], points[:, 1], color=colour(precision), linewidth=1.2, linestyle=":")
        axes.plot([], [], color=colour(precision), linewidth=1.2, linestyle=":", label=f"paper, {precision}")
    above.set(
        xlim=(0, max(points[-1, 0] for points in curves.values())), xlabel="iteration in the paper (dotted curves)"
    )
