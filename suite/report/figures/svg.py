"""One look for all figures, and SVG whose bytes depend on nothing but the numbers drawn.

Colours are those of Okabe and Ito, which people with colour-blindness tell apart; each precision keeps its own
everywhere. Text stays text (svg.fonttype none), so that a figure is small, can be searched, and does not depend on the
version of a font library.
"""

from __future__ import annotations

import io
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.patches import PathPatch  # noqa: E402
from matplotlib.path import Path as Outline  # noqa: E402

COLOURS = {"bf16": "#D55E00", "fp16": "#0072B2", "fp32": "#009E73"}
OTHER_COLOUR = "#555555"
LINE_STYLES = {"bf16": "-", "fp16": "-", "fp32": "--"}
MARKERS = {"bf16": "o", "fp16": "s", "fp32": "^"}
STYLE = {
    "svg.hashsalt": "fp16-mismatch-suite", "svg.fonttype": "none", "path.simplify": False,
    "font.family": ["DejaVu Sans"], "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "figure.facecolor": "white", "legend.frameon": False, "axes.unicode_minus": True,
}  # fmt: skip
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?:e-?\d+)?")


def colour(precision: str) -> str:
    return COLOURS.get(precision, OTHER_COLOUR)


def to_svg(figure) -> bytes:
    """The figure as SVG, coordinates rounded to 0.01 pt, without date or software version; closes the figure."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    rounded = re.sub(r"<[^!>][^>]*>", lambda tag: _LONG_NUMBER.sub(_two_decimals, tag[0]), out.getvalue())
    fonts = rounded.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, Helvetica, sans-serif")
    return "\n".join(line.rstrip() for line in fonts.splitlines()).encode() + b"\n"


def _two_decimals(match: re.Match) -> str:
    text = f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def dots(axes, x: np.ndarray, y: np.ndarray, colour: str, *, size: float, alpha: float, cells: int = 260) -> None:
    """A scatter plot as one SVG path of round dots; points that would cover each other are drawn once.

    x, y: (N,) in the units of axes whose limits are already set. `cells`: how many dots fit along an axis.
    """
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    grid = np.column_stack([(x - x0) / (x1 - x0), (y - y0) / (y1 - y0)])
    _, kept = np.unique(np.round(grid * cells), axis=0, return_index=True)
    kept = np.sort(kept)
    ends = np.column_stack([x[kept], y[kept], x[kept] + (x1 - x0) * 1e-5, y[kept]]).reshape(-1, 2)
    codes = np.tile([Outline.MOVETO, Outline.LINETO], len(kept))
    outline = Outline(ends, codes) if len(kept) else Outline(np.empty((0, 2)))
    outline.should_simplify = False
    axes.add_patch(
        PathPatch(outline, edgecolor=colour, facecolor="none", linewidth=size, alpha=alpha, capstyle="round")
    )


def note(axes, text: str, *, x: float = 0.04, y: float = 0.96, **how) -> None:
    """A few lines inside a panel, in axes coordinates, on a pale ground so that dots do not cross them."""
    how = {"ha": "left", "va": "top", "fontsize": 8.5, "linespacing": 1.35} | how
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
    axes.text(x, y, text, transform=axes.transAxes, bbox=box, zorder=5, **how)


def scientific(value: float, digits: int = 2) -> str:
    """2.3e-04 -> "2.3×10⁻⁴"; numbers between 0.01 and 10,000 as they are; zero and not-a-number in words."""
    if not np.isfinite(value):
        return "n/a"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
