"""Which quantity moves first when training collapses, and by how many iterations it leads the fall of the reward. No torch.

A quantity has moved at the first iteration from which its window mean stays, for as many means as a collapse must hold,
outside its first mean by the factor of its row, in either direction. It leads by the iterations between that and the
iteration at which the fall of the reward begins (stats.collapse_time); a negative lead is a lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suite.measure.stats import collapse_time, window_mean

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
)


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
    """{name of a watched series: iterations by which it moved before the reward fell, None if it did not move}; None for a
    run whose reward did not fall."""
    fall = collapse_time(*_series(metrics, "reward_mean"), DROP, WINDOW, HOLD)
    if fall is None or fall.step is None:
        return None
    moved = {one.name: moved_at(*_series(metrics, one.name), one.factor) for one in WATCHED}
    return {name: None if step is None else fall.step - step for name, step in moved.items()}


def _series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in metrics if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]
