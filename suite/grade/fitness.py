"""Whether finished runs are fit to be compared: settings and numbers of problems as the task has them, precision as
executed, arms that differ in one factor and saw the same problems, no run twice under two names. Whatever fails here
makes the task INVALID. No torch.
"""

from __future__ import annotations

import itertools

from suite.grade.launches import FINISHED
from suite.grade.planned import not_of_the_task, short_of_plan, unpaired
from suite.grade.sameness import same_runs
from suite.spec.defaults import as_it_ran
from suite.spec.kinds import kind_of
from suite.spec.plan import PATHS, ResolvedTask, canonical_json, differing_paths, resolve_task
from suite.spec.precision import breaches_of
from suite.spec.task import Task


def violations(task: Task | ResolvedTask, runs: list, foreign: bool = False) -> list[tuple[str, str]]:
    """(arm, sentence) for everything that makes finished runs unfit to compare.

    foreign: rollouts of another framework, whose settings and precision are taken on its word; the reader of its files looks
    at problems and samples.
    """
    resolved = resolve_task(task)
    task, finished = resolved.task, [run for run in runs if run.status in FINISHED]
    ours = [] if foreign else finished
    found = (
        _precision(kind_of(task).must_say, ours)
        + _repeated_seeds(finished)
        + _one_factor(task, finished)
        + _control_factors(task, finished)
        + not_of_the_task(resolved, ours)
        + short_of_plan(task, ours)
        + unpaired(ours)
        + same_runs(finished)
    )
    return list(dict.fromkeys(found))


def _precision(must_say: tuple[str, ...], runs: list) -> list[tuple[str, str]]:
    """An engine that ran in another dtype than its arm asks for, or that does not say what it ran in. A count of a data
    set asks for no precision.
    """
    found = []
    for run in runs:
        asked, executed = run.record["cell"]["settings"].get("precision"), run.record.get("precision_executed") or {}
        if asked:
            lines = breaches_of(must_say, asked, executed)
            found += [(run.arm, f"{run.record['cell']['name']}: precision: {line}") for line in lines]
    return found


def _repeated_seeds(runs: list) -> list[tuple[str, str]]:
    """The same seed twice is one launch (--fresh) only if it is the same cell; under another run key it is
    refused.
    """
    keys: dict[tuple, set] = {}
    for run in runs:
        keys.setdefault((run.arm, canonical_json(run.point), run.seed), set()).add(run.record["run_key"])
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
            groups.setdefault(canonical_json(run.point), []).append(run)
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
            (r for r in runs if control and r.arm == control.like and canonical_json(r.point) == canonical_json(run.point)), None
        )
        if like is not None:
            outside = [path for path in _differences(like, run) if not _covered(path, _leaves(control.set))]
            found += [
                (run.arm, f"{run.arm} differs from {control.like} in {path}, which it does not set") for path in outside
            ]
    return list(dict.fromkeys(found))


def _differences(a, b) -> list[str]:
    ran = [as_it_ran(run.record["cell"]["settings"], run.record["cell"].get("defaults")) for run in (a, b)]
    paths = differing_paths(*ran)
    return [path for path in paths if path not in PATHS]


def _covered(path: str, allowed) -> bool:
    return any(path == name or path.startswith(name + ".") or name.startswith(path + ".") for name in allowed)


def _leaves(nested: dict, prefix: str = "") -> list[str]:
    return [
        leaf
        for name, value in nested.items()
        for leaf in (_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"])
    ]
