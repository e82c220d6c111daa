"""Log-probs of response tokens, whatever model makes the hidden states: sequences of like length share a forward of fixed
row count, and the head runs on the response positions alone, a bounded number of them at a time, so that peak memory does
not grow with batch x length x vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from suite.engines.batch import pad_sequences
from suite.engines.world import World
from suite.spec.defaults import default

DEFAULT_HEAD_CHUNK_LOGITS = default("constants.head_chunk_logits")
NOTHING = ([0], 1)  # a sequence without a response


def plainly(work: Callable, *args):
    """Run a function of a model that lies whole on this device."""
    return work(*args)


@dataclass
class Scorer:
    """One model in one compute dtype, seen as a maker of log-probs in nats."""

    states: Callable[[torch.Tensor], torch.Tensor]  # (B, T) int64 ids, padded on the right -> (B, T, H) last hidden states
    head: torch.nn.Module  # (N, H) -> (N, V), with its weight (V, H)
    head_dtype: torch.dtype  # of the head's product; another one than the weight's casts both operands
    products: Callable[[], AbstractContextManager]  # arithmetic of 16-bit products
    temperature: float
    num_rows: int  # of every scoring forward
    device: torch.device
    head_chunk_tokens: int | None = None
    logits_dtype: torch.dtype | None = None  # as seen in the last product of the head
    world: World = World()  # whose ranks share the forwards of a scoring pass
    whole: Callable = plainly  # how a function of the model is run: a model that is spread over ranks is gathered for it

    def score(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of each response token, teacher-forced: (token_ids, num_prompt_tokens) -> (T_response,) float32 each. All
        ranks call it with the same sequences and get all results, which do not depend on how many ranks there are."""
        return self._score(sequences, self._logprobs)

    def score_and_entropy(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The log-probs of `score`, and the entropy of pi at each of those positions, nats."""
        both = self._score(sequences, self._logprobs_and_entropies)
        return [one[0] for one in both], [one[1] for one in both]

    def score_and_argmax(self, sequences: list[tuple[list[int], int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The log-probs of `score`, and the most probable token of pi at each of those positions, (T_response,) int64 each."""
        both = self._score(sequences, self._logprobs_and_argmax)
        return [one[0] for one in both], [one[1].astype(np.int64) for one in both]

    @torch.no_grad()
    def _score(self, sequences: list[tuple[list[int], int]], chunk) -> list[np.ndarray]:
        order = by_length(sequences)
        batches = [order[start : start + self.num_rows] for start in range(0, len(order), self.num_rows)]
        scores: dict[int, np.ndarray] = {}
        with self.products():
            for number in self.world.deal([padded_tokens(sequences, batch) for batch in batches]):
                if number is None:
                    self._score_batch([NOTHING], chunk)
                    continue
                batch = batches[number]
                scores |= zip(batch, self._score_batch([sequences[i] for i in batch], chunk), strict=True)
        everything = {index: score for part in self.world.gather(scores) for index, score in part.items()}
        return [everything[index] for index in range(len(sequences))]

    def _score_batch(self, sequences: list[tuple[list[int], int]], chunk) -> list[np.ndarray]:
        padded = pad_sequences(sequences, self.num_rows)
        token_ids = torch.from_numpy(padded.token_ids).to(self.device)
        wanted = torch.from_numpy(padded.response_mask).to(self.device)
        scores = self._over_response(token_ids, wanted, chunk).cpu().numpy()
        counts = [len(tokens) - num_prompt for tokens, num_prompt in sequences]
        return np.split(scores, np.cumsum(counts)[:-1], axis=-1)

    @torch.no_grad()
    def distributions(self, sequences: list[tuple[list[int], int]]) -> list[np.ndarray]:
        """log pi of the whole vocabulary at every response position: (T_response, V) float32 nats each; small V only."""
        full = []
        with self.products():
            for tokens, num_prompt in sequences:
                token_ids = torch.tensor([tokens], device=self.device)
                full.append(self.whole(self._distribution, token_ids, num_prompt).cpu().numpy())
        return full

    def _distribution(self, token_ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
        """(1, T) ids -> (T_response, V) float32 log pi of what may stand in the place of each response token."""
        return torch.log_softmax(self._logits(self.states(token_ids)[0, num_prompt - 1 : -1]), -1)

    def response_logprobs(self, token_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and mask -> (N,) float32 log-probs of the masked tokens, row by row; with gradients."""
        return self._over_response(token_ids, wanted, self._logprobs)

    def _over_response(self, token_ids: torch.Tensor, wanted: torch.Tensor, chunk) -> torch.Tensor:
        """(B, T) ids and mask -> (..., N) float32: what `chunk` makes of the masked tokens, row by row."""
        return self.whole(self._of_response, token_ids, wanted, chunk)

    def _of_response(self, token_ids: torch.Tensor, wanted: torch.Tensor, chunk) -> torch.Tensor:
        before = self.states(token_ids)[:, :-1][wanted[:, 1:]]  # (N, H): the states that predict the response tokens
        return self._in_chunks(before, token_ids[wanted], chunk)

    def _in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor, chunk) -> torch.Tensor:
        """`chunk` of `head_chunk_tokens` states and tokens at a time; with gradients each chunk's logits are made again in
        the backward pass instead of being kept."""
        size = self.head_chunk_tokens or max(64, DEFAULT_HEAD_CHUNK_LOGITS // self.head.weight.shape[0])
        parts = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([chunk(*part) for part in parts], dim=-1)
        return torch.cat([checkpoint(chunk, *part, **recomputing(self.products)) for part in parts], dim=-1)

    def _logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def _logprobs_and_entropies(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = self._logits(hidden).log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)  # logits are finite, so log-probs are: no 0 x inf
        return torch.stack([logprobs.gather(1, targets[:, None])[:, 0], entropies])

    def _logprobs_and_argmax(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logprobs = self._logits(hidden).log_softmax(-1)
        likeliest = logprobs.argmax(-1).float()  # exact in fp32 up to 2^24 tokens
        return torch.stack([logprobs.gather(1, targets[:, None])[:, 0], likeliest])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V) fp32 logits at the task's temperature, from a head product in the head's dtype."""
        if self.head_dtype == self.head.weight.dtype:
            logits = self.head(hidden)
        else:
            logits = torch.nn.functional.linear(hidden.to(self.head_dtype), self.head.weight.to(self.head_dtype))
        self.logits_dtype = logits.dtype
        logits = logits.float()
        return logits if self.temperature in (0, 1) else logits / self.temperature


def by_length(sequences: list[tuple[list[int], int]]) -> list[int]:
    """Indices of the sequences from the shortest to the longest; of equal ones in the given order."""
    return sorted(range(len(sequences)), key=lambda i: (len(sequences[i][0]), i))


def padded_tokens(sequences: list[tuple[list[int], int]], rows: list[int]) -> int:
    """What a forward of these rows costs: rows x the longest of them."""
    return len(rows) * max(len(sequences[i][0]) for i in rows)


def recomputing(products) -> dict:
    """Options of torch's checkpoint: a forward repeated in the backward pass needs the mode of its own, since the one
    around it is switched off while autograd runs."""
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), products())}
