"""The gap between the rollout policy mu (sampler) and the training policy pi (trainer), in numpy float64.

Everything is a function of two numbers per response token, log mu and log pi of the sampled token:

    r = log pi - log mu        (trainer minus rollout; nats)

What a verdict rests on is additive: `prompt_sums` turns tokens into one row of sums per prompt, `concat_sums` merges
rows of the same prompt, and `estimates` turns rows into numbers. Rows can be split, permuted and merged freely; so a
run can be recorded in parts, resumed, published without its tokens, and graded again from the sums alone.
`token_statistics` holds what sums cannot give (quantiles, correlation, sequence weights); suite/measure/bins.py holds the
same gap in bins, and over the whole vocabulary.

Names, formulas, units, and what other systems call the same thing: `suite.spec.estimands.ESTIMANDS` (also importable from
here).

Non-finite log-probabilities are an error, never a number. A finite but huge |r| (above about 709 nats) makes exp(|r|)
exceed float64: the affected sum is then +inf, in its own prompt's row and in every estimate built on it, and is never
turned into nan or clipped; k1, k2 and, for r < 0, k3 stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from suite.spec.estimands import ESTIMANDS, Estimand  # noqa: F401  (one table of names, offered where people look for it)

# Ratio band of the out-of-band share: pi/mu outside [0.9, 1.1], the band of the measurements in huggingface/trl#6789.
BAND = (0.9, 1.1)
TOKENS_PER_K = 1000.0

COUNTS = ("num_rollouts", "num_response_tokens", "num_out_of_band", "num_rewarded", "num_truncated")
MAXIMA = ("max_prob_diff", "max_k3")
MINIMA = ("min_prob_diff",)
PROMPT_SUM_COLUMNS = (
    "prompt_id",
    "num_rollouts",
    "num_response_tokens",
    "sum_k1",
    "sum_k2",
    "sum_k3",
    "sum_reverse_k3",
    "sum_abs_prob_diff",
    "sum_abs_logprob_diff",
    "sum_mult_prob_error",
    "num_out_of_band",
    "max_prob_diff",
    "min_prob_diff",
    "max_k3",
    "sum_len_k",
    "sum_len_k2",
    "sum_seq_log_ratio",
    "sum_seq_log_ratio2",
    "sum_len_k_x_seq_log_ratio",
    "sum_reward",
    "sum_reward2",
    "num_rewarded",
    "num_truncated",
)
# What rollouts add up to that no trainer scored: there is no pi, hence no r.
SAMPLED_COLUMNS = (
    "prompt_id",
    "num_rollouts",
    "num_response_tokens",
    "sum_len_k",
    "sum_len_k2",
    "sum_reward",
    "sum_reward2",
    "num_rewarded",
    "num_truncated",
)
SUMS = tuple(c for c in PROMPT_SUM_COLUMNS if c not in ("prompt_id", *MAXIMA, *MINIMA))

Sums = dict[str, np.ndarray]


# ---- per token -----------------------------------------------------------------------------------------------------


def log_ratio(rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> Float[np.ndarray, "T"]:
    """r = log pi - log mu per token, (T,) float64, nats. ValueError if shapes differ or a value is not finite."""
    log_mu, log_pi = (
        finite_tokens("rollout_logprobs", rollout_logprobs),
        finite_tokens("trainer_logprobs", trainer_logprobs),
    )
    if log_mu.shape != log_pi.shape:
        raise ValueError(
            f"rollout_logprobs has shape {log_mu.shape}, trainer_logprobs {log_pi.shape}: they must be equal"
        )
    return log_pi - log_mu


def k3(r: np.ndarray | float) -> Float[np.ndarray, "*shape"]:
    """e^r - 1 - r >= 0, elementwise: the low-variance estimator of KL[mu||pi] on tokens sampled from mu.

    e^r - 1 comes from expm1; where |r| < 1e-3 even expm1(r) - r cancels, so there the series r^2/2 + r^3/6 + r^4/24 +
    r^5/120 is used (its next term is below 1e-14 of the value). k3(1e-8) is 5e-17 to full precision. +inf where r >
    709.78.
    """
    r = np.asarray(r, dtype=np.float64)
    series = r * r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r / 120.0)))
    with np.errstate(over="ignore"):
        return np.where(np.abs(r) < 1e-3, series, np.expm1(r) - r)


def prob_diff(rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> Float[np.ndarray, "T"]:
    """pi - mu of the sampled token, signed, (T,). Computed as mu * (e^r - 1), which keeps its digits when pi and mu
    nearly agree."""
    r = log_ratio(rollout_logprobs, trainer_logprobs)
    mu = np.exp(np.asarray(rollout_logprobs, dtype=np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        close = mu * np.expm1(r)
    return np.where(np.abs(r) < 1.0, close, np.exp(np.asarray(trainer_logprobs, dtype=np.float64)) - mu)


def finite_tokens(name: str, values: np.ndarray) -> Float[np.ndarray, "T"]:
    """One value per token, float64; ValueError if not flat or not finite, naming the first such token."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name}: expected one flat array over tokens, found shape {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(f"{name}: token {bad[0]} is {values[bad[0]]}; log-probabilities must be finite")
    return values


