"""Time of collapse against dose, as sections of RESULTS.md and as figures, of every task that has launches at two doses."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from suite.archive.doses import (
    DOSE_COLUMNS,
    LEVEL_COLUMNS,
    PAPER_LEVELS,
    Level,
    Published,
    Response,
    dose_rows,
    level_rows,
    line_text,
    responses_of,
)  # fmt: skip
from suite.report.escaping import escape_markdown

MIN_DOSES = 2  # of a task's own; others join those that it shares a family with


def dose_sections(published: Published, own_levels: Sequence[Level]) -> list[str]:
    """Markdown: one heading, then a table of doses and one of levels for every family of every such task."""
    found = [(*key, one) for key in sorted(published) for one in responses_of(published, *key, MIN_DOSES)]
    levels = [*own_levels, *PAPER_LEVELS]
    return ["## Time of collapse against the dose of mismatch", *(_section(*each, levels) for each in found)] if found else []


def _section(task_id: str, fingerprint: str, response: Response, levels: Sequence[Level]) -> str:
    parts = [f"### {task_id}: {response.algorithm}", _table(dose_rows(response), DOSE_COLUMNS), line_text(response)]
    placed = level_rows(response, levels)
    parts += [_table(placed, LEVEL_COLUMNS)] if placed else []
    return "\n\n".join([*parts, f"On {fingerprint}; launches of other tasks with the same settings included."])


def _table(rows: list[list[str]], columns: Sequence[str]) -> str:
    return tabulate([[*map(escape_markdown, row)] for row in rows], columns, tablefmt="github", disable_numparse=True)
