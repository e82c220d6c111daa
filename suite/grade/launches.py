"""From run records to one number per launch: the values over which intervals are taken. No torch.

The unit of replication is the seed, an independent launch. Several finished attempts of one cell (`--fresh`) are the
same launch again: their mean counts once, so that repeating a run cannot make an interval narrower. Offline
protocols give sums per prompt, and the value is computed from those; RL and dataset runs give a series, and the
value is its reducer.

What a launch cannot give a value for says so in `problem`, with the iteration; an infinite value is a value and says
so too. Neither can carry a PASS.

A mismatch ratio over an RL run takes reducer geo_mean in each arm: the ratio of two geometric means is the geometric
mean of the per-step ratios. Every iteration then counts alike, whereas a plain mean over a run whose mismatch grows, or
whose tokens have an outlier, would be the value of a few iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from suite.errors import TaskError
from suite.grade.events import event_time, passage_time, why_no_event, why_not_at_end
from suite.measure.mismatch import concat_sums, estimates
from suite.spec.estimands import EVERY_ESTIMAND
from suite.spec.kinds import Kind, kind_of

FINISHED = ("success", "diverged")
# counts of a filter run, or shares of them, each with the number that it is a share of
SHARES_OF_COUNTS = {
    "num_kept": "num_problems", "kept_share": "num_problems", "num_overlap": "num_reference", "overlap_share": "num_reference",
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """What one run comes to. value: None where there is none, infinite where it overflowed; `problem` then says why.
    trials: rollouts behind a share, for the logit of 0 and 1. censored: "" | "high" (the truth is at least `value`: the
    event had not come by the horizon)."""

    value: float | None
    trials: int | None = None
    censored: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Launch:
    """One seed of one arm at one grid point: the mean over its attempts, each field as in Value. An attempt without a
    value leaves the launch without one: leaving it out would be choosing."""

    seed: int
    value: float | None
    trials: int | None = None
    censored: str = ""
    runs: tuple = field(default=(), repr=False)
    problem: str = ""
    arm: str = ""


def scale_of(estimand: str) -> str:
    """The scale of a level."""
    return EVERY_ESTIMAND[estimand].scale


def unit_of(estimand: str, form: str, reducer: str) -> str:
    if form == "ratio":
        return "ratio"
    if reducer in ("time_to_event", "fraction_of_seeds", "log_ratio"):
        return {"time_to_event": "iterations", "fraction_of_seeds": "share of seeds", "log_ratio": "log-ratio"}[reducer]
    return EVERY_ESTIMAND[estimand].unit


def same_point(run, at: dict) -> bool:
    return all(run.point.get(axis) == value for axis, value in at.items())


def arm_runs(task, runs: list, name: str, at: dict, other_runs: dict) -> list:
    """Runs of an arm or control at a grid point. In a compare task a name is `<task>-<arm>`, the task one of
    `needs`.
    """
    if not kind_of(task).compares:
        return [run for run in runs if run.arm == name and same_point(run, at)]
    need = need_of(task, name)
    if need is None:
        raise TaskError(task.file, "grade.contrast", name, f"<task>-<arm> with a task of {', '.join(task.needs)}")
    return [run for run in other_runs.get(need, []) if run.arm == name[len(need) + 1 :] and same_point(run, at)]


def need_of(task, name: str) -> str | None:
    """The task of `needs` whose arm or control a comparison calls by this name."""
    fitting = [need for need in task.needs if name.startswith(need + "-")]
    return max(fitting, key=len, default=None)


def launches(kind: Kind, runs: list, grade) -> list[Launch]:
    """One Launch per seed of finished runs, by seed; attempts of the same seed are averaged."""
    by_seed: dict[int, list] = {}
    for run in runs:
        if run.status in FINISHED:
            by_seed.setdefault(run.seed, []).append(run)
    return [_launch(kind, seed, by_seed[seed], grade) for seed in sorted(by_seed)]


def _launch(kind: Kind, seed: int, runs: list, grade) -> Launch:
    found = [run_value(kind, run, grade) for run in runs]
    values = [one.value for one in found]
    trials = [one.trials for one in found if one.trials]
    censored = "high" if any(one.censored for one in found) else ""
    problems = [f"{run.arm} seed {seed}: {one.problem}" for run, one in zip(runs, found, strict=True) if one.problem]
    tables = tuple(runs) if kind.value_from == "prompt_sums" else ()  # sums over a whole RL run say nothing about a reducer's window
    value = None if any(one is None for one in values) else float(np.mean(values))
    return Launch(seed, value, min(trials, default=None), censored, tables, next(iter(problems), ""), runs[0].arm)


def run_value(kind: Kind, run, grade) -> Value:
    """The value of one run: from where its protocol has it (Kind.value_from)."""
    if grade.estimand not in kind.estimands:  # sums of a run without a trainer say 0 where they mean nothing
        return Value(None, problem=f"a run of {kind.name} has no {grade.estimand}")
    if kind.value_from == "prompt_sums" and run.summary is not None:
        values = estimates(run.summary)
        if grade.estimand in values:
            return _whole(grade.estimand, values[grade.estimand], _trials(grade.estimand, run.summary))
    if kind.value_from != "series":
        whole = run.record["series_summary"]
        return _whole(grade.estimand, whole.get(grade.estimand), whole.get(SHARES_OF_COUNTS.get(grade.estimand)))
    run = up_to(run, grade.until)
    if grade.event is not None or grade.level is not None:
        return _time_or_event(run, grade)
    if problem := why_not_at_end(run, grade.until):
        return Value(None, problem=problem)
    value, problem = reduced(series(run, grade.estimand), grade.reducer, grade.window, has_gaps(grade.estimand))
    return Value(value, _window_trials(run, grade), problem=problem and f"{grade.estimand} {problem}")


def _whole(name: str, value, trials) -> Value:
    """A value of a whole run."""
    if value is None or math.isnan(value):
        return Value(None, trials, problem=f"it has no {name}")
    return Value(float(value), trials, problem="" if math.isfinite(value) else f"{name} is {value}")


def _time_or_event(run, grade) -> Value:
    """Iterations until the event or the level, or whether the event came at all."""
    time = event_time(run, grade) if grade.event is not None else passage_time(run, grade)
    if time is None:
        return Value(None, problem=why_no_event(run, grade))
    if time.censored and (problem := why_not_at_end(run, grade.until)):
        return Value(None, problem=problem)
    if grade.reducer == "time_to_event":
        when = time.horizon if time.censored else time.step
        return Value(float(when + 1), censored="high" if time.censored else "")  # iterations done: steps count from 0
    return Value(float(not time.censored))


def has_gaps(estimand: str) -> bool:
    """Whether an iteration may lack it by right."""
    return EVERY_ESTIMAND[estimand].gaps


def up_to(run, until: int | None):
    """The run as it stood after `until` iterations."""
    if until is None or len(run.metrics) < until:
        return run
    diverged_later = run.status == "diverged" and len(run.metrics) > until
    record = run.record | {"status": "success"} if diverged_later else run.record
    return replace(run, metrics=run.metrics[:until], record=record)


def _trials(estimand: str, summary: dict) -> int | None:
    column = {
        "reward_mean": "num_rewarded",
        "truncated_share": "num_rollouts",
        "out_of_band_share": "num_response_tokens",
    }
    return int(np.sum(summary[column[estimand]])) if estimand in column else None


def _window_trials(run, grade) -> int | None:
    counts = series(run, "num_rollouts")[-(grade.window or len(run.metrics)) :]
    return int(np.nansum(counts)) if scale_of(grade.estimand) == "logit" and np.isfinite(counts).any() else None


def series(run, name: str) -> np.ndarray:
    """One value per metrics row, float64; NaN where a row has no number."""
    values = [row.get(name) for row in run.metrics]
    return np.array([math.nan if value is None else float(value) for value in values])


def reduced(values: np.ndarray, reducer: str, window: int | None, gaps: bool = False) -> tuple[float | None, str]:
    """A series to one number, and what is wrong with it ("" if nothing is). No number where the part it looks at is
    shorter than its window or has an iteration without one; with `gaps`, where more than half of it has none. Where it
    has an infinite value the number is infinite.

    last_k_mean and epoch_mean: mean of the last `window` rows (one full pass for epoch_mean), at the end fixed by
    the schedule. log_ratio: log of the last window's mean over the first one's, a drift within the run; without a
    window each is a quarter of it. auc: trapezoid over rows, divided by their number - 1. mean, median, geo_mean: of
    all rows, or of the last `window`.
    """
    parts = _parts(len(values), reducer, window)
    if parts is None:
        return None, f"has {len(values)} iterations, fewer than its window needs"
    for part in parts:
        bad = [i for i in part if not math.isfinite(values[i])]
        infinite = next((i for i in bad if math.isinf(values[i])), None)
        if infinite is not None:
            return float(values[infinite]), f"is {values[infinite]} at iteration {infinite}"
        if bad and (not gaps or reducer == "auc" or 2 * len(bad) > len(part)):
            return None, f"has no value at iteration {bad[0]}"
    return _reduced([values[part][np.isfinite(values[part])] for part in map(list, parts)], reducer)


def _parts(num: int, reducer: str, window: int | None) -> list[range] | None:
    """The stretches of a series of `num` values that a reducer looks at; None where it is too short."""
    if reducer == "log_ratio":
        window = window or max(1, num // 4)
        return [range(window), range(num - window, num)] if num >= 2 * window else None
    start = num - window if window else 0
    return [range(start, num)] if start >= 0 and num >= (2 if reducer == "auc" else 1) else None


def _reduced(parts: list[np.ndarray], reducer: str) -> tuple[float | None, str]:
    kept = parts[-1]
    if reducer == "log_ratio":
        first, last = (float(np.mean(part)) for part in parts)
        return (math.log(last / first), "") if first > 0 and last > 0 else (None, "has no logarithm: a mean is not positive")
    if reducer == "geo_mean":
        return (float(np.exp(np.mean(np.log(kept)))), "") if (kept > 0).all() else (None, "has no logarithm: a value is not positive")
    if reducer == "auc":
        return float(np.trapezoid(kept) / (kept.size - 1)), ""
    return float(np.median(kept) if reducer == "median" else np.mean(kept)), ""


def finite(value) -> float | None:
    """A number, or None for None, NaN and infinities: JSON has no other way to say that there is no value."""
    return None if value is None or not math.isfinite(value) else float(value)


def prompt_table(found: list[Launch]) -> dict | None:
    """The prompt sums of all runs of these launches, rows of a prompt merged; None where any of them kept none."""
    tables = [run.summary for launch in found for run in launch.runs]
    return concat_sums(tables) if tables and all(table is not None for table in tables) else None
