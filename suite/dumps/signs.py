"""What the columns of a dump betray when they are looked at as a whole: signs that its numbers are not what they say.

A Flaw keeps what it touches from PASS and FAIL, or makes it INVALID; copies and foreign problems refuse the file. All
rules ask one question: could the engines have written this?

    copies      two launches with the same responses. A launch draws its own: that it draws a response of probability p
                again has a chance of at most N p, N being the rollouts of the launch. Chances below e^-50 are copies.
    zeros       log-prob exactly 0.0 on one side where the other side has less: a token that was appended or padded.
    floors      the smallest value of a column again and again: log-probs clamped from below.
    grids       all values of a column are bf16 or fp16 numbers, or decimals as coarse as the mismatch: what is compared
                is how they were stored.
    equal       both columns the same throughout: nothing was scored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from suite.dumps.rows import Rollout

COINCIDENCE = 50.0  # nats: what is less likely than e^-50 did not happen by chance
# Where one side is exactly 0.0 (an fp32 log-softmax gives that above 1 - 6e-8), the other has at least this: no rounding of
# logits moves a token further. At the end of nearly all responses of a launch less is enough: an end that was appended.
SURE_ZERO, SURE_END, MOST_ENDS, FEW_ENDS = -0.1, -1e-4, 0.9, 8
FLOOR, FLOOR_TIMES = -5.0, 5  # a value this low is drawn so rarely that five equal ones were not drawn
GRID_SHARE, GRID_VALUES = 0.9, 8  # share of the values that lie on a grid, and how many different ones it takes
SMALLEST_ON_GRID = 0.05  # nearer to 0 the fp16 grid is as fine as what a text with six digits can tell
SAME = 6e-7  # how far from the grid a value may be, for the digits that a text leaves out
COARSE = 0.05  # share of the mean squared log-ratio that rounding to decimals may make up
COLUMNS = ("rollout_logprobs", "trainer_logprobs")
NOTE = "NOTE"


@dataclass(frozen=True)
class Flaw:
    """Something wrong with one arm, at one grid point. word: INVALID, INCONCLUSIVE for what caps a claim, or NOTE for what is
    said beside the verdict.

    Where `tokens_only`, claims that rest on reward and length alone are not touched.
    """

    arm: str
    point: tuple[tuple[str, str], ...]
    word: str
    reason: str
    resolve: str
    tokens_only: bool = True


def launch_text(cell: tuple) -> str:
    arm, point, seed = cell
    at = ", ".join(f"{axis.rsplit('.', 1)[-1]}={label}" for axis, label in point)
    return f"arm {arm} seed {seed}" + (f" at {at}" if at else "")


# ---- the columns of one launch -----------------------------------------------------------------------------------------


@dataclass
class ColumnSigns:
    """One column of one launch, folded in part by part."""

    num: int = 0  # values beyond SMALLEST_ON_GRID
    on_grid: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GRIDS, 0))
    seen: set[float] = field(default_factory=set)  # a few different values
    lowest: float = 0.0
    num_lowest: int = 0
    lowest_at: str = ""

    def fold(self, values: np.ndarray, place) -> None:
        self._fold_lowest(values, place)
        values = values[values < -SMALLEST_ON_GRID]
        self.num += values.size
        for name, snapped in GRIDS.items():
            self.on_grid[name] += int((np.abs(snapped(values) - values) < SAME).sum())
        if len(self.seen) < GRID_VALUES:
            self.seen |= set(np.unique(values)[:GRID_VALUES].tolist())

    def _fold_lowest(self, values: np.ndarray, place) -> None:
        lowest = float(values.min(initial=0.0))
        if lowest < self.lowest:
            self.lowest, self.num_lowest, self.lowest_at = lowest, 0, place(int(values.argmin()))
        self.num_lowest += int((values == self.lowest).sum())

    def grid(self) -> str | None:
        """The coarsest grid on which the column lies."""
        if len(self.seen) < GRID_VALUES:
            return None
        return next((name for name, count in self.on_grid.items() if count >= GRID_SHARE * self.num), None)


def _bf16(values: np.ndarray) -> np.ndarray:
    """The nearest numbers with the mantissa of bf16, the upper half of an fp32 number."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32).astype(np.float64)


# Coarsest first: whoever lies on one lies on the finer ones too.
DECIMALS = {"a decimal of 1 digit": 1, "a decimal of 2 digits": 2, "a decimal of 3 digits": 3}
GRIDS = {
    "a bf16 number": _bf16,
    "an fp16 number": lambda values: values.astype(np.float16).astype(np.float64),
    **{name: lambda values, digits=digits: np.round(values, digits) for name, digits in DECIMALS.items()},
}