def token_counts(num_tokens: Sequence | np.ndarray, total: int) -> Int[np.ndarray, "N"]:
    """Response tokens per rollout; ValueError if one is negative or they do not sum to `total`."""
    lengths = np.asarray(num_tokens, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError("num_tokens: expected one flat array of counts >= 0")
    if lengths.sum() != total:
        raise ValueError(f"num_tokens sums to {lengths.sum()}, but there are {total} log-probabilities")
    return lengths


def _segments(
    reduce: np.ufunc, values: Float[np.ndarray, "T"], lengths: Int[np.ndarray, "N"], empty: float
) -> Float[np.ndarray, "N"]:
    """reduce (np.add, np.maximum, ...) over consecutive runs of `lengths`, (N,); runs of length 0 give `empty`."""
    out = np.full(lengths.shape, empty, dtype=np.float64)
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        out[filled] = reduce.reduceat(values, starts)
    return out


# ---- sums ----------------------------------------------------------------------------------------------------------


def prompt_sums(
    prompt_ids: Sequence | np.ndarray,
    num_tokens: Sequence | np.ndarray,
    rollout_logprobs: np.ndarray,
    trainer_logprobs: np.ndarray | None,
    rewards: Sequence | np.ndarray | None = None,
    truncated: Sequence | np.ndarray | None = None,
) -> Sums:
    """One row of sums per distinct prompt, in order of first appearance: the columns of PROMPT_SUM_COLUMNS, or without
    trainer_logprobs (None: nobody scored these rollouts) those of SAMPLED_COLUMNS.

    prompt_ids (N,), one per rollout; num_tokens (N,), response tokens of each, 0 allowed; rollout_logprobs and
    trainer_logprobs (sum of num_tokens,), nats, the rollouts' response tokens laid end to end. rewards (N,), nan =
    not rewarded. Lengths in the sequence moments are in thousands of tokens. A prompt without any token has max =
    -inf and min = +inf. ValueError: shapes that disagree, non-finite log-probabilities, infinite rewards.
    """
    rollouts = rollout_sums(num_tokens, rollout_logprobs, trainer_logprobs, rewards, truncated)
    if len(prompt_ids) != len(rollouts["num_rollouts"]):
        raise ValueError(f"{len(prompt_ids)} prompt_ids for {len(rollouts['num_rollouts'])} rollouts")
    return _merge_rows([str(p) for p in prompt_ids], rollouts)


def rollout_sums(num_tokens, rollout_logprobs, trainer_logprobs, rewards, truncated) -> Sums:
    """The columns of prompt_sums but prompt_id, one row per rollout; arguments and errors are those of prompt_sums."""
    lengths = token_counts(num_tokens, finite_tokens("rollout_logprobs", rollout_logprobs).size)
    scored = {} if trainer_logprobs is None else _scored_sums(lengths, rollout_logprobs, trainer_logprobs)
    len_k = lengths / TOKENS_PER_K
    reward, rewarded = _rewards(rewards, lengths.size)
    return scored | {
        "num_rollouts": np.ones_like(lengths),
        "num_response_tokens": lengths,
        "sum_len_k": len_k,
        "sum_len_k2": len_k**2,
        "sum_reward": reward,
        "sum_reward2": reward**2,
        "num_rewarded": rewarded.astype(np.int64),
        "num_truncated": _flags(truncated, lengths.size),
    }


def _scored_sums(lengths: Int[np.ndarray, "N"], rollout_logprobs, trainer_logprobs) -> Sums:
    """What only log pi gives, one row per rollout."""
    r = log_ratio(rollout_logprobs, trainer_logprobs)
    with np.errstate(over="ignore"):
        mult_prob_error = np.exp(np.abs(r))
    diff, k3_tokens = prob_diff(rollout_logprobs, trainer_logprobs), k3(r)
    out_of_band = (r < math.log(BAND[0])) | (r > math.log(BAND[1]))
    seq = _segments(np.add, r, lengths, 0.0)
    return {
        "sum_k1": -seq,
        "sum_k2": _segments(np.add, 0.5 * r * r, lengths, 0.0),
        "sum_k3": _segments(np.add, k3_tokens, lengths, 0.0),
        "sum_reverse_k3": _segments(np.add, k3(-r), lengths, 0.0),
        "sum_abs_prob_diff": _segments(np.add, np.abs(diff), lengths, 0.0),
        "sum_abs_logprob_diff": _segments(np.add, np.abs(r), lengths, 0.0),
        "sum_mult_prob_error": _segments(np.add, mult_prob_error, lengths, 0.0),
        "num_out_of_band": _segments(np.add, out_of_band.astype(np.float64), lengths, 0.0).astype(np.int64),
        "max_prob_diff": _segments(np.maximum, diff, lengths, -np.inf),
        "min_prob_diff": _segments(np.minimum, diff, lengths, np.inf),
        "max_k3": _segments(np.maximum, k3_tokens, lengths, -np.inf),
        "sum_seq_log_ratio": seq,
        "sum_seq_log_ratio2": seq**2,
        "sum_len_k_x_seq_log_ratio": lengths / TOKENS_PER_K * seq,
    }


def _rewards(rewards, num_rollouts: int) -> tuple[Float[np.ndarray, "N"], np.ndarray]:
    if rewards is None:
        return np.zeros(num_rollouts), np.zeros(num_rollouts, dtype=bool)
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.shape != (num_rollouts,) or np.isinf(rewards).any():
        raise ValueError(
            f"rewards: expected {num_rollouts} finite values (nan = not rewarded), found shape {rewards.shape}"
        )
    rewarded = ~np.isnan(rewards)
    return np.where(rewarded, rewards, 0.0), rewarded


def _flags(truncated, num_rollouts: int) -> Int[np.ndarray, "N"]:
    if truncated is None:
        return np.zeros(num_rollouts, dtype=np.int64)
    flags = np.asarray(truncated, dtype=bool)
    if flags.shape != (num_rollouts,):
        raise ValueError(f"truncated: expected {num_rollouts} values, found shape {flags.shape}")
    return flags.astype(np.int64)


class RunningSums:
    """Prompt sums to which rows are added as they come, in memory for one row per prompt.

    Rows added in several calls give the bits that one call with all of them gives: every entry is added to, row by row,
    in the order in which rows come. A column that some rows lack, as those of rollouts that no trainer scored, is left out.
    """

    def __init__(self):
        self._index: dict[str, int] = {}
        self._columns: Sums = {column: np.zeros(0, _START[column][1]) for column in PROMPT_SUM_COLUMNS[1:]}

    def add(self, keys: Sequence[str], rows: Mapping) -> None:
        """Rows with the same key become one row: sums add, maxima and minima are taken."""
        where = np.array([self._index.setdefault(key, len(self._index)) for key in keys], dtype=np.int64)
        self._columns = {name: self._joined(name, where, rows[name]) for name in self._columns if name in rows}

    def _joined(self, column: str, where: np.ndarray, values) -> np.ndarray:
        (start, dtype, reduce), old = _START[column], self._columns[column]
        out = np.concatenate([old, np.full(len(self._index) - len(old), start, dtype)])
        reduce.at(out, where, np.asarray(values, dtype=dtype))
        return out

    def table(self) -> Sums:
        """prompt_id and the columns that all rows have, a row per key in order of first appearance."""
        return {"prompt_id": np.array(list(self._index), dtype=object)} | {name: c.copy() for name, c in self._columns.items()}


def _start(column: str) -> tuple[float, type, np.ufunc]:
    """What a column is of no row, its dtype, and how rows are joined."""
    if column in MAXIMA or column in MINIMA:
        return (-np.inf, float, np.maximum) if column in MAXIMA else (np.inf, float, np.minimum)
    return 0, np.int64 if column in COUNTS else float, np.add


_START = {column: _start(column) for column in PROMPT_SUM_COLUMNS[1:]}


def _merge_rows(keys: list[str], rows: Sums) -> Sums:
    running = RunningSums()
    running.add(keys, rows)
    return running.table()


def concat_sums(tables: Sequence) -> Sums:
    """Tables of prompt_sums laid together, rows of the same prompt merged, in order of first appearance. [] gives an
    empty table. ValueError where one lacks a column, or some are of scored rollouts and others not."""
    columns = PROMPT_SUM_COLUMNS if not tables or any(map(is_scored, tables)) else SAMPLED_COLUMNS
    for table in tables:
        missing = [c for c in columns if c not in table]
        if missing:
            raise ValueError(f"a table of prompt sums lacks the columns {missing}")
    keys = [str(key) for table in tables for key in table["prompt_id"]]
    return _merge_rows(keys, {c: _stack([t[c] for t in tables]) for c in columns[1:]})


def is_scored(sums: Mapping) -> bool:
    """Whether these are sums of rollouts that a trainer scored."""
    return any(column in sums for column in PROMPT_SUM_COLUMNS if column not in SAMPLED_COLUMNS)


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(p) for p in parts]) if parts else np.zeros(0)


