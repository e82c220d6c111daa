"""Resume states of a run: written atomically, checked by hash when read, the last two kept.

    checkpoint/step-00010.pt    torch.save of the state after 10 steps
    checkpoint/step-00010.sha256
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch

from suite.files import sha256_file, write_atomic

KEEP = 2
NAME = re.compile(r"step-\d{5,}\.pt")


def save_checkpoint(folder: Path, num_steps: int, state: dict) -> None:
    """State after `num_steps` steps. The hash is written last: a checkpoint without one was cut short."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{num_steps:05d}.pt"
    write_atomic(path, buffer.getvalue())
    write_atomic(path.with_suffix(".sha256"), sha256_file(path).encode())
    for old in _paths(folder)[:-KEEP]:
        old.with_suffix(".sha256").unlink(missing_ok=True)
        old.unlink()


def load_checkpoint(folder: Path, at_most: int) -> tuple[int, dict | None, list[str]]:
    """(number of steps, state, what was passed over): the newest whole checkpoint of at most `at_most` steps, which is
    how many the record has; (0, None, ...) if there is none."""
    passed_over = []
    for path in reversed(_paths(folder)):
        if _steps_of(path) > at_most:
            passed_over.append(f"{path.name}: the record has only {at_most} whole steps")
            continue
        hash_file = path.with_suffix(".sha256")
        if not hash_file.exists():
            passed_over.append(f"{path.name}: its hash is missing, it was cut short")
        elif sha256_file(path).encode() != hash_file.read_bytes():
            passed_over.append(f"{path.name}: its content does not have the recorded hash")
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return _steps_of(path), state, passed_over
    return 0, None, passed_over


def _steps_of(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))
