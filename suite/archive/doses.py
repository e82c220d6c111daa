"""When training collapses, against the dose of mismatch with which it began: launches of RL tasks that differ in nothing else,
whatever task they belong to. No torch.

A family of launches has the same settings but for the sampler's precision and the horizon, and one fingerprint. The dose of an
arm is its k3 per token over the first iterations, before training has moved it; the time of a launch is the iteration at which
its reward begins to fall for good (the rule of lead.py), or the last one that was seen. A launch of an arm whose reward never
came above LEARNED has not collapsed and not survived either, and stays out; so does a mismatch below EXACT, which is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from suite.measure.censored import CensoredLine, censored_line
from suite.measure.lead import DROP, HOLD, WINDOW
from suite.measure.stats import collapse_time, window_mean
from suite.record.run import Run
from suite.spec.plan import canonical_json

EXACT, LEARNED = 1e-9, 0.5  # nats per token; reward
BEGUN = ("success", "diverged", "killed", "running")


@dataclass(frozen=True)
class Launch:
    """One launch: what it shares with others, its k3 at the start (nats per token), and the iteration of its fall, or the last
    one seen without."""

    family: str
    algorithm: str
    arm: str
    seed: int
    k3: float
    time: int
    fell: bool
    learned: bool
    exact_trainer: bool = True  # trained in fp32: what happens is then the sampler's doing


@dataclass(frozen=True)
class Dose:
    """The launches of one arm, by seed; k3 is their geometric mean."""

    arm: str
    k3: float
    launches: tuple[Launch, ...]

    @property
    def is_exact(self) -> bool:
        return self.k3 < EXACT


@dataclass(frozen=True)
class Response:
    """A family: its doses, the smallest first, and the line through the times, if the launches allow one."""

    algorithm: str
    doses: tuple[Dose, ...]
    line: CensoredLine | None


def launch_of(run: Run) -> Launch | None:
    """What a run says about dose and time; None for a control, a run without training or without enough iterations."""
    settings = run.record["cell"]["settings"]
    series = [row for row in run.metrics if row.get("reward_mean") is not None and row.get("k3_nats_per_token") is not None]
    if run.is_control or run.status not in BEGUN or not settings.get("schedule") or len(series) < WINDOW + HOLD:
        return None
    steps, rewards = [row["step"] for row in series], [row["reward_mean"] for row in series]
    fall = collapse_time(steps, rewards, DROP, WINDOW, HOLD)
    fell = fall is not None and fall.step is not None
    # an end that already looks like a fall, and is not held yet, was seen without one before it
    time = fall.step if fell else steps[-1] if fall is not None else steps[-1] - HOLD
    dose = float(np.mean([row["k3_nats_per_token"] for row in series[:WINDOW]]))
    learned = bool(window_mean(rewards, WINDOW).max() >= LEARNED)
    algorithm = settings["algorithm"]["name"]
    exact_trainer = settings["precision"]["train"] == "fp32"
    return Launch(_family(settings), algorithm, run.arm, run.seed, dose, int(time), fell, learned, exact_trainer)


def _family(settings: dict) -> str:
    kept = {name: part for name, part in settings.items() if part is not None and name not in ("precision", "schedule")}
    kept["train_in"] = settings["precision"]["train"]
    kept["schedule"] = {name: value for name, value in settings["schedule"].items() if name not in ("steps", "checkpoint_every")}
    return canonical_json(_said(kept))


def _said(value):
    """Without what is null: a setting that an older record does not know is null in a newer one."""
    if isinstance(value, dict):
        return {name: _said(part) for name, part in value.items() if part is not None}
    return value


def responses(launches: Iterable[Launch]) -> list[Response]:
    """Every family of launches with an exact trainer in which two doses at least stand beside an exact sampler. Of two runs of the
    same arm and seed the longer one counts."""
    families: dict[str, dict[tuple[str, int], Launch]] = {}
    for launch in (one for one in launches if one.exact_trainer):
        members = families.setdefault(launch.family, {})
        other = members.get((launch.arm, launch.seed))
        if other is None or (launch.fell, launch.time) > (other.fell, other.time):
            members[launch.arm, launch.seed] = launch
    found = [_response(list(members.values())) for members in families.values()]
    return sorted((one for one in found if sum(not dose.is_exact for dose in one.doses) > 1), key=lambda one: one.algorithm)


def _response(launches: Sequence[Launch]) -> Response:
    arms: dict[str, list[Launch]] = {}
    for launch in sorted(launches, key=lambda launch: launch.seed):
        arms.setdefault(launch.arm, []).append(launch)
    doses = [Dose(arm, float(np.exp(np.mean(np.log([max(one.k3, 1e-300) for one in its])))), tuple(its)) for arm, its in arms.items()]
    doses = tuple(sorted(doses, key=lambda dose: (dose.k3, dose.arm)))
    seen = [(dose.k3, one.time, one.fell) for dose in doses if not dose.is_exact for one in dose.launches if one.learned and one.time > 0]
    line = censored_line(*zip(*seen, strict=True)) if seen else None
    return Response(launches[0].algorithm, doses, line)


@dataclass(frozen=True)
class Level:
    """A mismatch to be placed on the line: whose it is, and its k3, nats per token."""

    label: str
    k3: float


# Figure 3 of the paper (OAT) at the start, and its ratio of bf16 to fp16 (baselines/paper.yaml, C16.kl_ratio)
PAPER_BF16, PAPER_RATIO = 1.0e-3, 65
PAPER_LEVELS = (Level("the paper's bf16", PAPER_BF16), Level("the paper's fp16", PAPER_BF16 / PAPER_RATIO))


def own_levels(runs: Iterable[Run]) -> list[Level]:
    """bf16 and fp16 of the desk model: k3 over the first iterations of launches that train and sample in it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        launch = launch_of(run)
        if launch is not None and run.arm in ("bf16", "fp16"):
            found.setdefault(run.arm, []).append(launch.k3)
    return [Level(f"{name} of this model", float(np.exp(np.mean(np.log(values))))) for name, values in sorted(found.items())]


