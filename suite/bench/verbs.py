"""`suite bench`: our scoring and our RL step beside what people use otherwise, measured in one run on this machine.

    scoring   tokens/s and peak memory of DenseTrainer.score against a plain transformers forward with full logits
    rl        seconds of one RL step of protocols/rl.py against TRL's GRPOTrainer with transformers generation
    moe       seconds of one training step of a mixture of experts on megatron-core against transformers' own

Figures come from processes of their own (worker.py): a warm-up, then a number of repetitions. Never two processes at once:
the threads of an idle one still spin. What is judged is the median of the paired ratios. Nothing here is a claim of the paper, so nothing is graded: targets are met or missed.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from suite.bench.tables import BENCHES, markdown, terminal
from suite.files import write_atomic
from suite.machine import environment


def run(names: list[str], *, vocabularies: list[int] | None = None, sizes: list[str] | None = None, out: Path) -> int:
    """Measure, print and write <out>/<name>-<fingerprint>.json and .md; 1 if a target that is no mere aim was missed, else 0.

    Args:
        vocabularies: entries of the vocabularies that `scoring` takes; sizes: desk recipes that `rl` takes.
    Raises UserError for an unknown size, NotRunnable where an engine is not installed.
    """
    choices = {"scoring": {"vocabularies": vocabularies}, "rl": {"sizes": sizes}, "moe": {}}
    for name in names:
        BENCHES[name].check(**choices[name])
    met = True
    for name in names:
        settings, rows, targets = BENCHES[name].measure(**choices[name], say=lambda line: print(line, flush=True))
        result = _heading(name, settings) | {"rows": rows, "targets": targets}
        print(terminal(result), flush=True)
        write(result, out)
        met = met and all(target["met"] for target in targets if not target.get("is_aim"))
    return 0 if met else 1


def write(result: dict, out: Path) -> None:
    """Both files of a result, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{result['name']}-{result['fingerprint']}"
    write_atomic(out / f"{stem}.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(out / f"{stem}.md", markdown(result).encode())
    print(f"written: {out / stem}.json and .md")


def _heading(name: str, settings: dict) -> dict:
    """What a figure means nothing without: the machine, the versions, the command."""
    machine = environment.collect()
    lists = {"--vocab": settings.get("vocabularies"), "--sizes": settings.get("sizes")}
    flags = [part for flag, values in lists.items() if values for part in (flag, ",".join(map(str, values)))]
    return {
        "schema": 1,
        "name": name,
        "command": shlex.join(["suite", "bench", name, *flags]),
        "fingerprint": environment.fingerprint(machine),
        "machine": {key: machine[key] for key in ("cpu", "memory_gib", "gpus", "os", "python", "env")},
        "versions": machine["packages"] | {"suite": machine["suite_version"]},
        "git": machine["git"],
        "settings": settings,
    }
