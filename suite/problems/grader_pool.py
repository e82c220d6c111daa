"""Processes that judge answers and may be killed: the hard time limit of the rewards.

Algebra can hang (towers of exponents, long sums) or fill the memory (large powers), and math-verify's own time limit is
a signal, which works in the main thread only. Here a worker is a process that has loaded math-verify and a child of it
that works: a job that is late costs the child, which is forked anew in milliseconds, and is reported as `timeout`; a
child that dies reports its job as `crashed`; a worker that dies, starting, idle or at work, is replaced. Memory is
capped by the kernel. The pool may be called from any thread and from inside somebody else's worker process.
"""

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from suite.problems.algebra import same_value
from suite.problems.answers import same_answer
from suite.problems.paper_graders import mathd_sympy, oat

WORKER_MEMORY_BYTES = 1 << 30  # address space; math-verify with sympy needs about a tenth of it
WORKER_START_SECONDS = 120.0
START_ATTEMPTS = 10  # workers in a row that were killed before they were ready; one that exits by itself is an error
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies


# --- the worker's side: may hang, may die -----------------------------------------------------------------------------


def parses(text: str) -> str:
    """How math-verify reads `text`: `expression` (as a sympy object), `text` (only as a string) or `nothing`."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return "nothing" if not found else "text" if all(isinstance(one, str) for one in found) else "expression"


def boxed(answer: str) -> str:
    r"""As math-verify has to be given it: 160 of the 1,460 published gold answers do not parse bare, all do in a box.

    Even in a box it takes `a + b + c` for the text `a +`, and `20,\!000` or a final period keep an answer from being a
    number: blanks around + and -, thousands separators and that period go first.
    """
    answer = re.sub(r",\s*\\!\s*(?=\d{3})", "", answer.strip().rstrip("."))
    return "\\boxed{" + re.sub(r"\s*([+-])\s*", r"\1", answer) + "}"


@functools.lru_cache(maxsize=4096)
def _parsed_gold(gold: str):
    from math_verify import parse

    return parse(boxed(gold), parsing_timeout=None)


def equivalent(answer: str, *golds: str) -> bool:
    """Whether math-verify finds `answer` equal to one of `golds`. No time limit of its own: call it through Workers."""
    from math_verify import parse, verify

    found = parse(boxed(answer), parsing_timeout=None)
    return any(verify(_parsed_gold(gold), found, timeout_seconds=None) for gold in golds)


def any_gold(grader: Callable[[str, str], bool]) -> Callable[..., bool]:
    return lambda answer, *golds: any(grader(answer, gold) for gold in golds)


OPERATIONS = {
    "parses": parses,
    "equivalent": equivalent,
    "suite": any_gold(lambda answer, gold: same_answer(gold, answer, same_value)),
    "mathd_sympy": any_gold(mathd_sympy),
    "oat": any_gold(oat),
}


def worker_main(cpu_seconds: float) -> None:
    """Load math-verify, then keep one child that answers jobs until the pipe of jobs closes. A process of its own."""
    import ctypes
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    prctl = ctypes.CDLL(None).prctl
    equivalent("1/2", "0.5")  # loads the grammar too: an error shows on the caller's stderr, no answer waits
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever a library prints must not be taken for an answer
    os.dup2(null, 2)
    status = -1
    while status != 0:  # 0: the pipe of jobs, or that of answers, was closed
        child = os.fork()
        if child == 0:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # who kills the worker ends its work too
            try:
                answer_jobs(answers, cpu_seconds)
            except BrokenPipeError:
                pass  # nobody reads answers any more: the caller was killed, and the next child would fare no better
            os._exit(0)
        status = os.waitpid(child, 0)[1]


def answer_jobs(answers, cpu_seconds: float) -> None:
    """Write the process id, then one line {"value": ...} for each job, JSON each, until the pipe of jobs closes."""
    import resource

    hard_cpu = resource.getrlimit(resource.RLIMIT_CPU)[1]
    answers.write(json.dumps({"pid": os.getpid()}).encode() + b"\n")
    for line in os.fdopen(os.dup(0), "rb"):
        # Should the caller be killed while a job hangs, nobody kills this process but the kernel.
        limit = int(time.process_time() + cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard_cpu < 0 else min(limit, hard_cpu), hard_cpu))
        operation, *arguments = json.loads(line)
        answers.write(json.dumps({"value": OPERATIONS[operation](*arguments)}).encode() + b"\n")


# --- the caller's side: a few workers that can be killed --------------------------------------------------------------


class _Worker:
    """One worker process, its working child (None while it is forked) and the job that child holds."""

    def __init__(self, timeout_seconds: float):
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # A fresh interpreter, not a fork: the caller may hold threads, a GPU or an engine that must not be inherited.
        code = f"from suite.problems.grader_pool import worker_main; worker_main({2 * timeout_seconds + 5})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the caller
        )  # fmt: skip
        os.set_blocking(self.process.stdout.fileno(), False)
        self.child, self.job, self.buffer = None, None, b""
        self.deadline = time.monotonic() + WORKER_START_SECONDS

    @property
    def ready(self) -> bool:
        return self.child is not None

    def give(self, index: int, job: tuple, timeout_seconds: float) -> None:
        self.job, self.deadline = index, time.monotonic() + timeout_seconds
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
        except BrokenPipeError:
            pass  # it died while idle; its closed stdout says so at the next read

    def read(self) -> list[dict] | None:
        """The whole lines that have come, None if the process has closed its end."""
        chunk = self.process.stdout.read(1 << 16)
        if chunk == b"":
            return None
        *lines, self.buffer = (self.buffer + (chunk or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def give_up(self) -> None:
        """Kill the child over its job; the process forks another."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        self.child, self.job, self.deadline = None, None, time.monotonic() + WORKER_START_SECONDS

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Workers:
    """A pool that runs OPERATIONS in processes that may be killed, with a deadline for each job.

    `run` may be called from any thread; calls take turns. Processes start at the first job and end with `close`, or
    when the calling process does.
    """

    def __init__(self, num_workers: int = 2, timeout_seconds: float = 5.0):
        if num_workers < 1 or timeout_seconds <= 0:
            raise ValueError(f"need num_workers >= 1, timeout_seconds > 0, found {num_workers}, {timeout_seconds}")
        self.num_workers, self.timeout_seconds = num_workers, timeout_seconds
        self._workers: list[_Worker] = []
        self._killed_starts = 0  # in a row
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._workers:
                self._workers.pop().stop()

    def run(self, jobs: Sequence[tuple]) -> list[tuple[str, object]]:
        """Run jobs (operation, *arguments): ("done", value), ("timeout", None) or ("crashed", None) for each, in order.

        Raises RuntimeError if a worker cannot start (math-verify missing, say): that is no fault of an answer.
        """
        with self._lock:
            try:
                return self._run(jobs)
            except BaseException:  # a worker may still hold a job of this call: its answer must not meet the next one
                while self._workers:
                    self._workers.pop().stop()
                raise

    def _run(self, jobs: Sequence[tuple]) -> list[tuple[str, object]]:
        results: list = [None] * len(jobs)
        waiting = deque(enumerate(jobs))
        while waiting or any(worker.job is not None for worker in self._workers):
            self._check_idle()
            while len(self._workers) < min(self.num_workers, len(waiting)):
                self._workers.append(_Worker(self.timeout_seconds))
            for worker in self._workers:
                if waiting and worker.ready and worker.job is None:
                    worker.give(*waiting.popleft(), self.timeout_seconds)
            for worker in self._wait():
                self._hear(worker, results)
            self._enforce_deadlines(results)
        return results

    def _check_idle(self) -> None:
        """A worker or child that died between jobs costs no answer."""
        for worker in [one for one in self._workers if one.ready and one.job is None]:
            if worker.process.poll() is None:
                self._hear(worker, [])
            else:
                self._replace(worker, [])

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None or not worker.ready]

    def _wait(self) -> list[_Worker]:
        """Workers with something to read, after at most the time until the next deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in self._busy():
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            until = min((worker.deadline for worker in self._busy()), default=0.0)
            return [key.data for key, _ in selector.select(max(until - time.monotonic(), 0.0))]

    def _hear(self, worker: _Worker, results: list) -> None:
        lines = worker.read()
        if lines is None:
            return self._replace(worker, results)
        for line in lines:
            if "pid" in line:
                if worker.job is not None:  # the child before this one died over it
                    results[worker.job], worker.job = ("crashed", None), None
                worker.child, self._killed_starts = line["pid"], 0
            elif worker.job is not None:  # else the answer came as its time was over
                results[worker.job], worker.job = ("done", line["value"]), None

    def _enforce_deadlines(self, results: list) -> None:
        for worker in [one for one in self._busy() if one.deadline <= time.monotonic()]:
            if worker.job is None:
                worker.stop()
                raise RuntimeError(f"a worker for math-verify did not start within {WORKER_START_SECONDS:g} s")
            results[worker.job] = ("timeout", None)
            worker.give_up()

    def _replace(self, worker: _Worker, results: list) -> None:
        """The process is gone: with its job, if it had one."""
        self._workers.remove(worker)
        worker.stop()
        if worker.job is not None:
            results[worker.job] = ("crashed", None)
        elif not worker.ready:
            code, self._killed_starts = worker.process.returncode, self._killed_starts + 1
            if code >= 0 or self._killed_starts >= START_ATTEMPTS:
                raise RuntimeError(f"a worker for math-verify could not start (exit code {code}); its error is above")
