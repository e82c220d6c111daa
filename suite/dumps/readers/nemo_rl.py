"""NeMo-RL: training data of GRPO, `<log_dir>/exp_*/train_data_stepN.jsonl`.

Source: NVIDIA-NeMo/RL 7ea279abf (2026-08-22), nemo_rl/algorithms/grpo.py (the fields) and nemo_rl/utils/logger.py,
log_batched_dict_as_jsonl: one line per sequence, a batch of one, so that every field is a list with one entry. Sequences
are padded on the right to the longest of the batch; `input_lengths` says where they end. Entry t of `generation_logprobs`
(the sampler's) and of `prev_logprobs` (the trainer's) belongs to token t; entry 0 of both, and the sampler's outside of
generated messages, is 0 and stands for nothing. `token_loss_mask` is 1 for generated tokens. `sample_loss_mask` takes
sequences out of the loss; they were sampled all the same, so it is not used. With dynamic sampling the rewards of these
sequences are `filtered_rewards`. Trainer logits are divided by the temperature (nemo_rl/models/automodel/train.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite import door
from suite.dumps import files as dump_files
from suite.dumps.readers.fields import Record, row_of_sequence

SWITCH = "NeMo-RL writes train_data_step*.jsonl into logger.log_dir, unless env.should_log_nemo_gym_responses is true"
FIELDS = ("token_ids", "token_loss_mask", "generation_logprobs", "prev_logprobs")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of one file, plain or gzip."""
    for number, values in door.json_lines(path, dump_files.MAX_BYTES, dump_files.MAX_LINE_BYTES):
        yield number, _row(Record(path, number, values if isinstance(values, dict) else {}, SWITCH))


def _row(batch: Record) -> dict[str, Any]:
    reward = "filtered_rewards" if "filtered_rewards" in batch.values else "rewards"
    values = {name: batch.list(name, 1)[0] for name in (*FIELDS, "input_lengths", reward)}
    record = Record(batch.path, batch.row, values, batch.switch)
    padded = len(record.list("token_ids"))
    end = record.whole("input_lengths", padded)
    ids, mask, mu, pi = (record.list(name, padded)[:end] for name in FIELDS)
    return row_of_sequence(record, ids, "token_loss_mask", mask, mu, pi, reward=values[reward])
