"""Ctrl-C, SIGTERM and SIGHUP end a run, at any moment: wherever Python stands, `Interrupted` is raised there, and what goes
up through the protocols closes the records as `killed`.

A library may turn an exception that it did not expect into another one, or lose it. So what was heard is also noted:
whatever comes up after a signal counts as the signal, and `check`, which every part of a run calls, raises it again.
Where a record is being written, a signal waits (`held`).
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_SECONDS = 1.0  # a terminal and a parent may both tell of one Ctrl-C


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end; its message is the name of the signal."""


class _Heard:
    number: int | None = None  # the first signal
    raised: float = 0.0
    holding: int = 0
    waits: bool = False


_heard = _Heard()


@contextmanager
def listening():
    """Inside, the signals that end a run raise Interrupted; those that this process was started to ignore (nohup) stay
    ignored. Does nothing outside the main thread, which gets no signals."""
    global _heard
    before, outside = {}, _heard
    if threading.current_thread() is threading.main_thread():
        there = {number: signal.getsignal(number) for number in ENDING}
        before = {number: handler for number, handler in there.items() if handler not in (signal.SIG_IGN, None)}
        _heard = _Heard()
    for number in before:
        signal.signal(number, _hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _heard = outside


def heard() -> int | None:
    """The number of the first signal that asked this process to end, or None."""
    return _heard.number


def check() -> None:
    """Raise Interrupted if a signal was heard and somebody has swallowed it."""
    if _heard.number is not None:
        raise Interrupted(signal.Signals(_heard.number).name)


@contextmanager
def held():
    """Inside, a signal waits until the end: a file that is being written is written whole."""
    _heard.holding += 1
    try:
        yield
    finally:
        _heard.holding -= 1
    if _heard.waits and not _heard.holding:
        _heard.waits = False
        check()


def _hear(number: int, _frame) -> None:
    again = _heard.number is not None and time.monotonic() - _heard.raised < SAME_SECONDS
    _heard.number = _heard.number or number
    if again:
        return
    _heard.raised = time.monotonic()
    if _heard.holding:
        _heard.waits = True
    else:
        check()
