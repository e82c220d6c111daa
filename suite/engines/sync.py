"""Weight sync from trainer to sampler, and the proof that it happened.

vLLM can keep stale weights silently after a reload: on a CPU it packs some weights into kernel layouts of their own, and
a reload that writes the plain tensor leaves the packed copy behind (tied output heads in fp32 and bf16, MoE experts in
every dtype). The same class of fault has bitten others on GPUs. So a sync is proved, not assumed:

    floor      right after both engines loaded the checkpoint: log-prob gap between sampler and trainer on fixed sequences
    challenge  every weight is moved by a tenth, synced, compared, and moved back: a weight that did not arrive
               leaves a gap far above the floor, in any dtype
    probe      after each later sync: the same comparison, to be read against the floor. Above it, floor and challenge are
               taken again at the present weights: training may have moved them to where the engines agree less, and a
               tensor that lags by one update is far closer than one that missed the challenge

A coarse format on the wire (m0 to m22) changes the weights on purpose, by more than a stale tensor would. So the trainer is
scored, for the comparison alone, with its weights rounded as those that travelled: the floor is then that of the engines,
however coarse the format. A cache of 8 bits hides a stale tensor in the same way, whatever the challenge: the trainer is
scored with its keys and values rounded as the cache's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from suite.engines.arithmetic import CachedAs, on_grid, round_to, torch_dtype
from suite.engines.batch import request_seed
from suite.engines.samplers.load import Sampler
from suite.engines.world import World
from suite.spec.precision import CACHE_FORMATS, FORMATS, dtype_name

# Relative size of the random move of each weight in the challenge; on a coarse wire a little more than half the spacing of
# its numbers, so that a weight that sits on one of them arrives as another.
CHALLENGE_SCALE, CHALLENGE_ROUNDINGS = 0.1, 1.1
# A gap (mean |dlogp|) is at the floor up to FACTOR x floor + 4 roundings of the coarser engine + 2e-6 nats. The floor moves
# with the weights, and engines that share kernels may start from almost none; a stale tensor in the challenge moves the
# gap by orders of magnitude.
TOLERATED_FACTOR, TOLERATED_ROUNDINGS, TOLERATED_NATS = 4.0, 4.0, 2e-6
CACHE_FLIP_NATS = 1e-4  # a key on the edge of two 8-bit numbers is one of them here, the other there; a stale tensor gives 5e-4 and more
FLOOR_SHARE = 0.25  # a floor is at most this share of what the challenge does to the trainer's own log-probs


class SyncError(RuntimeError):
    """The sampler does not hold the trainer's weights."""


@dataclass(frozen=True)
class Gap:
    """Distance between sampler and trainer on the probe sequences: mean |log mu - log pi| and k3, nats per token."""

    logprob_diff_mean: float
    k3: float


@dataclass(frozen=True)
class Probe:
    """Fixed sequences on which sampler and trainer are compared, teacher-forced on both sides; on every rank of
    `world`, of which the widest gap counts."""

    sequences: list[tuple[list[int], int]]
    precision: str  # format of the products of the coarser engine
    world: World = World()
    wire: str = "fp32"  # format in which weights travel
    cache: str = "fp32"  # format in which the sampler keeps keys and values

    def gap(self, sampler: Sampler, trainer) -> Gap:
        own = self._own_gap(sampler, trainer)
        gaps = self.world.gather((own.logprob_diff_mean, own.k3))
        return Gap(*(float(np.max(column)) for column in zip(*gaps, strict=True)))  # nan, if one is

    def _own_gap(self, sampler: Sampler, trainer) -> Gap:
        mu = np.concatenate(sampler.score(self.sequences)).astype(np.float64)
        pi = self.trainer_logprobs(trainer).astype(np.float64)
        r = pi - mu
        return Gap(float(np.abs(r).mean()), float((np.expm1(r) - r).mean()))

    def trainer_logprobs(self, trainer) -> np.ndarray:
        """log pi of the probe's response tokens, (T,) float32 nats, with the weights that a coarse wire lets through and the
        keys and values that a cache of 8 bits gives back."""
        rounded = nullcontext() if FORMATS[self.wire].is_dtype else trainer.moved_weights(rounder(self.wire))
        cached = CachedAs(self.cache) if self.cache in CACHE_FORMATS else nullcontext()
        with rounded, cached:
            return np.concatenate(trainer.score(self.sequences))

    def allowed(self, floor: Gap) -> float:
        """The largest mean |dlogp|, nats per token, that counts as at the floor."""
        slack = TOLERATED_ROUNDINGS * FORMATS[self.precision].rounding + TOLERATED_NATS
        slack += CACHE_FLIP_NATS if self.cache in CACHE_FORMATS else 0.0
        return TOLERATED_FACTOR * floor.logprob_diff_mean + slack

    def holds(self, gap: Gap, floor: Gap) -> bool:
        """Whether a gap is at the floor; one that is not a number is not."""
        return gap.logprob_diff_mean <= self.allowed(floor)

    def check(self, gap: Gap, floor: Gap, when: str) -> None:
        """Raises SyncError if a gap is above the floor."""
        if not self.holds(gap, floor):
            raise SyncError(
                f"weight sync: {when}, sampler and trainer differ by {gap.logprob_diff_mean:.3g} nats per token on the "
                f"probe, allowed {self.allowed(floor):.3g} (floor: {floor.logprob_diff_mean:.3g}): "
                "the sampler holds stale weights"
            )


