"""Ties a published record to what it claims to be a record of: the task of this checkout, and its own machine. No torch.

Records are claims and the task is the law: a record says which cell it is, with which settings, weights and precision and
on what machine, and each of these follows from something that its writer does not choose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from suite.archive.published import RECORD, records_of
from suite.files import json_safe
from suite.machine import environment
from suite.record.run import FINISHED, STATUSES, Run
from suite.spec.algorithms import resolve
from suite.spec.plan import Cell, differing_paths, read_path
from suite.spec.reading import read_task_text
from suite.spec.validate_rl import NOT_OF_THE_ROW

# What of a task decides neither a number nor a verdict: what says where a claim comes from and what it is called, what is
# shown beside it, what a machine needs. It may be put better without a new version. And where a file lies is no part of
# what it is: published records do not say it.
PROSE = {"title", "tags", "statement", "paper", "tolerance", "path", "extends", "metrics", "resources", "budget"}


def untied(run: Run, task, cells: dict[str, Cell]) -> list[str]:
    """What of one published run does not follow from the task, its cells (by name) or its machine."""
    with records_of(run.folder / RECORD):
        return [*_of_itself(run), *_cell(run, cells), *_text(run, task)]


def untied_from_itself(run: Run) -> list[str]:
    """What of one published run contradicts itself or its machine, whatever has become of its task."""
    with records_of(run.folder / RECORD):
        return list(_of_itself(run))


def _of_itself(run: Run) -> Iterator[str]:
    yield from _place(run)
    yield from _own_key(run)
    yield from _asked(run)
    yield from _algorithm(run)
    yield from _machine(run)


def _place(run: Run) -> Iterator[str]:
    """A run lies where its own record says."""
    record, folder = run.record, run.folder
    if record["task"]["id"] != folder.parents[2].name:
        yield f"task: found {record['task']['id']!r}, its folder is {folder.parents[2].name}"
    if (record["cell"]["name"], record["run_key"][:12]) != (folder.parent.name, folder.name.split(".")[0]):
        yield f"cell and run_key: found {record['cell']['name']} and {record['run_key'][:12]}, its folder is {folder.parent.name}/{folder.name}"
    if record["status"] not in STATUSES:
        yield f"status: found {record['status']!r}, allowed: {', '.join(STATUSES)}"
    elif record["status"] not in (*FINISHED, "invalidated") and run.summary is not None:
        yield f"status: found {record['status']}, but it has an evidence summary, which is written by a run that ends"
    if record["limit"] is not None:
        yield f"limit: found {record['limit']}, allowed: null; limited runs are never published"


def _own_key(run: Run) -> Iterator[str]:
    """The run key follows from the record's own settings."""
    cell, key, task = run.record["cell"], run.record["run_key"], run.record["task"]
    own = Cell(task["id"], task["version"], run.arm, tuple(run.point.items()), run.seed, cell["settings"], run.is_control,
               tuple((cell.get("defaults") or {}).items()))  # fmt: skip
    if own.run_key(run.record["limit"]) != key:
        yield f"run_key: found {key[:12]}, its settings give {own.run_key(run.record['limit'])[:12]}"


def _cell(run: Run, cells: dict[str, Cell]) -> Iterator[str]:
    """The cell and its run key are the task's."""
    cell, key = run.record["cell"], run.record["run_key"]
    planned = cells.get(cell["name"])
    if planned is None:
        yield f"cell: found {cell['name']}, allowed: a cell of the task; {_nearest(run, cells)}"
        return
    if (planned.arm, dict(planned.point), planned.seed, planned.is_control) != (run.arm, run.point, run.seed, run.is_control):
        yield f"cell: arm, grid point, seed or is_control of {cell['name']} are not the task's"
    if planned.run_key() != key:
        yield (f"run_key {key[:12]}, but the task now gives this cell {planned.run_key()[:12]}: "
               "a setting changed without a new version")  # fmt: skip


def _nearest(run: Run, cells: dict[str, Cell]) -> str:
    seeds = sorted({cell.seed for cell in cells.values() if cell.arm == run.arm})
    if seeds and run.seed not in seeds:
        return f"{run.arm} has the seeds {', '.join(map(str, seeds))}, not {run.seed}"
    return f"it has the arms {', '.join(dict.fromkeys(cell.arm for cell in cells.values()))}"


