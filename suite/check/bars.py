"""The bars that others publish (bars.yaml), and whether an arm clears them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files

import yaml

from suite.check.measures import Estimate
from suite.errors import UserError

YES, NO, NO_LIMIT, NO_VALUE = "yes", "no", "no limit", "no value"


@dataclass(frozen=True)
class Bar:
    """A limit on one statistic: `below` it, or at `most` it; neither where its author gave none."""

    name: str
    system: str
    statistic: str
    says: str
    source: str
    date: str
    below: float | None = None
    most: float | None = None

    @property
    def limit(self) -> str:
        return f"< {self.below:g}" if self.below is not None else f"<= {self.most:g}" if self.most is not None else ""

    def clears(self, value: float) -> bool:
        """nan clears nothing."""
        return value < self.below if self.below is not None else value <= self.most


@dataclass(frozen=True)
class Answer:
    """Whether one arm clears one bar. is_sure: the interval lies on the same side as the estimate."""

    bar: Bar
    arm: str
    estimate: Estimate | None
    word: str
    is_sure: bool


def bars() -> dict[str, Bar]:
    """Every published bar by name, in the order of the file."""
    rows = yaml.safe_load((files("suite.check") / "bars.yaml").read_text(encoding="utf-8"))
    return {row["name"]: Bar(**row | {"date": str(row["date"])}) for row in rows}


def chosen_bars(names: list[str]) -> list[str]:
    """The bars named after --bar. UserError for one that is not there, or that has no limit and so cannot be missed."""
    known = bars()
    limited = [name for name, bar in known.items() if bar.limit]
    for name in names:
        if name not in limited:
            why = " (it has no limit)" if name in known else ""
            raise UserError(f"--bar: found {name!r}{why}, allowed: {', '.join(limited)}")
    return names


def answers(estimates: dict[str, dict[str, Estimate]]) -> list[Answer]:
    """Every bar for every arm. estimates: arm -> statistic -> estimate."""
    return [_answer(bar, arm, found.get(bar.statistic)) for bar in bars().values() for arm, found in estimates.items()]


def _answer(bar: Bar, arm: str, estimate: Estimate | None) -> Answer:
    if estimate is None or math.isnan(estimate.value):
        return Answer(bar, arm, None, NO_VALUE, False)
    if not bar.limit:
        return Answer(bar, arm, estimate, NO_LIMIT, False)
    met = bar.clears(estimate.value)
    sure = estimate.interval is not None and all(bar.clears(end) == met for end in estimate.interval)
    return Answer(bar, arm, estimate, YES if met else NO, sure)


def missed(found: list[Answer], names: list[str]) -> list[Answer]:
    """The answers that make `suite check --bar ...` end with 1: a bar without a value is not cleared."""
    return [one for one in found if one.bar.name in names and one.word != YES]
