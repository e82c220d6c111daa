"""Several processes on one machine: the cells of a task are dealt out to workers, each with engines of its own.

Cells share nothing, so a worker is `suite run TASK --cell ...` in a process of its own: on its own GPU, or on its own
share of the cores (two engines on the same cores slow each other several times over). What a worker records is what one
process with that GPU or those cores would have recorded, and its fingerprint says so. No torch.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial

from suite.errors import UserError, WorkersFailed
from suite.plan import Cell

GRACE_SECONDS = 10  # for a worker to hear of an interrupt by itself
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Place:
    """Where a worker runs: these cores (None: wherever it is put) and these additions to the environment."""

    cores: frozenset[int] | None = None
    env: dict[str, str] = field(default_factory=dict)


def deal(cells: list[Cell], num: int) -> list[list[Cell]]:
    """The cells in `num` blocks, or fewer, of equal length give or take one; in order, since neighbours share engines."""
    num = min(num, len(cells))
    ends = [len(cells) * i // num for i in range(num + 1)]
    return [cells[start:end] for start, end in zip(ends, ends[1:])]


def places(num: int, gpus: list[str], cores: list[int]) -> list[Place]:
    """A GPU for each of `num` workers where there are GPUs, else an equal share of the cores. Raises UserError if there
    are more workers than either.
    """
    have, what = (len(gpus), "GPUs") if gpus else (len(cores), "cores")
    if num > have:
        raise UserError(f"--nproc: found {num}, allowed: at most {have}, the {what} that this process may use")
    if gpus:
        return [Place(env={"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:num]]
    ends = [len(cores) * i // num for i in range(num + 1)]
    shares = [cores[start:end] for start, end in zip(ends, ends[1:])]
    return [Place(frozenset(share), {"OMP_NUM_THREADS": str(len(share))}) for share in shares]


def run_workers(blocks: list[list[Cell]], where: list[Place], arguments: list[str], launcher: str | None = None) -> None:
    """One worker per block, all at once, until the last has ended; their lines on stderr are passed on with the worker's
    number before them.

    arguments: of `suite run`, without --cell. launcher: a command that starts each of them, such as `srun -n 1 -G 1`; it
    then decides where they run. Raises WorkersFailed if any failed: the others go on to their end first. An interrupt is
    handed to all of them, and they are waited for.
    """
    begin = shlex.split(launcher or "")
    workers, readers = [], []
    try:
        for number, (block, place) in enumerate(zip(blocks, where, strict=False)):
            names = ",".join(cell.name for cell in block)
            worker = subprocess.Popen(
                [*begin, sys.executable, "-m", "suite", "run", *arguments, "--cell", names],
                env=os.environ | place.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                preexec_fn=partial(_settle, place.cores, os.getpid()),
            )  # fmt: skip
            workers.append(worker)
            readers.append(threading.Thread(target=_pass_on, args=(number, worker.stderr), daemon=True))
            readers[-1].start()
        codes = [worker.wait() for worker in workers]
    finally:
        _end(workers)
        for reader in readers:
            reader.join()
    failed = [(number, code) for number, code in enumerate(codes) if code]
    if failed:
        told = ", ".join(f"worker {number} (exit {code})" for number, code in failed)
        raise WorkersFailed(f"{told} of {len(workers)} failed; what was recorded is intact", failed[0][1])


def _settle(cores: frozenset[int] | None, parent: int) -> None:
    """In the worker, before it begins: keep to these cores, and end if the parent is killed."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _end(workers: list[subprocess.Popen]) -> None:
    """After an interrupt: a terminal hands it to the workers as well; those that did not hear of it are ended."""
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.terminate()
            worker.wait()


def _pass_on(number: int, lines) -> None:
    with lines:
        for line in lines:
            print(f"[worker {number}] {line}", end="", file=sys.stderr, flush=True)
