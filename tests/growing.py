"""A protocol without engines for the tests of interrupts: parts that are known beforehand, one after the other."""

import dataclasses
import sys
import time

from suite.cli import main as cli
from suite.cli import verbs
from suite.spec.kinds import KINDS

NUM_PARTS, SECONDS = 40, 0.02


def run(cells, session) -> None:
    from test_record import part

    def body(writer) -> None:
        for step in range(writer.parts_done, NUM_PARTS):
            writer.append({"step": step, "k3": 1e-5 * step}, part(step))
            session.progress("cell", step + 1, NUM_PARTS)
            time.sleep(SECONDS)
        writer.finish("success", counts={"num_parts": writer.parts_done})

    session.run_cell(cells[0], "growing", body)


def main(words: list[str]) -> int:
    name = "offline_mismatch"
    KINDS[name] = dataclasses.replace(KINDS[name], module="growing")
    verbs.check_machine = lambda task, args: None
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
