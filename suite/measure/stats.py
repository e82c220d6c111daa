"""Intervals over launches, resampling of prompts, events in series with censoring, and what a design can decide.
numpy and scipy.

The unit of replication is the launch (seed). Intervals are two-sided at `level` (0.90 unless told), so each end is a
one-sided 5 % bound. Too little data is None, never 0.0 and never a point: one launch, launches that agree exactly, no
pair, no value on the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats


class Interval(NamedTuple):
    """An estimate with its interval in the estimand's own unit, how it was made, and from how many launches, prompts
    or trials."""

    estimate: float
    lo: float
    hi: float
    method: str
    num: int


# ---- over launches -------------------------------------------------------------------------------------------------


def to_scale(values: Sequence[float], scale: str, num_trials: Sequence[int] | int | None = None) -> np.ndarray | None:
    """Values (n,) on the scale on which an interval is taken; None if one of them does not lie on it.

    "log": values > 0. "logit": rates in [0, 1]; with num_trials (per launch, or one for all) a rate x/n enters as (x
    + 0.5)/(n + 1), so that 0 and 1 are finite; without, rates must lie strictly inside. "identity": any finite value.
    """
    values = np.asarray(values, dtype=np.float64)
    if scale == "identity":
        on_scale = values
    elif scale == "log":
        on_scale = np.log(np.where(values > 0, values, np.nan))
    elif scale == "logit":
        if num_trials is not None:
            n = np.asarray(num_trials, dtype=np.float64)
            values = np.where((values >= 0) & (values <= 1), (values * n + 0.5) / (n + 1.0), np.nan)
        inside = (values > 0) & (values < 1)
        on_scale = np.log(np.where(inside, values, np.nan)) - np.log1p(-np.where(inside, values, np.nan))
    else:
        raise ValueError(f"scale: found {scale!r}, allowed: identity, log, logit")
    return on_scale if np.isfinite(on_scale).all() else None


def from_scale(value: float, scale: str, num_trials: Sequence[int] | int | None = None) -> float:
    """Back to the estimand's unit; the (x + 0.5)/(n + 1) of the logit scale is undone (mean n), and the rate kept in
    [0, 1]."""
    if scale == "log":
        return math.exp(value) if value < 709.0 else math.inf
    if scale != "logit":
        return float(value)
    rate = 0.5 * (1.0 + math.tanh(0.5 * value))
    if num_trials is None:
        return rate
    n = float(np.mean(num_trials))
    return min(1.0, max(0.0, (rate * (n + 1.0) - 0.5) / n))


def student_t_interval(
    values: Sequence[float], level: float = 0.90, scale: str = "identity", num_trials: Sequence[int] | int | None = None
) -> Interval | None:
    """Mean over launches with a Student-t interval, taken on `scale` and brought back. values: one per launch.

    None with fewer than two launches, if a value does not lie on the scale, or if all launches agree exactly: their
    spread then says nothing about noise (use `launch_interval`, which falls back to the within-launch interval).
    """
    x = to_scale(values, scale, num_trials)
    if x is None or x.size < 2 or _agree(x):
        return None
    half = _t_quantile(x.size, level) * float(x.std(ddof=1)) / math.sqrt(x.size)
    ends = (from_scale(float(x.mean()) + shift, scale, num_trials) for shift in (0.0, -half, half))
    return Interval(*ends, "student_t", int(x.size))


def _agree(x: np.ndarray) -> bool:
    """All equal up to the rounding of the last two or three bits, which carries no information about launches."""
    return bool(np.ptp(x) <= 4 * np.finfo(np.float64).eps * np.abs(x).max())


def _t_quantile(n: int, level: float) -> float:
    return float(scipy_stats.t.ppf(0.5 + level / 2, n - 1))


def launch_interval(
    values: Sequence[float],
    within: Sequence[Interval | None],
    level: float = 0.90,
    scale: str = "identity",
    num_trials: Sequence[int] | int | None = None,
) -> Interval | None:
    """student_t_interval; where all launches (two or more) agree exactly, the hull of the within-launch intervals
    instead.

    within: one interval per launch (e.g. prompt_bootstrap or clopper_pearson); None if any of those needed is missing.
    """
    across = student_t_interval(values, level, scale, num_trials)
    values = np.asarray(values, dtype=np.float64)
    if across is not None or values.size < 2 or not np.isfinite(values).all() or not _agree(values):
        return across
    if len(within) != values.size or any(interval is None for interval in within):
        return None
    lo, hi = min(i.lo for i in within), max(i.hi for i in within)
    return Interval(float(values[0]), lo, hi, "within_run", int(values.size)) if lo < hi else None


def one_against_many(one: float, many: Sequence[float], level: float = 0.90) -> Interval | None:
    """many / one (geometric mean) with a t interval on the log scale, if all come from one distribution: the spread of
    `many` is taken for that of `one` too. For an A/A control of one launch. None with fewer than two launches in
    `many`, where one of the values is not positive, or where `many` agree exactly.
    """
    x, y = to_scale(many, "log"), to_scale([one], "log")
    if x is None or y is None or x.size < 2 or _agree(x):
        return None
    half = _t_quantile(x.size, level) * float(x.std(ddof=1)) * math.sqrt(1 + 1 / x.size)
    centre = float(x.mean() - y[0])
    return Interval(math.exp(centre), math.exp(centre - half), math.exp(centre + half), "one_against_many", 1)


# ---- within a launch -----------------------------------------------------------------------------------------------


def prompt_bootstrap(
    tables: Sequence[Mapping[str, np.ndarray]],
    statistic: Callable[..., np.ndarray],
    level: float = 0.90,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap over prompts, which are the clusters within a launch; for display and for launches that
    agree exactly.

    tables: one dict of additive columns (P,) per arm, rows aligned on the same prompts (arms are resampled together).
    statistic(*totals): per arm a dict of column totals of any shape (...,) -> (...,), e.g. a function of
    mismatch.estimates_of_totals. Fixed seed: the same tables give the same interval. None with fewer than two prompts
    or where the statistic is undefined (nan or inf) on the data or on a resample.
    """
    columns = [
        {name: np.asarray(col, dtype=np.float64) for name, col in table.items() if name != "prompt_id"}
        for table in tables
    ]
    sizes = {col.size for table in columns for col in table.values()}
    if len(sizes) != 1:
        raise ValueError(f"tables must have the same prompts, found columns of sizes {sorted(sizes)}")
    num_prompts = sizes.pop()
    if num_prompts < 2:
        return None
    estimate = float(statistic(*({name: col.sum() for name, col in table.items()} for table in columns)))
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, num_resamples, 200):  # blocks, so that memory does not grow with resamples x prompts
        block = min(200, num_resamples - start)
        weights = rng.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts), size=block).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a column that overflowed: its statistic is not finite, and others do not use it
            drawn.append(statistic(*({name: weights @ col for name, col in table.items()} for table in columns)))
    drawn = np.concatenate(drawn)
    if not (math.isfinite(estimate) and np.isfinite(drawn).all()):
        return None
    lo, hi = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, float(lo), float(hi), "prompt_bootstrap", int(num_prompts))


