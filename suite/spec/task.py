"""A task file as typed, frozen values: what the paper claims, under which settings it is tested, and what counts as
the same result.

How a file becomes one is in reading.py. What can only be judged across keys (one factor between arms, accept regions, baseline
keys) is in validate.py. The settings sections are in settings.py. No torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, PrivateAttr, WithJsonSchema
from pydantic_core import PydanticCustomError

from suite.spec import claims as written
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

Level = Literal["P0", "P1", "P2", "P3", "P4", "P5"]
Tier = Literal["desk", "node", "paper"]
Kind = Literal["ratio", "threshold", "event", "ordering", "equivalence", "count", "report"]
Reducer = Literal[
    "last_k_mean", "epoch_mean", "mean", "median", "geo_mean", "log_ratio", "auc", "time_to_event", "fraction_of_seeds"
]
Range = tuple[float | None, float | None]  # null = open end


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
