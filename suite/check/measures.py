"""The numbers of a check: one per launch, and over launches an estimate with its interval. No torch.

A launch is a seed of an arm. With two launches or more the interval is Student's over launches; with one it is a bootstrap
over prompts, which knows nothing of what differs between launches, and says so by its method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from suite.measure import stats
from suite.measure.mismatch import Sums, concat_sums, estimates, estimates_of_totals, prompt_sums
from suite.spec.estimands import ESTIMANDS

LEVEL = 0.90
BANDS = {"share_in_0.999_1.002": (0.999, 1.002), "share_in_0.99_1.01": (0.99, 1.01), "share_in_0.95_1.05": (0.95, 1.05)}
SAMPLE_MEAN = "logprob_diff_sample_mean"  # slime's: mean over responses of a response's mean |r|
# statistic -> (in words, unit, scale of its interval)
ABOUT = {
    name: (ESTIMANDS[name].formula, ESTIMANDS[name].unit, ESTIMANDS[name].scale)
    for name in ("k1_nats_per_token", "k3_nats_per_token", "prob_diff_mean", "mult_prob_error", "out_of_band_share")
} | {SAMPLE_MEAN: ("mean over responses of mean|r|", "nats", "log")} | {
    name: (f"share of tokens with pi/mu in [{low:g}, {high:g}]", "share", "logit") for name, (low, high) in BANDS.items()
}  # fmt: skip
SHOWN = ("k1_nats_per_token", "k3_nats_per_token", "prob_diff_mean", "mult_prob_error", "out_of_band_share")


@dataclass
class Launch:
    """The rollouts of one seed of one arm, folded into sums as they come. num_in: tokens inside each band."""

    arm: str
    seed: int
    sums: Sums = field(default_factory=lambda: concat_sums([]))
    num_in: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BANDS, 0))
    sum_of_means: float = 0.0
    num_with_tokens: int = 0

    def add(self, prompt_ids: list[str], lengths, mu: np.ndarray, pi: np.ndarray, truncated=None) -> None:
        """Rollouts laid end to end: mu and pi (sum of lengths,) log-probs in nats, lengths (N,) response tokens of each."""
        self.sums = concat_sums([self.sums, prompt_sums(prompt_ids, lengths, mu, pi, None, truncated)])
        lengths, r = np.asarray(lengths, np.int64), np.asarray(pi, np.float64) - np.asarray(mu, np.float64)
        for name, (low, high) in BANDS.items():
            self.num_in[name] += int(((r >= math.log(low)) & (r <= math.log(high))).sum())
        filled = lengths > 0
        starts = (np.cumsum(lengths) - lengths)[filled]
        if filled.any():
            self.sum_of_means += float((np.add.reduceat(np.abs(r), starts) / lengths[filled]).sum())
            self.num_with_tokens += int(filled.sum())

    @property
    def num_tokens(self) -> int:
        return int(np.sum(self.sums["num_response_tokens"]))

    @property
    def num_rollouts(self) -> int:
        return int(np.sum(self.sums["num_rollouts"]))

    def value(self, statistic: str) -> float:
        """nan where there is nothing to compute it from."""
        if statistic in BANDS:
            return self.num_in[statistic] / self.num_tokens if self.num_tokens else math.nan
        if statistic == SAMPLE_MEAN:
            return self.sum_of_means / self.num_with_tokens if self.num_with_tokens else math.nan
        found = estimates(self.sums)[statistic]
        return math.nan if found is None else found


@dataclass(frozen=True)
class Estimate:
    """interval: at LEVEL, None where the launches give none. method: how it was made."""

    value: float
    interval: tuple[float, float] | None
    method: str
    num: int


def estimate(launches: list[Launch], statistic: str) -> Estimate:
    """Of one arm."""
    values, scale = [launch.value(statistic) for launch in launches], ABOUT[statistic][2]
    if len(values) == 1:
        return _of_one(launches[0], statistic, values[0])
    trials = [launch.num_tokens for launch in launches] if scale == "logit" else None
    found = stats.student_t_interval(values, LEVEL, scale, trials)
    if found is None:
        return Estimate(float(np.mean(values)), None, f"none: {_why(values, scale)}", len(values))
    # all 0 or all 1: the interval is that of counts, and its middle is a hair off what was seen
    middle = values[0] if scale == "logit" and set(values) in ({0.0}, {1.0}) else found.estimate
    return Estimate(middle, (found.lo, found.hi), f"Student's t over {found.num} launches", found.num)


def _why(values: list[float], scale: str) -> str:
    off = stats.to_scale(values, scale, None) is None
    return "a launch has no value above 0" if off and scale == "log" else "a launch has no value" if off else "the launches agree exactly"


def _of_one(launch: Launch, statistic: str, value: float) -> Estimate:
    found = None
    if statistic in SHOWN:
        found = stats.prompt_bootstrap([_table(launch)], lambda totals: estimates_of_totals(totals)[statistic], LEVEL)
    if found is None:
        return Estimate(value, None, "none: one launch", 1)
    return Estimate(value, (found.lo, found.hi), f"bootstrap over {found.num} prompts of one launch", 1)


def _table(launch: Launch) -> dict[str, np.ndarray]:
    return {name: column for name, column in launch.sums.items() if name.startswith(("sum_", "num_"))}


def ratio(first: list[Launch], second: list[Launch], statistic: str) -> Estimate | None:
    """The geometric mean over launches of first / second, pair by pair where they share their seeds. None where a value is
    not positive."""
    left, right = ({launch.seed: launch for launch in found} for found in (first, second))
    shared = sorted(left.keys() & right.keys())
    tops, bottoms = ([side[seed].value(statistic) for seed in shared] for side in (left, right))
    if not shared or not all(value > 0 for value in (*tops, *bottoms)):
        return None
    ratios = [top / bottom for top, bottom in zip(tops, bottoms, strict=True)]
    mean = math.exp(float(np.mean(np.log(ratios))))
    found = stats.student_t_interval(ratios, LEVEL, "log")
    if found is None:
        return Estimate(mean, None, "none: fewer than two launches" if len(ratios) < 2 else "none: the launches agree exactly", len(ratios))
    return Estimate(found.estimate, (found.lo, found.hi), f"Student's t over {found.num} pairs of launches", found.num)


def by_arm(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """In order of first appearance, seeds ascending."""
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        found.setdefault(launch.arm, []).append(launch)
    return {arm: sorted(some, key=lambda launch: launch.seed) for arm, some in found.items()}


def arm_estimates(arms: dict[str, list[Launch]]) -> dict[str, dict[str, Estimate]]:
    """arm -> statistic -> estimate, of every statistic of ABOUT."""
    return {arm: {name: estimate(launches, name) for name in ABOUT} for arm, launches in arms.items()}


def ratios(arms: dict[str, list[Launch]], pairs: list[tuple[str, str]], statistics) -> dict[tuple[str, str], dict[str, Estimate | None]]:
    return {(a, b): {name: ratio(arms[a], arms[b], name) for name in statistics} for a, b in pairs if a in arms and b in arms}
