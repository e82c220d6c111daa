"""`suite watch` on a terminal: the lines of suite/report/watching.py, drawn again every two seconds until every run has ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from suite.errors import EXIT_NOTHING
from suite.report.watching import RUNNING, Watched, lines, watched

SECONDS = 2.0


def watch(runs_dir: Path, task: str | None, once: bool = False) -> int:
    """0, or 14 where nothing is recorded. Ctrl-C ends the watching and not the run."""
    runs = watched(runs_dir, task)
    if not runs:
        print(f"{task or 'watch'}: nothing recorded below {runs_dir}")
        return EXIT_NOTHING
    console = Console(highlight=False)
    if once or not console.is_terminal:
        print("\n".join(lines(runs, console.width)))
        return 0
    with Live(_shown(runs, console), console=console, auto_refresh=False, screen=False) as live:
        while any(run.status in RUNNING for run in runs):
            time.sleep(SECONDS)
            runs = watched(runs_dir, task)
            live.update(_shown(runs, console), refresh=True)
    sys.stdout.flush()
    return 0


def _shown(runs: list[Watched], console: Console) -> Text:
    """What fits the terminal: running cells before finished ones where not all do."""
    text = lines(runs, console.width)
    if len(text) > console.height - 1:
        text = lines([run for run in runs if run.status in RUNNING], console.width)[: console.height - 2] + ["..."]
    return Text("\n".join(text), no_wrap=True, overflow="crop")
