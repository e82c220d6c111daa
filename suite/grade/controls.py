"""What must hold before a verdict says anything: controls with a known outcome, precision as executed, arms that
differ in one factor.

Also: attempts that repeat a seed under other settings. Whatever fails here makes the task INVALID. No torch.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np

from suite import stats
from suite.grade.contrasts import Levels, contrast_of, level_of, within
from suite.grade.judge import Evidence, disjoint, ends_text, inside, number, pair, region_text
from suite.grade.launches import FINISHED, launches, series
from suite.plan import PATHS, differing_paths
from suite.precision import contract_breaches, unsaid_points
from suite.task import Grade

ON_INTERVALS = ("aa", "null_drift")


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
    points = [dict(zip(task.grid, values, strict=True)) for values in itertools.product(*task.grid.values())]
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
    if control.kind not in ON_INTERVALS:
        return row | _by_value(evidence, control, ordered)
    finding = _finding(evidence, control, ordered)
    row |= {"estimate": number(finding.estimate), "interval": pair(finding.interval), "num_seeds": finding.num_seeds}
    if finding.interval is None:
        return row | {"outcome": "inconclusive", "reason": finding.problem}
    accept, shown = f"accept {region_text(control.accept)}", f"interval {ends_text(finding.interval)}"
    if inside(finding.interval, control.accept):
        return row | {"outcome": "holds", "reason": f"{shown} inside {accept}"}
    if disjoint(finding.interval, control.accept):
        return row | {"outcome": "broken", "reason": f"{shown} disjoint from {accept}"}
    return row | {"outcome": "inconclusive", "reason": f"{shown} straddles {accept}"}


def _by_value(evidence: Evidence, control, arms: list[list]) -> dict:
    """Floor and broken on purpose: plain means over launches, so that a floor of exactly 0 is a value like others."""
    grade = Grade(estimand=control.estimand, contrast=control.contrast)
    values = [[launch.value for launch in launches(evidence.task.protocol, runs, grade)] for runs in arms]
    row = {"num_seeds": min(len(column) for column in values)}
    if any(value is None for column in values for value in column):
        return row | {"outcome": "inconclusive", "reason": f"a launch has no value of {control.estimand}"}
    value = _contrast([float(np.mean(column)) for column in values], control.contrast.form)
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


def _finding(evidence: Evidence, control, arms: list[list]):
    """The contrast of a control at 90 %. With one launch on a side, its interval is the one over prompts (offline), or
    over steps (a drift), or takes the spread of the other side's launches (A/A).
    """
    protocol, form = evidence.task.protocol, control.contrast.form
    drifts = control.kind == "null_drift" and protocol == "rl"
    grade = Grade(
        estimand=control.estimand,
        contrast=control.contrast,
        reducer="log_ratio" if drifts else "mean",
        window=_drift_window(control, arms[0]) if drifts else None,
    )
    found, levels = [launches(protocol, runs, grade) for runs in arms], Levels(0.90, 0.90)
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
    done = {(run.arm, canonical(run.point), run.seed) for run in runs if run.status in FINISHED}
    return [run for run in runs if (run.arm, canonical(run.point), run.seed) not in done]


def violations(task, runs: list) -> list[tuple[str, str]]:
    """(arm, sentence) for everything that makes finished runs unfit to compare."""
    finished = [run for run in runs if run.status in FINISHED]
    return (
        _precision(task.protocol, finished)
        + _repeated_seeds(finished)
        + _one_factor(task, finished)
        + _control_factors(task, finished)
    )


def _precision(protocol: str, runs: list) -> list[tuple[str, str]]:
    """An engine that ran in another dtype than its arm asks for, or that does not say what it ran in. Runs that asked for
    no precision (a foreign dump, a count of a data set) ran no engine of ours.
    """
    found = []
    for run in runs:
        asked, executed = run.record.get("precision_asked") or {}, run.record.get("precision_executed") or {}
        if {"rollout", "train"} <= asked.keys():
            lines = contract_breaches(asked, executed)
            lines += [f"{point}: not recorded" for point in unsaid_points(protocol, executed)]
            found += [(run.arm, f"{run.record['cell']['name']}: precision: {line}") for line in lines]
    return found


def _repeated_seeds(runs: list) -> list[tuple[str, str]]:
    """The same seed twice is one launch (--fresh) only if it is the same cell; under another run key it is
    refused.
    """
    keys: dict[tuple, set] = {}
    for run in runs:
        keys.setdefault((run.arm, canonical(run.point), run.seed), set()).add(run.record["run_key"])
    return [
        (arm, f"{arm} seed {seed}: recorded under {len(found)} different run keys")
        for (arm, _, seed), found in keys.items()
        if len(found) > 1
    ]


def _one_factor(task, runs: list) -> list[tuple[str, str]]:
    """Arms may differ only in `vary`; the runs of one arm at one point not at all."""
    found, groups = [], {}
    for run in runs:
        if not run.is_control:
            groups.setdefault(canonical(run.point), []).append(run)
    for same_place in groups.values():
        firsts: dict[str, object] = {}
        for run in same_place:
            first = firsts.setdefault(run.arm, run)
            found += [(run.arm, f"{run.arm}: runs differ in {path}") for path in _differences(first, run)]
        for a, b in itertools.combinations(firsts.values(), 2):
            outside = [path for path in _differences(a, b) if not _covered(path, task.vary)]
            found += [
                (arm, f"{a.arm} and {b.arm} differ in {path}, which is not in vary")
                for path in outside
                for arm in (a.arm, b.arm)
            ]
    return list(dict.fromkeys(found))


def _control_factors(task, runs: list) -> list[tuple[str, str]]:
    """A control may differ from the arm that it starts from only in what it sets."""
    found, controls = [], {control.name: control for control in task.controls}
    for run in runs:
        control = controls.get(run.arm)
        like = next(
            (r for r in runs if control and r.arm == control.like and canonical(r.point) == canonical(run.point)), None
        )
        if like is not None:
            outside = [path for path in _differences(like, run) if not _covered(path, _leaves(control.set))]
            found += [
                (run.arm, f"{run.arm} differs from {control.like} in {path}, which it does not set") for path in outside
            ]
    return list(dict.fromkeys(found))


def _differences(a, b) -> list[str]:
    paths = differing_paths(a.record["cell"]["settings"], b.record["cell"]["settings"])
    return [path for path in paths if path not in PATHS]


def _covered(path: str, allowed) -> bool:
    return any(path == name or path.startswith(name + ".") or name.startswith(path + ".") for name in allowed)


def _leaves(nested: dict, prefix: str = "") -> list[str]:
    return [
        leaf
        for name, value in nested.items()
        for leaf in (_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])
    ]


def canonical(value) -> str:
    return json.dumps(value, sort_keys=True)
