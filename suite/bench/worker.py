"""The process of one side: reads its job, warms up, then measures once for each line on its standard input.

Its standard output carries one line of JSON per repetition and nothing else; what engines print goes to standard error.
The end of its input ends it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

# Both sides run without a network, and none reports to anyone.
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


class Turns:
    """The worker's end of the conversation."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.job = json.loads(sys.stdin.readline())

    def answer(self, **figures) -> None:
        """Report a repetition and wait until the next one is wanted; leaves the process when none is."""
        print(json.dumps(figures), file=self._answers, flush=True)
        if not sys.stdin.readline():
            sys.exit(0)


class PeakMemory:
    """Growth of this process's peak memory since `reset`, in bytes: of the GPU where torch uses one, else resident."""

    def __init__(self):
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        self._start = 0

    def reset(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
            self._start = self._cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # "5" sets the peak (VmHWM) to the present size (VmRSS)
        self._start = _status_bytes("VmRSS")

    def growth(self) -> int:
        peak = self._cuda.max_memory_allocated() if self._cuda else _status_bytes("VmHWM")
        return peak - self._start


def _status_bytes(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def main() -> None:
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    turns = Turns()
    from suite.bench import moe_step, rl_step, scoring

    (scoring.SIDES | rl_step.SIDES | moe_step.SIDES)[turns.job["side"]](turns)


if __name__ == "__main__":
    main()
