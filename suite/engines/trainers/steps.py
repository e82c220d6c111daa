"""One gradient step of any trainer: forward and backward in micro-batches, shared out over the ranks, then add up, unscale,
check, clip, step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch

from suite.engines.batch import MiniBatch, pad_sequences
from suite.engines.losses import policy_loss
from suite.engines.ranks import Ranks, ReplicaError
from suite.engines.trainers.health import ActivationWatch
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.masters import MasterWeights
from suite.engines.trainers.scoring import Scorer, by_length
from suite.spec.algorithms import Algorithm
from suite.spec.defaults import default

DEFAULT_MICRO_BATCH_SIZE = default("train.micro_batch_size")


@dataclass
class Stepper:
    """What a gradient step needs of a trainer."""

    scorer: Scorer
    masters: MasterWeights
    scaler: LossScaler
    watch: ActivationWatch
    underflow: Callable[[], float]  # share of the present compute gradients that underflowed
    ranks: Ranks
    micro_batch_size: int = DEFAULT_MICRO_BATCH_SIZE
    grad_clip: float | None = None

    def update(self, batch: MiniBatch, algorithm: Algorithm) -> dict[str, float]:
        """One gradient step on a mini-batch. Returns its metrics, named as in metrics.jsonl.

        A loss or gradient that is not finite skips the step. Rows without any advantage have a gradient of exactly 0, which
        says nothing about underflow: a micro-batch of such rows does not count towards its share, and a mini-batch of them
        reports none. Raises ReplicaError if the ranks took different steps.
        """
        order, size = by_length(batch.sequences), self.micro_batch_size
        parts = self.ranks.share([order[start : start + size] for start in range(0, len(order), size)])
        with self.scorer.products(), self.watch:
            done = [self._backward(batch.rows(part), algorithm, batch) for part in parts]
        done = [one for share in self.ranks.gather(done) for one in share]
        report = {
            "loss": sum(loss for loss, _, _ in done),
            "activation_max_abs": float(np.max(self.ranks.gather(self.watch.largest))),  # nan, if one is
        }
        underflow = [pair for _, _, pair in done if pair]
        if underflow:
            shares, num_rows = zip(*underflow)
            report["grad_underflow_share"] = float(np.average(shares, weights=num_rows))
        self.ranks.add_up(self.masters.gradients() if self.ranks.size > 1 else [])
        stepped = self.masters.step(self.scaler, self.grad_clip)
        if self.ranks.size > 1:
            self._check_replicas(stepped["grad_norm"])
        return report | reduce(add, (statistics for _, statistics, _ in done)).metrics() | stepped

    def _check_replicas(self, grad_norm: float) -> None:
        """Every rank must have taken the same step and hold the same masters. Raises ReplicaError."""
        checksum = sum(master.detach().double().sum().item() for master in self.masters.masters.values())
        found = {repr(pair) for pair in self.ranks.gather((grad_norm, checksum))}
        if len(found) > 1:
            raise ReplicaError(f"the trainers of the ranks have come apart: (gradient norm, sum of weights) {', '.join(sorted(found))}")

    def _backward(self, rows: MiniBatch, algorithm: Algorithm, batch: MiniBatch):
        """Gradients of one micro-batch of `batch` into the masters. Returns its loss, its statistics, and (share of the
        gradients that underflowed, rows) if any row has an advantage."""
        output = self._loss(rows, algorithm, len(batch.sequences), batch.num_response_tokens)
        self.scaler.scale(output.loss).backward()
        underflow = (self.underflow(), len(rows.sequences)) if rows.advantages.any() else None
        self.masters.collect()
        return output.loss.item(), output.statistics, underflow

    def _loss(self, rows: MiniBatch, algorithm: Algorithm, num_sequences: int, num_tokens: int):
        device, padded = self.scorer.device, pad_sequences(rows.sequences, len(rows.sequences))
        token_ids = torch.from_numpy(padded.token_ids).to(device)
        mask = torch.from_numpy(padded.response_mask).to(device)

        def spread(values: torch.Tensor) -> torch.Tensor:  # (N,) -> (B, T), 0 outside the mask
            return torch.zeros(mask.shape, dtype=values.dtype, device=device).masked_scatter(mask, values)

        given = [rows.old_trainer_logprobs, rows.rollout_logprobs]
        old, rollout = (spread(torch.from_numpy(np.concatenate(arrays)).to(device)) for arrays in given)
        return policy_loss(
            algorithm, spread(self.scorer.response_logprobs(token_ids, mask)), old, rollout, mask,
            torch.from_numpy(rows.advantages).to(device),
            num_sequences=num_sequences, num_tokens=num_tokens, length_norm=rows.length_norm,
        )  # fmt: skip
