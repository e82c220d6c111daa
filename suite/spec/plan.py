"""From a task to its cells: arms x grid x seeds, then controls; what each cell is, and the key under which its run is
stored.

A run key is made of everything that decides the numbers and of nothing else: resolved settings, task id and version,
seed. Paths, host names, budgets, titles and the grade block do not enter, so re-grading or moving a checkpoint never
makes a run stale. No torch.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from suite.errors import TaskError
from suite.spec.settings import REQUIRED, SECTIONS, Settings
from suite.spec.strict_yaml import TaskErrors
from suite.spec.task import Control, Task, axis_label, deep_merge
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
        settings = {section: _without_null(values) for section, values in self.settings.items() if values}
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
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces, ASCII: the same text for the same value on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plan(task: Task) -> list[Cell]:
    """All cells of a task: arms x grid x seeds, then controls x seeds. Raises TaskErrors where a cell does not resolve.

    A dataset or compare task without arms has one cell named after its protocol; compare tasks have none.
    """
    if task.protocol == "compare":
        return []
    cells = [
        _cell(task, arm, point, seed, settings) for arm, point, settings in _resolved_arms(task) for seed in task.seeds
    ]
    for control in task.controls:
        for point, settings in _resolved_control(task, control):
            cells += [_cell(task, control.name, point, seed, settings, True) for seed in control.seeds]
    return cells


def arm_names(task: Task) -> tuple[str, ...]:
    """Arms in the order of the file; the protocol's name for a task that has no arms."""
    return tuple(task.arms) or (task.protocol,)


def grid_points(task: Task) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of grid values, the first axis slowest; one empty point without a grid."""
    axes = [[(path, value) for value in values] for path, values in task.grid.items()]
    return list(itertools.product(*axes))


def resolve(task: Task, overrides: dict, point: tuple[tuple[str, Any], ...] = (), key: str = "arms") -> dict[str, Any]:
    """Base settings, overridden, at one grid point: plain data with defaults filled in. Raises TaskErrors, keys
    prefixed with `key`.
    """
    raw = deep_merge(_written(task), overrides)
    for path, value in point:
        raw = deep_merge(raw, _nested(path, value))
    file = task.file
    try:
        settings = Settings.model_validate_json(json.dumps(raw), strict=True).model_dump(mode="json")
    except ValidationError as problem:
        raise TaskErrors(explain(problem, raw, Settings, [(file, raw)], f"{key}.")) from None
    missing = [path for path in REQUIRED[task.protocol] if read_path(settings, path, None) is None]
    if missing:
        raise TaskErrors(
            [TaskError(file, f"{key}.{path}", "nothing", f"a value ({task.protocol} needs it)") for path in missing]
        )
    return settings


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


def one_factor_errors(task: Task) -> list[TaskError]:
    """Arms that differ outside `vary`, and arms that do not differ at all."""
    file = task.file
    arms = {arm: resolve(task, task.arms.get(arm, {}), key=f"arms.{arm}") for arm in task.arms}
    errors = []
    for (first, left), (second, right) in itertools.combinations(arms.items(), 2):
        paths = differing_paths(left, right)
        outside = [path for path in paths if not any(path == vary or path.startswith(vary + ".") for vary in task.vary)]
        for path in outside:
            found = f"{first}: {read_path(left, path, None)!r}, {second}: {read_path(right, path, None)!r}"
            allowed = "arms that differ only in vary: " + (", ".join(task.vary) or "(empty)")
            errors.append(TaskError(file, f"arms.{second}.{path}", found, allowed))
        if not paths:
            errors.append(
                TaskError(file, f"arms.{second}", f"the settings of {first}", "arms that differ", "use a control-aa")
            )
    return errors


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


def _cell(task: Task, arm: str, point, seed: int, settings: dict, is_control: bool = False) -> Cell:
    return Cell(task.id, task.version, arm, point, seed, settings, is_control)


def _resolved_arms(task: Task):
    for arm in arm_names(task):
        for point in grid_points(task):
            yield arm, point, resolve(task, task.arms.get(arm, {}), point, f"arms.{arm}")


def _resolved_control(task: Task, control: Control):
    """A control runs at its own grid point, or at every one when `at` names none."""
    overrides = deep_merge(task.arms.get(control.like, {}), control.set)
    for point in grid_points(task):
        if all(dict(point)[path] == value for path, value in control.at.items() if path in dict(point)):
            yield point, resolve(task, overrides, point, f"controls.{control.name}")


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
