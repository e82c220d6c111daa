"""A check on the terminal: one screen."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.check.bars import NO, YES
from suite.check.result import DOUBTFUL, Result, bar_rows, flight_lines, number_rows, ratio_rows

COLOURS = {YES: "green", NO: "red", DOUBTFUL: "yellow", "fits": "green", "close": "yellow", "overflows": "red"}


def show(result: Result) -> None:
    out = Console(highlight=False)
    out = out if out.is_terminal else Console(highlight=False, width=160)
    out.print(f"[bold]{escape(result.title)}[/]")
    for name, text in result.about:
        out.print(escape(f"  {name}: {text}"))
    for line in result.doubts:
        out.print(f"[yellow]doubtful:[/] {escape(line)}")
    table = _table("", *result.arms)
    for row in number_rows(result):
        table.add_row(row["name"], *(escape(text) for _, text in row["cells"]))
    for pair, name, text in ratio_rows(result):
        table.add_row(f"{name}, {pair}", escape(text), *[""] * (len(result.arms) - 1))
    out.print(table)
    _bars(out, result)
    if result.preflight:
        first, *rest = flight_lines(result.preflight)
        out.print(f"[{COLOURS[result.preflight.word]}]{first}[/] " + escape(" ".join(rest)))
    for line in result.notes:
        out.print(escape(f"note: {line}"))


def _bars(out: Console, result: Result) -> None:
    table = _table("would it pass?", "limit", *result.arms, "source, as read")
    for row in bar_rows(result):
        bar = row["bar"]
        answers = [f"[{COLOURS.get(one['word'], 'default')}]{escape(one['text'])}[/] {one['number']}".strip() for one in row["answers"]]
        name = f"[bold]{bar.name}[/] (chosen)" if row["chosen"] else bar.name
        table.add_row(name, escape(f"{bar.statistic} {bar.limit}".strip()), *answers, f"{escape(bar.source.split(',')[0])}, {bar.date}")
    out.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
