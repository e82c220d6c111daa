"""What an evidence table adds up to: the step from rows to the sums that grading reads. No torch.

A row is a rollout. Where a run keeps only some of them whole (`thinned`), the others stand there without their tokens;
every row of such a table holds the sums of its tokens (mismatch.PROMPT_SUM_COLUMNS), so that it adds up to the same.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from suite.measure.mismatch import COUNTS, PROMPT_SUM_COLUMNS, RunningSums, rollout_sums, token_statistics

TOKEN_COLUMNS = ("token_ids", "rollout_logprobs", "trainer_logprobs", "trainer_entropies")
MOST_TOKENS_HELD = 4 * 2**20  # of one run, for its token statistics: 32 MiB


def flat(evidence: pa.Table, column: str) -> np.ndarray:
    """All values of a list column, one after the other, in float64."""
    return np.asarray(evidence[column].combine_chunks().flatten().to_numpy(zero_copy_only=False), np.float64)


def is_scored(evidence: pa.Table) -> bool:
    """Whether a trainer scored these rollouts, all of them. Without one the column is null; 0.0 would be a measurement."""
    return is_thinned(evidence) or evidence["trainer_logprobs"].null_count == 0


def num_response_tokens(evidence: pa.Table) -> np.ndarray:
    return evidence["rollout_logprobs"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def is_thinned(evidence: pa.Table) -> bool:
    return "sum_k3" in evidence.column_names


def whole_rows(evidence: pa.Table) -> pa.Table:
    """The rows that have their tokens."""
    return evidence.filter(pc.is_valid(evidence["token_ids"])) if is_thinned(evidence) else evidence


def thinned(evidence: pa.Table, num_rows: int, seed: int) -> pa.Table:
    """The same rows, `num_rows` of them with their tokens, drawn with `seed`; all with the sums of their tokens."""
    kept = np.zeros(evidence.num_rows, dtype=bool)
    kept[np.random.default_rng(seed).permutation(evidence.num_rows)[:num_rows]] = True
    gone = pa.array(~kept)
    _, sums = rollout_rows(evidence)
    columns = {name: evidence[name] for name in evidence.column_names}
    for name in TOKEN_COLUMNS:
        columns[name] = pc.if_else(gone, pa.scalar(None, evidence.schema.field(name).type), evidence[name])
    return pa.table(columns | {name: pa.array(sums[name], _kind(name)) for name in PROMPT_SUM_COLUMNS[1:]})


def _kind(column: str) -> pa.DataType:
    return pa.int64() if column in COUNTS else pa.float64()


def rollout_rows(evidence: pa.Table) -> tuple[list[str], dict[str, np.ndarray]]:
    """The prompt of each row, and the sums of its tokens (mismatch.rollout_sums)."""
    prompts = evidence["prompt_id"].to_pylist()
    if is_thinned(evidence):
        return prompts, {name: evidence[name].to_numpy() for name in PROMPT_SUM_COLUMNS[1:]}
    rewards = evidence["reward"].to_numpy().astype(np.float64)
    truncated = pc.fill_null(pc.equal(evidence["finish_reason"], "length"), False).to_numpy()
    log_mu = flat(evidence, "rollout_logprobs")
    log_pi = flat(evidence, "trainer_logprobs") if is_scored(evidence) else None
    return prompts, rollout_sums(num_response_tokens(evidence), log_mu, log_pi, rewards, truncated)


def summarise(evidence: pa.Table) -> dict[str, np.ndarray]:
    """Per-prompt sums of an evidence table: mismatch.PROMPT_SUM_COLUMNS, of which rollouts that no trainer scored have
    mismatch.SAMPLED_COLUMNS."""
    running = RunningSums()
    running.add(*rollout_rows(evidence))
    return running.table()


class Tally:
    """What the parts of a run add up to, kept while it goes on, so that its end reads no evidence back.

    The sums are, to the bit, those of all parts together. Statistics that need every token at once exist while all rows
    have their tokens and these are at most MOST_TOKENS_HELD; what is held until then does not grow with the parts.
    """

    def __init__(self):
        self._sums, self._num_tokens, self._tokens = RunningSums(), 0, []

    def add(self, evidence: pa.Table) -> None:
        """Take in one part of the run."""
        prompts, rows = rollout_rows(evidence)
        self._sums.add(prompts, rows)
        self._num_tokens += int(rows["num_response_tokens"].sum())
        if is_thinned(evidence) or self._num_tokens > MOST_TOKENS_HELD:
            self._tokens = None
        elif self._tokens is not None:
            columns = (flat(evidence, name).astype(np.float32) for name in ("rollout_logprobs", "trainer_logprobs"))
            self._tokens.append((*columns, num_response_tokens(evidence)))

    def sums(self) -> dict[str, np.ndarray]:
        """Per-prompt sums of all parts."""
        return self._sums.table()

    def token_statistics(self) -> dict[str, float | None]:
        """mismatch.token_statistics of all tokens; {} where they are not all at hand."""
        if self._tokens is None:
            return {}
        empty = np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        rollout, trainer, lengths = (np.concatenate(parts) for parts in zip(empty, *self._tokens))
        return token_statistics(rollout.astype(np.float64), trainer.astype(np.float64), lengths)