def sync_weights(trainer, sampler: Sampler, wire: str) -> str:
    """Hand the trainer's fp32 masters, rounded to the wire format, to the sampler. Returns the formats that travelled."""
    travelled = set()

    def noted():
        for name, tensor in trainer.named_weights(torch_dtype(wire)):
            if not FORMATS[wire].is_dtype:  # a dtype is left to the trainer, and read from what it hands over
                tensor = round_to(tensor, wire)
            travelled.add(wire if on_grid(tensor, wire) else dtype_name(tensor.dtype))
            yield name, tensor

    sampler.load_weights(noted())
    return "+".join(sorted(travelled))


def prove_sync(trainer, sampler: Sampler, wire: str, probe: Probe) -> Gap:
    """Measure the floor, run the challenge, and leave both engines with the weights they came with; returns the floor.

    Raises SyncError if a challenge weight did not arrive, if the way back does not end at the floor again, or if the
    floor is no floor: a sampler with other weights altogether is as far away before the challenge as after it.
    """
    floor, before = probe.gap(sampler, trainer), probe.trainer_logprobs(trainer)
    with trainer.moved_weights(_mover(seed=0, wire=wire)):
        effect = float(np.abs(probe.trainer_logprobs(trainer) - before).mean())
        if not floor.logprob_diff_mean <= FLOOR_SHARE * effect:
            raise SyncError(
                f"weight sync: sampler and trainer differ by {floor.logprob_diff_mean:.3g} nats per token on the probe, "
                f"where moving every weight by a tenth changes {effect:.3g}: the sampler holds stale weights"
            )
        sync_weights(trainer, sampler, wire)
        probe.check(probe.gap(sampler, trainer), floor, "after every weight was moved and synced")
    sync_weights(trainer, sampler, wire)
    probe.check(probe.gap(sampler, trainer), floor, "after the weights were moved back and synced")
    return floor


def rounder(wire: str) -> Callable[[Iterable[tuple[str, torch.Tensor]]], None]:
    """Rounds each weight, in place, to the format."""

    def move(named_tensors) -> None:
        for _, tensor in named_tensors:
            tensor.copy_(round_to(tensor, wire))

    return move


def _mover(seed: int, wire: str = "fp32") -> Callable[[Iterable[tuple[str, torch.Tensor]]], None]:
    """Multiplies each weight, in place, by 1 + scale x a random sign: no weight keeps its value. A tensor of zeros (a fresh
    bias, the B of a fresh adapter) becomes scale x a random sign. The signs of a tensor are drawn from its name."""
    scale = max(CHALLENGE_SCALE, CHALLENGE_ROUNDINGS * FORMATS[wire].rounding)

    def move(named_tensors) -> None:
        for name, tensor in named_tensors:
            generator = torch.Generator().manual_seed(request_seed(seed, name))
            drawn = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8)
            signs = drawn.to(tensor.device).to(tensor.dtype) * 2 - 1
            if tensor.any():
                tensor.mul_(1 + scale * signs)
            else:
                tensor.copy_(scale * signs)

    return move
