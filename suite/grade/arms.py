"""What a task's `metrics` come to in each arm: the table beside the claims. Nothing here is graded."""

from __future__ import annotations

import numpy as np

from suite.grade.judge import number
from suite.grade.launches import FINISHED
from suite.spec.plan import canonical_json
from suite.spec.task import axis_label


def arm_metrics(task, runs: list) -> list[dict]:
    """One row per arm and grid point with a finished run: {arm, at, num_launches, values: {metric: mean over its runs}}.

    The value of a launch is that of the whole run where records hold one (all tokens pooled), else the mean over its
    iterations; None where no launch has one.
    """
    groups: dict[tuple, list] = {}
    for run in runs:
        if run.status in FINISHED and not run.is_control:
            groups.setdefault((canonical_json(run.point), run.arm), []).append(run)
    return [
        {"arm": arm, "at": dict(found[0].point), "num_launches": len({run.seed for run in found}),
         "values": {name: _mean([_of_launch(run, name) for run in found]) for name in task.metrics}}
        for (_, arm), found in sorted(groups.items())
    ]  # fmt: skip


def arm_label(row: dict) -> str:
    """`bf16`, or `bf16 num_terms=25-200` where there is a grid."""
    points = [f"{path.rsplit('.', 1)[-1]}={axis_label(value)}" for path, value in row["at"].items()]
    return " ".join([row["arm"], *points])


def _of_launch(run, name: str) -> float | None:
    whole = run.record["series_summary"]
    if name in whole:
        return _number(whole[name])
    return _mean([_number(row.get(name)) for row in run.metrics])


def _mean(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return number(np.mean(values)) if values else None


def _number(value) -> float | None:
    return number(value) if isinstance(value, (int, float)) else None
