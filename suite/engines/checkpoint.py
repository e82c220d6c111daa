"""Resume states of a run: every rank writes its part (torch.distributed.checkpoint), any number of ranks reads it; checked
by hash when read, the last two kept.

    checkpoint/step-00010/            the state after 10 steps; renamed to this when all of it is written
        __0_0.distcp, __1_0.distcp    the tensors, a file per rank that wrote
        .metadata                     which part of which tensor lies where
        numbers.json                  what is no tensor: the loss scaler, the counts of the optimizer
        SHA256                        a hash for each of the others
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from suite.engines.world import World, ensure_group
from suite.files import sha256_file, write_atomic

KEEP = 2
NAME, UNFINISHED = re.compile(r"step-\d{5,}"), ".unfinished"
NUMBERS, HASHES = "numbers.json", "SHA256"
OF_BEFORE = "a single file, as versions before this one wrote it"

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    folder: Path
    numbers: dict

    def read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill these tensors, in place; every rank must call it, with its own part of each. Raises an error of torch's for a
        tensor that the checkpoint does not have or that has another shape there."""
        with _quiet():
            dcp.load(tensors, checkpoint_id=self.folder)


def save_checkpoint(folder: Path, num_steps: int, tensors: dict[str, torch.Tensor], numbers: dict, world: World = World()) -> None:
    """State after `num_steps` steps; every rank must call it. Tensors may be spread over the ranks; `numbers`, which JSON
    holds, are the same on all."""
    ensure_group()
    path = folder / f"step-{num_steps:05d}"
    unfinished = path.with_name(path.name + UNFINISHED)
    if world.is_first:
        for left in folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
    world.first(None)
    with _quiet():
        dcp.save(tensors, checkpoint_id=unfinished)
    if world.is_first:
        write_atomic(unfinished / NUMBERS, json.dumps(numbers).encode())
    names = world.first(sorted(file.name for file in unfinished.iterdir()) if world.is_first else None)
    hashes = world.spread(names, lambda share: [sha256_file(unfinished / name) for name in share])
    if world.is_first:
        lines = [f"{sha256}  {name}\n" for name, sha256 in zip(names, hashes, strict=True)]
        write_atomic(unfinished / HASHES, "".join(lines).encode())
        shutil.rmtree(path, ignore_errors=True)  # of an attempt whose record was cut shorter than this
        unfinished.rename(path)
        for old in _paths(folder)[:-KEEP]:
            shutil.rmtree(old)
    world.first(None)


def load_checkpoint(folder: Path, at_most: int, world: World = World()) -> tuple[int, Saved | None, list[str]]:
    """(number of steps, checkpoint, what was passed over): the newest whole checkpoint of at most `at_most` steps, which is
    how many the record has; (0, None, ...) if there is none. Every rank must call it, and finds the same."""
    passed_over = [f"{path.name}: {OF_BEFORE}" for path in world.first(sorted(folder.glob("step-*.pt")))]
    for path in reversed(world.first(_paths(folder))):
        if _steps_of(path) > at_most:
            passed_over.append(f"{path.name}: the record has only {at_most} whole steps")
        elif fault := _fault_of(path, world):
            passed_over.append(f"{path.name}: {fault}")
        else:
            return _steps_of(path), Saved(path, json.loads((path / NUMBERS).read_bytes())), passed_over
    return 0, None, passed_over


def _fault_of(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint; the ranks share its files out."""
    try:
        lines = (path / HASHES).read_bytes().decode().splitlines() if world.is_first else None
    except FileNotFoundError:
        lines = []
    except UnicodeDecodeError:
        lines = ["?"]
    lines = world.first(lines)
    if not lines:
        return "its hashes are missing, it was cut short"
    is_whole = world.spread(lines, lambda share: [_has_hash(path, line) for line in share])
    return None if all(is_whole) else "its content does not have the recorded hash"


def _has_hash(path: Path, line: str) -> bool:
    sha256, _, name = line.partition("  ")
    file = path / Path(name).name
    return file.is_file() and sha256_file(file) == sha256


def _quiet():
    """torch.distributed.checkpoint warns of internals of torch that it uses itself."""
    return warnings.catch_warnings(action="ignore")


def _steps_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())