def dose_rows(response: Response) -> list[list[str]]:
    """One row a dose: arm, k3, launches, how many fell and when, and how far the others were seen."""
    return [_dose_row(dose) for dose in response.doses]


DOSE_COLUMNS = ("arm", "k3 at the start", "launches", "fell", "at iteration", "the others, seen to")


def _dose_row(dose: Dose) -> list[str]:
    fell = sorted(one.time for one in dose.launches if one.fell and one.learned)
    lasted = sorted(one.time for one in dose.launches if not one.fell and one.learned)
    idle = sum(not one.learned for one in dose.launches)
    k3 = "none" if dose.is_exact else f"{dose.k3:.2g}"
    launches = f"{len(dose.launches)}" + (f", {idle} learned nothing" if idle else "")
    return [dose.arm, k3, launches, str(len(fell)), ", ".join(map(str, fell)), ", ".join(map(str, lasted))]


LEVEL_COLUMNS = ("mismatch", "k3", "expected fall, iteration [90 %]", "")


def level_rows(response: Response, levels: Sequence[Level]) -> list[list[str]]:
    """Where other mismatches lie on the line; none without a line."""
    if response.line is None:
        return []
    doses = [dose.k3 for dose in response.doses if not dose.is_exact]
    rows = []
    for level in levels:
        time = response.line.time_at(level.k3)
        inside = min(doses) <= level.k3 <= max(doses)
        rows.append([level.label, f"{level.k3:.2g}", f"{time.estimate:.3g} [{time.lo:.3g}, {time.hi:.3g}]", "" if inside else "beyond the doses"])
    return rows


def line_text(response: Response) -> str:
    """The slope in words, or why there is none."""
    launches = [one for dose in response.doses if not dose.is_exact for one in dose.launches if one.learned]
    fell = sum(one.fell for one in launches)
    if response.line is None:
        return f"No line: {fell} of {len(launches)} launches fell; three falls are needed, at two doses at least."
    slope = response.line.slope_interval()
    ends = f"{slope.estimate:.2f} [{slope.lo:.2f}, {slope.hi:.2f}]"
    return f"Of {len(launches)} launches {fell} fell; the time to the fall goes with the power {ends} of the dose (90 %, the others censored)."


LEVELS_OF = "desk-sanity-grpo"  # the task whose arms are bf16 and fp16 of the desk model
Published = dict[tuple[str, str], list[Launch]]  # launches by task and fingerprint


def responses_of(published: Published, task_id: str, fingerprint: str, min_doses: int = 1) -> list[Response]:
    """The families to which launches of a task at `min_doses` doses or more belong, with the launches of every task on the same
    fingerprint."""
    own = published.get((task_id, fingerprint), [])
    doses: dict[str, set[str]] = {}
    for launch in own:
        doses.setdefault(launch.family, set()).update([launch.arm] if launch.k3 >= EXACT else [])
    wanted = {family for family, arms in doses.items() if len(arms) >= min_doses}
    return responses(one for (_, where), its in published.items() if where == fingerprint for one in its if one.family in wanted)