def drift_interval(first: Sequence[float], last: Sequence[float], level: float = 0.90) -> Interval | None:
    """log(mean(last) / mean(first)) of two stretches of one series, with a Welch-t interval by the delta method.

    For a run in which nothing should move: its values are then draws of one distribution, and nearly independent. None
    with fewer than two values on a side, for a mean that is not positive, or where nothing varies.
    """
    parts = [np.asarray(part, dtype=np.float64) for part in (first, last)]
    if any(part.size < 2 or not np.isfinite(part).all() or part.mean() <= 0 for part in parts):
        return None
    variances = [float(part.var(ddof=1)) / part.size / float(part.mean()) ** 2 for part in parts]
    if sum(variances) == 0:
        return None
    freedom = sum(variances) ** 2 / sum(v**2 / (part.size - 1) for v, part in zip(variances, parts, strict=True))
    half = float(scipy_stats.t.ppf(0.5 + level / 2, freedom)) * math.sqrt(sum(variances))
    centre = math.log(parts[1].mean() / parts[0].mean())
    return Interval(centre, centre - half, centre + half, "within_run", min(part.size for part in parts))


def clopper_pearson(successes: int, trials: int, level: float = 0.90) -> Interval | None:
    """Exact interval for a share: two-sided, each tail at most (1 - level)/2. None without a trial."""
    _check_share(successes, trials)
    if trials == 0:
        return None
    tail = (1 - level) / 2
    lo = float(scipy_stats.beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    hi = float(scipy_stats.beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return Interval(successes / trials, lo, hi, "clopper_pearson", trials)


def _check_share(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials, found {successes} of {trials}")


# ---- events in a series --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EventTime:
    """When something happened in a series: `step`, or None if it had not by `horizon` (right-censored there)."""

    step: int | None
    horizon: int
    cause: str  # drop | non_finite | passed | censored

    @property
    def censored(self) -> bool:
        return self.step is None


def window_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Trailing means of `window` consecutive values, (n - window + 1,); entry i ends at value i + window - 1. Empty
    if too short."""
    values = np.asarray(values, dtype=np.float64)
    if window < 1:
        raise ValueError(f"window: found {window}, allowed: >= 1")
    if values.size < window:
        return np.zeros(0)
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)


def collapse_time(
    steps: Sequence[int], values: Sequence[float], drop: float, window: int, hold: int, relative: bool = False
) -> EventTime | None:
    """First step of a collapse: the window mean falls more than `drop` below its own earlier peak and stays there for
    `hold` means.

    steps, values: (n,), one entry per iteration. With `relative`, `drop` is a share of the peak ("falls by half":
    0.5). A fall within the first window is seen too: the mean of the first k < window values is a peak as well, from
    which a fall must be sqrt(window / k) times as deep, since its noise is that much larger. The step is that of the
    first mean of the held stretch. A non-finite value is an event at its own step,
    whichever comes first. None where nobody can say: the series is shorter than window + hold, or ends in a fall that
    is not yet held.
    """
    steps, values = _series(steps, values)
    broken = np.flatnonzero(~np.isfinite(values))
    seen = values[: broken[0]] if broken.size else values
    fallen = _below_peak(seen, window, drop, relative)
    held = _first_held(fallen, hold)
    horizon = int(steps[-1]) if steps.size else 0
    if held is not None:
        return EventTime(int(steps[held + window - 1]), horizon, "drop")
    if broken.size:
        return EventTime(int(steps[broken[0]]), horizon, "non_finite")
    undecided = values.size < window + hold or fallen[-1]
    return None if undecided else EventTime(None, horizon, "censored")


def _below_peak(values: np.ndarray, window: int, drop: float, relative: bool) -> np.ndarray:
    """For each window mean, whether it lies more than the drop below an earlier one or below one of the first values."""
    means = window_mean(values, window)
    if not means.size:
        return np.zeros(0, dtype=bool)
    ks = np.arange(1, window)
    first = np.cumsum(values[: window - 1]) / ks
    floors = [means - drop * (np.abs(means) if relative else 1.0)]
    floors.insert(0, first - np.sqrt(window / ks) * drop * (np.abs(first) if relative else 1.0))
    return means < np.maximum.accumulate(np.concatenate(floors))[window - 1 :]


def _first_held(flags: np.ndarray, hold: int) -> int | None:
    """Index at which the first run of at least `hold` consecutive True begins."""
    if hold < 1:
        raise ValueError(f"hold: found {hold}, allowed: >= 1")
    if flags.size < hold:
        return None
    starts = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(flags, hold).all(axis=1))
    return int(starts[0]) if starts.size else None


def first_passage(steps: Sequence[int], values: Sequence[float], threshold: float, window: int) -> EventTime | None:
    """First step at which the mean of the last `window` values is >= threshold; censored at the last step otherwise.

    A window holding a non-finite value never passes. None if the series is shorter than the window.
    """
    steps, values = _series(steps, values)
    means = window_mean(values, window)
    if not means.size:
        return None
    passed = np.flatnonzero(np.isfinite(means) & (means >= threshold))
    if passed.size:
        return EventTime(int(steps[passed[0] + window - 1]), int(steps[-1]), "passed")
    return EventTime(None, int(steps[-1]), "censored")


def _series(steps, values) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=np.float64)
    if steps.shape != values.shape or steps.ndim != 1:
        raise ValueError(f"steps {steps.shape} and values {values.shape} must be two flat arrays of one length")
    if (np.diff(steps) <= 0).any():
        raise ValueError("steps must increase")
    return steps, values


# ---- what a design can decide --------------------------------------------------------------------------------------


def p_inside(mean: float, sd: float, num: int, accept: tuple[float | None, float | None], level: float = 0.90) -> float:
    """Probability that a Student-t interval over `num` normal launches lies inside `accept`: P(PASS).

    mean, sd (between launches) and accept are on the scale of the interval (log for ratios); None in accept is an
    open end. By quadrature over the chi-squared distribution of the sample variance; 0 with fewer than two launches.
    """
    lo, hi = _open_ends(accept)
    return _over_sample_sd(
        sd,
        num,
        level,
        lambda half, se: np.maximum(
            0.0, scipy_stats.norm.cdf((hi - half - mean) / se) - scipy_stats.norm.cdf((lo + half - mean) / se)
        ),
    )


def p_disjoint(
    mean: float, sd: float, num: int, accept: tuple[float | None, float | None], level: float = 0.90
) -> float:
    """Probability that the same interval lies wholly outside `accept`: P(FAIL)."""
    lo, hi = _open_ends(accept)
    return _over_sample_sd(
        sd,
        num,
        level,
        lambda half, se: scipy_stats.norm.sf((hi + half - mean) / se) + scipy_stats.norm.cdf((lo - half - mean) / se),
    )


def _open_ends(accept) -> tuple[float, float]:
    return (-math.inf if accept[0] is None else accept[0]), (math.inf if accept[1] is None else accept[1])


def _over_sample_sd(sd: float, num: int, level: float, probability: Callable) -> float:
    """Mean of probability(half width, standard error) over equally likely sample standard deviations."""
    if num < 2:
        return 0.0
    if sd <= 0:
        raise ValueError(f"sd: found {sd}, allowed: > 0")
    midpoints = (np.arange(4000) + 0.5) / 4000
    sample_sd = sd * np.sqrt(scipy_stats.chi2.ppf(midpoints, num - 1) / (num - 1))
    half = _t_quantile(num, level) * sample_sd / math.sqrt(num)
    return float(np.mean(probability(half, sd / math.sqrt(num))))


def p_share_inside(rate: float, num: int, accept: tuple[float | None, float | None], level: float = 0.90) -> float:
    """Probability that the Clopper-Pearson interval of Binomial(num, rate) lies inside `accept`: P(PASS) of an event
    claim."""
    lo, hi = _open_ends(accept)
    return _over_counts(rate, num, level, lambda i: i.lo >= lo and i.hi <= hi)


def p_share_disjoint(rate: float, num: int, accept: tuple[float | None, float | None], level: float = 0.90) -> float:
    """Probability that the same interval lies wholly outside `accept`: P(FAIL)."""
    lo, hi = _open_ends(accept)
    return _over_counts(rate, num, level, lambda i: i.hi < lo or i.lo > hi)


def _over_counts(rate: float, num: int, level: float, decides: Callable[[Interval], bool]) -> float:
    if num < 1:
        return 0.0
    intervals = (clopper_pearson(k, num, level) for k in range(num + 1))
    return float(sum(scipy_stats.binom.pmf(k, num, rate) for k, interval in enumerate(intervals) if decides(interval)))
