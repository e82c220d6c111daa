"""From a task to its cells: arms x grid x seeds, then controls; what each cell is, and the key under which its run is
stored.

A run key is made of everything that decides the numbers and of nothing else: resolved settings, task id and version,
seed. Paths, host names, budgets, titles and the grade block do not enter, so re-grading or moving a checkpoint never
makes a run stale. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suite.errors import TaskError
from suite.spec.checkout import base_folder
from suite.spec.defaults import fill, relied_on, said
from suite.spec.kinds import kind_of
from suite.spec.reading import deep_merge, read_task
from suite.spec.settings import SECTIONS, Settings
from suite.spec.strict_yaml import TaskErrors
from suite.spec.task import Task, axis_label
from suite.spec.task_errors import explain

_MISSING = object()
# Not in the key: where a file lies, which is not what it is; the pin of a model's small files, which is checked
# whenever they are used, so that a task may be pinned more tightly and keep its runs; and how much evidence is kept, which
# no sum depends on.
PATHS = ("model.path", "data.path", "data.kept.path", "data.reference.path", "model.files_sha256", "schedule.whole_rows_per_step")


@dataclass(frozen=True)
class Cell:
    """One run to be made: an arm (or control) at one grid point with one seed. `settings` is resolved and plain."""

    task_id: str
    task_version: int
    arm: str
    point: tuple[tuple[str, Any], ...]  # (dotted path, value), in the order of the grid
    seed: int
    settings: dict[str, Any]
    is_control: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()  # (dotted path, value) of what the task does not say; `settings` has these too

    @property
    def name(self) -> str:
        """`bf16.num_terms=60-120.s0`: a folder name, unique within the task."""
        axes = [f"{path.rsplit('.', 1)[-1]}={axis_label(value)}" for path, value in self.point]
        return ".".join([self.arm, *axes, f"s{self.seed}"])

    def get(self, path: str, default: Any = _MISSING) -> Any:
        """The setting at a dotted path. None where a section above it is absent; KeyError for a name no section has."""
        return read_path(self.settings, path, default)

    def run_key(self, limit: int | None = None) -> str:
        """sha256 (64 hex digits) of the canonical JSON of what decides the numbers. A limited run has a key of its
        own.
        """
        own, changed = said(self.settings, dict(self.defaults))
        settings = {section: _without_null(values) for section, values in own.items() if values}
        for path in PATHS:
            *above, name = path.split(".")
            holder = read_path(settings, ".".join(above), None)
            if isinstance(holder, dict):
                holder.pop(name, None)
        content = {
            "task_id": self.task_id,
            "task_version": self.task_version,
            "settings": settings,
            "seed": self.seed,
            "is_control": self.is_control,
            "limit": limit,
        } | ({"defaults": changed} if changed else {})
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, ASCII: the same text for the same value on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class ResolvedTask:
    """A task with everything that follows from its file, worked out once and handed to whoever checks, runs or grades it.

    cells: in the order in which they run; none of a task that only compares. needed: the tasks in `needs` that lie beside it
    and resolve, by id; these have no `needed` of their own.
    """

    task: Task
    cells: tuple[Cell, ...]
    settings: dict[tuple[str, str], dict[str, Any]] = field(repr=False)  # of `settings_by`
    needed: dict[str, ResolvedTask] = field(default_factory=dict, repr=False)

    def settings_by(self, name: str, point: Point = ()) -> dict[str, Any]:
        """The settings of an arm or control at a grid point. KeyError where the task has no such cell."""
        return self.settings[name, canonical_json(point)]

    def at_every_point(self, name: str) -> list[dict[str, Any]]:
        """The settings of an arm or control at each of its grid points."""
        return [settings for (arm, _), settings in self.settings.items() if arm == name]


def resolve_task(task: Task | ResolvedTask) -> ResolvedTask:
    """The task resolved; one that is resolved already as it is. Raises TaskErrors with all that does not resolve, each key
    once."""
    if isinstance(task, ResolvedTask):
        return task
    needed = {}
    for need in needed_tasks(task):
        with contextlib.suppress(TaskErrors):
            needed[need.id] = _resolved(need, {})
    return _resolved(task, needed)


def plan(task: Task | ResolvedTask) -> list[Cell]:
    """All cells of a task: arms x grid x seeds, then controls x seeds. Raises TaskErrors where a cell does not resolve.

    A task of a protocol without arms has one cell named after the protocol; one that only compares has none.
    """
    return list(task.cells if isinstance(task, ResolvedTask) else _resolved(task, {}).cells)


def needed_tasks(task: Task) -> list[Task]:
    """The tasks in `needs` as they lie beside this one; validate reports one that is missing or cannot be read."""
    beside = tasks_beside(task) if task.needs else {}
    found = [read_task(path)[0] for name, path in beside.items() if name in task.needs]
    return [need for need in found if need is not None]


def tasks_beside(task: Task) -> dict[str, Path]:
    """id -> file of the tasks in the same checkout."""
    files = base_folder(task.file).parent.glob("*/*.yaml")
    return {path.stem: path for path in sorted(files) if not path.parent.name.startswith("_")}


def _resolved(task: Task, needed: dict[str, ResolvedTask]) -> ResolvedTask:
    """Equal settings, as of an A/A control and its arm, are resolved once."""
    errors: dict[str, TaskError] = {}
    known: dict[str, tuple] = {}  # raw settings -> what Cell holds of them
    settings, cells = {}, []
    for name, overrides, points, seeds, key in _parts(task):
        for point in points:
            raw = _raw(task, overrides, point)
            text = canonical_json(raw)
            try:
                known[text] = known.get(text) or _filled(task, resolve(task, raw, key))
            except TaskErrors as found:
                errors |= {error.key: error for error in found.errors if error.key not in errors}
                continue
            its, defaults = known[text]
            settings[name, canonical_json(point)] = its
            is_control = key.startswith("controls.")
            cells += [Cell(task.id, task.version, name, point, seed, its, is_control, defaults) for seed in seeds]
        if errors and key == "arms." + arm_names(task)[-1]:
            break  # a control would only echo its arm
    if errors:
        raise TaskErrors(list(errors.values()))
    return ResolvedTask(task, tuple(cells), settings, needed)


def _filled(task: Task, settings: dict) -> tuple[dict, tuple[tuple[str, Any], ...]]:
    defaults = relied_on(kind_of(task), settings)
    return fill(settings, defaults), tuple(defaults.items())


def _parts(task: Task):
    """(name, overrides, grid points, seeds, key for errors) of every arm, then of every control."""
    if kind_of(task).compares:
        return
    points = grid_points(task)
    for arm in arm_names(task):
        yield arm, task.arms.get(arm, {}), points, task.seeds, f"arms.{arm}"
    for control in task.controls:  # at its own grid point, or at every one when `at` names none
        its = [point for point in points if all(dict(point)[path] == value for path, value in control.at.items() if path in dict(point))]
        overrides = deep_merge(task.arms.get(control.like, {}), control.set)
        yield control.name, overrides, its, control.seeds, f"controls.{control.name}"


def arm_names(task: Task) -> tuple[str, ...]:
    """Arms in the order of the file; the protocol's name for a task that has no arms."""
    return tuple(task.arms) or (task.protocol,)


