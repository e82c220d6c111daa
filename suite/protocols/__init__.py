"""Protocols: one file per kind of experiment. Each turns cells into finished run folders."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from suite import environment, signals
from suite.files import write_json
from suite.plan import Cell
from suite.ranks import PeerLost, Ranks
from suite.record import Run, read_run
from suite.task import Task
from suite.writer import RunWriter, SilentWriter, failure, open_run

MODULES = {
    "offline_mismatch": "suite.protocols.offline",
    "offline_accuracy": "suite.protocols.offline",
    "rl": "suite.protocols.rl",
    "filter": "suite.protocols.filter",
    "dataset": "suite.protocols.dataset",
}


@dataclass(frozen=True)
class Session:
    """What a protocol is given besides its cells."""

    task: Task
    limit: int | None
    progress: Callable[..., None]
    open_cell: Callable[[Cell], RunWriter | Run]  # a finished Run if the cell is complete, else its writer
    ranks: Ranks = Ranks()  # that run every cell together

    def run_cell(self, cell: Cell, stage: str, body: Callable[[RunWriter], None]) -> None:
        """Open the record of a cell, unless it is complete, and let `body` finish it. Whatever `body` raises is written
        into the record, under `stage`, and goes on up."""
        writer = self.open_cell(cell)
        if isinstance(writer, Run):
            self.progress(cell.name, 1, 1, "complete already")
            return
        try:
            body(writer)
        except BaseException as error:
            if not self.ranks.is_first:
                _tell_rank_0(writer, stage, error)
            elif writer.is_open:
                writer.fail(stage, error)
                _hear_from_ranks(writer)
            raise


RANK_ERROR = "rank-error.json"


def _tell_rank_0(writer: RunWriter, stage: str, error: BaseException) -> None:
    """Leave the error of another rank where rank 0, which will soon miss it, finds it; the loss of a peer is no news."""
    if not isinstance(error, PeerLost):
        write_json(writer.folder / RANK_ERROR, failure(stage, error))


def _hear_from_ranks(writer: RunWriter) -> None:
    note = writer.folder / RANK_ERROR
    if note.exists():
        writer.update(**json.loads(note.read_text()))
        note.unlink()


def run_task(task: Task, cells: list[Cell], *, runs_dir: Path, limit: int | None = None, fresh: bool = False,
             progress: Callable[..., None] = lambda *a, **k: None, ranks: Ranks = Ranks()) -> None:
    """Run every cell that has no finished record yet; the same call again after a kill goes on where it stopped.

    Args:
        limit: number of prompts (RL: steps); the runs get keys of their own and are never graded.
        fresh: begin a new attempt for every cell, also where a finished one exists.
        ranks: that run these cells together.
    Raises whatever ended a run: UserError and NotRunnable for the user, OSError for a full or read-only disk.
    """
    machine = environment.collect(runs_dir)
    fingerprint = environment.fingerprint(machine)
    has_evidence, opened = task.protocol != "dataset", []

    def open_cell(cell: Cell) -> RunWriter | Run:
        found = None
        if ranks.is_first:
            with signals.held():  # no writer without somebody who closes it
                found = open_run(runs_dir, task, cell, machine, fingerprint, limit=limit, fresh=fresh, evidence_parts=has_evidence)
                opened.append(found)
            if isinstance(found, RunWriter):
                (found.folder / RANK_ERROR).unlink(missing_ok=True)  # of an attempt whose rank 0 was killed as well
        return follow(found, ranks)

    def tell(*done, **more) -> None:
        signals.check()
        progress(*done, **more)

    try:
        protocol = importlib.import_module(MODULES[task.protocol])
        protocol.run(cells, Session(task, limit, tell, open_cell, ranks))
    except BaseException as error:
        for writer in opened:
            if isinstance(writer, RunWriter) and writer.is_open:
                writer.fail(task.protocol, error)
        raise


def follow(found: RunWriter | Run | None, ranks: Ranks) -> RunWriter | Run:
    """What rank 0 opened; on the other ranks the same run, or a writer that keeps everything to itself."""
    folder, record, metrics, is_open = ranks.first(
        (found.folder, found.record, found.metrics, isinstance(found, RunWriter)) if found else None
    )
    if found:
        return found
    return SilentWriter(folder, record, metrics) if is_open else read_run(folder)
