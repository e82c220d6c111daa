"""One gradient step of any trainer: forward and backward in micro-batches, dealt to the ranks, then unscale, check, clip,
step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Protocol

import numpy as np
import torch

from suite.engines.batch import MiniBatch, pad_sequences
from suite.engines.losses import policy_loss
from suite.engines.trainers.health import ActivationWatch
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.scoring import NOTHING, Scorer, by_length, padded_tokens
from suite.engines.world import World
from suite.spec.algorithms import Algorithm
from suite.spec.defaults import default

DEFAULT_MICRO_BATCH_SIZE = default("train.micro_batch_size")


class Weights(Protocol):
    """Masters and optimizer: masters.py, or shards.py for a model that is spread over ranks."""

    def expect(self, is_last: bool) -> None:
        """Say before a backward pass whether it is the last one of its step."""

    def collect(self) -> None:
        """Take in the gradients that a backward pass left."""

    def step(self, scaler: LossScaler, grad_clip: float | None) -> dict[str, float]:
        """One update from the gradients of all micro-batches and ranks; its metrics."""


@dataclass
class Stepper:
    """What a gradient step needs of a trainer."""

    scorer: Scorer
    weights: Weights
    scaler: LossScaler
    watch: ActivationWatch
    underflow: Callable[[], float]  # share of the gradients of the last backward pass that underflowed
    world: World
    micro_batch_size: int = DEFAULT_MICRO_BATCH_SIZE
    grad_clip: float | None = None

    def update(self, batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        """One gradient step on a mini-batch, which all ranks give alike. Returns its metrics, named as in metrics.jsonl.

        A loss or gradient that is not finite skips the step. Rows without any advantage have a gradient of exactly 0, which
        says nothing about underflow: a micro-batch of such rows does not count towards its share, and a mini-batch of them
        reports none.
        """
        order, size = by_length(batch.sequences), self.micro_batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        dealt = self.world.deal([padded_tokens(batch.sequences, part) for part in parts])
        own, num_empty = [number for number in dealt if number is not None], dealt.count(None)
        with self.scorer.products():
            for _ in range(num_empty):
                self.weights.expect(is_last=not own)
                self._empty_backward()
            with self.watch:
                done = {}
                for number in own:
                    self.weights.expect(is_last=number == own[-1])
                    done[number] = self._backward(batch.rows(parts[number]), algorithm, batch)
        shares = self.world.gather((done, self.watch.largest))
        done = dict(sorted((number, one) for share, _ in shares for number, one in share.items())).values()
        report = {
            "loss": sum(loss for loss, _, _ in done),
            "activation_max_abs": float(np.max([largest for _, largest in shares])),  # nan, if one is
        }
        underflow = [pair for _, _, pair in done if pair]
        if underflow:
            shares, num_rows = zip(*underflow)
            report["grad_underflow_share"] = float(np.average(shares, weights=num_rows))
        stepped = self.weights.step(self.scaler, self.grad_clip)
        return report | reduce(add, (statistics for _, statistics, _ in done)).metrics() | stepped

    def _empty_backward(self) -> None:
        """The passes of a rank that has no micro-batch left, for those that gather a spread model together with it: their
        gradient is exactly 0."""
        token_ids, mask = self._padded([NOTHING])
        self.scorer.response_logprobs(token_ids, mask).sum().backward()
        self.underflow()  # of zeros that nobody is to count
        self.weights.collect()

    def _padded(self, sequences: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) ids and response mask, on the device."""
        padded = pad_sequences(sequences, len(sequences))
        return tuple(torch.from_numpy(array).to(self.scorer.device) for array in (padded.token_ids, padded.response_mask))

    def _backward(self, rows: MiniBatch, algorithm: Algorithm, batch: MiniBatch):
        """Gradients of one micro-batch of `batch` into the masters. Returns its loss, its statistics, and (share of the
        gradients that underflowed, rows) if any row has an advantage."""
        output = self._loss(rows, algorithm, len(batch.sequences), batch.num_response_tokens)
        self.scaler.scale(output.loss).backward()
        share = self.underflow()
        self.weights.collect()
        return output.loss.item(), output.statistics, (share, len(rows.sequences)) if rows.advantages.any() else None

    def _loss(self, rows: MiniBatch, algorithm: Algorithm, num_sequences: int, num_tokens: int):
        device = self.scorer.device
        token_ids, mask = self._padded(rows.sequences)

        def spread(values: torch.Tensor) -> torch.Tensor:  # (N,) -> (B, T), 0 outside the mask
            return torch.zeros(mask.shape, dtype=values.dtype, device=device).masked_scatter(mask, values)

        given = [rows.old_trainer_logprobs, rows.rollout_logprobs]
        old, rollout = (spread(torch.from_numpy(np.concatenate(arrays)).to(device)) for arrays in given)
        return policy_loss(
            algorithm, spread(self.scorer.response_logprobs(token_ids, mask)), old, rollout, mask,
            torch.from_numpy(rows.advantages).to(device),
            num_sequences=num_sequences, num_tokens=num_tokens, length_norm=rows.length_norm,
        )  # fmt: skip
