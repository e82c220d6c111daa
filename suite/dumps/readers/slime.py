"""slime: training data, the file that --save-debug-train-data (or --dump-details) names, `<rollout_id>.pt`.

Source: THUDM/slime 624b824a8 (2026-08-21), slime/observability/train_data_utils.py, format_version 2: a dictionary with
`samples`, one per sequence in the order of the rollout: `tokens` (prompt and response), `response_lengths`, and over the
response alone `loss_masks`, `rollout_log_probs` (the sampler's) and `log_probs` (the trainer's); `truncated` 0 or 1.
`rewards` of a sample is normalised; `raw_reward` of the whole batch, at `rollout_position`, is not. Trainer logits are
divided by --rollout-temperature (slime/backends/megatron_utils/loss.py). The dump of --save-debug-rollout-data has the
sampler's half alone. The file is read with torch's weights_only, which runs no code of it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite import door
from suite.door import FileError
from suite.dumps.readers.fields import Record, row_of

SWITCH = "slime writes it with --save-debug-train-data and --get-mismatch-metrics or --use-tis"
MAX_BYTES = 2**32


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position in `samples` from 1, row) of one file."""
    data = _load(path)
    if data.get("format_version") != 2 or not isinstance(data.get("samples"), list):
        found = f"format_version {data.get('format_version')}, with {', '.join(sorted(map(str, data))[:8])}"
        raise FileError(path, "format_version", found, "2, with samples", SWITCH)
    for number, values in enumerate(data["samples"], 1):
        yield number, _row(Record(path, number, values if isinstance(values, dict) else {}, SWITCH), data.get("raw_reward"))


def _load(path: Path) -> dict:
    import torch

    try:
        data = torch.load(io.BytesIO(door.read_bytes(path, MAX_BYTES)), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as problem:
        found = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise FileError(path, "", found, "a file of torch.save with tensors and plain values", SWITCH) from None
    return data if isinstance(data, dict) else {}


def _row(record: Record, raw_reward: Any) -> dict[str, Any]:
    ids = record.list("tokens")
    length = record.whole("response_lengths", len(ids))
    mask, mu, pi = (record.list(name, length) for name in ("loss_masks", "rollout_log_probs", "log_probs"))
    finish = {0: "stop", 1: "length"}.get(record.values.get("truncated"))
    start = len(ids) - length
    return row_of(ids[:start], ids[start:], mask, mu, pi, finish_reason=finish, reward=_reward(record, raw_reward))


def _reward(record: Record, raw: Any) -> Any:
    place = record.values.get("rollout_position")
    return raw[place] if isinstance(raw, list) and isinstance(place, int) and 0 <= place < len(raw) else None
