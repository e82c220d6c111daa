"""Grading rollouts that another framework wrote: `suite grade TASK --evidence FILE`, with no engine at all. Files that
frameworks write themselves are read with `--from` (suite/dumps/readers).

A dump is parquet or JSON lines (also .gz), one row per rollout: one file, several, or a folder of shards. Columns:

    column              type             meaning
    arm                 string           an arm of the task (bf16, fp16, ...) or one of its controls (control-...)
    seed                integer >= 0     the independent launch, one of the task's; arms are compared seed by seed
    prompt_id           string/integer   rollouts of one prompt share it; so do arms
    sample_id           integer >= 0     optional; which of a prompt's rollouts this is
    token_ids           integers         prompt and response, with
    num_prompt_tokens   integer >= 0       how many of them are the prompt; or instead of both:
    response_token_ids  integers         the response alone
    rollout_logprobs    numbers <= 0     log mu of each response token, by the sampler, natural log, temperature applied
    trainer_logprobs    numbers <= 0     log pi of the same tokens by the trainer, at the same temperature
    loss_mask           0 and 1          optional, one per response token; 0 = not sampled (tool output): does not count
    finish_reason       string           optional; "stop" or "length" (cut off by the token limit)
    reward              number           optional; null or nan = not rewarded; needed where a claim is about the reward
    <grid axis>         as in the task   e.g. num_terms: "25-200" or [25, 200]; needed where the grid has several points
    step, trainer_entropies              allowed and not used (the suite's own evidence has them); so is pandas' index

So the suite's own evidence rows are accepted once they carry `arm` and `seed`. A dump is refused whole at the first
row that cannot be used, with file, row (counted from 1; the line of a JSON lines file), field and reason: nothing is
dropped or clipped, and the one repair, log-probs up to 1e-5 above 0 that count as 0, is said in `notes`. It is refused
too where launches are copies of each other, or arms saw other problems. What else does not fit, in columns
(suite/dumps/signs.py) or beside the plan of the task (suite/dumps/plan.py), caps the claims that rest on it.

What such a verdict cannot know: settings and executed precision of the other framework are taken on its word.
Controls of a kind (floor, aa, broken) of which the dump contains none are listed as absent, and cap every claim, and the
task, at INCONCLUSIVE; a second one of a kind that is there is noted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.dumps import files as dump_files
from suite.dumps.caps import cap_verdict
from suite.dumps.plan import Problems, draws_at_random, plan_flaws, planned_counts
from suite.dumps.readers.sources import Source
from suite.dumps.rows import Rollout, check_row, row_error
from suite.dumps.signs import NOTE, Copies, Flaw, LaunchSigns
from suite.errors import TaskError, UserError
from suite.files import sha256_file
from suite.measure.mismatch import concat_sums, estimates, prompt_sums, token_statistics
from suite.record.run import Run
from suite.record.schema import new_record
from suite.spec.kinds import KINDS, kind_of
from suite.spec.task import Task, axis_label

FLUSH_TOKENS = 500_000  # tokens held before they are folded into sums
# Up to this many, quantiles and sequence weights are given too; beyond, only what sums can give.
KEPT_TOKENS = 20_000_000
USUAL_ROLLOUTS = 1000  # of a launch, where the task does not say


@dataclass(frozen=True)
class Dump:
    """What is in the files: finished runs, what is wrong with them, and remarks for the reader."""

    runs: list[Run]
    flaws: list[Flaw]
    notes: list[str]


def grade_evidence(task: Task, paths: str | Path | Sequence[str | Path], source: Source | None = None) -> dict:
    """The verdict (as in verdict.json, and `notes`) on a dump. UserError names file, row and field where it cannot be
    used."""
    from suite.grade.verdict import grade_task

    dump = read_dump(task, paths, source)
    present = {run.arm for run in dump.runs}
    kept = tuple(control for control in task.controls if control.name in present)
    absent = [control for control in task.controls if control.name not in present]
    stood_for = [control for control in absent if control.kind in {one.kind for one in kept}]
    absent = [control for control in absent if control not in stood_for]
    verdict = grade_task(_with_controls(task, kept), dump.runs, foreign=True)
    return cap_verdict(_with_controls(task, kept), verdict, [flaw for flaw in dump.flaws if flaw.word != NOTE], absent) | {
        "notes": dump.notes + [_stood_for(control, kept) for control in stood_for]
    }


def _stood_for(control, kept: tuple) -> str:
    """A dump costs its owner a run per control, so one of a kind is enough to grade it; the note says what it leaves open."""
    other = next(one for one in kept if one.kind == control.kind)
    return f"no rows of {control.name}; {other.name} stands for it, which looks at another grid point or quantity"


def _with_controls(task: Task, controls: tuple) -> Task:
    return task if len(controls) == len(task.controls) else task.model_copy(update={"controls": controls})


# ---- from rows to runs ---------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """The rollouts of one cell, folded into sums whenever enough tokens have gathered; float32 copies of the tokens
    while they fit."""

    sums: list[dict] = field(default_factory=list)
    pending: list[Rollout] = field(default_factory=list)
    tokens: list[tuple] = field(default_factory=list)
    signs: LaunchSigns = field(default_factory=LaunchSigns)
    problems: Problems = field(default_factory=Problems)
    num_rounded: int = 0

    def add(self, rollout: Rollout) -> None:
        self.problems.note(rollout)
        self.num_rounded += rollout.num_rounded
        self.pending.append(rollout)

    def fold(self, keep_tokens: bool) -> None:
        if not self.pending:
            return
        mu, pi = (
            np.concatenate([getattr(r, name) for r in self.pending])
            for name in ("rollout_logprobs", "trainer_logprobs")
        )
        lengths = [r.rollout_logprobs.size for r in self.pending]
        self.signs.fold(self.pending, mu, pi)
        prompts, rewards = [r.prompt_id for r in self.pending], [r.reward for r in self.pending]
        part = prompt_sums(prompts, lengths, mu, pi, rewards, [r.truncated for r in self.pending])
        self.sums = [concat_sums([*self.sums, part])]
        if keep_tokens:
            self.tokens.append((mu.astype(np.float32), pi.astype(np.float32), lengths))
        self.pending = []

    def statistics(self) -> dict:
        if not self.tokens:
            return {}
        mu, pi, lengths = (np.concatenate(column) for column in zip(*self.tokens, strict=True))
        return token_statistics(mu, pi, lengths)

    def flaws(self, cell: tuple) -> list[Flaw]:
        return list(self.signs.flaws(cell, float(self.sums[0]["sum_k2"].sum())))


def read_dump(task: Task, paths: str | Path | Sequence[str | Path], source: Source | None = None) -> Dump:
    """One Run per (arm, grid point, seed), sorted, with the flaws found. Memory is bounded by prompts and rollouts, not
    by tokens. Raises UserError for what cannot be used."""
    if kind_of(task).value_from != "prompt_sums":
        graded = " or ".join(kind.name for kind in KINDS.values() if kind.value_from == "prompt_sums")
        raise UserError(f"{task.id}: --evidence grades tasks of protocol {graded}; this one is {task.protocol!r}")
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    shards = dump_files.shards(paths)
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    launches, copies = _gather(task, shards, source.read if source else dump_files.read_rows)
    if not launches:
        raise TaskError(where, "rows", "none", "one row per rollout", "there are no rows")
    _check_arms(task, where, launches)
    if any(grade.estimand == "reward_mean" for grade in task.grade.values()):
        _check_rewards(where, launches)
    flaws = [flaw for cell in sorted(launches) for flaw in launches[cell].flaws(cell)]
    flaws += plan_flaws(task, where, {cell: launch.problems for cell, launch in launches.items()}, required_arms(task))
    if copied := copies.worst():
        raise TaskError(where, "rows", copied, "launches that each drew their own responses",
                        "a seed that is not used, or files that were copied")  # fmt: skip
    evidence = _evidence_of([shard.path for shard in shards])
    runs = [_run(task, shards[0].path, evidence, cell, launches[cell]) for cell in sorted(launches)]
    return Dump(runs, flaws, _notes(launches, flaws))


def _notes(launches: dict[tuple, Launch], flaws: list[Flaw]) -> list[str]:
    rounded = sum(launch.num_rounded for launch in launches.values())
    text = f"{rounded} log-probs barely above 0 (fp32 rounding) were taken as 0"
    return ([text] if rounded else []) + list(dict.fromkeys(flaw.reason for flaw in flaws))


def _evidence_of(paths: list[Path]) -> dict:
    """Name and hash of the files, as the record has them; several have the hash of their hashes."""
    hashes = [sha256_file(path) for path in paths]
    if len(paths) == 1:
        return {"file": paths[0].name, "sha256": hashes[0]}
    files = [{"file": path.name, "sha256": digest} for path, digest in zip(paths, hashes, strict=True)]
    return {"files": files, "sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest()}


def _gather(task: Task, shards: list[dump_files.Shard], read: Callable) -> tuple[dict[tuple, Launch], Copies]:
    launches: dict[tuple, Launch] = {}
    seen: set[bytes] = set()
    random, copies = draws_at_random(task), Copies(_usual_rollouts(task))
    pending = total = num_rows = 0
    for shard in shards:
        for row_number, row in read(shard):
            rollout = check_row(task, shard.path, row_number, row)
            num_rows += 1
            if num_rows > dump_files.MAX_ROWS:
                raise row_error(shard.path, row_number, "rows", num_rows, f"at most {dump_files.MAX_ROWS} in all files")
            _refuse_duplicate(rollout, seen)
            if random:
                copies.note(rollout)
            launches.setdefault(rollout.cell, Launch()).add(rollout)
            pending, total = pending + rollout.rollout_logprobs.size + 1, total + rollout.rollout_logprobs.size
            if pending >= FLUSH_TOKENS:
                _fold_all(launches, total)
                pending = 0
    _fold_all(launches, total)
    return launches, copies


def _usual_rollouts(task: Task) -> int:
    counts = [planned_counts(task, arm, ()) for arm in task.arms]
    return max([prompts * samples for prompts, samples in counts if prompts and samples], default=USUAL_ROLLOUTS)


def _fold_all(launches: dict[tuple, Launch], total: int) -> None:
    for launch in launches.values():
        launch.fold(keep_tokens=total <= KEPT_TOKENS)
        if total > KEPT_TOKENS:
            launch.tokens = []


def _refuse_duplicate(rollout: Rollout, seen: set[bytes]) -> None:
    if rollout.sample_id is None:
        return
    key = hashlib.blake2b(repr((rollout.cell, rollout.prompt_id, rollout.sample_id)).encode(), digest_size=16).digest()
    if key in seen:
        found = {name: getattr(rollout, name) for name in ("arm", "seed", "prompt_id", "sample_id")}
        allowed = "each (arm, seed, grid point, prompt_id, sample_id) once"
        raise row_error(rollout.path, rollout.row, "sample_id", found, allowed)
    seen.add(key)


def required_arms(task: Task) -> list[str]:
    """Arms that the grade block speaks of, controls aside, sorted."""
    controls = {control.name for control in task.controls}
    return sorted({name for grade in task.grade.values() for name in grade.contrast.names} - controls)


def _check_arms(task: Task, where: str, cells: dict[tuple, Launch]) -> None:
    required = required_arms(task)
    missing = [arm for arm in required if arm not in {arm for arm, _, _ in cells}]
    if missing:
        found = sorted({arm for arm, _, _ in cells})
        raise TaskError(
            where,
            "arm",
            found,
            f"the grade block of {task.id} needs {', '.join(required)}",
            f"missing: {', '.join(missing)}",
        )
    for point in sorted({point for _, point, _ in cells}):
        seeds = {arm: sorted(s for a, p, s in cells if a == arm and p == point) for arm in required}
        if len({tuple(found) for found in seeds.values()}) > 1:
            at = ", ".join(f"{axis}={label}" for axis, label in point)
            raise TaskError(
                where,
                "seed" + (f" at {at}" if at else ""),
                seeds,
                "the same seeds in every arm: they are compared seed by seed",
            )


def _check_rewards(where: str, cells: dict[tuple, Launch]) -> None:
    for (arm, _, seed), cell in cells.items():
        rewarded, rollouts = (int(cell.sums[0][column].sum()) for column in ("num_rewarded", "num_rollouts"))
        if rewarded != rollouts:
            raise TaskError(
                where,
                f"reward of arm {arm}, seed {seed}",
                f"{rewarded} of {rollouts} rollouts rewarded",
                "all of them",
                "a claim of this task is about the reward",
            )


def _run(task: Task, path: Path, evidence: dict, key: tuple, cell: Launch) -> Run:
    """A finished run as record.read_run gives it, with what a dump can know; settings and precision are not among
    it."""
    arm, labels, seed = key
    summary = cell.sums[0]
    point = {axis: _grid_value(task, axis, label) for axis, label in labels}
    name = ".".join([arm, *(f"{axis.rsplit('.', 1)[-1]}={label}" for axis, label in labels), f"s{seed}"])
    series = estimates(summary) | cell.statistics()
    counts = {
        "num_prompts": len(summary["prompt_id"]),
        "num_rollouts": int(summary["num_rollouts"].sum()),
        "num_response_tokens": int(summary["num_response_tokens"].sum()),
    }
    cell_part = {
        "name": name, "arm": arm, "point": point, "seed": seed, "settings": {},
        "is_control": arm in {control.name for control in task.controls},
    }  # fmt: skip
    record = new_record(
        task, cell_part, hashlib.sha256(f"{evidence['sha256']} {name}".encode()).hexdigest(), status="success", counts=counts,
        series_summary=series, environment={"evidence": evidence}, fingerprint=f"evidence-{evidence['sha256'][:12]}",
    )  # fmt: skip
    return Run(path, record, [{"step": 0, **counts, **series}], summary)


def _grid_value(task: Task, axis: str, label: str) -> Any:
    return next(value for value in task.grid[axis] if axis_label(value) == label)
