"""Advantages and policy losses: pure torch functions of a batch and a row of `algorithms.ALGORITHMS`.

Two rules keep every value finite that the formula keeps finite. A masked position is replaced by 0 with `where` before
anything is computed from it, so padding may hold inf or nan and still gets a gradient of exactly 0. A log-ratio is
limited (truncated, masked, or held at `log_ratio_limit`) before exp, so no overflowed exp is ever multiplied by a mask.

Losses are additive: with `num_sequences` and `num_tokens` counted over the whole mini-batch, the losses of its
micro-batches sum to the loss of the mini-batch, and so do their gradients. Under data parallelism the counts are those
of all ranks and gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from suite.spec.algorithms import ADVANTAGES, Algorithm

# OAT and Dr.GRPO's code; keeps a group of near-equal rewards finite. VeRL has 1e-6, which moves advantages by 7e-6. A group of
# one response has advantage 0 here; VeRL gives it its reward.
STD_EPSILON = 1e-8


def advantages(rewards: Float[Tensor, "N"], group_ids: Int[Tensor, "N"], kind: str) -> Float[Tensor, "N"]:
    """One advantage per response, constant over its tokens.

    group_mean: R - mean of its group, the response itself included. group_mean_std: that divided by the group's
    standard deviation (n - 1 in the denominator) + 1e-8. reward: R itself. Groups need not be contiguous or equal in
    size; a group of equal rewards, or of one response, gets exactly 0. Computed in fp64, returned in fp32 (fp64 for
    fp64 rewards). Raises ValueError for an unknown kind or a reward that is not finite.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage {kind!r}, allowed: {', '.join(ADVANTAGES)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("advantages: a reward is not finite; leave unrewarded responses out of the batch")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    if kind == "reward":
        return rewards.to(dtype)
    centred, group, size = _centre(rewards.double(), group_ids)
    if kind == "group_mean_std":
        squares = torch.zeros_like(size).index_add_(0, group, centred**2)
        centred = centred / ((squares / (size - 1).clamp_min(1)).sqrt() + STD_EPSILON)[group]
    return centred.to(dtype)


def _centre(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R - group mean (N,), group index (N,), group size (G,)). The group's minimum is taken off first: equal rewards
    then give an exact 0 instead of a rounding error that a division by the deviation would blow up."""
    unique, group = torch.unique(group_ids, return_inverse=True)
    size = torch.zeros(len(unique), dtype=rewards.dtype, device=rewards.device).index_add_(
        0, group, torch.ones_like(rewards)
    )
    lowest = torch.full_like(size, math.inf).scatter_reduce_(0, group, rewards, "amin")
    shifted = rewards - lowest[group]
    total = torch.zeros_like(size).index_add_(0, group, shifted)
    return shifted - (total / size)[group], group, size


@dataclass(frozen=True)
class LossStatistics:
    """Additive counts of one micro-batch, 0-d fp64 tensors on its device; `a + b` merges two micro-batches.

    They stay tensors until `metrics()`, so that no micro-batch waits for the device.
    """

    num_tokens: Tensor  # response tokens in the loss
    num_clipped: Tensor  # of them: without gradient, held by the PPO clip, the dual clip or the trust region
    num_limited: Tensor  # of them: PPO log-ratio beyond log_ratio_limit
    num_sequences: Tensor  # responses with at least one token in the loss
    sum_weight: Tensor  # sequence weight w = prod_t pi(theta)/mu of those responses, before any cap of the row
    sum_weight2: Tensor
    max_weight: Tensor
    num_units: Tensor  # tokens or responses that carry a correction weight (0 for rows without one)
    sum_correction: Tensor  # the weight as applied: after truncation or masking
    num_truncated: Tensor
    num_masked: Tensor

    def __add__(self, other: LossStatistics) -> LossStatistics:
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return LossStatistics(**{k: torch.maximum(a, b) if k == "max_weight" else a + b for k, (a, b) in pairs.items()})

    def metrics(self) -> dict[str, float]:
        """Named as in metrics.jsonl; a quantity that the batch or the row does not have is left out, never 0.0.

        clip_fraction: share of tokens without gradient because of a clip or a trust region. importance_weight_mean, _max and
        effective_sample_size = (sum w)^2 / (n sum w^2), as a share of n: of the raw sequence weight, for every row
        alike, so that a cap cannot hide how degenerate the weights are. correction_mean, truncated_fraction,
        masked_fraction: of the weight that the row applies, over its tokens or sequences.
        """
        n = {f.name: getattr(self, f.name).item() for f in fields(self)}
        out = {}
        if n["num_tokens"]:
            out["clip_fraction"] = n["num_clipped"] / n["num_tokens"]
            out["log_ratio_limited_fraction"] = n["num_limited"] / n["num_tokens"]
        if n["num_sequences"]:
            out["importance_weight_mean"] = n["sum_weight"] / n["num_sequences"]
            out["importance_weight_max"] = n["max_weight"]
        if n["sum_weight2"]:
            out["effective_sample_size"] = n["sum_weight"] ** 2 / (n["num_sequences"] * n["sum_weight2"])
        if n["num_units"]:
            out["correction_mean"] = n["sum_correction"] / n["num_units"]
            out["truncated_fraction"] = n["num_truncated"] / n["num_units"]
            out["masked_fraction"] = n["num_masked"] / n["num_units"]
        return out


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch (0-d, fp32 or fp64, to be minimised) and what happened while computing it."""

    loss: Float[Tensor, ""]
    statistics: LossStatistics

    @property
    def metrics(self) -> dict[str, float]:
        """`statistics.metrics()` of this micro-batch alone; add statistics first for those of a mini-batch."""
        return self.statistics.metrics()


def policy_loss(
    algorithm: Algorithm,
    new_logprobs: Float[Tensor, "B T"],
    old_trainer_logprobs: Float[Tensor, "B T"] | None,
    rollout_logprobs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    advantages: Float[Tensor, "B"],
    *,
    num_sequences: int,
    num_tokens: int | None = None,
    length_norm: int | None = None,
) -> LossOutput:
    """The negative objective of `algorithm` (its `formula`), a mean over the `num_sequences` of the whole mini-batch.

    Log-probs are nats of the sampled tokens: new_logprobs log pi(theta), with gradient; old_trainer_logprobs
    log pi(theta'), None where the row does not need it; rollout_logprobs log mu(theta'). Only new_logprobs gets a
    gradient. loss_mask is True on response tokens. num_tokens (mask total of the mini-batch) is needed by aggregation
    token_mean; length_norm (tokens) by sum_over_length, unless the row has an aggregation_length, which wins. A value
    that is not finite under the mask makes the loss non-finite, for the trainer to skip. Raises ValueError for a
    missing input or normaliser and for shapes that do not agree.
    """
    _check_inputs(algorithm, new_logprobs, old_trainer_logprobs, rollout_logprobs, loss_mask, advantages)
    new = _masked(new_logprobs, loss_mask)  # (B, T), fp32 at least, 0 at padding
    mu = _masked(rollout_logprobs.detach(), loss_mask)
    old = _masked(old_trainer_logprobs.detach(), loss_mask) if algorithm.needs_old_trainer_logprobs else mu
    advantage = advantages.detach().to(new.dtype)[:, None]  # (B, 1)

    term, clipped, limited = _token_terms(algorithm, new, old, loss_mask, advantage)
    weight, truncated, masked = _correction(algorithm, new.detach(), old, mu, loss_mask)  # (B, T) or (B, 1)
    objective = torch.where(loss_mask, term if weight is None else weight * term, 0.0)
    loss = -_aggregate(algorithm, objective, loss_mask, num_sequences, num_tokens, length_norm)
    return LossOutput(
        loss, _statistics(algorithm, new.detach() - mu, loss_mask, clipped, limited, weight, truncated, masked)
    )


def _check_inputs(algorithm, new, old, mu, mask, advantages) -> None:
    """Broadcasting would hide a wrong shape: (B,) against (B, 1) gives (B, B) and a plausible number."""
    if old is None and algorithm.needs_old_trainer_logprobs:
        raise ValueError(f"{algorithm.name} needs old_trainer_logprobs: {algorithm.formula}")
    for name, tensor, shape in (
        ("old_trainer_logprobs", old, new.shape),
        ("rollout_logprobs", mu, new.shape),
        ("loss_mask", mask, new.shape),
        ("advantages", advantages, new.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} to fit new_logprobs")
    if mask.dtype != torch.bool:
        raise ValueError(f"loss_mask has dtype {mask.dtype}, expected torch.bool")


def _masked(logprobs: Tensor, mask: Tensor) -> Tensor:
    """fp32 at least (16-bit log-probs have lost the mismatch already), exactly 0 at padding whatever padding holds."""
    return torch.where(mask, logprobs.to(torch.promote_types(logprobs.dtype, torch.float32)), 0.0)


def _token_terms(algorithm, new, old, mask, advantage) -> tuple[Tensor, Tensor, Tensor]:
    """Per token (B, T): P_t or A log pi, where a clip holds it, and where the log-ratio was beyond the limit."""
    if algorithm.ratio_level == "none":
        nowhere = torch.zeros_like(mask)
        if algorithm.divergence == "none":
            return advantage * new, nowhere, nowhere
        outside = _outside(algorithm, new.detach(), old, advantage)
        return torch.where(outside, 0.0, advantage * new), outside & mask, nowhere
    limit = algorithm.log_ratio_limit
    log_ratio = new - old
    if algorithm.ratio_level == "sequence_mean":  # GSPO: the value of the mean ratio, the gradient of each token
        log_ratio = _sequence_sum(log_ratio.detach()) / _lengths(mask).to(new.dtype)
        ratio = log_ratio.clamp(-limit, limit).exp() * (new - new.detach()).exp()
    else:
        ratio = log_ratio.clamp(-limit, limit).exp()
    term, clipped = _clip(algorithm, ratio, advantage)
    return term, clipped & mask, (log_ratio.detach().abs() > limit) & mask


def _outside(algorithm, new, old, advantage) -> Tensor:
    """(B, T): tokens beyond the trust region on the side to which their advantage pushes them. Log-probs above 0 count
    as 0; a log-prob of the trainer that is not finite is never outside, so that it stays visible in the loss."""
    new_prob, old_prob = new.clamp_max(0).exp(), old.clamp_max(0).exp()
    moved = new_prob - old_prob
    size = moved.abs() if algorithm.divergence == "tv" else _binary_kl(old.clamp_max(0), new.clamp_max(0))
    up = (advantage > 0) & (moved > 0) & (size > algorithm.divergence_high)
    down = (advantage < 0) & (moved < 0) & (size > algorithm.divergence_low)
    return (up | down) & torch.isfinite(new)


def _binary_kl(log_p, log_q) -> Tensor:
    """KL(p || q) of the distributions (y_t, any other token), nats; inf where q leaves nothing for another token and p does."""
    rest_p, rest_q = -torch.expm1(log_p), -torch.expm1(log_q)
    rest = torch.where(rest_p > 0, rest_p * (rest_p.log() - rest_q.log()), 0.0)
    return log_p.exp() * (log_p - log_q) + rest


def _clip(algorithm, ratio, advantage) -> tuple[Tensor, Tensor]:
    """(P_t, tokens on which a bound is active). `ratio` is finite, so the branch not taken cannot spread a nan."""
    free = ratio * advantage
    bounded = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantage
    term, clipped = torch.minimum(free, bounded), bounded < free
    if algorithm.dual_clip is not None and math.isfinite(algorithm.dual_clip):
        floor = algorithm.dual_clip * advantage
        below = (advantage < 0) & (term < floor)
        term, clipped = torch.where(below, floor, term), clipped | below
    return term, clipped


def _correction(algorithm, new, old, mu, mask) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(weight, truncated, masked), each (B, T) for token level or (B, 1) for sequence level; no gradient flows here.

    Cap and floor act on the log-weight. A nan stays a nan: comparing it with the cap is False, and it is not masked away.
    """
    if algorithm.weight == "none":
        return None, None, None
    above_line, below_line = algorithm.weight.split("/")
    logprobs = {"new": new, "old": old, "rollout": mu}
    log_weight = logprobs[above_line] - logprobs[below_line]
    if algorithm.correction_level != "token":
        log_weight = _sequence_sum(log_weight)
    if algorithm.correction_level == "sequence_mean":
        log_weight = log_weight / _lengths(mask).to(new.dtype)
    log_cap = math.inf if algorithm.cap is None else math.log(algorithm.cap)
    log_floor = -math.inf if algorithm.floor is None else math.log(algorithm.floor)
    outside = (log_weight > log_cap) | (log_weight < log_floor)
    if algorithm.correction in ("mask", "reject"):
        inside = log_weight if algorithm.correction == "mask" else 0 * log_weight  # 1 inside, and nan stays nan
        log_weight = torch.where(outside, -math.inf, inside)
    elif algorithm.correction == "truncate":
        log_weight = log_weight.clamp(log_floor, log_cap)
    weight = log_weight.clamp_max(algorithm.log_ratio_limit).exp()
    nowhere = torch.zeros_like(outside)
    return weight, *((outside, nowhere) if algorithm.correction == "truncate" else (nowhere, outside))


def _aggregate(algorithm, objective, mask, num_sequences, num_tokens, length_norm) -> Tensor:
    """(B, T) -> 0-d, already divided by the normaliser of the whole mini-batch."""
    if algorithm.aggregation == "token_mean":
        return objective.sum() / _positive("num_tokens", num_tokens, algorithm)
    num_sequences = _positive("num_sequences", num_sequences, algorithm)
    per_sequence = _sequence_sum(objective)  # (B, 1)
    if algorithm.aggregation == "token_mean_per_sequence":
        return (per_sequence / _lengths(mask).to(objective.dtype)).sum() / num_sequences
    length = algorithm.aggregation_length or length_norm
    return per_sequence.sum() / (_positive("length_norm", length, algorithm) * num_sequences)


def _positive(name: str, value: int | None, algorithm: Algorithm) -> int:
    if value is None or value <= 0:
        raise ValueError(f"{algorithm.name} ({algorithm.aggregation}) needs {name} above 0, found {value}")
    return value


def _sequence_sum(values: Tensor) -> Tensor:
    return values.sum(dim=1, keepdim=True)  # (B, T) -> (B, 1); inputs are fp32 at least, so is the sum


def _lengths(mask: Tensor) -> Tensor:
    return mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1); an empty response contributes 0 / 1, not 0 / 0


@torch.no_grad()
def _statistics(algorithm, log_w, mask, clipped, limited, weight, truncated, masked) -> LossStatistics:
    present = mask.any(dim=1, keepdim=True)  # (B, 1)
    sequence_log_w = _sequence_sum(log_w.double()).clamp_max(algorithm.log_ratio_limit)
    raw = torch.where(present, sequence_log_w.exp(), 0.0)
    unit = mask if algorithm.correction_level == "token" else present
    none = torch.zeros((), dtype=torch.float64, device=mask.device)

    def count(flags):
        return none if flags is None else (flags & unit).sum().double()

    return LossStatistics(
        num_tokens=mask.sum().double(),
        num_clipped=clipped.sum().double(),
        num_limited=limited.sum().double(),
        num_sequences=present.sum().double(),
        sum_weight=raw.sum(),
        sum_weight2=(raw**2).sum(),
        max_weight=raw.amax() if raw.numel() else none,
        num_units=none if weight is None else unit.sum().double(),
        sum_correction=none if weight is None else torch.where(unit, weight.double(), 0.0).sum(),
        num_truncated=count(truncated),
        num_masked=count(masked),
    )
