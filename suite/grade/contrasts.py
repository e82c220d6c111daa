"""From launches to an estimate with its intervals: a level, a ratio, a difference, or a share of seeds. No torch.

Two intervals are taken from the same values. The one at the stated level (90 %, so each end is a one-sided 5 %
bound) is shown and decides PASS: a task passes only if all of its claims do, so no claim needs more than its own 5
%. The wider one decides FAIL, since a task fails as soon as one claim does, and a claim as soon as one of its pairs
does: the task's 5 % is split over its claims (`shares_of`), and a claim's share over its pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy import stats as scipy_stats

from suite.grade.launches import Launch, prompt_table, scale_of
from suite.measure import stats
from suite.measure.mismatch import SUMS, estimates_of_totals

Ends = tuple[float, float]
ZERO_IF_EQUAL = ("k2_nats_per_token", "k3_nats_per_token", "reverse_k3_nats_per_token", "prob_diff_mean", "logprob_diff_mean")
ADDITIVE = tuple(estimates_of_totals(dict.fromkeys(SUMS, 1.0)))  # estimands that are functions of additive sums


@dataclass(frozen=True)
class Levels:
    """Two-sided confidence levels: `stated` by the grade for PASS, `strict` for FAIL."""

    stated: float
    strict: float

    @classmethod
    def of(cls, level: float, share: float, num_pairs: int = 1) -> Levels:
        """share: of the stated error, what this claim may use for FAIL."""
        return cls(level, 1 - (1 - level) * share / max(num_pairs, 1))


def shares_of(task, failed: tuple[str, ...] = ()) -> dict[str, float]:
    """claim id -> the share of the task's 5 % that it may use for FAIL; together they are at most 1.

    With few seeds the interval of a share of seeds has steps: five launches that all say no are an error of 1/32 if the
    truth is one half, and an equal split could never exclude anything. The first such claim (collapses before
    stable, then as in the file) takes what its outermost outcome costs, if that fits, and all others share what is left
    equally. Once it has failed (its id is in `failed`) what it took passes on to the next such claim, and so on: a fixed
    sequence, which costs no more than its first step. Counts without noise cost nothing.
    """
    graded = [claim for claim in task.claims if claim.kind != "report" and claim.id in task.grade]
    noisy = [claim for claim in graded if not is_exact(task.grade[claim.id])]
    stepped = [claim.id for claim in in_sequence(task) if claim in noisy and is_share_of_seeds(claim.kind, task.grade[claim.id])]
    cost = 2.0 ** -len(task.seeds) / 0.05 * 1.0001  # of the 5 %; a hair more, so that the end of an interval clears one half
    apart = bool(stepped) and cost < 1.0 and len(noisy) > 1
    rest = (1.0 - cost * apart) / max(len(noisy) - apart, 1)
    num_open = 1 + next((i for i, name in enumerate(stepped) if name not in failed), len(stepped))
    takes = stepped[:num_open] if apart else []
    return {claim.id: 1.0 if claim not in noisy else cost if claim.id in takes else rest for claim in graded}


def in_sequence(task) -> list:
    """The claims in the order in which they are graded: those that something is stable after all others."""
    events = {name: grade.event for name, grade in task.grade.items() if grade.event is not None}
    return sorted(task.claims, key=lambda claim: claim.id in events and events[claim.id].expect == "stable")


def is_exact(grade) -> bool:
    """Whether an interval is the value itself: a count in which nothing is random."""
    return grade.interval is not None and grade.interval.method == "exact"


def is_share_of_seeds(kind: str, grade) -> bool:
    """Whether a claim is about how many seeds show an event."""
    return kind == "event" and grade.reducer != "time_to_event"


@dataclass(frozen=True)
class Finding:
    """One comparison. interval and strict are None where there is none, and `problem` says why."""

    label: str
    estimate: float | None
    interval: Ends | None
    strict: Ends | None
    method: str
    num_seeds: int
    per_seed: list[dict] = field(repr=False)
    problem: str = ""
    spread: float | None = None  # standard deviation between launches, on `scale`
    scale: str = "identity"
    censored: str = ""  # "" | "high" (the truth lies at or above the estimate) | "low" | "both"


def level_of(label: str, found: list[Launch], grade, levels: Levels) -> Finding:
    """The value of one arm."""
    scale = {"log_ratio": "identity", "time_to_event": "log"}.get(grade.reducer, scale_of(grade.estimand))
    per_seed = [_row(launch) for launch in found]
    known = all(launch.trials for launch in found)
    trials = [launch.trials for launch in found] if scale == "logit" and known else None
    values = [launch.value for launch in found]
    return _finding(label, [values], scale, trials, per_seed, _censored(found, []), grade, "arm", [found], levels)


def contrast_of(label: str, form: str, first: list[Launch], second: list[Launch], grade, levels: Levels) -> Finding:
    """The ratio (as a log-ratio) or the difference of two arms; pair by pair where they share their seeds."""
    scale = "log" if form == "ratio" else "identity"
    left, right = ({launch.seed: launch for launch in found} for found in (first, second))
    shared = sorted(left.keys() & right.keys())
    if len(shared) < 2 and not (shared and len(left) == len(right) == 1):
        columns = [[launch.value for launch in found] for found in (first, second)]
        per_seed = [row for side, found in enumerate((first, second)) for row in _one_sided(found, side)]
        return _finding(
            label, columns, scale, None, per_seed, _censored(first, second), grade, form, [first, second], levels
        )
    first, second = [left[seed] for seed in shared], [right[seed] for seed in shared]
    values = [_apart(a.value, b.value, form) for a, b in zip(first, second, strict=True)]
    per_seed = [
        {"seed": a.seed, "value": value, "values": [a.value, b.value], "censored": _censored([a], [b])}
        for a, b, value in zip(first, second, values, strict=True)
    ]
    return _finding(
        label, [values], scale, None, per_seed, _censored(first, second), grade, form, [first, second], levels
    )


def share_of_seeds(label: str, found: list[Launch], expect: str, levels: Levels) -> Finding:
    """The fraction of seeds that show the event, with the exact (Clopper-Pearson) interval.

    A launch of several attempts shows it if most of them do; where the claim is that nothing happens, if any does.
    """
    per_seed = [_row(launch) for launch in found]
    if problem := _without_value(found):
        return Finding(label, None, None, None, "clopper_pearson", len(found), per_seed, problem)
    most = 0.5 if expect == "collapses" else 0.0
    num = sum(launch.value > most for launch in found)
    shown, strict = (stats.clopper_pearson(num, len(found), level) for level in (levels.stated, levels.strict))
    return Finding(label, shown.estimate, shown[1:3], strict[1:3], "clopper_pearson", len(found), per_seed)


def difference_of_shares(label: str, first: list[Launch], second: list[Launch], expect: str, levels: Levels) -> Finding:
    """Fraction of seeds with the event, first minus second: the exact intervals of both, combined by square and add
    (Newcombe).
    """
    a, b = (share_of_seeds(label, found, expect, levels) for found in (first, second))
    num_seeds, per_seed = min(a.num_seeds, b.num_seeds), a.per_seed + b.per_seed
    if a.problem or b.problem:
        return Finding(label, None, None, None, "newcombe", num_seeds, per_seed, a.problem or b.problem)
    ends = [_newcombe(a.estimate, b.estimate, *pair) for pair in ((a.interval, b.interval), (a.strict, b.strict))]
    return Finding(label, a.estimate - b.estimate, *ends, "newcombe", num_seeds, per_seed)


def _newcombe(a: float, b: float, of_a: Ends, of_b: Ends) -> Ends:
    return a - b - math.hypot(a - of_a[0], of_b[1] - b), a - b + math.hypot(of_a[1] - a, b - of_b[0])


def exact(label: str, found: list[Launch]) -> Finding:
    """A count: the interval is the value itself, or spans the values where launches disagree."""
    per_seed = [_row(launch) for launch in found]
    if problem := _without_value(found):
        return Finding(label, None, None, None, "exact", len(found), per_seed, problem)
    values = [launch.value for launch in found]
    ends = (min(values), max(values))
    return Finding(label, float(np.median(values)), ends, ends, "exact", len(found), per_seed)


def share_of_trials(label: str, found: list[Launch], estimand: str, levels: Levels) -> Finding:
    """A count over problems that are kept or not by chance, or its share: the exact interval (Clopper-Pearson) of all
    launches' problems together. Problems are sampled independently and differ in their rates, which makes it wide rather
    than narrow. A count is given per launch.
    """
    per_seed = [_row(launch) for launch in found]
    problem = _without_value(found) or next((f"seed {one.seed}: the number of problems is not recorded" for one in found if not one.trials), "")
    if problem:
        return Finding(label, None, None, None, "clopper_pearson", len(found), per_seed, problem)
    trials = sum(launch.trials for launch in found)
    counted = estimand.startswith("num_")
    unit = trials / len(found) if counted else 1.0
    hits = sum(round(one.value * (1 if counted else one.trials)) for one in found)
    shown, strict = (stats.clopper_pearson(hits, trials, level) for level in (levels.stated, levels.strict))
    ends = [(unit * interval.lo, unit * interval.hi) for interval in (shown, strict)]
    return Finding(label, unit * shown.estimate, *ends, "clopper_pearson", len(found), per_seed)


def _row(launch: Launch) -> dict:
    row = {"seed": launch.seed, "value": launch.value, "censored": launch.censored}
    return row | ({"problem": launch.problem} if launch.problem else {})


def _without_value(found: list[Launch]) -> str:
    """Why launches cannot give an interval: the first that has no finite value, in its own words."""
    if not found:
        return "no finished run"
    bad = next((one for one in found if one.value is None or not math.isfinite(one.value)), None)
    return "" if bad is None else bad.problem or f"seed {bad.seed} has no value"


def within(estimand: str, form: str, arms: list[list[Launch]], level: float) -> stats.Interval | None:
    """Interval over prompts inside these launches (cluster bootstrap, rows of a prompt merged), arms resampled
    together.

    None where prompt sums were not kept, the arms saw different prompts, or the estimand is not a function of sums.
    """
    tables = [prompt_table(found) for found in arms] if estimand in ADDITIVE else [None]
    if any(table is None or len(table["prompt_id"]) < 2 for table in tables):
        return None
    tables = [_sorted(table) for table in tables]
    if any(list(table["prompt_id"]) != list(tables[0]["prompt_id"]) for table in tables):
        return None

    def statistic(*totals):
        values = [estimates_of_totals(total)[estimand] for total in totals]
        with np.errstate(divide="ignore", invalid="ignore"):
            return (
                values[0] / values[1]
                if form == "ratio"
                else values[0] - values[1]
                if form == "difference"
                else values[0]
            )

    return stats.prompt_bootstrap([{name: table[name] for name in SUMS if name in table} for table in tables], statistic, level)


def _sorted(table: dict) -> dict:
    order = np.argsort(table["prompt_id"].astype(str), kind="stable")
    return {name: column[order] for name, column in table.items()}


def _finding(label, columns, scale, trials, per_seed, censored, grade, form, arms, levels: Levels) -> Finding:
    """columns: one list of values for a single arm or for pairs, two for arms that share no seeds. arms: the
    launches behind them.
    """
    method = grade.interval.method if grade.interval else "student_t"
    num_seeds = min(len(column) for column in columns)
    on_scale = (
        None
        if any(v is None for column in columns for v in column)
        else [stats.to_scale(c, scale, trials) for c in columns]
    )
    if num_seeds == 0 or on_scale is None or any(column is None for column in on_scale):
        problem = "no finished run" if num_seeds == 0 else _off_scale(scale, grade.estimand, arms)
        return Finding(label, None, None, None, method, num_seeds, per_seed, problem, None, scale, censored)
    centre = float(on_scale[0].mean() - (on_scale[1].mean() if len(columns) == 2 else 0.0))
    estimate = stats.from_scale(centre, scale, trials)
    spread = math.sqrt(sum(float(x.var(ddof=1)) for x in on_scale)) if num_seeds > 1 else None
    if method == "within_run":
        found = [within(grade.estimand, form, arms, level) for level in (levels.stated, levels.strict)]
        problem = "" if all(found) else "no prompt sums from which to take an interval within the launch"
    elif num_seeds == 1:
        found, problem = [None, None], "one seed"
    else:
        found = [
            _over_launches(columns, scale, trials, grade.estimand, form, arms, level)
            for level in (levels.stated, levels.strict)
        ]
        problem = "" if all(found) else _agreed(censored, arms, estimate)
    if not all(found):
        return Finding(label, estimate, None, None, method, num_seeds, per_seed, problem, spread, scale, censored)
    ends, strict = ((float(interval.lo), float(interval.hi)) for interval in found)
    return Finding(label, estimate, ends, strict, found[0].method, num_seeds, per_seed, "", spread, scale, censored)


def _off_scale(scale: str, estimand: str, arms: list[list[Launch]]) -> str:
    """Which launch keeps values from the scale, with what it has."""
    for launch in (one for found in arms for one in found):
        if problem := _without_value([launch]):
            return problem
        if scale == "log" and launch.value == 0:
            equal = ": log-probs of sampler and trainer are equal" if estimand in ZERO_IF_EQUAL else ""
            return f"{launch.arm} seed {launch.seed}: {estimand} is exactly 0{equal}; 0 has no logarithm"
        if scale == "log" and launch.value < 0:
            return f"{launch.arm} seed {launch.seed}: {estimand} is {launch.value:.4g}, which has no logarithm"
    return f"a launch has no value that lies on the {scale} scale"


def _agreed(censored: str, arms: list[list[Launch]], value: float) -> str:
    """Why launches that all agree have no interval."""
    if censored:
        return "all launches agree exactly, and no launch saw the event before the horizon"
    kept = all(launch.runs and all(run.summary is not None for run in launch.runs) for found in arms for launch in found)
    tail = "so do their prompts" if kept else "no prompt sums were kept to take an interval from"
    return f"all launches agree exactly ({value:.4g}), and {tail}"


def _over_launches(columns, scale, trials, estimand, form, arms, level) -> stats.Interval | None:
    if len(columns) == 2:
        return welch_interval(columns[0], columns[1], level, scale) or within(estimand, form, arms, level)
    across = stats.student_t_interval(columns[0], level, scale, trials)
    if across is not None:
        return across
    if scale == "logit" and trials:  # shares that agree exactly, such as five launches that solved everything
        counts = zip(columns[0], trials, strict=True)
        one_by_one = [stats.clopper_pearson(round(value * n), n, level) for value, n in counts]
    else:
        one_by_one = [within(estimand, form, [[arm[i]] for arm in arms], level) for i in range(len(columns[0]))]
    return stats.launch_interval(columns[0], one_by_one, level, scale, trials)


def welch_interval(first: list[float], second: list[float], level: float, scale: str) -> stats.Interval | None:
    """Difference of two means on `scale` (on the log scale: their ratio) for arms that share no seeds. None where
    nothing varies.
    """
    a, b = stats.to_scale(first, scale), stats.to_scale(second, scale)
    if a is None or b is None or min(a.size, b.size) < 2:
        return None
    parts = [float(x.var(ddof=1)) / x.size for x in (a, b)]
    error = math.sqrt(sum(parts))
    if error <= 1e-12 * max(abs(float(a.mean())), abs(float(b.mean())), 1e-300):
        return None
    freedom = sum(parts) ** 2 / sum(part**2 / (x.size - 1) for part, x in zip(parts, (a, b), strict=True))
    half = float(scipy_stats.t.ppf(0.5 + level / 2, freedom)) * error
    centre = float(a.mean() - b.mean())
    ends = (stats.from_scale(centre + shift, scale) for shift in (0.0, -half, half))
    return stats.Interval(*ends, "welch_t", int(min(a.size, b.size)))


def _one_sided(found: list[Launch], side: int) -> list[dict]:
    return [
        {
            "seed": launch.seed,
            "value": None,
            "values": [launch.value if i == side else None for i in (0, 1)],
            "censored": launch.censored,
        }
        | ({"problem": launch.problem} if launch.problem else {})
        for launch in found
    ]


def _apart(a: float | None, b: float | None, form: str) -> float | None:
    if a is None or b is None:
        return None
    return a - b if form == "difference" else a / b if b != 0 else None


def _censored(first: list[Launch], second: list[Launch]) -> str:
    """A numerator that is at least its value makes the contrast at least its value; a denominator makes it at most
    that.
    """
    high, low = any(launch.censored for launch in first), any(launch.censored for launch in second)
    return "both" if high and low else "high" if high else "low" if low else ""
