"""Reading task files: blocks and file merged, claims expanded, and a Task, or every error of the file: file, key, value found,
values allowed. No torch.
"""

import copy
import json
import math
from pathlib import Path

from pydantic import ValidationError

from suite.errors import TaskError
from suite.spec import claims as written
from suite.spec.checkout import base_folder, task_files, task_path
from suite.spec.strict_yaml import TaskErrors, parse_yaml, read_yaml
from suite.spec.task import Grade, Source, Task, axis_label
from suite.spec.task_errors import explain, field_locations, take_out

MAX_NAMES, MAX_CELLS = 100, 5000


def load_all(repo: Path | None = None) -> dict[str, Task]:
    """Every task of the checkout by id. Raises TaskErrors with the errors of all files together."""
    tasks, errors = load_readable(repo)
    if errors:
        raise TaskErrors(errors)
    return tasks


def load_readable(repo: Path | None = None) -> tuple[dict[str, Task], list[TaskError]]:
    """The tasks of the checkout that can be read, by id, and the errors of those that cannot: one bad file hides no
    other."""
    tasks, errors = {}, []
    for name, path in task_files(repo).items():
        task, found, _ = read_task(path)
        errors += found
        if task is not None and not found:
            tasks[name] = task
    return tasks, errors


def load_task(path_or_id: str | Path) -> Task:
    """The task in a file, or the one of that id in this checkout. Raises TaskErrors naming every error, UserError for
    an unknown id.
    """
    task, errors, _ = read_task(task_path(path_or_id))
    if errors or task is None:
        raise TaskErrors(errors)
    return task


def read_task(path: Path) -> tuple[Task | None, list[TaskError], list[str]]:
    """(task, errors, keys left out). With errors the task is what remains without the faulty keys, so that the checks
    of validate.py can still speak about the rest; None where nothing sensible remains.
    """
    return _task_of(*read_yaml(path), path)


def read_task_text(text: str, path: Path) -> tuple[Task | None, list[TaskError], list[str]]:
    """As `read_task`, for the text of a task in hand, such as a record's; `path` is where it would lie."""
    return _task_of(*parse_yaml(text, path), path)


def _task_of(raw: object, problems: list[TaskError], path: Path) -> tuple[Task | None, list[TaskError], list[str]]:
    merged, layers, errors = _read_layers(raw, problems, path)
    if merged is None:
        return None, errors, []
    said = {error.key for error in errors}
    errors += _check_place(merged, path)
    found = written.expand(merged, layers, tuple(Grade.model_fields), base_folder(path).parent)
    errors, said, raw = errors + found.errors, said | set(found.left_out), found.raw
    source = Source(path, copy.deepcopy(raw), found.form)
    _expand_points(raw)
    task, left_out = None, []
    for _ in range(4):
        try:
            task = Task.model_validate_json(json.dumps(raw), strict=True)
            task._source = source
            errors += _check_size(task)
            break
        except ValidationError as problem:
            news = [written.as_written(error, found.form) for error in explain(problem, raw, Task, layers)]
            errors += [] if left_out else [error for error in news if error.key not in said]
            faulty = field_locations(problem)
            left_out += [".".join(map(str, location)) for location in faulty]
            if not all([take_out(raw, location) for location in faulty]):  # noqa: C419  every one is taken out
                break
    return task, errors, [*(written.written_key(key, found.form) for key in left_out), *said]


def _read_layers(raw: object, problems: list[TaskError], path: Path) -> tuple[dict | None, list[tuple[Path, dict]], list[TaskError]]:
    """Merged mapping, the layers it came from (task first, then the blocks, nearest first), and errors of all files."""
    errors = list(problems)
    if not isinstance(raw, dict):
        return None, [], errors
    layers, merged = [(path, raw)], {}
    for block_path in _block_paths(raw, path, errors):
        block, block_errors = read_yaml(block_path)
        errors += block_errors
        for key in sorted({"grade", "claims", "id", "extends", "fixed"} & set(block or {})):
            errors.append(
                TaskError(block_path, key, "in a _base block", "only in a task file", "it is never inherited")
            )
        if isinstance(block, dict):
            merged = deep_merge(merged, block)
            layers.insert(1, (block_path, block))
    return deep_merge(merged, raw), layers, errors


def _block_paths(raw: dict, path: Path, errors: list[TaskError]) -> list[Path]:
    names = raw.get("extends")
    if not isinstance(names, list) or not names:
        return []
    there = {block.stem: block for block in sorted(base_folder(path).glob("*.yaml"))}
    for index, name in enumerate(names):
        if not isinstance(name, str) or name not in there:
            errors.append(TaskError(path, f"extends.{index}", name, f"a block in tasks/_base: {', '.join(there)}"))
    return [there[name] for name in names if isinstance(name, str) and name in there]


def deep_merge(base: dict, top: dict) -> dict:
    """`top` over `base`: mappings merge key by key, everything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = deep_merge(merged[key], value) if both else value
    return merged


def _expand_points(raw: dict) -> None:
    """`at` may name a grid value by its label; put the value itself there, so that points compare equal everywhere."""
    grid = raw.get("grid") if isinstance(raw.get("grid"), dict) else {}
    grades = raw.get("grade") if isinstance(raw.get("grade"), dict) else {}
    controls = raw.get("controls") if isinstance(raw.get("controls"), list) else []
    for block in [*grades.values(), *controls]:
        at = block.get("at") if isinstance(block, dict) else None
        for axis, label in (at if isinstance(at, dict) else {}).items():
            values = grid.get(axis) if isinstance(grid.get(axis), list) else []
            at[axis] = next((value for value in values if axis_label(value) == label), label)


def _check_place(raw: dict, path: Path) -> list[TaskError]:
    errors = []
    if isinstance(raw.get("id"), str) and raw["id"] != path.stem:
        errors.append(TaskError(path, "id", raw["id"], f"{path.stem} (the file name)"))
    folder = path.resolve().parent.name
    if folder in ("desk", "node", "paper") and isinstance(raw.get("tier"), str) and raw["tier"] != folder:
        errors.append(TaskError(path, "tier", raw["tier"], f"{folder} (the folder)"))
    return errors


def _check_size(task: Task) -> list[TaskError]:
    """So many cells that nobody could even list them are a slip of the pen: every check below looks at each of them."""
    names, points = len(task.arms) + len(task.controls), math.prod(map(len, task.grid.values()))
    cells = max(1, names) * points * len(task.seeds)
    if cells <= MAX_CELLS and names <= MAX_NAMES:
        return []
    found = f"{names} arms and controls at {points} points, {cells} cells"
    return [TaskError(task.file, "grid", found, f"at most {MAX_NAMES} arms and controls, {MAX_CELLS} cells")]
