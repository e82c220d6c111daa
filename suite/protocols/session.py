"""What a protocol is given besides its cells, and how the end of a cell, good or bad, gets into its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from suite.engines.world import PeerLost, World, naming_a_lost_peer
from suite.files import write_json
from suite.record.run import Run
from suite.record.writer import RunWriter, failure
from suite.spec.plan import Cell
from suite.spec.task import Task


@dataclass(frozen=True)
class Session:
    """What a protocol is given besides its cells."""

    task: Task
    limit: int | None
    progress: Callable[..., None]
    open_cell: Callable[[Cell], RunWriter | Run]  # a finished Run if the cell is complete, else its writer
    world: World = World()  # of the ranks that run every cell together

    def run_cell(self, cell: Cell, stage: str, body: Callable[[RunWriter], None]) -> None:
        """Open the record of a cell, unless it is complete, and let `body` finish it. Whatever `body` raises is written
        into the record, under `stage`, and goes on up."""
        writer = self.open_cell(cell)
        if isinstance(writer, Run):
            self.progress(cell.name, 1, 1, "complete already")
            return
        try:
            with naming_a_lost_peer(self.world):
                body(writer)
        except BaseException as error:
            if not self.world.is_first:
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
