"""Controls of the cause: what the loss is told of the log-probs, changed on purpose and in a known way. No torch.

If the mismatch makes training collapse because the loss weighs tokens wrongly, then an exact sampler with the same wrong
weights must collapse as well, and the same weights dealt to other tokens, or noise of the same size, must not. A policy
gradient on rollouts of mu weighs a token, seen from pi, by mu/pi. So the arms below sample from pi itself and multiply the
term of each token by a weight u:

    rounded         u = pi_b/pi, pi_b the trainer with its weights rounded to the format: what a coarse sampler would do
    permuted        the same u, dealt to other tokens of like probability: same size, no correlation with the token
    unbiased-noise  u = exp(s z - s^2/2), z normal, s^2 the mean of (log u)^2 of `rounded`: mean 1, same size
    biased-low      u = 1.2 where pi < 0.1, else 1: no rounding anywhere

and two act on a real mismatch instead:

    aligned         the sampler's own log-probs are the old log-probs of the PPO ratio: pi(theta)/mu. For GRPO that is
                    `anchor: rollout`; for rows weighted by old/rollout, which have no anchor, it takes the weight away
    hidden          the trainer's old log-probs stand for the sampler's: no correction can see the mismatch

The weight enters as old - rollout, so the row must weigh tokens by old/rollout without a cap that acts (GRPO-Token-TIS, cap 1.0e+9).
Sources: peers' causal pair of biased weights and unbiased noise, arXiv 2602.01103; the log-probs' bypass mode of verl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

LOW_PROBABILITY, LOW_WEIGHT = 0.1, 1.2  # arXiv 2602.01103
PROBABILITY_BINS = 64  # tokens are permuted among so many groups of equal size, by probability

Tokens = Float[np.ndarray, "T"]


def _rounded(old: Tokens, rollout: Tokens, coarse: Tokens, rng) -> tuple[Tokens, Tokens]:
    return old, old - (coarse - old)


def _permuted(old: Tokens, rollout: Tokens, coarse: Tokens, rng) -> tuple[Tokens, Tokens]:
    return old, old - dealt_to_others(coarse - old, old, rng)


def _noise(old: Tokens, rollout: Tokens, coarse: Tokens, rng) -> tuple[Tokens, Tokens]:
    size = float(np.sqrt(np.mean((coarse - old) ** 2))) if old.size else 0.0
    return old, old - (size * rng.standard_normal(old.size) - size**2 / 2)


def _biased_low(old: Tokens, rollout: Tokens, coarse: Tokens | None, rng) -> tuple[Tokens, Tokens]:
    return old, old - np.where(np.exp(old) < LOW_PROBABILITY, np.log(LOW_WEIGHT), 0.0)


@dataclass(frozen=True)
class Perturbation:
    """One row: what it makes of (old trainer log-probs, rollout log-probs, log-probs of the rounded trainer, generator),
    whether it needs a format to round to, and whether its weight enters through old/rollout."""

    name: str
    make: Callable[..., tuple[Tokens, Tokens]]
    needs_format: bool = False
    weighs_tokens: bool = True


_ROWS = (
    Perturbation("rounded", _rounded, needs_format=True),
    Perturbation("permuted", _permuted, needs_format=True),
    Perturbation("unbiased-noise", _noise, needs_format=True),
    Perturbation("biased-low", _biased_low),
    Perturbation("aligned", lambda old, rollout, coarse, rng: (rollout, rollout), weighs_tokens=False),
    Perturbation("hidden", lambda old, rollout, coarse, rng: (old, old), weighs_tokens=False),
)
PERTURBATIONS: dict[str, Perturbation] = {row.name: row for row in _ROWS}


def dealt_to_others(values: Tokens, logprobs: Tokens, rng: np.random.Generator) -> Tokens:
    """`values`, permuted at random among tokens of like log-prob: groups of equal size (at most PROBABILITY_BINS) along the
    order of `logprobs`. The multiset of values stays what it was, also within each group."""
    order, dealt = np.argsort(logprobs, kind="stable"), np.array(values)
    for group in np.array_split(order, min(PROBABILITY_BINS, max(1, order.size))):
        dealt[group] = values[rng.permutation(group)]
    return dealt


def perturbed(name: str, old: list[np.ndarray], rollout: list[np.ndarray], coarse: list[np.ndarray] | None,
              seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(old, rollout) log-probs of the rollouts of a step as the loss is told them: N arrays of (T_i,) float32 nats each.

    coarse: those of the trainer with rounded weights, where the perturbation needs them.
    """
    ends = np.cumsum([len(values) for values in old])[:-1]
    flat = [None if parts is None else np.concatenate(parts).astype(np.float64) for parts in (old, rollout, coarse)]
    made = PERTURBATIONS[name].make(*flat, np.random.default_rng(seed))
    return tuple(np.split(values.astype(np.float32), ends) for values in made)
