"""A task file as typed, frozen values: what the paper claims, under which settings it is tested, and what counts as
the same result.

`load_task` either returns a Task or raises TaskErrors with every error of the file: file, key, value found, values
allowed. What can only be judged across keys (one factor between arms, accept regions, baseline keys) is in
validate.py. The settings sections are in settings.py. No torch.
"""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, PrivateAttr, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from suite.errors import TaskError
from suite.spec import claims as written
from suite.spec.checkout import base_folder, find_repo, task_files, task_path  # noqa: F401  (offered where people look)
from suite.spec.kinds import KINDS
from suite.spec.resolved_text import resolved_text
from suite.spec.settings import (
    SECTIONS,
    Algorithm,
    Data,
    Model,
    Name,
    Natural,
    Positive,
    PrecisionSettings,
    Rollout,
    Schedule,
    SettingPath,
    Strict,
    Train,
)
from suite.spec.strict_yaml import TaskErrors, parse_yaml, read_yaml
from suite.spec.task_errors import explain, field_locations, take_out

Level = Literal["P0", "P1", "P2", "P3", "P4", "P5"]
Tier = Literal["desk", "node", "paper"]
Kind = Literal["ratio", "threshold", "event", "ordering", "equivalence", "count", "report"]
Reducer = Literal[
    "last_k_mean", "epoch_mean", "mean", "median", "geo_mean", "log_ratio", "auc", "time_to_event", "fraction_of_seeds"
]
Range = tuple[float | None, float | None]  # null = open end
MAX_NAMES, MAX_CELLS = 100, 5000


def _known_protocol(name: str) -> str:
    if name not in KINDS:
        raise PydanticCustomError("literal_error", "no such protocol", {"expected": ", ".join(KINDS)})
    return name


Protocol = Annotated[str, AfterValidator(_known_protocol), WithJsonSchema({"enum": [*KINDS], "title": "Protocol", "type": "string"})]


class Paper(Strict):
    """What the paper reports; `level` says how well that is known (P0 printed ... P5 judgement)."""

    value: JsonValue = None
    unit: str
    source: str
    level: Level
    baseline: str


class Claim(Strict):
    id: Name
    about: Annotated[str, Field(pattern=r"^C([1-9]|[12][0-9]|3[0-7])$")]
    statement: str
    kind: Kind
    paper: Paper | None = None


