"""The figure of dose and response: the iteration at which training collapses against the mismatch it began with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suite.archive.doses import Level, Response, line_text
from suite.report.figures.plots import Figure
from suite.report.figures.svg import STYLE, plt, to_svg

BLACK, BLUE, GREY = "#000000", "#0072b2", "#777777"


def dose_figures(found: Sequence[Response], levels: Sequence[Level]) -> list[Figure]:
    """One figure per family of launches."""
    with plt.rc_context(STYLE):
        return [Figure(_name(found, at), plot_dose(one, levels), _caption(one)) for at, one in enumerate(found)]


def _name(found: Sequence[Response], at: int) -> str:
    return "dose" if len(found) == 1 else f"dose-{at + 1}"


def _caption(response: Response) -> str:
    return (
        f"{response.algorithm}: iteration at which the reward begins to fall for good, against k3 at the start of training. Dots are "
        f"launches that fell, triangles the last iteration of those that did not. {line_text(response)}"
    )


def plot_dose(response: Response, levels: Sequence[Level]) -> bytes:
    """Both axes logarithmic; the line with its 90 % band, if there is one; other mismatches as vertical lines."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    doses = [dose for dose in response.doses if not dose.is_exact]
    for fell, marker, face, label in ((True, "o", BLUE, "fell"), (False, "^", "none", "had not fallen by then")):
        points = [(dose.k3, one.time) for dose in doses for one in dose.launches if one.fell == fell and one.learned]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, facecolors=face, edgecolors=BLUE, s=34, label=label, zorder=3)
    low, high = min([*(dose.k3 for dose in doses), *(level.k3 for level in levels)]), max(dose.k3 for dose in doses)
    if response.line is not None:
        _draw_line(axes, response, np.geomspace(low / 1.5, high * 1.5, 25))
    axes.set(xscale="log", yscale="log", xlabel="k3 at the start (nats per token)", ylabel="iteration of the fall")
    for level in levels:
        axes.axvline(level.k3, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(level.k3, 0.98, level.label, rotation=90, va="top", ha="right", fontsize="x-small", color=GREY, transform=axes.get_xaxis_transform())
    axes.legend(loc="lower left", fontsize="small")
    return to_svg(figure)


def _draw_line(axes, response: Response, grid: np.ndarray) -> None:
    times = np.array([response.line.time_at(float(dose))[:3] for dose in grid])
    axes.plot(grid, times[:, 0], color=BLACK, linewidth=1.4, label="line, 90 % band")
    axes.fill_between(grid, times[:, 1], np.minimum(times[:, 2], 1e6), color=BLACK, alpha=0.12, linewidth=0)
    fell = [one.time for dose in response.doses for one in dose.launches]
    axes.set_ylim(0.5 * min(fell), 1e3 * max(fell))