def _asked(run: Run) -> Iterator[str]:
    """Precision and weights are those of the cell's settings."""
    record, settings = run.record, run.record["cell"]["settings"]
    asked, wanted = record["precision_asked"], settings.get("precision") or {}
    if {k: v for k, v in asked.items() if v is not None} != {k: v for k, v in wanted.items() if v is not None}:
        yield f"precision_asked: found {json.dumps(asked, sort_keys=True)}, its settings say {json.dumps(wanted, sort_keys=True)}"
    for name in ("sha256", "files_sha256", "revision"):
        found, pinned = (record.get("weights") or {}).get(name), read_path(settings, f"model.{name}", None)
        if found is not None and pinned not in (None, "unknown") and found != pinned:
            yield f"weights.{name}: found {str(found)[:64]}, the task pins {pinned}"


def _algorithm(run: Run) -> Iterator[str]:
    """The row of the loss is what its settings give. A key that rows have gained or lost since says nothing."""
    said, settings = run.record.get("algorithm"), dict(run.record["cell"]["settings"].get("algorithm") or {})
    if said is None or not settings:
        return
    overrides = {name: value for name, value in settings.items() if name not in NOT_OF_THE_ROW}
    given = resolve(settings["name"], **overrides).settings()
    for name in sorted(said.keys() & given.keys()):
        if said[name] != json_safe(given[name]):
            yield f"algorithm.{name}: found {said[name]!r}, its settings give {given[name]!r}"


def _machine(run: Run) -> Iterator[str]:
    """Folder name, fingerprint and environment are one and the same machine."""
    folder, said = run.folder.parents[1].name, run.fingerprint
    given = environment.fingerprint(run.record["environment"])
    if not said == given == folder:
        yield f"fingerprint: found {said}, its environment gives {given}, its folder is {folder}"


def _text(run: Run, task) -> Iterator[str]:
    """The task as it was when the run was made: the text of this checkout, or of an older grade version."""
    said = run.record["task"]
    if said["text"] == task.text or said["version"] != task.version or said["grade_version"] < task.grade_version:
        return
    if said["grade_version"] > task.grade_version:
        yield f"task.grade_version: found {said['grade_version']}, the task is at {task.grade_version}"
    elif problem := _differs(said["text"], task.text, task.file):
        at = f"at the same version {task.version} and grade_version {task.grade_version}"
        yield f"task.text: another text than {task.file.name} {at}: {problem}"


@lru_cache(maxsize=256)  # the runs of a task say the same text, and `now` holds all that the blocks bring in
def _differs(then: str, now: str, file: Path) -> str | None:
    """Where the task of a record means something else than the one of today; None if nowhere. Either may be written with
    blocks or in full, with claims as a list or as a map."""
    (old, problems, _), (new, _, _) = read_task_text(then, file), read_task_text(now, file)
    if old is None or problems:
        return str(problems[0])
    return ", ".join(differing_paths(_meaning(old.model_dump(mode="json")), _meaning(new.model_dump(mode="json")))) or None


def _meaning(value):
    if isinstance(value, dict):
        return {name: _meaning(part) for name, part in value.items() if name not in PROSE}
    named = isinstance(value, list) and value and all(isinstance(part, dict) and ("id" in part or "name" in part) for part in value)
    if named:
        return {part.get("id", part.get("name")): _meaning(part) for part in value}
    return [_meaning(part) for part in value] if isinstance(value, list) else value


def missing_cells(runs: list[Run], cells: dict[str, Cell]) -> list[str]:
    """The names of planned cells of which there is no run."""
    there = {run.record["cell"]["name"] for run in runs}
    return [name for name in cells if name not in there]


def missing_attempts(folders: list[Path]) -> list[str]:
    """Attempts are published without a gap, so that none can be left out: the ones that are not there."""
    there = {(path.parent, path.name) for path in folders}
    found = []
    for path in folders:
        first, _, number = path.name.partition(".")
        for earlier in range(1, int(number or 1)):
            name = first if earlier == 1 else f"{first}.{earlier}"
            if (path.parent, name) not in there:
                found.append(f"{path.parent / name}: attempt {earlier} is not there, attempt {number} is")
    return list(dict.fromkeys(found))
