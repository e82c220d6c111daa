"""The mismatch where one number does not do: in bins of position, length, entropy or probability, and over the whole
vocabulary.

Numpy float64; r = log pi - log mu as in suite/measure/mismatch.py, whose errors on shapes and non-finite values these
functions share.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from suite.measure.mismatch import finite_tokens, k3


def bin_sums(x: np.ndarray, edges: np.ndarray, r: np.ndarray, prob_diff: np.ndarray) -> Float[np.ndarray, "B 3"]:
    """Tokens, sum of k3 and sum of |pi - mu| in each bin [lo, hi) of x, the last one [lo, hi]; (B, 3) for B + 1 edges.
    What lies outside the edges is counted in the first or the last bin."""
    bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    columns = (np.ones_like(r), k3(r), np.abs(prob_diff))
    return np.stack([np.bincount(bins, weights=values, minlength=len(edges) - 1) for values in columns], axis=1)


def token_property(by: str, num: int, lengths: Int[np.ndarray, "N"], rollout_logprobs, entropies) -> Float[np.ndarray, "T"]:
    """The value of the property at each of `num` tokens; lengths are those of the responses."""
    if by == "position":
        return (np.arange(num) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.float64)
    if by == "length":
        return np.repeat(lengths, lengths).astype(np.float64)
    if by == "probability":
        return np.exp(np.asarray(rollout_logprobs, dtype=np.float64))
    if by != "entropy":
        raise ValueError(f"by: found {by!r}, allowed: position, length, entropy, probability")
    if entropies is None or np.shape(entropies) != (num,):
        raise ValueError(f"by='entropy' needs `entropies`, one per token ({num}), found {np.shape(entropies)}")
    return finite_tokens("entropies", entropies)


def full_vocabulary_kl(mu_logprobs: np.ndarray, pi_logprobs: np.ndarray) -> Float[np.ndarray, "T"]:
    """KL[mu||pi] at each position over the whole vocabulary, nats, (T,), from normalised log-probabilities (T, V).

    Rows are renormalised in float64 and summed as mu * k3(log pi - log mu), which equals the KL of normalised rows,
    has no negative terms to cancel, and is >= 0 by construction. +inf where pi is 0 on a token that mu can emit.
    ValueError: shapes that differ, nan, or rows that are not log-probabilities (their probabilities do not sum to 1
    within 1e-3).
    """
    log_mu, log_pi = _normalised("mu_logprobs", mu_logprobs), _normalised("pi_logprobs", pi_logprobs)
    if log_mu.shape != log_pi.shape:
        raise ValueError(f"mu_logprobs has shape {log_mu.shape}, pi_logprobs {log_pi.shape}: they must be equal")
    possible = np.isfinite(log_mu)
    r = np.where(possible, log_pi, 0.0) - np.where(possible, log_mu, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        direct = np.exp(log_pi) - np.exp(log_mu) - np.exp(log_mu) * r  # mu * k3 without forming e^r, which may overflow
        terms = np.where(np.abs(r) < 1.0, np.exp(log_mu) * k3(r), direct)
    return np.where(possible, terms, np.exp(log_pi)).sum(axis=1)


def _normalised(name: str, logprobs: np.ndarray) -> Float[np.ndarray, "T V"]:
    logprobs = np.asarray(logprobs, dtype=np.float64)
    if logprobs.ndim != 2 or logprobs.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (T, V), found {logprobs.shape}")
    if np.isnan(logprobs).any() or (logprobs == np.inf).any():
        raise ValueError(f"{name}: nan or +inf")
    top = logprobs.max(axis=1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError(f"{name}: row {int(np.isneginf(top).argmax())} gives every token probability 0")
    log_total = top + np.log(np.exp(logprobs - top).sum(axis=1, keepdims=True))
    if logprobs.shape[0] and np.abs(np.expm1(log_total)).max() > 1e-3:
        raise ValueError(f"{name}: row {int(np.abs(log_total).argmax())} does not sum to 1; are these logits?")
    return logprobs - log_total