# ---- estimates -----------------------------------------------------------------------------------------------------


def totals_of(sums: Mapping) -> dict:
    """Additive columns summed over prompts: what estimates_of_totals takes (the bootstrap makes its own, one per
    resample)."""
    return {c: np.asarray(sums[c]).sum() for c in SUMS if c in sums}


def estimates_of_totals(totals: Mapping) -> dict:
    """Every estimate that is a function of additive totals; elementwise over totals of any shape. nan where it is
    undefined; without the totals of scored rollouts only what needs no pi."""
    t = {name: np.asarray(value, dtype=np.float64) for name, value in totals.items()}
    tokens, rollouts = t["num_response_tokens"], t["num_rollouts"]
    sampled = {
        "response_tokens_mean": _ratio(tokens, rollouts),
        "reward_mean": _ratio(t["sum_reward"], t["num_rewarded"]),
        "truncated_share": _ratio(t["num_truncated"], rollouts),
    }
    if not is_scored(t):
        return sampled
    slope, intercept = _least_squares(t)
    return {
        "k1_nats_per_token": _ratio(t["sum_k1"], tokens),
        "k2_nats_per_token": _ratio(t["sum_k2"], tokens),
        "k3_nats_per_token": _ratio(t["sum_k3"], tokens),
        "reverse_k3_nats_per_token": _ratio(t["sum_reverse_k3"], tokens),
        "prob_diff_mean": _ratio(t["sum_abs_prob_diff"], tokens),
        "logprob_diff_mean": _ratio(t["sum_abs_logprob_diff"], tokens),
        "mult_prob_error": _ratio(t["sum_mult_prob_error"], tokens),
        "out_of_band_share": _ratio(t["num_out_of_band"], tokens),
        "seq_kl_k1_nats": _ratio(-t["sum_seq_log_ratio"], rollouts),
        "seq_slope_nats_per_1k_tokens": slope,
        "seq_intercept_nats": intercept,
    } | sampled


