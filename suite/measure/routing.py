"""Which experts the two engines choose: what mismatch means in a mixture of experts beyond the rounding of log-probs.

Both engines are asked for the choice at every position, in every layer, teacher-forced: (T, layers, k) expert numbers, in
ascending order. An engine without experts, or one that does not tell, gives None. What is compared is the choice at the
positions that predict a response token.

With routing replay (train.routing_replay) the trainer takes the sampler's choices in place of its own, in scoring and in
updates, so that the two engines differ in rounding alone. Source: rollout routing replay, arXiv 2510.11370.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suite.errors import UserError

Sequences = list[tuple[list[int], int]]  # (token_ids, num_prompt_tokens)
OWN = -1  # in place of an expert's number: the router's own choice


def of_response(choices: np.ndarray, num_prompt: int, num_tokens: int) -> np.ndarray:
    """(T, layers, k) of all positions -> those of the positions that predict a response token."""
    return choices[num_prompt - 1 : num_tokens - 1]


def disagreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float | None:
    """Share of (token, layer) pairs for which two engines choose other sets of experts; None without a token."""
    if not ours:
        return None
    a, b = np.concatenate(ours), np.concatenate(theirs)
    if a.shape != b.shape:
        raise ValueError(f"routing: found choices of shapes {a.shape} and {b.shape}, allowed: one shape")
    return float((a != b).any(axis=-1).mean()) if a.size else None


def routing_disagreement(sequences: Sequences, sampled: list[np.ndarray] | None, trainer) -> dict[str, float | None]:
    """The metric of a step, from the sampler's choices `sampled`; nothing where either engine has none to tell."""
    theirs = None if sampled is None else trainer.expert_choices(sequences)
    if theirs is None:
        return {}
    ends = [(num_prompt, len(tokens)) for tokens, num_prompt in sequences]
    parts = ([of_response(one, *end) for one, end in zip(all, ends, strict=True)] for all in (sampled, theirs))
    return {"routing_disagreement": disagreement(*parts)}


def replay(train: dict, sequences: Sequences, sampled: list[np.ndarray] | None, trainer) -> None:
    """Let the trainer follow the sampler's choices for these sequences, where the train section asks for it.

    Raises UserError where the sampler has no choices to tell.
    """
    if not train.get("routing_replay"):
        return
    if sampled is None:
        raise UserError(
            "train.routing_replay: found 'rollout', but this sampler does not tell which experts it chose; allowed: a mixture "
            "of experts, on a CPU"
        )
    trainer.follow(sequences, sampled)


class RouteBook:
    """Expert choices by sequence, found again by the tokens of a padded row.

    Attention is causal, so what was chosen for a sequence holds for every sequence that begins with it: a row takes the
    choices of the longest sequence in the book that it begins with.
    """

    def __init__(self, sequences: Sequences = (), choices: Sequence[np.ndarray] = ()):
        self._choices = {_key(tokens): one for (tokens, _), one in zip(sequences, choices, strict=True)}
        self._lengths = sorted({len(tokens) for tokens, _ in sequences}, reverse=True)

    def __bool__(self) -> bool:
        return bool(self._choices)

    def rows(self, token_ids: np.ndarray, num_layers: int, k: int) -> np.ndarray:
        """(B, T) ids -> (B, T, layers, k) choices; OWN where the book has none."""
        found = np.full((*token_ids.shape, num_layers, k), OWN, np.int64)
        for row, tokens in enumerate(token_ids):
            one = next((self._choices[key] for n in self._lengths if (key := _key(tokens[:n])) in self._choices), None)
            if one is not None:
                found[row, : len(one)] = one
        return found


def _key(tokens) -> bytes:
    return np.asarray(tokens, np.int64).tobytes()
