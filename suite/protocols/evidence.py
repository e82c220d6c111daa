"""Rollouts and what was scored of them as rows of evidence."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from suite.engines.batch import Rollout
from suite.record.run import EVIDENCE_SCHEMA


def evidence_table(rollouts: list[Rollout], trainer_logprobs: list[np.ndarray] | None, step: int,
                   rewards: list[float] | None = None, trainer_entropies: list[np.ndarray] | None = None) -> pa.Table:
    """Rollouts as evidence rows (record.EVIDENCE_SCHEMA), one per rollout, in the given order. What nobody computed is
    null: without a trainer there is no log pi."""
    columns = {
        "prompt_id": [r.request.prompt_id for r in rollouts],
        "sample_id": [r.request.sample_id for r in rollouts],
        "step": [step] * len(rollouts),
        "token_ids": [r.token_ids for r in rollouts],
        "num_prompt_tokens": [len(r.request.prompt_token_ids) for r in rollouts],
        "rollout_logprobs": [r.rollout_logprobs for r in rollouts],
        "trainer_logprobs": trainer_logprobs if trainer_logprobs is not None else [None] * len(rollouts),
        "finish_reason": [r.finish_reason for r in rollouts],
        "reward": rewards if rewards is not None else [float("nan")] * len(rollouts),
        "trainer_entropies": trainer_entropies if trainer_entropies is not None else [None] * len(rollouts),
    }
    return pa.table(columns, schema=EVIDENCE_SCHEMA)
