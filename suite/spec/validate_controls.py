"""Controls and floors of a task: each of them can fail for what its claims would notice, and each graded claim has one.
No torch.
"""

from __future__ import annotations

import math

from suite.errors import TaskError
from suite.spec.kinds import kind_of
from suite.spec.task import Control, Grade, Task


def guard_errors(task: Task) -> list[TaskError]:
    """Claims that need a floor and have none, and A/A controls that hold whatever happens."""
    claims = [(claim, task.grade[claim.id]) for claim in task.claims if claim.kind != "report" and claim.id in task.grade]
    allowed, why = "the level that shows that a run learned: {at_least: ..., derivation: ...}", "two runs that learned nothing agree, and never fall"
    bare = [claim.id for claim, grade in claims if needs_floor(claim.kind, grade) and grade.floor is None]
    errors = [TaskError(task.file, f"grade.{name}.floor", "nothing", allowed, why) for name in bare]
    return errors + [error for control in task.controls for check in control.checks for error in _too_wide(task, check)]


def unguarded(task: Task, needed: list[Task]) -> list[str]:
    """Graded claims without a control on their estimand at their grid point, one sentence each. A count in which nothing is
    random needs none; a comparison has those of the tasks whose arms it names.
    """
    claims = [(claim.id, task.grade[claim.id]) for claim in task.claims if claim.kind != "report" and claim.id in task.grade]
    return [
        f"no control guards {name}: add one on {grade.estimand}{_where(grade)}"
        for name, grade in claims
        if not (grade.interval and grade.interval.method == "exact")
        and not any(guards(control, grade) for one in _owners(task, grade, needed) for control in one.controls)
    ]


def guards(control: Control, grade: Grade) -> bool:
    """Whether a control would notice what spoils a claim: it looks at its estimand, at its grid point."""
    same = all(control.at.get(axis, value) == value for axis, value in grade.at.items())
    return same and any(check.estimand == grade.estimand for check in control.checks)


def needs_floor(kind: str, grade: Grade) -> bool:
    """A claim that nothing happened, or that arms are alike."""
    return kind == "equivalence" or (grade.event is not None and grade.event.expect == "stable")


def margin_of(grade: Grade) -> float | None:
    """By how much its arms may be off before a claim notices: the half width of its region (in logs for a ratio), or what
    lies between its only end and no effect. None where that is nothing, as for a claim of a sign.
    """
    if grade.accept is None or grade.contrast.form not in ("ratio", "difference"):
        return None
    ends = list(grade.accept)
    if grade.contrast.form == "ratio":
        ends = [None if end is None or end <= 0 else math.log(end) for end in ends]
    width = (ends[1] - ends[0]) / 2 if None not in ends else max(abs(end) for end in ends if end is not None)
    return width or None


def _too_wide(task: Task, check: Control) -> list[TaskError]:
    """An A/A control on the estimand of a claim must be narrower than the claim is."""
    form = check.contrast.form
    claims = [(name, grade) for name, grade in task.grade.items() if grade.estimand == check.estimand and grade.contrast.form == form]
    ends = [end for end in check.accept if end is not None]
    if check.kind != "aa" or not ends:
        return []
    reach = max(abs(math.log(end)) if form == "ratio" else abs(end) for end in ends)
    bad = [name for name, grade in claims if (margin := margin_of(grade)) is not None and reach >= margin]
    allowed = f"an interval narrower than that of {', '.join(bad)}"
    return [TaskError(task.file, f"controls.{check.name}.accept", list(check.accept), allowed, "it could not fail")] if bad else []


def _owners(task: Task, grade: Grade, needed: list[Task]) -> list[Task]:
    """The tasks whose controls guard a claim: those whose arms it names."""
    if not kind_of(task).compares:
        return [task]
    return [need for need in needed if any(name.startswith(f"{need.id}-") for name in grade.contrast.names)]


def _where(grade: Grade) -> str:
    return f" at {', '.join(f'{axis.rsplit(chr(46), 1)[-1]}={value}' for axis, value in grade.at.items())}" if grade.at else ""
