"""When something happened in the series of an RL run: collapses, first passages, a loss that broke, a scaler that is
stuck, and whether the run has an end at all. No torch.
"""

from __future__ import annotations

import math

from suite.measure import stats

SKIPS_IN_A_ROW = 10  # that many skipped steps in a row at the smallest loss scale are an event of their own
SMALLEST_SCALE = 1.0
WARM_UP_STEPS = 10  # iterations in which a dynamic loss scale may look for its level


def why_not_at_end(run, until: int | None) -> str:
    """Why nothing is known about the last planned iteration (`until`, or the end of the schedule); "" if it is.

    A run whose last ten iterations skipped every step is the exception: its weights stand still, and what it was at its
    end it would have stayed. One that diverged otherwise can sample nothing more.
    """
    steps = (run.record["cell"]["settings"].get("schedule") or {}).get("steps")
    planned = min(filter(None, (until, steps)), default=len(run.metrics))
    if [row.get("step") for row in run.metrics] != list(range(len(run.metrics))):
        return f"its iterations are not numbered 0 to {len(run.metrics) - 1}"
    if len(run.metrics) >= planned or stands_still(run):
        return ""
    if run.status == "diverged":
        why = (run.record.get("diverged") or {}).get("reason") or "diverged"
        return f"diverged at iteration {len(run.metrics)} ({why}): it has no value at iteration {planned - 1}"
    return f"{len(run.metrics)} of {planned} iterations are recorded"


def stands_still(run) -> bool:
    """Whether every optimizer step of the last ten iterations was skipped."""
    last = run.metrics[-SKIPS_IN_A_ROW:]
    return len(last) == SKIPS_IN_A_ROW and all((row.get("step_skipped") or 0) >= updates_per_step(run) for row in last)


def why_no_event(run, grade) -> str:
    """Why nobody can say whether the event came."""
    num, event = len(run.metrics), grade.event
    if (bare := without_value(run, grade.estimand)) is not None:
        return f"{grade.estimand} has no value at iteration {bare}"
    needed = event.window + event.hold if event else grade.window or 1
    if num < needed:
        return f"{num} iterations, {needed} needed: no event could have been seen"
    return f"it ends in a fall that is not yet held for {event.hold} iterations"


def event_time(run, grade) -> stats.EventTime | None:
    """When the run's event began, censored at its last iteration; None if the series is too short for one to show.

    Four things are an event, whichever comes first: the collapse that the claim describes, a loss that is not finite,
    ten skipped steps in a row at the smallest loss scale, and a run that diverged.
    """
    event, horizon = grade.event, int(run.metrics[-1]["step"]) if run.metrics else 0
    seen = None
    if without_value(run, grade.estimand) is None:
        steps, values = zip(*((row["step"], row[grade.estimand]) for row in run.metrics), strict=True) if run.metrics else ((), ())
        seen = stats.collapse_time(steps, values, event.drop, event.window, event.hold, event.relative)
    diverged = stats.EventTime(horizon, horizon, "non_finite") if run.status == "diverged" else None
    found = [
        time for time in (seen, _broken_loss(run, horizon), _stuck_scaler(run, horizon), diverged) if time is not None
    ]
    return min(found, key=lambda time: math.inf if time.censored else time.step, default=None)


def passage_time(run, grade) -> stats.EventTime | None:
    """First iteration whose mean over the last `window` ones is at least grade.level; censored at the last one."""
    if without_value(run, grade.estimand) is not None:
        return None
    values = [row[grade.estimand] for row in run.metrics]
    return stats.first_passage([row["step"] for row in run.metrics], values, grade.level, grade.window or 1)


def without_value(run, estimand: str) -> int | None:
    """The first iteration that has no number of an estimand; None if all have one."""
    values = ((row["step"], row.get(estimand)) for row in run.metrics)
    return next((step for step, value in values if value is None or math.isnan(value)), None)


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
    """Share of optimizer steps after warm-up that were skipped, those included that a run whose weights stand still never
    took; 0 where nothing is recorded.
    """
    train, num_updates = run.record["cell"]["settings"].get("train") or {}, updates_per_step(run)
    warm_up = max(WARM_UP_STEPS, -(-((train.get("optimizer") or {}).get("warmup_steps") or 0) // num_updates))
    steps = (run.record["cell"]["settings"].get("schedule") or {}).get("steps") or 0
    never_taken = [num_updates] * (steps - len(run.metrics)) if stands_still(run) else []
    skipped = [*(row["step_skipped"] for row in run.metrics if row.get("step_skipped") is not None), *never_taken][warm_up:]
    return sum(skipped) / len(skipped) / num_updates if skipped else 0.0
