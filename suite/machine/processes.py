"""Several processes on one machine: the cells of a task are dealt out to workers, each with its own engines.

A worker is `suite run TASK --cell ...` in a process of its own: on its own GPU, or on its own share of the cores (two
engines on the same cores slow each other several times over). Its fingerprint says how many it had. RL cells share nothing,
so a worker records what one process with the same GPU or cores would have; offline, cells that share rollouts stay together,
but an engine that serves fewer launches samples in other batches, whose numbers differ in their last bits.

Where train.parallel.data says so, a worker is torchrun (suite/engines/together.py), whose ranks run each of its cells together
(suite/engines/world.py); so they do where somebody starts `suite run` with torchrun, on one machine or many. No torch.
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from suite import signals
from suite.errors import EXIT_ERROR, UserError, WorkersFailed
from suite.spec.kinds import Kind
from suite.spec.plan import Cell, canonical_json

GRACE_SECONDS = 10  # for a worker to hear of an interrupt by itself
POLL_SECONDS = 0.1
ROLLOUT_POINTS = ("precision.rollout", "precision.kv_cache", "precision.rollout_logits")
WORKER_VARIABLE = "SUITE_WORKER"
CHECKED = {WORKER_VARIABLE: "1"}  # says to a worker that whoever started it has looked at the machine
PR_SET_PDEATHSIG = 1  # of Linux's prctl
TORCHRUN = ["-m", "suite.engines.together", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]


@dataclass(frozen=True)
class Place:
    """Where a worker runs: these cores (None: wherever it is put) and these additions to the environment."""

    cores: frozenset[int] | None = None
    env: dict[str, str] = field(default_factory=dict)


def deal(cells: list[Cell], num: int, kind: Kind) -> list[list[Cell]]:
    """The cells in `num` blocks, or fewer, of about equal length. Cells whose rollouts are the same (without training:
    one sampler, one launch) stay together, and cells of one sampler are neighbours.
    """
    samplers: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        sampler = canonical_json([cell.get(path, None) for path in ("model", "rollout", *ROLLOUT_POINTS)])
        launch = canonical_json([cell.settings["data"], cell.seed, cell.name if kind.trains else ""])
        samplers.setdefault(sampler, {}).setdefault(launch, []).append(cell)
    launches = [launch for group in samplers.values() for launch in group.values()]
    num = min(num, len(launches))
    ends = [len(launches) * i // num for i in range(num + 1)]
    return [[cell for launch in launches[start:end] for cell in launch] for start, end in zip(ends, ends[1:])]


def places(num: int, gpus: list[str], cores: list[int], ranks: int = 1) -> list[Place]:
    """A GPU for every rank of each of `num` workers where there are GPUs, else an equal share of the cores each. Raises
    UserError if there are more ranks than either.
    """
    have, what = (len(gpus), "GPUs") if gpus else (len(cores), "cores")
    if num * ranks > have:
        raise UserError(f"--nproc: found {num * ranks}, allowed: at most {have}, the {what} that this process may use")
    if gpus:
        shares = [gpus[ranks * i : ranks * (i + 1)] for i in range(num)]
        return [Place(env=CHECKED | {"CUDA_VISIBLE_DEVICES": ",".join(share)}) for share in shares]
    size = len(cores) // (num * ranks)  # equal shares: the number of cores is part of the fingerprint; the rest idles
    shares = [cores[size * ranks * i : size * ranks * (i + 1)] for i in range(num)]
    return [Place(frozenset(share), CHECKED | {"OMP_NUM_THREADS": str(size)}) for share in shares]


def take_place(gpus: Callable[[], list[str]]) -> None:
    """In a rank that torchrun has started, before torch is imported: keep to one of the machine's GPUs, or to an equal share
    of the cores, and end if torchrun is killed. Does nothing in a process alone.

    gpus: the names of those that this process may use. Raises UserError if there are more ranks than GPUs.
    """
    num, number = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if num == 1:
        return
    here, cores = gpus(), sorted(os.sched_getaffinity(0))
    if here and num > len(here):
        raise UserError(f"torchrun: found {num} processes on this machine, allowed: at most {len(here)}, its GPUs")
    place = places(num, here, cores if here or len(cores) >= num else cores * num)[number]
    os.environ |= place.env
    _settle(place.cores, os.getppid())


def run_workers(blocks: list[list[Cell]], where: list[Place], arguments: list[str], *, ranks: int = 1,
                launcher: str | None = None) -> None:
    """A worker per block, all at once, until the last has ended; their lines on stderr are passed on with the worker's
    number before them.

    where: a place for each worker. arguments: of `suite run`, without --cell. ranks: that run each cell together; a worker
    of several is torchrun. launcher: a command that starts each worker, such as `srun -n 1 -G 1`; it then decides where
    they run. Raises WorkersFailed if any failed: the others go on to their end first. An interrupt is handed to all of them,
    and they are waited for.
    """
    torchrun = [*TORCHRUN, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    begin = [*shlex.split(launcher or ""), sys.executable, *torchrun, "-m", "suite", "run", *arguments, "--cell"]
    workers, readers = [], []
    try:
        for block, place in zip(blocks, where, strict=True):
            workers.append(subprocess.Popen(
                [*begin, ",".join(cell.name for cell in block)], env=os.environ | place.env, text=True, errors="replace",
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=partial(_settle, place.cores, os.getpid()),
            ))  # fmt: skip
            readers.append(threading.Thread(target=_pass_on, args=(len(readers), workers[-1].stderr), daemon=True))
            readers[-1].start()
        failed = _wait(workers)
    finally:  # a terminal tells the workers of Ctrl-C as well; who sends another signal tells this process alone
        told_all = signals.heard() in (None, signal.SIGINT)
        _end(workers, GRACE_SECONDS if told_all else 0)
        for reader in readers:
            reader.join()
    if failed:
        told = ", ".join(f"worker {number} (exit {code})" for number, code in failed)
        codes = {code for _, code in failed}
        raise WorkersFailed(f"{told} of {len(workers)} failed; what was recorded is intact", codes.pop() if len(codes) == 1 else EXIT_ERROR)


def _wait(workers: list[subprocess.Popen]) -> list[tuple[int, int]]:
    """(number, exit code) of the workers that failed, in the order in which they did."""
    failed, left = [], dict(enumerate(workers))
    while left:
        for number, worker in list(left.items()):
            code = worker.poll()
            if code is None:
                continue
            del left[number]
            if code:
                failed.append((number, code))
        time.sleep(POLL_SECONDS)
    return failed


def _settle(cores: frozenset[int] | None, parent: int) -> None:
    """In the worker, before it begins: keep to these cores, and end if the parent is killed."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _end(workers: list[subprocess.Popen], seconds: float) -> None:
    """Wait for these to end by themselves, then tell them all to, and wait until they have."""
    deadline = time.monotonic() + seconds
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        worker.wait()


def _pass_on(number: int, lines) -> None:
    with lines:
        for line in lines:
            print(f"[worker {number}] {line}", end="", file=sys.stderr, flush=True)