class Contrast(Strict):
    """Exactly one of: the level of an arm, a ratio or difference of two, an ascending order of several with its
    margin.
    """

    arm: Name | None = None
    ratio: tuple[Name, Name] | None = None
    difference: tuple[Name, Name] | None = None
    order: Annotated[tuple[Name, ...], Field(min_length=2)] | None = None
    margin: Annotated[float, Field(ge=0)] | None = None

    @property
    def form(self) -> str:
        """The one that is set; validate.py refuses none and several."""
        return next(
            (form for form in ("arm", "ratio", "difference", "order") if getattr(self, form) is not None), "arm"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Arms and controls it speaks of."""
        value = getattr(self, self.form)
        return (value,) if isinstance(value, str) else tuple(value or ())


class Event(Strict):
    """A collapse: a fall by more than `drop` below the running peak of the `window`-step mean that lasts `hold` such
    means (counted in iterations). With `relative`, drop is a share of the peak: 0.5 is a fall by half.
    """

    drop: Annotated[float, Field(gt=0)]
    relative: bool = False
    window: Positive
    hold: Positive
    expect: Literal["collapses", "stable"]

    @property
    def rule(self) -> str:
        """In words."""
        drop = f"{self.drop:.0%} of it" if self.relative else f"{self.drop:g}"
        return f"the {self.window}-iteration mean falls by more than {drop} below its peak, for {self.hold} iterations"


class Interval(Strict):
    method: Literal["student_t", "clopper_pearson", "within_run", "exact"]
    level: Annotated[float, Field(gt=0, lt=1)] = 0.90
    unit: Literal["seed", "prompt"] = "seed"


def _date(text: str) -> str:
    if not written.is_date(text):
        raise ValueError("a day that the calendar has, as 2026-11-20")
    return text


class Tolerance(Strict):
    """Where the accept region comes from: its source level, how it was derived, and when it was fixed (YYYY-MM-DD)."""

    level: Level
    derivation: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_date)]


class Floor(Strict):
    """The level that every launch must reach for a claim that nothing happened, or that arms are alike, to say anything:
    a run that learned nothing never falls, and two such runs agree. derivation: where the number comes from.
    """

    at_least: float
    derivation: str


class Grade(Strict):
    """How one claim is judged: the estimand of which arms at which grid point, its interval, and the region it must
    lie in.

    window: iterations that the reducer looks at, at the end of the series. until: the series is taken up to that
    iteration only (the horizon of the claim); null = to the end of the schedule. level: with reducer time_to_event and
    no event, the time is the first iteration whose window mean is at least this high. floor: of an equivalence and of an
    event that is not to happen; below it the claim is INCONCLUSIVE.
    """

    estimand: str
    contrast: Contrast
    reducer: Reducer = "mean"
    at: dict[SettingPath, JsonValue] = {}
    window: Positive | None = None
    until: Positive | None = None
    level: float | None = None
    event: Event | None = None
    interval: Interval | None = None
    accept: Range | None = None
    remark_band: Range | None = None
    min_seeds: Positive = 1
    floor: Floor | None = None
    tolerance: Tolerance | None = None


class Check(Strict):
    """What is looked at in the runs of a control: the contrast of an estimand, and what it must lie in. kind: that of the
    control unless said. window: of a drift, the iterations at each end of the series that are compared.
    """

    estimand: str
    contrast: Contrast
    accept: Range
    kind: Literal["aa", "floor", "broken", "null_drift"] | None = None
    reducer: Reducer = "mean"
    window: Positive | None = None


class Control(Strict):
    """A cell whose outcome is known: `like` an arm, with `set` on top. The task is INVALID where it fails.

    also: further checks of the same runs, so that one launch guards several claims.
    """

    name: Name
    kind: Literal["aa", "floor", "broken", "null_drift"]
    like: Name
    set: dict[str, JsonValue] = {}
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)]
    at: dict[str, JsonValue] = {}
    estimand: str
    reducer: Reducer = "mean"
    window: Positive | None = None
    contrast: Contrast
    accept: Range
    also: tuple[Check, ...] = ()

    @property
    def checks(self) -> list["Control"]:
        """The control once per check, each with a single one; the further ones are named after what they look at."""
        further = [
            self.model_copy(update={"name": f"{self.name}-{check.estimand}", "kind": check.kind or self.kind, "also": (),
                                    **{name: getattr(check, name) for name in ("estimand", "contrast", "accept", "reducer", "window")}})
            for check in self.also
        ]  # fmt: skip
        return [self.model_copy(update={"also": ()}), *further]


class Resources(Strict):
    """What one cell needs at least; `cpu_ok` means that it also runs without a GPU."""

    gpus: Natural
    gpu_mem_gib: Annotated[float, Field(ge=0)]
    nodes: Positive = 1
    disk_gib: Annotated[float, Field(ge=0)]
    cpu_ok: bool


class Budget(Strict):
    """Wall time allowed for all cells together on the machine that `resources` describes."""

    minutes: Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Source:
    """Where a task was read from, what its file and blocks come to, and how its claims are written."""

    path: Path
    expanded: dict
    form: written.Form | None


class Task(Strict):
    """One task file, `extends` already merged. Sections may be partial: arms complete them (plan.resolve)."""

    schema_: Literal[1] = Field(alias="schema")
    id: Name
    version: Positive
    grade_version: Positive
    tier: Tier
    title: str
    tags: tuple[str, ...] = ()
    extends: tuple[Name, ...] = ()
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]
    protocol: Protocol
    model: Model | None = None
    data: Data | None = None
    rollout: Rollout | None = None
    train: Train | None = None
    precision: PrecisionSettings | None = None
    algorithm: Algorithm | None = None
    schedule: Schedule | None = None
    arms: dict[Name, dict[str, JsonValue]] = {}
    vary: tuple[SettingPath, ...] = ()
    grid: dict[SettingPath, Annotated[list[JsonValue], Field(min_length=1)]] = {}
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)]
    controls: tuple[Control, ...] = ()
    metrics: tuple[str, ...] = ()
    needs: tuple[Name, ...] = ()
    grade: dict[Name, Grade] = {}
    resources: Resources
    budget: Budget | None = None
    _source: Source | None = PrivateAttr(default=None)

    @property
    def source(self) -> Source | None:
        """File and text; enters no key."""
        return self._source

    @property
    def text(self) -> str:
        """The task written out in full, as it stands in tasks/_resolved: blocks merged, claims with all that they say."""
        keys = [field.alias or name for name, field in Task.model_fields.items()]
        return resolved_text(self._source.expanded, keys, tuple(Grade.model_fields)) if self._source else ""

    @property
    def file(self) -> Path:
        """The file to name in errors."""
        return self._source.path if self._source else Path(f"{self.id}.yaml")

    @property
    def settings(self) -> dict[str, Any]:
        """The sections as plain data, defaults filled in, before any arm."""
        return {
            name: None if (part := getattr(self, name)) is None else part.model_dump(mode="json") for name in SECTIONS
        }


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


def axis_label(value: Any) -> str:
    """A grid value as it appears in cell names, in letters, digits, _, + and - alone: numbers joined by a dash, files by
    their stems; of a section without a name its plain values."""
    if isinstance(value, dict):
        plain = (str(item) for item in value.values() if not isinstance(item, (dict, list, tuple)))
        return _safe(Path(str(value.get("name") or value.get("id") or "-".join(plain))).stem)
    if isinstance(value, (list, tuple)):
        return ("+" if any(isinstance(item, dict) for item in value) else "-").join(axis_label(item) for item in value)
    return _safe(str(value).replace(".", "p"))


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_+-]+", "_", text)


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

