"""Run the cells of a task: each into a run folder of its own, by the module of the task's protocol (suite/spec/kinds.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from suite import signals
from suite.engines.world import World
from suite.machine import environment
from suite.protocols.session import RANK_ERROR, Session
from suite.record.run import Run, read_run
from suite.record.writer import RunWriter, SilentWriter, open_run
from suite.spec.kinds import kind_of
from suite.spec.plan import Cell
from suite.spec.task import Task


def run_task(task: Task, cells: list[Cell], *, runs_dir: Path, limit: int | None = None, fresh: bool = False,
             progress: Callable[..., None] = lambda *a, **k: None, world: World = World()) -> None:
    """Run every cell that has no finished record yet; the same call again after a kill goes on where it stopped.

    Args:
        limit: number of prompts (RL: steps); the runs get keys of their own and are never graded.
        fresh: begin a new attempt for every cell, also where a finished one exists.
        world: the ranks that run these cells together.
    Raises whatever ended a run: UserError and NotRunnable for the user, OSError for a full or read-only disk.
    """
    machine = environment.collect(runs_dir)
    fingerprint = environment.fingerprint(machine)
    kind, opened = kind_of(task), []

    def open_cell(cell: Cell) -> RunWriter | Run:
        found = None
        if world.is_first:
            with signals.held():  # no writer without somebody who closes it
                found = open_run(runs_dir, task, cell, machine, fingerprint, limit=limit, fresh=fresh, evidence_parts=kind.evidence != "none")
                opened.append(found)
            if isinstance(found, RunWriter):
                (found.folder / RANK_ERROR).unlink(missing_ok=True)  # of an attempt whose rank 0 was killed as well
        return follow(found, world)

    def tell(*done, **more) -> None:
        signals.check()
        progress(*done, **more)

    try:
        importlib.import_module(kind.module).run(cells, Session(task, limit, tell, open_cell, world))
    except BaseException as error:
        for writer in opened:
            if isinstance(writer, RunWriter) and writer.is_open:
                writer.fail(task.protocol, error)
        raise


def follow(found: RunWriter | Run | None, world: World) -> RunWriter | Run:
    """What rank 0 opened; on the other ranks the same run, or a writer that keeps everything to itself."""
    folder, record, metrics, is_open = world.first(
        (found.folder, found.record, found.metrics, isinstance(found, RunWriter)) if found else None
    )
    if found:
        return found
    return SilentWriter(folder, record, metrics) if is_open else read_run(folder)
