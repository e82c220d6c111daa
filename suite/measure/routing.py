"""Which experts the two engines choose: what mismatch means in a mixture of experts beyond the rounding of log-probs.

Both engines are asked for the choice at every position that predicts a response token, in every layer, teacher-forced:
(T_response, layers, k) expert numbers, in ascending order. An engine without experts, or one that does not tell, gives None.
"""

from __future__ import annotations

import numpy as np

Sequences = list[tuple[list[int], int]]  # (token_ids, num_prompt_tokens)


def of_response(choices: np.ndarray, num_prompt: int, num_tokens: int) -> np.ndarray:
    """(T, layers, k) of all positions -> those of the positions that predict a response token."""
    return choices[num_prompt - 1 : num_tokens - 1]


def disagreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float | None:
    """Share of (token, layer) pairs for which two engines choose other sets of experts; None without a token."""
    a, b = np.concatenate(ours), np.concatenate(theirs)
    if a.shape != b.shape:
        raise ValueError(f"routing: found choices of shapes {a.shape} and {b.shape}, allowed: one shape")
    return float((a != b).any(axis=-1).mean()) if a.size else None


def routing_disagreement(sequences: Sequences, sampler, trainer) -> dict[str, float | None]:
    """The metric of a step, or nothing where either engine has no choices to tell."""
    theirs = trainer.expert_choices(sequences)
    ours = None if theirs is None else sampler.expert_choices(sequences)
    return {} if ours is None else {"routing_disagreement": disagreement(ours, theirs)}
