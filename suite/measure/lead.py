"""Which quantity moves first when training collapses, and by how many iterations it leads the fall of the reward. No torch.

A quantity has moved at the first iteration from which its window mean stays, for as many means as a collapse must hold,
outside its first mean by the factor of its row, in either direction. It leads by the iterations between that and the
iteration at which the fall of the reward begins (stats.collapse_time); a negative lead is a lag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suite.measure.stats import collapse_time, student_t_interval, window_mean

WINDOW, HOLD, DROP = 8, 8, 0.1  # of the fall, in iterations and in reward; every quantity is seen through the same window


@dataclass(frozen=True)
class Watched:
    """A series, and the factor by which it must change to count as moved."""

    name: str
    label: str
    factor: float


WATCHED = (
    Watched("k3_nats_per_token", "k3 (nats per token)", 2.0),
    Watched("bad_update_share_0p5", "share of bad updates", 2.0),
    Watched("entropy_nats", "entropy (nats)", 1.5),
    Watched("grad_norm", "gradient norm", 1.5),
    Watched("response_tokens_mean", "response length (tokens)", 1.1),
    Watched("argmax_flip_share", "share of argmax flips", 2.0),
    Watched("grad_norm_embedding", "gradient norm of the embedding", 1.5),
    Watched("grad_norm_first_layers", "gradient norm of the first layers", 1.5),
    Watched("grad_norm_middle_layers", "gradient norm of the middle layers", 1.5),
    Watched("grad_norm_last_layers", "gradient norm of the last layers", 1.5),
    Watched("grad_norm_head", "gradient norm of the head", 1.5),
)


@dataclass(frozen=True)
class Lead:
    """By how many iterations a series had moved before the reward fell, over the launches that fell: the mean over those in
    which it moved, its 90 % interval (None of one launch, or of equal ones), and how many moved."""

    watched: Watched
    mean: float | None
    interval: tuple[float, float] | None
    num_moved: int
    num_fell: int


def moved_at(steps: Sequence[int], values: Sequence[float], factor: float) -> int | None:
    """The iteration from which (n,) values stay away from their first window mean by `factor`; None if they never do, or
    if that mean is not positive."""
    means = window_mean(np.asarray(values, np.float64), WINDOW)
    if not means.size or not means[0] > 0:
        return None
    away = (means >= factor * means[0]) | (means <= means[0] / factor)
    for start in range(len(away) - HOLD + 1):
        if away[start : start + HOLD].all():
            return int(steps[start + WINDOW - 1])
    return None


def leads(metrics: list[dict]) -> dict[str, int | None] | None:
    """{name of a watched series that the run records: iterations by which it moved before the reward fell, None if it did
    not move}; None for a run whose reward did not fall."""
    fall = collapse_time(*_series(metrics, "reward_mean"), DROP, WINDOW, HOLD)
    if fall is None or fall.step is None:
        return None
    recorded = {one: series for one in WATCHED if (series := _series(metrics, one.name))[0]}
    moved = {one.name: moved_at(*series, one.factor) for one, series in recorded.items()}
    return {name: None if step is None else fall.step - step for name, step in moved.items()}


def over_launches(runs: Sequence[list[dict]]) -> list[Lead]:
    """The leads of every watched series over the metrics of launches, in the order of WATCHED; [] where no reward fell."""
    fell = [lead for lead in map(leads, runs) if lead is not None]
    return [_lead(one, [lead.get(one.name) for lead in fell]) for one in WATCHED if any(one.name in lead for lead in fell)]


def in_order(found: list[Lead]) -> list[Lead]:
    """The series that moved in every launch that fell, the earliest first; then the others."""
    return sorted(found, key=lambda lead: (lead.num_moved < lead.num_fell, -(lead.mean if lead.mean is not None else -math.inf)))


def lead_of(lead: Lead) -> str:
    """Its mean with the interval, in iterations, and in how many launches it never moved."""
    if lead.mean is None:
        return "never moved"
    missing = lead.num_fell - lead.num_moved
    shown = f"{lead.mean:.1f} [{lead.interval[0]:.1f}, {lead.interval[1]:.1f}]" if lead.interval else f"{lead.mean:.1f}"
    return shown + (f" (in {missing} it never moved)" if missing else "")


def _lead(watched: Watched, values: list[int | None]) -> Lead:
    moved = [value for value in values if value is not None]
    if not moved:
        return Lead(watched, None, None, 0, len(values))
    interval = student_t_interval(moved, 0.90, scale="identity") if len(moved) > 1 else None
    ends = (interval.lo, interval.hi) if interval else None
    return Lead(watched, sum(moved) / len(moved), ends, len(moved), len(values))


def _series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]
