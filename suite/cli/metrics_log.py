"""`--log tensorboard|wandb`: the rows of metrics.jsonl, as they are written, to a logger that people have. The record stays what
counts: a logger that fails ends nothing but itself.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

from suite.door import FileError
from suite.errors import UserError
from suite.record.run import read_metrics, read_record, run_folders

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # logger -> package
Send = Callable[[str, int, dict[str, float]], None]  # (cell, step, values)


class MetricsLog:
    """Wraps the progress of a run: after each report it sends the rows of that cell that are new."""

    def __init__(self, progress: Callable, task_folder: Path, send: Send):
        self.progress, self.task_folder, self.send = progress, task_folder, send
        self.sent: dict[Path, int] = {}

    def __call__(self, cell: str, done: int, total: int, note: str = "") -> None:
        self.progress(cell, done, total, note)
        try:
            self._send_new(cell)
        except Exception as problem:  # whatever the logger raises: the run is worth more than its log
            print(f"--log: {type(problem).__name__}: {problem}; the run goes on without it", file=sys.stderr)
            self.send = lambda *row: None

    def _send_new(self, cell: str) -> None:
        for folder in run_folders(self.task_folder / cell):
            try:
                rows, _ = read_metrics(folder), read_record(folder)
            except (FileError, FileNotFoundError):
                continue
            start = self.sent.get(folder, 0)
            for row in rows[start:]:
                self.send(f"{cell}/{folder.name}", int(row.get("step", 0)), numbers(row))
            self.sent[folder] = len(rows)


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row; `step` is the axis."""
    return {name: float(value) for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}  # fmt: skip


def logger(kind: str, task: str, runs_dir: Path) -> Send:
    """Where rows go. UserError where the package is not installed."""
    if importlib.util.find_spec(NEEDS[kind]) is None:
        raise UserError(f"--log {kind}: found no package {NEEDS[kind]}, allowed: an installed one; run: pip install {NEEDS[kind]}")
    return _tensorboard(runs_dir / task / "tensorboard") if kind == "tensorboard" else _wandb(task)


def _tensorboard(folder: Path) -> Send:
    from torch.utils.tensorboard import SummaryWriter

    writers: dict[str, SummaryWriter] = {}

    def send(cell: str, step: int, values: dict[str, float]) -> None:
        writer = writers.setdefault(cell, SummaryWriter(str(folder / cell)))
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def _wandb(task: str) -> Send:
    import wandb

    run = wandb.init(project="fp16-mismatch-suite", name=task)

    def send(cell: str, step: int, values: dict[str, float]) -> None:
        run.log({f"{cell}/{name}": value for name, value in values.items()} | {f"{cell}/step": step})

    return send
