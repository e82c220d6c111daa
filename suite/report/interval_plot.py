"""One claim as a small drawing: accept region, interval, estimate and the paper's value on one axis. SVG of about 500 bytes whose
colours come from the page, so that it fits light and dark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from suite.report.rows import Row
from suite.report.tables import number, region
from suite.spec.estimands import EVERY_ESTIMAND

WIDTH, HEIGHT, MARGIN = 168, 26, 6


@dataclass(frozen=True)
class Axis:
    """From values to pixels; `is_log` where all of them are positive and lie over a decade apart."""

    low: float
    high: float
    is_log: bool

    def at(self, value: float) -> float:
        """Clipped to the drawing."""
        low, high, value = (_log(one) if self.is_log else one for one in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(MARGIN + min(1.0, max(0.0, share)) * (WIDTH - 2 * MARGIN), 1)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def interval_plot(row: Row) -> Markup:
    """Nothing for a row without a single number to draw, such as an order of several arms."""
    if not _is_number(row.estimate) or (row.interval is not None and not all(map(_is_number, row.interval))):
        return Markup("")
    ends = [end for end in (row.accept or []) if _is_number(end)]
    paper = row.paper_value if _is_number(row.paper_value) and row.paper_unit in ("", row.unit) else None
    axis = axis_of([row.estimate, *(row.interval or ()), *ends, *([paper] if paper is not None else [])], row.estimand)
    parts = [_band(axis, row.accept)] if row.accept is not None and all(end is None or _is_number(end) for end in row.accept) else []
    if row.interval is not None:
        parts.append(f'<path class="p-interval" d="M{axis.at(row.interval[0])} 13H{axis.at(row.interval[1])}"/>')
    if paper is not None:
        x = axis.at(paper)
        parts.append(f'<path class="p-paper" d="M{x} 3l4 4-4 4-4-4z"/>')
    parts.append(f'<circle class="p-estimate" cx="{axis.at(row.estimate)}" cy="13" r="3.5"/>')
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="') + _words(row, paper) + Markup(
        f'"><path class="p-axis" d="M{MARGIN} 22H{WIDTH - MARGIN}"/>{"".join(parts)}</svg>'
    )


def axis_of(values: list[float], estimand: str) -> Axis:
    """Over all the values, with a tenth of room at either end."""
    low, high = min(values), max(values)
    scale = EVERY_ESTIMAND[estimand].scale if estimand in EVERY_ESTIMAND else "identity"
    if low > 0 and high > 10 * low and scale != "logit":
        room = (high / low) ** 0.1
        return Axis(low / room, high * room, True)
    room = 0.1 * (high - low) or 0.5 * abs(high) or 0.5
    return Axis(low - room, high + room, False)


def _band(axis: Axis, accept) -> str:
    left, right = (axis.at(end) if end is not None else place for end, place in zip(accept, (0, WIDTH)))
    return f'<rect class="p-accept" x="{left}" y="4" width="{max(1, round(right - left, 1))}" height="18"/>'


def _words(row: Row, paper) -> str:
    parts = [f"estimate {number(row.estimate)}", row.interval and f"interval {region(row.interval)}", row.accept and f"accept {region(row.accept)}"]
    return "; ".join(filter(None, [*parts, f"paper {number(paper)}" if paper is not None else None]))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
