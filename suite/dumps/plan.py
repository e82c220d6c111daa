"""What a dump holds beside what its task plans: launches, problems, samples, and whether arms saw the same problems."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from suite.dumps.rows import Rollout
from suite.dumps.signs import NOTE, Flaw, launch_text
from suite.errors import TaskError
from suite.grade.controls import control_points
from suite.spec.plan import read_path
from suite.spec.reading import deep_merge
from suite.spec.task import Task, axis_label

# A launch with fewer problems or samples than planned is as fit to compare, only noisier, and the interval over launches shows
# that noise. Below these shares of the plan it says too little of the task's own problems, and above the plan it was chosen.
ENOUGH_PROBLEMS, ENOUGH_SAMPLES = 1 / 3, 1 / 2

Cell = tuple  # (arm, ((dotted path, label), ...), seed)


@dataclass
class Problems:
    """The prompts of one launch: id -> digest of its tokens (None where they are not given), and rollouts of each."""

    tokens: dict[str, bytes | None] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def note(self, rollout: Rollout) -> None:
        ids = rollout.prompt_ids
        digest = None if ids is None else hashlib.blake2b(ids.tobytes(), digest_size=12).digest()
        known = self.tokens.setdefault(rollout.prompt_id, digest)
        if known != digest:
            found = f"prompt {rollout.prompt_id!r:.80} with other prompt tokens than in an earlier row of the launch"
            raise TaskError(rollout.path, f"row {rollout.row}: prompt_id", found, "one prompt under one prompt_id")
        self.samples[rollout.prompt_id] = self.samples.get(rollout.prompt_id, 0) + 1


def planned_counts(task: Task, arm: str, point: tuple[tuple[str, str], ...]) -> tuple[int | None, int | None]:
    """(problems, samples of each) of a launch of this arm; None where the task leaves it to its data."""
    control = next((control for control in task.controls if control.name == arm), None)
    above = deep_merge(task.arms.get(control.like, {}), control.set) if control else task.arms.get(arm, {})
    settings = deep_merge({name: part for name, part in task.settings.items() if part is not None}, above)
    for path, label in point:
        settings = deep_merge(settings, _nested(path, next(v for v in task.grid[path] if axis_label(v) == label)))
    files = read_path(settings, "data.files", None) or []
    rows = sum(file.get("rows") or 0 for file in files) if files and all(file.get("rows") for file in files) else None
    num_prompts = read_path(settings, "data.num_prompts", None) or read_path(settings, "data.unique_rows", None) or rows
    return num_prompts, read_path(settings, "rollout.samples_per_prompt", None)


def _nested(path: str, value: Any) -> Any:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def draws_at_random(task: Task) -> bool:
    """Whether two launches of the task can be told apart by what they drew: not where it decodes greedily."""
    sections = [task.settings.get("rollout") or {}, *(arm.get("rollout") or {} for arm in task.arms.values())]
    return all(section.get("temperature") != 0 and section.get("top_k") != 1 for section in sections)


def plan_flaws(task: Task, where: str, cells: dict[Cell, Problems], required: list[str]) -> list[Flaw]:
    """What is missing, or too many. Raises TaskError where arms of one launch saw other problems."""
    return [*_counts(task, cells), *_missing(task, cells, required), *_unlike(where, cells, required)]


def _counts(task: Task, cells: dict[Cell, Problems]) -> list[Flaw]:
    flaws = []
    for cell in sorted(cells):
        prompts, samples = planned_counts(task, *cell[:2])
        found = cells[cell].samples
        wrong = [] if prompts in (None, len(found)) else [f"{len(found)} of {prompts} planned problems"]
        odd = [] if samples is None else [name for name, count in found.items() if count != samples]
        if odd:
            others = f" and {len(odd) - 1} other problems" if odd[1:] else ""
            wrong.append(f"{found[odd[0]]} of {samples} planned samples of {odd[0]!r:.80}{others}")
        if wrong:
            enough = _enough(len(found), prompts, ENOUGH_PROBLEMS) and all(_enough(n, samples, ENOUGH_SAMPLES) for n in found.values())
            resolve = "give the problems and samples that the task plans, no less and no more"
            word = NOTE if enough else "INCONCLUSIVE"
            flaws.append(Flaw(*cell[:2], word, f"{launch_text(cell)}: {'; '.join(wrong)}", resolve, False))
    return flaws


def _enough(found: int, planned: int | None, share: float) -> bool:
    return planned is None or share * planned <= found <= planned


def _missing(task: Task, cells: dict[Cell, Problems], required: list[str]) -> list[Flaw]:
    """Planned launches that are not there, of arms and of controls that are."""
    points = sorted({point for _, point, _ in cells})
    planned = [(arm, point, task.seeds) for point in points for arm in required]
    for control in task.controls:
        own = [tuple((axis, axis_label(value)) for axis, value in at.items()) for at in control_points(task, control)]
        planned += [(control.name, point, control.seeds) for point in own if any(c[0] == control.name for c in cells)]
    flaws = []
    for arm, point, seeds in planned:
        absent = [seed for seed in seeds if (arm, point, seed) not in cells]
        if absent:
            where = launch_text((arm, point, absent[0])).replace(f"seed {absent[0]}", f"seed {', '.join(map(str, absent))}")
            flaws.append(Flaw(arm, point, "INCONCLUSIVE", f"{where}: no rows; {len(seeds)} launches are planned",
                              "add the launches that the task plans", False))  # fmt: skip
    return flaws


def _unlike(where: str, cells: dict[Cell, Problems], required: list[str]) -> list[Flaw]:
    """Arms of one seed at one grid point are compared pair by pair, so they must have seen the same problems."""
    flaws = []
    for arm, point, seed in sorted(cell for cell in cells if cell[0] in required[1:]):
        first = (required[0], point, seed)
        if first in cells:
            flaws += _unlike_pair(where, first, (arm, point, seed), cells[first].tokens, cells[arm, point, seed].tokens)
    return flaws


def _unlike_pair(where: str, first: Cell, second: Cell, ours: dict, theirs: dict) -> list[Flaw]:
    both, names = ours.keys() & theirs.keys(), f"{launch_text(first)} and {launch_text(second)}"
    allowed = "the same problems, and the same prompt_id for each, in every arm: arms are compared on them"
    if not both:
        raise TaskError(where, "prompt_id", f"{names}: no prompt_id in common", allowed)
    other = sorted(name for name in both if None not in (ours[name], theirs[name]) and ours[name] != theirs[name])
    if other:
        raise TaskError(where, "prompt_id", f"{names}: other prompt tokens under {other[0]!r:.80}", allowed)
    alone = sorted(ours.keys() ^ theirs.keys())
    text = f"{names}: {len(alone)} problems stand in one of them only, such as {alone[0]!r:.80}" if alone else ""
    resolve = "give every problem in every arm"
    return [Flaw(*cell[:2], "INCONCLUSIVE", text, resolve, False) for cell in (first, second) if alone]
