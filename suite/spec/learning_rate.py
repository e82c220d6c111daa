"""The learning rate of every update, as a function of how many were taken before it: nothing to store, so a resumed run
goes on with the same rates to the bit. No torch.

    lr(n) = lr x warm(n) x decay(max(0, n - warmup_steps))
    warm(n) = min(1, (n + 1) / warmup_steps), 1 without warm-up
    decay(k): constant  1
              linear    1 - (1 - final) min(1, k / steps)
              step      factor ^ floor(k / every)

n counts optimizer steps that were taken: not the iterations of a run, each of which has schedule.minibatches of them, and
not those that were skipped because a gradient was not finite.
"""

from __future__ import annotations

SCHEDULES = {"constant": (), "linear": ("steps", "final"), "step": ("every", "factor")}  # kind: the keys it has


def learning_rate(optimizer: dict, num_updates: int) -> float:
    """The rate of the update that follows `num_updates`, of a resolved train.optimizer."""
    warmup_steps = optimizer.get("warmup_steps") or 0
    warm = min(1.0, (num_updates + 1) / warmup_steps) if warmup_steps else 1.0
    return optimizer["lr"] * warm * _decay(optimizer.get("lr_schedule"), max(0, num_updates - warmup_steps))


def _decay(schedule: dict | None, num_updates: int) -> float:
    kind = schedule["kind"] if schedule else "constant"
    if kind == "linear":
        return 1.0 - (1.0 - schedule["final"]) * min(1.0, num_updates / schedule["steps"])
    if kind == "step":
        return schedule["factor"] ** (num_updates // schedule["every"])
    return 1.0
