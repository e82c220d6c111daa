"""Controls: comparisons whose outcome is known beforehand. One that is broken makes the task INVALID. No torch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from suite.grade.contrasts import Levels, contrast_of, level_of, within
from suite.grade.judge import Evidence, disjoint, ends_text, inside, number, pair, region_text
from suite.grade.launches import FINISHED, launches, series
from suite.grade.planned import missing_launches
from suite.measure import stats
from suite.spec.kinds import kind_of
from suite.spec.plan import canonical_json, grid_points
from suite.spec.task import Grade

ON_INTERVALS = ("aa", "null_drift")


def grade_controls(evidence: Evidence) -> list[dict]:
    """One row per check of every control of the evidence's task."""
    return [grade_control(evidence, check) for control in evidence.task.controls for check in control.checks]


def grade_control(evidence: Evidence, control) -> dict:
    """One control at each of its grid points; the worst point decides.

    A/A and null drift: holds if the interval lies within accept, broken only if disjoint from it, else inconclusive.
    With a single seed on either side the interval is the one over prompts. Floor and broken-on-purpose: the point
    estimate decides, whose distance from the bound is orders of magnitude. outcome: holds | inconclusive | broken |
    error | not_run.
    """
    order = ("broken", "error", "not_run", "inconclusive", "holds")
    rows = [_at_point(evidence, control, at) for at in control_points(evidence.task, control)]
    return min(rows, key=lambda row: order.index(row["outcome"]))


def control_points(task, control) -> list[dict]:
    points = [dict(point) for point in grid_points(task)]
    return [point for point in points if all(point.get(axis) == value for axis, value in control.at.items())]


def _at_point(evidence: Evidence, control, at: dict) -> dict:
    row = {
        "name": control.name,
        "kind": control.kind,
        "estimand": control.estimand,
        "at": at,
        "estimate": None,
        "interval": None,
        "accept": list(control.accept),
        "num_seeds": 0,
    }
    arms = {name: evidence.arm(name, at) for name in control.contrast.names}
    for name, runs in arms.items():
        if any(run.status == "failed" for run in unfinished(runs)):
            return row | {"outcome": "error", "reason": f"a run of {name} failed"}
        if not any(run.status in FINISHED for run in runs):
            return row | {"outcome": "not_run", "reason": f"no finished run of {name}"}
    ordered = [arms[name] for name in control.contrast.names]
    grade = _grade_of(evidence, control, ordered)
    if infinite := _infinite(evidence, grade, ordered):
        return row | {"outcome": "broken", "reason": infinite}
    if control.kind not in ON_INTERVALS:
        return row | _by_value(evidence, control, ordered)
    missing = missing_launches(evidence.task, evidence.runs, evidence.other_tasks, evidence.other_runs, grade.model_copy(update={"at": at}))
    if missing:
        return row | {"outcome": "inconclusive", "reason": f"missing_launches: {', '.join(missing[:5])}"}
    finding = _finding(evidence, control, grade, ordered)
    row |= {"estimate": number(finding.estimate), "interval": pair(finding.interval), "num_seeds": finding.num_seeds}
    if finding.interval is None:
        return row | {"outcome": "inconclusive", "reason": finding.problem}
    accept, shown = f"accept {region_text(control.accept)}", f"interval {ends_text(finding.interval)}"
    if inside(finding.interval, control.accept):
        return row | {"outcome": "holds", "reason": f"{shown} inside {accept}"}
    if disjoint(finding.interval, control.accept):
        return row | {"outcome": "broken", "reason": f"{shown} disjoint from {accept}"}
    return row | {"outcome": "inconclusive", "reason": f"{shown} straddles {accept}"}


def _grade_of(evidence: Evidence, control, arms: list[list]) -> Grade:
    """A control as a claim: how its launches come to a value."""
    drifts = control.kind == "null_drift" and kind_of(evidence.task).trains
    return Grade(
        estimand=control.estimand,
        contrast=control.contrast,
        reducer="log_ratio" if drifts else control.reducer,
        window=_drift_window(control, arms[0]) if drifts else control.window,
    )


def _infinite(evidence: Evidence, grade: Grade, arms: list[list]) -> str:
    """The first launch whose value is infinite: whatever a control accepts, that is not it."""
    found = (launch for runs in arms for launch in launches(kind_of(evidence.task), runs, grade))
    return next((one.problem for one in found if one.value is not None and math.isinf(one.value)), "")


def _by_value(evidence: Evidence, control, arms: list[list]) -> dict:
    """Floor and broken on purpose: plain means over launches, so that a floor of exactly 0 is a value like others."""
    grade = Grade(estimand=control.estimand, contrast=control.contrast)
    found = [launches(kind_of(evidence.task), runs, grade) for runs in arms]
    row = {"num_seeds": min(len(column) for column in found)}
    if bare := next((launch for column in found for launch in column if launch.value is None), None):
        return row | {"outcome": "inconclusive", "reason": bare.problem}
    value = _contrast([float(np.mean([launch.value for launch in column])) for column in found], control.contrast.form)
    holds = value is not None and inside((value, value), control.accept)
    shown = "0 / 0" if value is None else f"{value:.4g}"
    reason = f"{shown} {'in' if holds else 'outside'} accept {region_text(control.accept)}"
    return row | {"estimate": number(value), "outcome": "holds" if holds else "broken", "reason": reason}


def _contrast(levels: list[float], form: str) -> float | None:
    """None for 0 / 0; anything else above 0 is infinite."""
    if form == "arm":
        return levels[0]
    if form == "difference":
        return levels[0] - levels[1]
    return levels[0] / levels[1] if levels[1] else math.inf if levels[0] else None


def _finding(evidence: Evidence, control, grade: Grade, arms: list[list]):
    """The contrast of a control at 90 %. With one launch on a side, its interval is the one over prompts (offline), or
    over steps (a drift), or takes the spread of the other side's launches (A/A).
    """
    kind, form, drifts = kind_of(evidence.task), control.contrast.form, grade.reducer == "log_ratio"
    found, levels = [launches(kind, runs, grade) for runs in arms], Levels(0.90, 0.90)
    if form == "arm":
        finding = level_of(control.name, found[0], grade, levels)
    else:
        finding = contrast_of(control.name, form, found[0], found[1], grade, levels)
    if finding.interval is None and finding.estimate is not None:
        narrow = within(control.estimand, form, found, 0.90)
        finished = [run for run in arms[0] if run.status in FINISHED]
        if drifts and form == "arm" and len(finished) == 1:
            values = series(finished[0], control.estimand)
            narrow = stats.drift_interval(values[: grade.window], values[-grade.window :])
        elif narrow is None and control.kind == "aa" and form == "ratio" and len(found[1]) == 1:
            narrow = stats.one_against_many(found[1][0].value, [launch.value for launch in found[0]])
        if narrow is not None:
            finding = replace(finding, interval=(narrow.lo, narrow.hi), method=narrow.method)
    return finding


def _drift_window(control, runs: list) -> int:
    """The first and the last quarter of the series, unless the control says otherwise."""
    lengths = [len(run.metrics) for run in runs if run.status in FINISHED]
    return control.window or max(1, min(lengths, default=0) // 4)


def unfinished(runs: list) -> list:
    """Runs of cells that have no finished attempt."""
    done = {(run.arm, canonical_json(run.point), run.seed) for run in runs if run.status in FINISHED}
    return [run for run in runs if (run.arm, canonical_json(run.point), run.seed) not in done]
