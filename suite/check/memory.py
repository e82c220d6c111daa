"""Whether a checkpoint fits this machine, from its number of parameters. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from suite.check.checkpoint import Checkpoint
from suite.door import FileError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 2**30
CACHE_BYTES = GIB  # keys and values, rollout.kv_cache_gib of the template
ENGINE_BYTES = int(1.5 * GIB)  # code and scratch of both engines on a CPU
USABLE = 0.9  # of what is free


def needed_bytes(num_parameters: int, pairs: list[tuple[str, str]]) -> int:
    """Of the largest (rollout, train) pair: both engines hold the weights at the same time. The preflight holds them once,
    in fp32."""
    engines = max(BYTES[rollout] + BYTES[train] for rollout, train in pairs)
    return num_parameters * engines + CACHE_BYTES + ENGINE_BYTES


def free_bytes(gpus: list[dict]) -> int:
    """Memory that engines may take: that of the first GPU, else what is free in main memory and in the control group."""
    if gpus:
        return int(gpus[0]["memory_gib"] * GIB * USABLE)
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), flags=re.MULTILINE)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    known = [int(free[1]) * 1024] if free else []
    known += [int(limit) - int(used)] if limit.isdigit() and used.isdigit() else []
    return int(min(known, default=0) * USABLE)


def require_fit(model: Checkpoint, pairs: list[tuple[str, str]], free: int) -> None:
    """FileError where both engines do not fit beside each other."""
    need = needed_bytes(model.num_parameters, pairs)
    if need <= free:
        return
    rollout, train = max(pairs, key=lambda pair: BYTES[pair[0]] + BYTES[pair[1]])
    found = (f"{model.num_parameters / 1e9:.2f}B parameters, {need / GIB:.1f} GiB for a sampler in {rollout} "
             f"and a trainer in {train} with their caches")  # fmt: skip
    raise FileError(model.shown, "", found, f"at most {free / GIB:.1f} GiB, what this machine has free", "a smaller model, or a larger machine")


def most_weight_bytes(free: int) -> int:
    """Weights on disk that could fit at all: both engines in 16 bits, of a checkpoint in 16 bits."""
    return max(0, (free - CACHE_BYTES - ENGINE_BYTES) // 2)


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""
