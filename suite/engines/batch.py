"""Rollouts and the padded tensors made of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from suite.spec.defaults import default

PAD_TO_TOKENS = default("constants.pad_to_tokens")


@dataclass(frozen=True)
class Request:
    """One response to sample, of at most `max_tokens` where that is less than rollout.max_tokens. `seed` fixes its
    randomness whatever else is in the batch."""

    prompt_id: str
    sample_id: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    max_tokens: int | None = None


@dataclass(frozen=True)
class Rollout:
    """One sampled response with the log-probs its sampler reported."""

    request: Request
    response_token_ids: list[int]  # includes the stop token, if one was sampled
    rollout_logprobs: np.ndarray  # (T,) float32, nats, log mu of each response token
    finish_reason: str  # stop | length
    argmax_token_ids: list[int] | None = None  # the sampler's most probable token where each response token was drawn

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_token_ids, *self.response_token_ids]

    @property
    def num_response_tokens(self) -> int:
        return len(self.response_token_ids)


def response_room(request: Request, rollout: dict) -> int:
    """How many response tokens fit: max_tokens, or what max_model_len leaves beside the prompt. Can be 0 or less."""
    context = rollout.get("max_model_len")
    room = rollout["max_tokens"] if request.max_tokens is None else min(rollout["max_tokens"], request.max_tokens)
    return room if context is None else min(room, context - len(request.prompt_token_ids))


def empty_rollout(request: Request) -> Rollout:
    """What a prompt that fills the whole context gets: no token, cut by length, hence no reward."""
    return Rollout(request, [], np.zeros(0, np.float32), "length", [])


def request_seed(*parts) -> int:
    """A 31-bit seed from whatever identifies a response (launch seed, prompt, sample, step): same parts, same seed."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class PaddedSequences:
    """Prompt + response, padded on the right: under causal attention padding there cannot reach a real token.

    token_ids: (B, T) int64; response_mask: (B, T) bool, True where token t is a response token (its log-prob is wanted).
    """

    token_ids: np.ndarray
    response_mask: np.ndarray


def pad_sequences(sequences: list[tuple[list[int], int]], num_rows: int, pad_id: int = 0) -> PaddedSequences:
    """Pad (token_ids, num_prompt_tokens) pairs to one shape: `num_rows` rows, length a multiple of PAD_TO_TOKENS.

    Rows beyond the given sequences are padding altogether, so that every forward of a run has the same number of rows.
    """
    longest = max(len(tokens) for tokens, _ in sequences)
    length = -(-longest // PAD_TO_TOKENS) * PAD_TO_TOKENS
    token_ids = np.full((num_rows, length), pad_id, dtype=np.int64)
    mask = np.zeros((num_rows, length), dtype=bool)
    for row, (tokens, num_prompt) in enumerate(sequences):
        token_ids[row, : len(tokens)] = tokens
        mask[row, num_prompt : len(tokens)] = True
    return PaddedSequences(token_ids, mask)


def in_one_shape(padded: PaddedSequences, num_rows: int, length: int, pad_id: int = 0) -> PaddedSequences:
    """The same rows, padded further to (num_rows, length): ranks that share their experts run forwards of one shape, however
    many sequences each of them has and however long they are. What is added asks for no log-prob, so it has no loss."""
    rows, columns = num_rows - len(padded.token_ids), length - padded.token_ids.shape[1]
    if rows < 0 or columns < 0:
        raise ValueError(f"found a batch of shape {padded.token_ids.shape}, allowed: at most {(num_rows, length)}")
    edges = ((0, rows), (0, columns))
    return PaddedSequences(np.pad(padded.token_ids, edges, constant_values=pad_id), np.pad(padded.response_mask, edges))


@dataclass(frozen=True)
class MiniBatch:
    """The rollouts of one gradient step. Log-probs in nats, one (T_i,) float32 array per rollout."""

    sequences: list[tuple[list[int], int]]  # (token_ids, num_prompt_tokens)
    rollout_logprobs: list[np.ndarray]  # log mu(theta')
    old_trainer_logprobs: list[np.ndarray]  # log pi(theta')
    advantages: np.ndarray  # (N,) float32
    length_norm: int  # L of aggregation sum_over_length, tokens

    @property
    def num_response_tokens(self) -> int:
        return sum(len(logprobs) for logprobs in self.rollout_logprobs)

    def rows(self, indices: list[int]) -> MiniBatch:
        """Some of the rollouts, in the given order."""
        pick = lambda values: [values[i] for i in indices]  # noqa: E731
        return MiniBatch(pick(self.sequences), pick(self.rollout_logprobs), pick(self.old_trainer_logprobs),
                         self.advantages[indices], self.length_norm)