def _ratio(top: np.ndarray | float, bottom: np.ndarray | float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


def _least_squares(t: dict) -> tuple:
    """Slope (nats per 1,000 tokens) and intercept (nats) of sequence log-ratio on length, from centred second moments.

    Undefined (nan) when all lengths are equal, i.e. when the centred sum of squares is rounding error of the raw one.
    """
    mean_x, mean_y = _ratio(t["sum_len_k"], t["num_rollouts"]), _ratio(t["sum_seq_log_ratio"], t["num_rollouts"])
    s_xx = t["sum_len_k2"] - t["sum_len_k"] * mean_x
    s_xy = t["sum_len_k_x_seq_log_ratio"] - mean_x * t["sum_seq_log_ratio"]
    defined = s_xx > 1e-13 * t["sum_len_k2"]
    slope = np.where(defined, _ratio(s_xy, np.where(defined, s_xx, 1.0)), np.nan)
    return slope, mean_y - slope * mean_x


def estimates(sums: Mapping) -> dict[str, float | None]:
    """Every metric that prompt sums can give, named as in ESTIMANDS; pooled over tokens (or sequences), not averaged
    over prompts. Sums of rollouts that no trainer scored give the three that need no pi.

    None where there is nothing to estimate from: no token, no reward, all lengths equal, a share of a total that is
    zero.
    """
    values = {name: float(value) for name, value in estimates_of_totals(totals_of(sums)).items()}
    if not is_scored(sums):
        return {name: None if math.isnan(value) else value for name, value in values.items()}
    has_tokens = int(np.asarray(sums["num_response_tokens"]).sum()) > 0
    if has_tokens:
        values["prob_diff_max"] = float(np.max(sums["max_prob_diff"]))
        values["prob_diff_min"] = float(np.min(sums["min_prob_diff"]))
        values["k3_top_token_share"] = share(float(np.max(sums["max_k3"])), float(np.sum(sums["sum_k3"])))
    names = (*values, "prob_diff_max", "prob_diff_min", "k3_top_token_share")
    return {name: None if math.isnan(values.get(name, math.nan)) else values[name] for name in names}


def share(part: float, whole: float) -> float:
    """part / whole; nan where the whole is zero or overflowed."""
    return part / whole if whole > 0 and math.isfinite(whole) else math.nan


def token_statistics(
    rollout_logprobs: np.ndarray, trainer_logprobs: np.ndarray, num_tokens: Sequence | np.ndarray
) -> dict[str, float | None]:
    """What sums cannot give, from all tokens (T,) of a run: tail of |pi - mu|, tail share of k3, correlation,
    sequence weights.

    effective_sample_size = (sum w)^2 / (N sum w^2), w = exp(sum_t r) per sequence, untruncated, so that it can show
    the collapse that truncated weights hide; computed on the log scale, so no w overflows. None where undefined.
    """
    r = log_ratio(rollout_logprobs, trainer_logprobs)
    lengths = token_counts(num_tokens, r.size)
    seq = _segments(np.add, r, lengths, 0.0)
    with np.errstate(over="ignore"):
        seq_error = _segments(np.add, np.exp(np.abs(r)), lengths, np.nan) / np.maximum(lengths, 1)
    some_tokens, some_rollouts = r.size > 0, lengths.size > 0
    values = {
        "prob_diff_p999": float(np.quantile(np.abs(prob_diff(rollout_logprobs, trainer_logprobs)), 0.999))
        if some_tokens
        else math.nan,
        "k3_top_0p1pct_share": _top_share(k3(r), 0.001) if some_tokens else math.nan,
        "prob_pearson": _pearson(np.exp(rollout_logprobs), np.exp(trainer_logprobs)),
        "effective_sample_size": _effective_share(seq) if some_rollouts else math.nan,
        "seq_log_ratio_max": float(seq.max()) if some_rollouts else math.nan,
        "seq_log_ratio_min": float(seq.min()) if some_rollouts else math.nan,
        "seq_mult_prob_error_max": float(np.nanmax(seq_error)) if some_tokens else math.nan,
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _top_share(values: Float[np.ndarray, "T"], fraction: float) -> float:
    count = math.ceil(fraction * values.size)
    return share(float(np.partition(values, -count)[-count:].sum()), float(values.sum()))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def _effective_share(log_weights: Float[np.ndarray, "N"]) -> float:
    w = np.exp(log_weights - log_weights.max())
    return float(w.sum() ** 2 / (w.size * (w @ w)))
