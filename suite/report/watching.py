"""`suite watch [TASK]`: what runs are doing, from their folders alone, as lines for a terminal of any width. No torch.

It looks at record.json and metrics.jsonl as they grow and touches nothing, so it may run beside the run, or on another machine
that sees the folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from suite.door import FileError
from suite.record.run import read_metrics, read_record, run_folders

BARS = "▁▂▃▄▅▆▇█"
GAP = "·"  # a value that is not there, or not finite
# metric -> how it is called, and whether its bars are drawn on a log scale
SERIES = {
    "reward_mean": ("reward", False), "k3_nats_per_token": ("k3", True), "prob_diff_mean": ("|pi-mu|", True),
    "grad_norm": ("grad norm", True),
}  # fmt: skip
NARROWEST = 24
RUNNING = ("planned", "running")


@dataclass(frozen=True)
class Watched:
    """One run as it stands. total: steps that it will have, None where the settings do not say."""

    task: str
    cell: str
    status: str
    metrics: list[dict] = field(repr=False)
    total: int | None
    started: str


def watched(runs_dir: Path, task: str | None) -> list[Watched]:
    """The newest attempt of every cell of a task, oldest first; without a task, of the one that began last."""
    folders = [runs_dir / task] if task else [path for path in sorted(runs_dir.glob("*")) if path.is_dir()]
    found = [one for folder in folders for place in run_folders(folder) if (one := _read(place))]
    if task is None and found:
        newest = max(found, key=lambda one: one.started).task
        found = [one for one in found if one.task == newest]
    latest = {one.cell: one for one in sorted(found, key=lambda one: one.started)}
    return sorted(latest.values(), key=lambda one: (one.started, one.cell))


def _read(folder: Path) -> Watched | None:
    """None for a folder that is just being made, or a line of it that is just being written."""
    try:
        record, metrics = read_record(folder)[0], read_metrics(folder)
    except (FileError, FileNotFoundError):
        return None
    return Watched(record["task"]["id"], record["cell"]["name"], record["status"], metrics, _total(record), str(record.get("started_utc") or ""))


def _total(record: dict) -> int | None:
    """Steps of RL; batches of prompts of the others."""
    settings = record["cell"]["settings"]
    if steps := (settings.get("schedule") or {}).get("steps"):
        return min(steps, record["limit"] or steps)
    prompts, size = (settings.get("data") or {}).get("num_prompts"), (settings.get("rollout") or {}).get("prompts_per_batch")
    prompts = min(prompts, record["limit"] or prompts) if prompts else None
    return math.ceil(prompts / size) if prompts and size else None


def lines(runs: list[Watched], width: int) -> list[str]:
    """What is shown, no line longer than `width` letters: finished cells in a line each, the others with their series."""
    return [line[: max(width, NARROWEST)] for run in runs for line in _of_run(run, max(width, NARROWEST))]


def _of_run(run: Watched, width: int) -> list[str]:
    done = len(run.metrics)
    steps = f"{done}/{run.total}" if run.total else f"{done}"
    parts = [run.cell, run.status, steps, time_left(run)]
    head = "  ".join(part for part in parts if part)
    if run.status not in RUNNING:
        return [head]
    names = [name for name in SERIES if any(_is_number(row.get(name)) for row in run.metrics)]
    return [head, *(_series(run.metrics, name, width) for name in names)]


def time_left(run: Watched) -> str:
    """From the time that the last ten steps took; nothing where that is not known."""
    if run.status not in RUNNING or not run.total or not run.metrics:
        return ""
    last = run.metrics[-10:]
    seconds = sum(value for row in last for name, value in row.items() if name.startswith("t_") and _is_number(value)) / len(last)
    left = seconds * (run.total - len(run.metrics))
    return "" if seconds <= 0 else f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"


def _series(metrics: list[dict], name: str, width: int) -> str:
    title, is_log = SERIES[name]
    values = [row.get(name) for row in metrics]
    last = next((f"{value:.3g}" for value in reversed(values) if _is_number(value)), "")
    return f"  {title:<9} {sparkline(values, width - 22, is_log)} {last}"


def sparkline(values: list, width: int, is_log: bool = False) -> str:
    """The last `width` values as bars between their least and their largest; GAP where there is none, or no log of it."""
    shown = [_height(value, is_log) for value in values[-max(width, 1) :]]
    known = [value for value in shown if value is not None]
    if not known:
        return GAP * len(shown)
    low, span = min(known), max(known) - min(known)
    return "".join(GAP if value is None else BARS[round((value - low) / span * (len(BARS) - 1))] if span else BARS[0] for value in shown)


def _height(value, is_log: bool) -> float | None:
    if not _is_number(value) or is_log and value <= 0:
        return None
    return math.log(value) if is_log else float(value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