@dataclass
class LaunchSigns:
    """Both columns of one launch beside each other."""

    columns: dict[str, ColumnSigns] = field(default_factory=lambda: {name: ColumnSigns() for name in COLUMNS})
    num_tokens: int = 0
    num_different: int = 0
    num_ends: int = 0
    zero_ends: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    zeros: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    zero_at: dict[tuple[str, str], str] = field(default_factory=dict)

    def fold(self, rollouts: list[Rollout], mu: np.ndarray, pi: np.ndarray) -> None:
        ends = np.cumsum([rollout.rollout_logprobs.size for rollout in rollouts])

        def place(token: int) -> str:
            row = int(np.searchsorted(ends, token, side="right"))
            return rollouts[row].place(token - int(ends[row - 1] if row else 0))

        last = np.array([end - 1 for end, one in zip(ends, rollouts, strict=True) if one.rollout_logprobs.size], dtype=np.int64)
        self.num_ends += last.size
        self.num_tokens += mu.size
        self.num_different += int((mu != pi).sum())
        for name, mine, other in (("rollout_logprobs", mu, pi), ("trainer_logprobs", pi, mu)):
            self.columns[name].fold(mine, place)
            self._note_zeros(name, np.flatnonzero((mine == 0) & (other < SURE_ZERO)), self.zeros, other, place)
            self._note_zeros(name, last[(mine[last] == 0) & (other[last] < SURE_END)], self.zero_ends, other, place)

    def _note_zeros(self, name: str, odd: np.ndarray, counts: dict[str, int], other: np.ndarray, place) -> None:
        """Count log-probs of exactly 0.0 that the other column belies, and remember where the first one stands."""
        counts[name] += odd.size
        if odd.size:
            kind = "end" if counts is self.zero_ends else "any"
            self.zero_at.setdefault((name, kind), f"{place(int(odd[0]))} (the other column has {other[odd[0]]:.4g})")

    def flaws(self, cell: tuple, sum_k2: float) -> Iterator[Flaw]:
        """sum_k2: half the sum of squared log-ratios over the tokens of the launch."""
        arm, point, _ = cell
        where = launch_text(cell)
        if self.num_tokens and not self.num_different:
            yield Flaw(arm, point, "INCONCLUSIVE", f"{where}: the two columns are equal, k3 is exactly 0",
                       "score the rollouts with the trainer; some frameworks copy the sampler's log-probs")  # fmt: skip
            return
        for name, column in self.columns.items():
            grid = column.grid()
            if grid in DECIMALS and 2 * sum_k2 * COARSE > self.num_tokens * 10.0 ** (-2 * DECIMALS[grid]) / 12:
                grid = None
            if grid:
                yield Flaw(arm, point, "INCONCLUSIVE", f"{where}: every value of {name} is {grid}: the mismatch is that of "
                           "storage", f"write {name} in fp32, from a log-softmax in fp32")  # fmt: skip
            elif found := self._made_up(name):
                yield Flaw(arm, point, "INVALID", f"{where}: {name} is exactly 0.0 at {found[1]}, {found[0]} times in all: a "
                           "placeholder, for a token that was not sampled",
                           "leave out what was not sampled (prompt, appended end, tool output), or mask it out")  # fmt: skip
            if not grid and column.lowest <= FLOOR and column.num_lowest >= FLOOR_TIMES:
                yield Flaw(arm, point, "INVALID", f"{where}: {name} is {column.lowest:.6g} {column.num_lowest} times, first at "
                           f"{column.lowest_at}: a floor, or a placeholder", "take log-probs that are not clamped")  # fmt: skip

    def _made_up(self, name: str) -> tuple[int, str] | None:
        """How many log-probs of exactly 0.0 cannot have been computed, and where the first one stands."""
        if self.zeros[name]:
            return self.zeros[name], self.zero_at[name, "any"]
        if self.zero_ends[name] >= max(FEW_ENDS, MOST_ENDS * self.num_ends):
            return self.zero_ends[name], self.zero_at[name, "end"]
        return None


# ---- launches beside each other ----------------------------------------------------------------------------------------


@dataclass
class Copies:
    """Responses that were seen before, as digests: twice in one launch or under two seeds by their tokens or by either
    column; under two arms, controls or grid points of one seed, which may share problems and noise, by both columns."""

    num_rollouts: int  # of a launch
    first: dict[bytes, tuple] = field(default_factory=dict)  # digest -> (cell, file, row) that had it first
    shared: dict[tuple, list] = field(default_factory=dict)  # (cell, cell, what) -> [nats, rollouts, place, place]

    def note(self, rollout: Rollout) -> None:
        nats = float(-rollout.rollout_logprobs.sum()) - math.log(self.num_rollouts)
        if nats <= 0:
            return
        ids, mu, pi = (values.tobytes() for values in
                       (rollout.response_ids, rollout.rollout_logprobs, rollout.trainer_logprobs))  # fmt: skip
        seed, cell = str(rollout.seed).encode(), repr(rollout.cell).encode()
        # Equal columns are as telling as the tokens only where they hold many different values.
        of_column = min(nats, len(set(rollout.rollout_logprobs.tolist())))
        self._compare("tokens", (b"cell", cell, ids), nats, rollout, lambda other: True)
        for what, content, worth in (("tokens", ids, nats), (COLUMNS[0], mu, of_column), (COLUMNS[1], pi, of_column)):
            self._compare(what, (what.encode(), content), worth, rollout, lambda other: other[2] != rollout.seed)
        both = (b"both", seed, mu, pi)
        self._compare("log-probs on both sides", both, of_column, rollout, lambda other: other != rollout.cell)

    def _compare(self, what: str, content: tuple[bytes, ...], nats: float, rollout: Rollout, counts) -> None:
        key = hashlib.blake2b(b"\0".join(content), digest_size=12).digest()
        here = (rollout.cell, rollout.path, rollout.row)
        there = self.first.setdefault(key, here)
        if there is not here and counts(there[0]):
            found = self.shared.setdefault((there[0], rollout.cell, what), [0.0, 0, there, here])
            found[0], found[1] = found[0] + nats, found[1] + 1

    def worst(self) -> str | None:
        """The sentence for the two launches with the most in common, if that is beyond chance."""
        pair = max(self.shared, key=lambda one: self.shared[one][0], default=None)
        if pair is None or self.shared[pair][0] < COINCIDENCE:
            return None
        (first, second, what), (_, num, there, here) = pair, self.shared[pair]
        who = f"{launch_text(first)}, twice" if first == second else f"{launch_text(first)} and {launch_text(second)}"
        places = " and ".join(f"{path.name} row {row}" for _, path, row in (there, here))
        return f"{who}: the same {what} in {num} rollouts, such as {places}"
