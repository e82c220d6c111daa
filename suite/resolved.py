"""The mismatch where one number does not do: in bins of position, length, entropy or probability, and over the whole
vocabulary.

Numpy float64; r = log pi - log mu as in suite/mismatch.py, whose errors on shapes and non-finite values these
functions share.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from jaxtyping import Float, Int

from suite.mismatch import finite_tokens, k3, log_ratio, prob_diff, token_counts


def resolved(
    rollout_logprobs: np.ndarray,
    trainer_logprobs: np.ndarray,
    num_tokens: Sequence | np.ndarray,
    by: str,
    edges: Sequence | np.ndarray,
    entropies: np.ndarray | None = None,
) -> list[dict]:
    """The mismatch in bins of a token's property: rows {by, lo, hi, num_tokens, k3_nats_per_token, prob_diff_mean}.

    by = "position" (0-based within the response), "length" (tokens of its response), "entropy" (nats, of the
    distribution at that position; needs `entropies` (T,)), "probability" (mu of the sampled token). Bins
    are [lo, hi), the last one [lo, hi]; edges may be infinite. An empty bin has None. ValueError if a token lies
    outside all bins: a table must not lose tokens silently.
    """
    r = log_ratio(rollout_logprobs, trainer_logprobs)
    x = token_property(by, r.size, token_counts(num_tokens, r.size), rollout_logprobs, entropies)
    edges = np.asarray(edges, dtype=np.float64)
    if edges.ndim != 1 or edges.size < 2 or not (edges[1:] > edges[:-1]).all():
        raise ValueError(f"edges: expected at least two increasing values, found {edges.tolist()}")
    if x.size and (x.min() < edges[0] or x.max() > edges[-1]):
        raise ValueError(
            f"{by} spans [{x.min()}, {x.max()}], outside the edges [{edges[0]}, {edges[-1]}]; use inf for open ends"
        )
    sums = bin_sums(x, edges, r, prob_diff(rollout_logprobs, trainer_logprobs))
    return [
        {
            "by": by,
            "lo": float(edges[i]),
            "hi": float(edges[i + 1]),
            "num_tokens": int(n),
            "k3_nats_per_token": float(k3_sum / n) if n else None,
            "prob_diff_mean": float(diff_sum / n) if n else None,
        }
        for i, (n, k3_sum, diff_sum) in enumerate(sums)
    ]


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
