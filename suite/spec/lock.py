"""tasks/_resolved/<id>.yaml: a task written out in full, as a lock file. Blocks are merged and every claim says all that
follows from its kind, its type and baselines/paper.yaml. It is what is graded and what records keep; committed, so that a
change of a shared block or of a type of claims shows as a difference in every task that it touches.

`suite lock` writes them; `suite validate`, and every verb that runs or grades, refuses one that is stale. What a task is
judged by changes with its grade_version: `suite lock` writes nothing else under the same one. A checkout without the folder
tasks/_resolved, and a task file outside tasks/, has no locks. No torch.
"""

from __future__ import annotations

from pathlib import Path

from suite.errors import TaskError
from suite.files import write_atomic
from suite.spec.checkout import base_folder
from suite.spec.plan import differing_paths, read_path
from suite.spec.reading import read_task_text
from suite.spec.strict_yaml import parse_yaml
from suite.spec.task import Control, Grade, Task


def lock_path(task: Task) -> Path | None:
    """Where the lock of a task lies; None for a task that has none."""
    tasks = base_folder(task.file).parent
    kept = (tasks / "_resolved").is_dir() and task.file.resolve().parent.parent == tasks.resolve()
    return tasks / "_resolved" / f"{task.id}.yaml" if kept else None


def lock_errors(task: Task) -> list[TaskError]:
    """What is stale about the lock of a task, and what `suite lock` would refuse to write."""
    path = lock_path(task)
    if path is None:
        return []
    command, then = f"run: suite lock {task.id}", _text(path)
    if then is None:
        return [TaskError(path, "(file)", "nothing", f"the task written out in full; {command}")]
    if then == task.text:
        return []
    old, new = (parse_yaml(text, path)[0] or {} for text in (then, task.text))
    key = (differing_paths(old, new) or ["(file)"])[0]
    found, now = (read_path(part, key, None) for part in (old, new)) if key != "(file)" else ("another text", "the text that the task comes to")
    return regrading_errors(task) or [TaskError(path, key, found, f"{now}: the lock is stale; {command}")]


def regrading_errors(task: Task) -> list[TaskError]:
    """A task that is judged otherwise than its lock says, under no higher grade_version, or one whose grade_version fell."""
    then = _text(_folder(task) / f"{task.id}.yaml")
    old, problems, _ = read_task_text(then, task.file) if then is not None else (None, [], [])
    if old is None or problems or old.grade_version < task.grade_version:
        return []
    changed = differing_paths(_judged(old), _judged(task))
    if not changed and old.grade_version == task.grade_version:
        return []
    what = (", ".join(changed[:3]) or "grade_version") + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    hint = f"changed: {what}; for a task that nobody has run yet, delete its file in tasks/_resolved instead"
    allowed = f"{old.grade_version + 1}: it is judged otherwise than at {old.grade_version}" if changed else f"{old.grade_version}, or more"
    return [TaskError(task.file, "grade_version", task.grade_version, allowed, hint)]


def write_lock(task: Task) -> bool:
    """Write the lock of a task that regrading_errors has nothing against; False where it was current."""
    path = _folder(task) / f"{task.id}.yaml"
    if _text(path) == task.text:
        return False
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, task.text.encode())
    return True


def _folder(task: Task) -> Path:
    return base_folder(task.file).parent / "_resolved"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def stray_locks(tasks: Path, ids: set[str]) -> list[Path]:
    """Files in tasks/_resolved that are the lock of no task."""
    return sorted(path for path in (tasks / "_resolved").glob("*") if path.suffix != ".yaml" or path.stem not in ids)


def _judged(task: Task) -> dict:
    """What decides a verdict: kinds of claims, grades without the prose of their derivations, checks of controls."""
    return {
        "claims": {claim.id: {"kind": claim.kind} | _grade(task.grade.get(claim.id)) for claim in task.claims},
        "controls": {control.name: _checks(control) for control in task.controls},
    }


def _grade(grade: Grade | None) -> dict:
    return {} if grade is None else grade.model_dump(mode="json", exclude={"tolerance": {"derivation", "date"}, "floor": {"derivation"}})


def _checks(control: Control) -> dict:
    return {check.name: check.model_dump(mode="json", include={"kind", "estimand", "reducer", "window", "contrast", "accept"}) for check in control.checks}
