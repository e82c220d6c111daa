"""From run records to one number per launch: the values over which intervals are taken. No torch.

The unit of replication is the seed, an independent launch. Several finished attempts of one cell (`--fresh`) are the
same launch again: their mean counts once, so that repeating a run cannot make an interval narrower. Offline
protocols give sums per prompt, and the value is computed from those; RL and dataset runs give a series, and the
value is its reducer.

A mismatch ratio over an RL run takes reducer geo_mean in each arm: the ratio of two geometric means is the geometric
mean of the per-step ratios. Every iteration then counts alike, whereas a plain mean over a run whose mismatch grows, or
whose tokens have an outlier, would be the value of a few iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from suite import stats
from suite.errors import TaskError
from suite.estimands import EVERY_ESTIMAND
from suite.mismatch import concat_sums, estimates

FINISHED = ("success", "diverged")
OFFLINE = ("offline_mismatch", "offline_accuracy")
SKIPS_IN_A_ROW = 10  # that many skipped steps in a row at the smallest loss scale are an event of their own
SMALLEST_SCALE = 1.0
WARM_UP_STEPS = 10  # iterations in which a dynamic loss scale may look for its level
WHOLE_RUN = ("filter",)  # protocols whose values belong to the run as a whole, not to its parts


@dataclass(frozen=True)
class Launch:
    """One seed of one arm at one grid point.

    value: None where the run has nothing to estimate from. trials: rollouts behind a share, for the logit of 0 and 1.
    censored: "" | "high" (the truth is at least `value`: the event had not come by the horizon).
    """

    seed: int
    value: float | None
    trials: int | None = None
    censored: str = ""
    runs: tuple = field(default=(), repr=False)


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
    if task.protocol != "compare":
        return [run for run in runs if run.arm == name and same_point(run, at)]
    need = need_of(task, name)
    if need is None:
        raise TaskError(task.file, "grade.contrast", name, f"<task>-<arm> with a task of {', '.join(task.needs)}")
    return [run for run in other_runs.get(need, []) if run.arm == name[len(need) + 1 :] and same_point(run, at)]


def need_of(task, name: str) -> str | None:
    """The task of `needs` whose arm or control a comparison calls by this name."""
    fitting = [need for need in task.needs if name.startswith(need + "-")]
    return max(fitting, key=len, default=None)


def launches(protocol: str, runs: list, grade) -> list[Launch]:
    """One Launch per seed of finished runs, by seed; attempts of the same seed are averaged."""
    by_seed: dict[int, list] = {}
    for run in runs:
        if run.status in FINISHED:
            by_seed.setdefault(run.seed, []).append(run)
    return [_launch(protocol, seed, by_seed[seed], grade) for seed in sorted(by_seed)]


def _launch(protocol: str, seed: int, runs: list, grade) -> Launch:
    found = [run_value(protocol, run, grade) for run in runs]
    values = [value for value, _, _ in found if value is not None]
    trials = [count for _, count, _ in found if count]
    censored = "high" if any(mark for _, _, mark in found) else ""
    tables = tuple(runs) if protocol in OFFLINE else ()  # sums over a whole RL run say nothing about a reducer's window
    return Launch(seed, float(np.mean(values)) if values else None, min(trials, default=None), censored, tables)


def run_value(protocol: str, run, grade) -> tuple[float | None, int | None, str]:
    """(value, trials, censored) of one run: from its prompt sums if it is an offline protocol, else from its
    series.
    """
    if protocol in OFFLINE and run.summary is not None:
        values = estimates(run.summary)
        if grade.estimand in values:
            return finite(values[grade.estimand]), _trials(grade.estimand, run.summary), ""
    if protocol in OFFLINE + WHOLE_RUN:
        return finite(run.record["series_summary"].get(grade.estimand)), None, ""
    run = up_to(run, grade.until)
    if grade.event is not None or grade.level is not None:
        time = event_time(run, grade) if grade.event is not None else passage_time(run, grade)
        if time is None:
            return None, None, ""
        if grade.reducer == "time_to_event":
            when = time.horizon if time.censored else time.step
            return float(when + 1), None, "high" if time.censored else ""  # iterations done: steps count from 0
        unseen = time.censored and ended_before(run, grade.until)
        return None if unseen else float(not time.censored), None, ""
    if ended_before(run, grade.until):
        return None, None, ""
    return reduced(series(run, grade.estimand), grade.reducer, grade.window), _window_trials(run, grade), ""


def up_to(run, until: int | None):
    """The run as it stood after `until` iterations."""
    if until is None or len(run.metrics) < until:
        return run
    diverged_later = run.status == "diverged" and len(run.metrics) > until
    record = run.record | {"status": "success"} if diverged_later else run.record
    return replace(run, metrics=run.metrics[:until], record=record)


def ended_before(run, until: int | None) -> bool:
    """Whether nothing is known about iteration `until`. A run that diverged takes no further step: what it was at its
    end it would have stayed.
    """
    return until is not None and len(run.metrics) < until and run.status != "diverged"


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


def reduced(values: np.ndarray, reducer: str, window: int | None) -> float | None:
    """A series to one number. None where the part it looks at is shorter than its window, or less than half of it is
    finite.

    last_k_mean and epoch_mean: mean of the last `window` rows (one full pass for epoch_mean), at the end fixed by
    the schedule. log_ratio: log of the last window's mean over the first one's, a drift within the run; without a
    window each is a quarter of it. auc: trapezoid over rows, divided by their number - 1. mean, median, geo_mean: of
    all rows, or of the last `window`.
    """
    if reducer == "log_ratio":
        window = window or max(1, len(values) // 4)
    if window is not None and len(values) < window * (2 if reducer == "log_ratio" else 1):
        return None
    if reducer == "log_ratio":
        first, last = (_plain_mean(part) for part in (values[:window], values[-window:]))
        return math.log(last / first) if first and last and first > 0 and last > 0 else None
    part = values[-window:] if window is not None else values
    kept = part[np.isfinite(part)]
    if kept.size == 0 or 2 * kept.size < part.size:
        return None
    if reducer == "geo_mean":
        return float(np.exp(np.mean(np.log(kept)))) if (kept > 0).all() else None
    if reducer == "auc":
        return float(np.trapezoid(kept) / (kept.size - 1)) if kept.size == part.size > 1 else None
    return float(np.median(kept) if reducer == "median" else np.mean(kept))


def _plain_mean(part: np.ndarray) -> float | None:
    return finite(float(np.mean(part))) if part.size else None


def event_time(run, grade) -> stats.EventTime | None:
    """When the run's event began, censored at its last iteration; None if the series is too short for one to show.

    Four things are an event, whichever comes first: the collapse that the claim describes, a loss that is not finite,
    ten skipped steps in a row at the smallest loss scale, and a run that diverged.
    """
    rows = [row for row in run.metrics if row.get(grade.estimand) is not None]
    event, horizon = grade.event, int(run.metrics[-1]["step"]) if run.metrics else 0
    seen = stats.collapse_time(
        [row["step"] for row in rows],
        [row[grade.estimand] for row in rows],
        event.drop,
        event.window,
        event.hold,
        event.relative,
    )
    diverged = stats.EventTime(horizon, horizon, "non_finite") if run.status == "diverged" else None
    found = [
        time for time in (seen, _broken_loss(run, horizon), _stuck_scaler(run, horizon), diverged) if time is not None
    ]
    return min(found, key=lambda time: math.inf if time.censored else time.step, default=None)


def passage_time(run, grade) -> stats.EventTime | None:
    """First iteration whose mean over the last `window` ones is at least grade.level; censored at the last one."""
    rows = [row for row in run.metrics if row.get(grade.estimand) is not None]
    values = [row[grade.estimand] for row in rows]
    return stats.first_passage([row["step"] for row in rows], values, grade.level, grade.window or 1)


def _broken_loss(run, horizon: int) -> stats.EventTime | None:
    """The first iteration with a loss that is nan or infinite. A gradient that overflowed under a loss scale is a
    skipped step, not this."""
    broken = (row["step"] for row in run.metrics if row.get("loss") is not None and not math.isfinite(row["loss"]))
    step = next(broken, None)
    return None if step is None else stats.EventTime(int(step), horizon, "non_finite")


def _stuck_scaler(run, horizon: int) -> stats.EventTime | None:
    """Optimizer steps skipped one after the other at the smallest scale. An iteration says only how many of its steps
    were skipped and the scale of its last one, so the first iteration of a row of skips counts once, the others whole.
    """
    num_updates, in_a_row, began = updates_per_step(run), 0, 0
    for row in run.metrics:
        stuck = (row.get("step_skipped") or 0) >= num_updates and row.get("loss_scale", math.inf) <= SMALLEST_SCALE
        began = row["step"] if stuck and not in_a_row else began
        in_a_row = in_a_row + (num_updates if in_a_row else 1) if stuck else 0
        if in_a_row >= SKIPS_IN_A_ROW:
            return stats.EventTime(int(began), horizon, "non_finite")
    return None


def updates_per_step(run) -> int:
    """Optimizer steps in one iteration."""
    schedule = run.record["cell"]["settings"].get("schedule") or {}
    return schedule.get("minibatches") or 1


def skipped_share(run) -> float:
    """Share of optimizer steps after warm-up that were skipped; 0 where nothing is recorded."""
    train, num_updates = run.record["cell"]["settings"].get("train") or {}, updates_per_step(run)
    warm_up = max(WARM_UP_STEPS, -(-((train.get("optimizer") or {}).get("warmup_steps") or 0) // num_updates))
    skipped = series(run, "step_skipped")[warm_up:]
    skipped = skipped[np.isfinite(skipped)]
    return float(np.mean(skipped)) / num_updates if skipped.size else 0.0


def finite(value) -> float | None:
    """A number, or None for None, NaN and infinities: JSON has no other way to say that there is no value."""
    return None if value is None or not math.isfinite(value) else float(value)


def prompt_table(found: list[Launch]) -> dict | None:
    """The prompt sums of all runs of these launches, rows of a prompt merged; None where any of them kept none."""
    tables = [run.summary for launch in found for run in launch.runs]
    return concat_sums(tables) if tables and all(table is not None for table in tables) else None
