"""What `suite show` says of a published task's launches beside its verdict: which quantity moved first before the reward fell, and
the time of the fall against the dose of mismatch. Reads results/, prints tables."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.archive.doses import (
    DOSE_COLUMNS,
    LEVEL_COLUMNS,
    LEVELS_OF,
    PAPER_LEVELS,
    Response,
    dose_rows,
    launch_of,
    level_rows,
    line_text,
    own_levels,
    responses_of,
)  # fmt: skip
from suite.archive.published import records_of
from suite.archive.publishing import published_runs
from suite.measure.lead import in_order, lead_of, over_launches
from suite.spec.kinds import kind_of
from suite.spec.reading import load_readable
from suite.spec.task import Task


def print_falls(console: Console, table, task: Task, results: Path) -> None:
    """Of every fingerprint on which a task that trains is published. table(*columns) makes an empty table."""
    if not kind_of(task).trains:
        return
    for folder in sorted(path for path in (results / task.id).glob("*") if path.is_dir()):
        with records_of(folder):
            runs = [run for run in published_runs(results, task.id, folder.name) if not run.is_control]
            leads = over_launches([run.metrics for run in runs])
        console.print(f"\n[bold]{escape(folder.name)}[/]: {_first(leads, len(runs))}")
        if leads:
            console.print(_lead_table(table, leads))
        for response in _responses(task, results, folder.name):
            _print_response(console, table, response, own_levels(published_runs(results, LEVELS_OF, _newest(results, folder.name))))


def _first(leads: list, num_launches: int) -> str:
    if not leads:
        return f"nothing fell in {num_launches} launches"
    first, fell = in_order(leads)[0], leads[0].num_fell
    if first.num_moved < fell:
        return f"{fell} of {num_launches} launches fell; no series moved in all of them"
    return f"{fell} of {num_launches} launches fell; {first.watched.label} moved first, by {lead_of(first)} iterations"


def _lead_table(table, leads: list) -> Table:
    rows = table("series", "moved by", "iterations before the fall [90 %]")
    for lead in in_order(leads):
        rows.add_row(escape(lead.watched.label), f"a factor of {lead.watched.factor:g}", escape(lead_of(lead)))
    return rows


def _responses(task: Task, results: Path, fingerprint: str) -> list[Response]:
    """The families that launches of this task belong to, with the launches of all tasks tagged `dose`."""
    if "dose" not in task.tags:
        return []
    named = [one.id for one in load_readable()[0].values() if kind_of(one).trains and "dose" in one.tags]
    found = {(name, fingerprint): map(launch_of, published_runs(results, name, fingerprint)) for name in {task.id, *named}}
    return responses_of({key: [one for one in its if one] for key, its in found.items()}, task.id, fingerprint)


def _newest(results: Path, fingerprint: str) -> str:
    """The fingerprint whose levels are shown: this one, or the last by name where the task is published."""
    there = sorted(path.name for path in (results / LEVELS_OF).glob("*") if path.is_dir())
    return fingerprint if fingerprint in there else there[-1] if there else fingerprint


def _print_response(console: Console, table, response: Response, own: list) -> None:
    rows = table(*DOSE_COLUMNS)
    for row in dose_rows(response):
        rows.add_row(*map(escape, row))
    console.print(f"\n{escape(response.algorithm)}: {escape(line_text(response))}")
    console.print(rows)
    levels = level_rows(response, [*own, *PAPER_LEVELS])
    if levels:
        rows = table(*LEVEL_COLUMNS)
        for row in levels:
            rows.add_row(*map(escape, row))
        console.print(rows)
