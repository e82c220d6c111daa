"""Rollouts that somebody's run wrote, without a task: `suite check --evidence FILE... [--from FRAMEWORK]`. Columns and refusals
are those of suite/dumps/dump.py; `arm` and `seed` may be absent, since nothing is compared with a plan. No torch, except to
read slime's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.check.measures import Launch
from suite.dumps import files as dump_files
from suite.dumps.files import Shard
from suite.dumps.readers.sources import Source
from suite.dumps.rows import Rollout, check_row, row_error
from suite.dumps.signs import NOTE, LaunchSigns
from suite.errors import TaskError, UserError
from suite.files import FOLDER_NAME

ARM, SEED = "rollouts", 0  # of files that do not say
FLUSH_TOKENS, KEPT_TOKENS = 500_000, 20_000_000  # folded at a time; held for the figure
MOST_ARMS = 20


@dataclass(frozen=True)
class AnyLaunch:
    """In place of a task: whatever arm and seed a row has is planned."""

    arms: tuple
    seeds: tuple
    id: str = "check"
    grid: dict = field(default_factory=dict)
    controls: tuple = ()


@dataclass
class Gathered:
    """One launch while its files are read."""

    launch: Launch
    pending: list[Rollout] = field(default_factory=list)
    signs: LaunchSigns = field(default_factory=LaunchSigns)
    parts: list[tuple] = field(default_factory=list)
    num_rounded: int = 0

    def fold(self, keep: bool) -> None:
        if not self.pending:
            return
        mu, pi = (np.concatenate([getattr(one, name) for one in self.pending]) for name in ("rollout_logprobs", "trainer_logprobs"))
        lengths = np.array([one.rollout_logprobs.size for one in self.pending])
        self.signs.fold(self.pending, mu, pi)
        self.launch.add([one.prompt_id for one in self.pending], lengths, mu, pi, [one.truncated for one in self.pending])
        if keep:
            self.parts.append((mu.astype(np.float32), pi.astype(np.float32), lengths))
        self.pending = []


@dataclass(frozen=True)
class Dumped:
    """launches, sorted. parts: arm -> rollouts laid end to end, for the figure. doubts, notes: sentences."""

    launches: list[Launch]
    parts: dict[str, list[tuple]]
    doubts: list[str]
    notes: list[str]


def read(paths: list[Path], framework: str | None, arm: str | None, seed: int | None) -> Dumped:
    """Every launch in the files. UserError names file, row and field of what cannot be used."""
    shards = dump_files.shards([Path(path) for path in paths])
    found: dict[tuple, Gathered] = {}
    pending = total = num_rows = 0
    for shard in shards:
        for number, row in _rows(shard, framework, arm, seed):
            rollout, num_rows = _checked(shard, number, row), num_rows + 1
            if num_rows > dump_files.MAX_ROWS:
                raise row_error(shard.path, number, "rows", num_rows, f"at most {dump_files.MAX_ROWS} in all files")
            one = found.setdefault(rollout.cell, Gathered(Launch(rollout.arm, rollout.seed)))
            one.pending.append(rollout)
            one.num_rounded += rollout.num_rounded
            pending, total = pending + rollout.rollout_logprobs.size + 1, total + rollout.rollout_logprobs.size
            if pending >= FLUSH_TOKENS:
                _fold(found, total)
                pending = 0
    _fold(found, total)
    if not total:
        raise TaskError(paths[0], "rows", "no response tokens", "one row per rollout, with its tokens")
    if len(arms := {name for name, _, _ in found}) > MOST_ARMS:
        raise TaskError(paths[0], "arm", f"{len(arms)} arms", f"at most {MOST_ARMS}")
    return _dumped(found, total)


def _fold(found: dict[tuple, Gathered], total: int) -> None:
    for one in found.values():
        one.fold(total <= KEPT_TOKENS)
        if total > KEPT_TOKENS:
            one.parts = []


def _rows(shard: Shard, framework: str | None, arm: str | None, seed: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with an arm and a seed: their own, their folder's, the flag's, or the defaults. UserError where two of them differ."""
    if framework:
        said = shard.constants
        arm_flag = arm if arm is not None else None if "arm" in said else ARM
        seed_flag = seed if seed is not None else None if "seed" in said else SEED
        yield from Source(framework, arm_flag, seed_flag).read(shard)
        return
    for number, row in dump_files.read_rows(shard):
        for name, flag, default in (("arm", arm, ARM), ("seed", seed, SEED)):
            if row.get(name) is None:
                row[name] = default if flag is None else flag
            elif flag is not None and row[name] != flag:
                raise UserError(f"{shard.path}: row {number}: {name}: found {row[name]!r}, allowed: {flag!r}, as --{name} says")
        yield number, row


def _checked(shard: Shard, number: int, row: dict[str, Any]) -> Rollout:
    if not isinstance(row.get("arm"), str) or not FOLDER_NAME.fullmatch(row["arm"]):
        raise row_error(shard.path, number, "arm", row.get("arm"), "letters, digits and _ . = + -")
    return check_row(AnyLaunch((row.get("arm"),), (row.get("seed"),)), shard.path, number, row)


def _dumped(found: dict[tuple, Gathered], total: int) -> Dumped:
    cells = sorted(found)
    flaws = [flaw for cell in cells for flaw in found[cell].signs.flaws(cell, float(found[cell].launch.sums["sum_k2"].sum()))]
    rounded = sum(one.num_rounded for one in found.values())
    notes = [f"{rounded} log-probs barely above 0 (fp32 rounding) were taken as 0"] if rounded else []
    notes += ["no figure: more tokens than are kept for it"] if total > KEPT_TOKENS else []
    notes += ["precision and temperature are taken on the word of whoever wrote the files"]
    parts: dict[str, list[tuple]] = {}
    for cell in cells:
        parts.setdefault(cell[0], []).extend(found[cell].parts)
    doubts = list(dict.fromkeys(flaw.reason for flaw in flaws if flaw.word != NOTE))
    return Dumped([found[cell].launch for cell in cells], {arm: some for arm, some in parts.items() if some}, doubts,
                  notes + list(dict.fromkeys(flaw.reason for flaw in flaws if flaw.word == NOTE)))  # fmt: skip