def grid_points(task: Task) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of grid values, the first axis slowest; one empty point without a grid."""
    axes = [[(path, value) for value in values] for path, values in task.grid.items()]
    return list(itertools.product(*axes))


def resolve(task: Task, raw: dict, key: str = "arms") -> dict[str, Any]:
    """Settings as the files say them to plain data with defaults filled in. Raises TaskErrors, keys prefixed with `key`."""
    try:
        settings = Settings.model_validate_json(json.dumps(raw), strict=True).model_dump(mode="json")
    except ValidationError as problem:
        raise TaskErrors(explain(problem, raw, Settings, [(task.file, raw)], f"{key}.")) from None
    missing = [path for path in kind_of(task).required if read_path(settings, path, None) is None]
    if missing:
        raise TaskErrors(
            [TaskError(task.file, f"{key}.{path}", "nothing", f"a value ({task.protocol} needs it)") for path in missing]
        )
    return settings


def _raw(task: Task, overrides: dict, point: Point) -> dict:
    """Base settings as written, overridden, at one grid point."""
    raw = deep_merge(_written(task), overrides)
    for path, value in point:
        raw = deep_merge(raw, _nested(path, value))
    return raw


def differing_paths(left: dict, right: dict, prefix: str = "") -> list[str]:
    """Dotted paths at which two resolved settings differ, sorted."""
    paths = []
    for name in sorted(set(left) | set(right)):
        a, b, path = left.get(name), right.get(name), f"{prefix}{name}"
        if isinstance(a, dict) and isinstance(b, dict):
            paths += differing_paths(a, b, path + ".")
        elif a != b:
            paths.append(path)
    return paths


def one_factor_errors(task: Task | ResolvedTask) -> list[TaskError]:
    """Arms that differ outside `vary` at some grid point, and arms that do not differ at all."""
    resolved, errors = resolve_task(task), {}
    task = resolved.task
    for point in grid_points(task):
        arms = {arm: resolved.settings_by(arm, point) for arm in task.arms}
        for (first, left), (second, right) in itertools.combinations(arms.items(), 2):
            paths = differing_paths(left, right)
            for path in (path for path in paths if not _covered(path, task.vary)):
                found = f"{first}: {read_path(left, path, None)!r}, {second}: {read_path(right, path, None)!r}"
                allowed = "arms that differ only in vary: " + (", ".join(task.vary) or "(empty)")
                errors.setdefault((first, second, path), TaskError(task.file, f"arms.{second}.{path}", found, allowed))
            if not paths:
                found = (f"arms.{second}", f"the settings of {first}", "arms that differ", "use a control-aa")
                errors.setdefault((first, second, ""), TaskError(task.file, *found))
    return list(errors.values())


def _covered(path: str, vary: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in vary)


def read_path(settings: dict, path: str, default: Any = _MISSING) -> Any:
    """Value at a dotted path of plain nested settings; see Cell.get."""
    value: Any = settings
    for part in path.split("."):
        if value is None:
            return None if default is _MISSING else default
        if not isinstance(value, dict) or part not in value:
            if default is _MISSING:
                raise KeyError(
                    f"no setting {path!r}: {part!r} is not one of {sorted(value) if isinstance(value, dict) else value}"
                )
            return default
        value = value[part]
    return default if value is None and default is not _MISSING else value


def _written(task: Task) -> dict:
    """The sections as the files say them, without defaults: an arm may complete a section that the base leaves open."""
    parts = {name: getattr(task, name) for name in SECTIONS}
    return {name: part.model_dump(mode="json", exclude_unset=True) for name, part in parts.items() if part is not None}


def _nested(path: str, value: Any) -> dict:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
