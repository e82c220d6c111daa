"""What an evidence table adds up to: the step from rows to the sums that grading reads. No torch."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from suite.measure.mismatch import prompt_sums


def flat(evidence: pa.Table, column: str) -> np.ndarray:
    """All values of a list column, one after the other, in float64."""
    return np.asarray(evidence[column].combine_chunks().flatten().to_numpy(zero_copy_only=False), np.float64)


def num_response_tokens(evidence: pa.Table) -> np.ndarray:
    return evidence["rollout_logprobs"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def summarise(evidence: pa.Table) -> dict[str, np.ndarray]:
    """Per-prompt sums (mismatch.PROMPT_SUM_COLUMNS) of an evidence table."""
    rewards = evidence["reward"].to_numpy().astype(np.float64)
    truncated = np.array([reason == "length" for reason in evidence["finish_reason"].to_pylist()])
    prompts = evidence["prompt_id"].to_pylist()
    logprobs = flat(evidence, "rollout_logprobs"), flat(evidence, "trainer_logprobs")
    return prompt_sums(prompts, num_response_tokens(evidence), *logprobs, rewards, truncated)
