"""prime-rl: token exports of the trainer, `<output_dir>/token_exports/step_N/rank_R.jsonl`.

Source: PrimeIntellect-ai/prime-rl 559b44772 (2026-08-21), src/prime_rl/trainer/rl/token_export.py, schema_version 1: one line
per sequence of a micro batch; flat lists over prompt and response without padding; null where a number is not finite,
which the trainer's first entry is. The trainer divides logits by the temperature of each token
(src/prime_rl/trainer/rl/train.py). There is no finish reason, and in this version no reward.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite import door
from suite.dumps import files as dump_files
from suite.dumps.readers.fields import Record, row_of_sequence

SWITCH = "prime-rl writes it with trainer.enable_token_export = true"


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of one file, plain or gzip."""
    for number, values in door.json_lines(path, dump_files.MAX_BYTES, dump_files.MAX_LINE_BYTES):
        record = Record(path, number, values if isinstance(values, dict) else {}, SWITCH)
        yield number, _row(record)


def _row(record: Record) -> dict[str, Any]:
    if (version := record.values.get("schema_version")) != 1:
        raise record.refuse("schema_version", version, "1")
    ids = record.list("token_ids")
    mask, mu, pi = (record.list(name, len(ids)) for name in ("loss_mask", "inference_logprobs", "trainer_logprobs"))
    return row_of_sequence(record, ids, "loss_mask", mask, mu, pi)
