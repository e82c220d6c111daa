"""Two sides of a comparison, each alone in a process of its own, in turn; and the arithmetic of their ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 60  # for an engine to shut down in, before its process is killed
STDERR_LINES = 20  # of a side that died: enough for the end of a traceback


class SideFailed(RuntimeError):
    """A side of a comparison ended before it answered."""


class Side:
    """A process that measures one thing whenever it is asked. Its first answer is its warm-up."""

    def __init__(self, job: dict):
        self.name = job["side"]
        self._stderr = tempfile.TemporaryFile()
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "suite.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr, env=os.environ | {"PYTHONPATH": paths}, text=True,
        )  # fmt: skip
        self.warm_up = self._ask(job)

    def turn(self) -> dict:
        """One repetition: the figures that the side reports."""
        return self._ask("go")

    def _ask(self, message) -> dict:
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code, words = self._process.wait(), self._last_words()
            self._close()
            raise SideFailed(f"{self.name} ended with exit code {code}:\n{words}")
        return json.loads(answer)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        return "\n".join(self._stderr.read().decode(errors="replace").splitlines()[-STDERR_LINES:])

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """End the process by ending its input; kill it if the comparison failed."""
        if kind is not None:
            self._process.kill()
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            pipe.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def in_turn(ours: dict, theirs: dict, repetitions: int) -> tuple[list[dict], list[dict]]:
    """Figures of each repetition of ours, then of theirs. One process lives at a time: the worker threads of an idle one
    spin on the cores of the other for a while."""
    measured = []
    for job in (ours, theirs):
        with Side(job) as side:
            measured.append([side.turn() for _ in range(repetitions)])
    return measured[0], measured[1]


def column(turns: list[dict], key: str) -> list[float]:
    """One figure over the repetitions."""
    return [turn[key] for turn in turns]


def paired_ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Ratio of each repetition."""
    return [n / d for n, d in zip(numerators, denominators, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of a figure over the repetitions."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def with_range(figure: dict[str, float], form: str) -> str:
    """A spread as text: median (smallest to largest)."""
    median, low, high = (format(figure[key], form) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def target(what: str, found: float, wanted: str, bound: float) -> dict:
    """Whether a median keeps a bound; `wanted` is "at least", "at most" or "below"."""
    met = {"at least": found >= bound, "at most": found <= bound, "below": found < bound}[wanted]
    return {"what": what, "found": found, "wanted": f"{wanted} {bound:g}", "met": met}
