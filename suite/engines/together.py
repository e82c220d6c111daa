"""torchrun, for a cell that several ranks run together; the exit code is that of the rank that failed first, where torchrun's
own is always 1. `python -m suite.engines.together <arguments of torchrun>`, as launch.py starts it.
"""

from __future__ import annotations

import sys

from suite.errors import EXIT_ERROR


def main(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments)
    except ChildFailedError as problem:
        rank, failure = problem.get_first_failure()
        print(f"rank {rank} failed first (exit {failure.exitcode}); the others were ended", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else EXIT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
