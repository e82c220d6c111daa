"""The peak memory of a program. ru_maxrss is no such thing: a child begins with the peak of whoever started it."""

import inspect
from pathlib import Path


def peak_mib() -> int:
    """Largest resident size of this program so far, or since the last reset, MiB (Linux)."""
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


def reset_peak() -> None:
    """Let the peak begin at the present size."""
    Path("/proc/self/clear_refs").write_text("5")


PEAK_MIB = inspect.getsource(peak_mib)  # to stand at the head of a program that a test starts
