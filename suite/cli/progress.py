"""How a run shows itself: a live bar on a terminal, one line per step elsewhere, nothing from ranks above 0.

Protocols call it as `progress(cell_name, done, total, note="")`, once per step or prompt batch; they need not know
where it goes.
"""

import os
import sys
import time


class Progress:
    """A context manager around one run of `num_cells` cells. Lines go to stderr: stdout belongs to results."""

    def __init__(self, num_cells: int, stream=None):
        self.num_cells, self.stream = num_cells, stream or sys.stderr
        self.silent = os.environ.get("RANK", "0") != "0"
        self.live, self.bars, self.finished, self.started = None, {}, set(), time.monotonic()

    def __enter__(self):
        if not self.silent and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.live = Bars(*columns, console=Console(file=self.stream))
            self.live.start()
        return self

    def __exit__(self, *error):
        if self.live is not None:
            self.live.stop()

    def __call__(self, cell_name: str, done: int, total: int, note: str = "") -> None:
        if done >= total:
            self.finished.add(cell_name)
        if self.silent:
            return
        if self.live is not None:
            self._move_bar(cell_name, done, total, note)
        else:
            seconds = time.monotonic() - self.started
            counted = f"[{len(self.finished)}/{self.num_cells} cells, {seconds:.0f} s]"
            print(f"{counted} {cell_name} {done}/{total} {note}".rstrip(), file=self.stream, flush=True)

    def _move_bar(self, cell_name: str, done: int, total: int, note: str) -> None:
        if cell_name not in self.bars:
            self.bars[cell_name] = self.live.add_task(cell_name, total=total, note=note)
        self.live.update(self.bars[cell_name], completed=done, total=total, note=note)
