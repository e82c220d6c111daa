"""What `suite plan` says of the GPUs of a task: how they are started, what their memory is for, how long they are at work."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.machine.hours import ASSUMED, CARDS, gpu_hours, seconds_per_step
from suite.machine.memory import GIB, REST_GIB, Need, need_of, num_ranks, why_not
from suite.spec.plan import Cell
from suite.spec.task import Task


def print_layout(console: Console, table: Table, task: Task, cells: list[Cell]) -> None:
    """Nothing for a task that needs no GPU. `table`: an empty one with the columns of `COLUMNS`."""
    card = task.resources.gpu_mem_gib
    if not task.resources.gpus or not cells:
        return
    for line in launch_lines(task, cells):
        console.print(escape(line))
    needs = distinct_needs(cells, card)
    if not needs:
        console.print("memory: the shape of the model is not known here (no local config.json, and not in suite/spec/shapes.py)")
        return
    for cell, need in needs:
        for part, size in rows(need):
            table.add_row(escape(cell.name), part, f"{size:.1f}")
    console.print(table)
    for cell, need in needs:
        console.print(escape(f"{cell.name}: {need.total_gib:.1f} of {card:g} GiB; {why_not(need, card) or 'fits'}"))
    for line in hour_lines(cells, card):
        console.print(escape(line))


COLUMNS = ("cell", "memory of each GPU", "GiB")


def distinct_needs(cells: list[Cell], card_gib: float) -> list[tuple[Cell, Need]]:
    """The first cell of every need that differs from those before."""
    found: dict[str, tuple[Cell, Need]] = {}
    for cell in cells:
        if need := need_of(cell, card_gib):
            found.setdefault(repr(need), (cell, need))
    return list(found.values())


def rows(need: Need) -> list[tuple[str, float]]:
    """(part, GiB); smallest parts included, so that they add up."""
    parts = [(f"trainer: {name}", size / GIB) for name, size in need.trainer.items()]
    parts += [(f"sampler: {name}", size / GIB) for name, size in need.sampler.items()]
    return [*parts, ("rest, assumed", REST_GIB)]


def launch_lines(task: Task, cells: list[Cell]) -> list[str]:
    """The command that starts the ranks of each cell, on one node or on several."""
    gpus, nodes = task.resources.gpus, task.resources.nodes
    ranks = max(map(num_ranks, cells))
    if ranks == 1:
        return [f"start: suite run {task.id}, or --nproc {gpus} for as many cells at once" if gpus > 1 else f"start: suite run {task.id}"]
    if nodes == 1:
        return [f"start: torchrun --standalone --nproc-per-node {ranks} -m suite run {task.id}"]
    torchrun = f"torchrun --nnodes {nodes} --nproc-per-node {gpus} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500"
    return [f"start: srun --nodes {nodes} --ntasks-per-node 1 {torchrun} -m suite run {task.id}"]


def hour_lines(cells: list[Cell], card_gib: float) -> list[str]:
    """Seconds a step and GPU-hours of all cells, on each card of the table; [] where nothing is known of them."""
    lines = []
    for card in CARDS:
        seconds, hours = seconds_per_step(cells[0], card_gib, card), gpu_hours(cells, card_gib, card)
        if seconds is not None and hours is not None:
            lines.append(f"{card.name}: about {seconds:.0f} s a step, {hours:,.0f} GPU-hours for all {len(cells)} cells")
    return [*lines, ASSUMED] if lines else []
