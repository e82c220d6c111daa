"""The paper's figure 5 from the rollouts of a check."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from suite.archive.points import points_of
from suite.check.measures import Launch
from suite.measure.mismatch import concat_sums, estimates
from suite.report.figures.plots import Arm, figure5
from suite.report.figures.svg import STYLE, plt

MOST_COLUMNS = 4
Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # log mu, log pi (T,) nats; response lengths (N,)


def draw(arms: dict[str, list[Launch]], parts: dict[str, Iterable[Part]]) -> bytes | None:
    """SVG of the first arms that have tokens; None where none has. parts: arm -> rollouts, laid end to end."""
    columns = []
    for arm, launches in list(arms.items())[:MOST_COLUMNS]:
        sums = concat_sums([launch.sums for launch in launches])
        tokens, sequences = int(sums["num_response_tokens"].sum()), int(sums["num_rollouts"].sum())
        if tokens and arm in parts:
            points = points_of((mu, pi, lengths, np.empty(0)) for mu, pi, lengths in parts[arm])
            columns.append(Arm(arm, estimates(sums), points, len(launches), tokens, sequences))
    if not columns:
        return None
    with plt.rc_context(STYLE):
        return figure5(columns)
