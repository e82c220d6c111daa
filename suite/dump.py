"""Grading rollouts that another framework wrote: `suite grade TASK --evidence FILE`, with no engine at all.

The file is parquet or JSON lines, one row per rollout. Columns:

    column              type             meaning
    arm                 string           an arm of the task (bf16, fp16, ...) or one of its controls (control-...)
    seed                integer >= 0     the independent launch; arms are compared seed by seed
    prompt_id           string/integer   rollouts of one prompt share it; so do arms
    sample_id           integer >= 0     optional; which of a prompt's rollouts this is
    token_ids           integers         prompt and response, with
    num_prompt_tokens   integer >= 0       how many of them are the prompt; or instead of both:
    response_token_ids  integers         the response alone
    rollout_logprobs    numbers <= 0     log mu of each response token, by the sampler, natural log, temperature applied
    trainer_logprobs    numbers <= 0     log pi of the same tokens by the trainer, at the same temperature
    finish_reason       string           optional; "stop" or "length" (cut off by the token limit)
    reward              number           optional; null or nan = not rewarded; needed where a claim is about the reward
    <grid axis>         as in the task   e.g. num_terms: "25-200" or [25, 200]; needed where the grid has several points
    step                integer          allowed and not used (the suite's own evidence has it)

So the suite's own evidence rows are accepted once they carry `arm` and `seed`. A file is refused whole at the first
row that cannot be used, with file, row (counted from 1; the line of a JSON lines file), field and reason: nothing is
dropped, clipped or repaired.

What such a verdict cannot know: settings and executed precision of the other framework are taken on its word.
Controls that the file does not contain are listed as absent, and cap every claim, and the task, at INCONCLUSIVE.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suite.dump_rows import Rollout, check_row, read_rows, row_error
from suite.errors import TaskError, UserError
from suite.grade.launches import OFFLINE
from suite.mismatch import concat_sums, estimates, prompt_sums, token_statistics
from suite.record import RECORD_SCHEMA, Run, sha256_file
from suite.task import Task, axis_label

FLUSH_TOKENS = 500_000  # tokens held before they are folded into sums
# Up to this many, quantiles and sequence weights are given too; beyond, only what sums can give.
KEPT_TOKENS = 20_000_000


def grade_evidence(task: Task, path: str | Path) -> dict:
    """The verdict (as in verdict.json) on a dump. TaskError names file, row and field where the file cannot be used."""
    from suite.grade import grade_task

    runs = runs_of_dump(task, Path(path))
    present = {run.arm for run in runs}
    absent = [control for control in task.controls if control.name not in present]
    kept = tuple(control for control in task.controls if control.name in present)
    return cap_for_absent_controls(grade_task(_with_controls(task, kept), runs), absent)


def _with_controls(task: Task, controls: tuple) -> Task:
    return task if len(controls) == len(task.controls) else task.model_copy(update={"controls": controls})


def cap_for_absent_controls(verdict: dict, absent: list) -> dict:
    """The verdict with absent controls listed; where there are any, PASS and FAIL become INCONCLUSIVE, with what they
    would have been."""
    if not absent:
        return verdict
    names = ", ".join(control.name for control in absent)
    claims = [_capped(claim, names) for claim in verdict["claims"]]
    controls = [*verdict["controls"], *(_absent_row(control) for control in absent)]
    return _capped(verdict, names) | {"claims": claims, "controls": controls}


def _absent_row(control) -> dict:
    """A control in verdict.json, with an outcome of its own: neither held nor broken."""
    return {
        "name": control.name, "kind": control.kind, "estimand": control.estimand, "at": dict(control.at),
        "estimate": None, "interval": None, "accept": list(control.accept), "num_seeds": 0, "outcome": "absent",
        "reason": f"the evidence file has no rows with arm {control.name}",
    }  # fmt: skip


def _capped(judged: dict, names: str) -> dict:
    if judged["verdict"] not in ("PASS", "FAIL"):
        return dict(judged)
    why = f"controls absent from the evidence file: {names}; otherwise {judged['verdict']}: {judged['reason']}"
    resolve = {"resolve": f"add rows with arm {names}"} if "resolve" in judged else {}
    return judged | {"verdict": "INCONCLUSIVE", "reason": why} | resolve


# ---- from rows to runs ---------------------------------------------------------------------------------------------


@dataclass
class CellSums:
    """Rollouts of one cell, folded into sums whenever enough tokens have gathered; float32 copies of the tokens while
    they fit."""

    sums: list[dict] = field(default_factory=list)
    pending: list[Rollout] = field(default_factory=list)
    tokens: list[tuple] = field(default_factory=list)

    def fold(self, keep_tokens: bool) -> None:
        if not self.pending:
            return
        mu, pi = (
            np.concatenate([getattr(r, name) for r in self.pending])
            for name in ("rollout_logprobs", "trainer_logprobs")
        )
        lengths = [r.rollout_logprobs.size for r in self.pending]
        part = prompt_sums(
            [r.prompt_id for r in self.pending],
            lengths,
            mu,
            pi,
            [r.reward for r in self.pending],
            [r.truncated for r in self.pending],
        )
        self.sums = [concat_sums([*self.sums, part])]
        if keep_tokens:
            self.tokens.append((mu.astype(np.float32), pi.astype(np.float32), lengths))
        self.pending = []

    def statistics(self) -> dict:
        if not self.tokens:
            return {}
        mu, pi, lengths = (np.concatenate(column) for column in zip(*self.tokens, strict=True))
        return token_statistics(mu, pi, lengths)


def runs_of_dump(task: Task, path: Path) -> list[Run]:
    """One Run per (arm, grid point, seed) of the file, sorted. Memory is bounded by prompts and rollouts, not by
    tokens."""
    if task.protocol not in OFFLINE:
        raise UserError(
            f"{task.id}: --evidence grades tasks of protocol {' or '.join(OFFLINE)}; this one is {task.protocol!r}"
        )
    cells, rewarded_only = _gather(task, path), any(g.estimand == "reward_mean" for g in task.grade.values())
    if not cells:
        raise TaskError(path, "rows", "none", "one row per rollout", "the file is empty")
    _check_arms(task, path, cells)
    if rewarded_only:
        _check_rewards(path, cells)
    digest = sha256_file(path)
    return [_run(task, path, digest, key, cells[key]) for key in sorted(cells)]


def _gather(task: Task, path: Path) -> dict[tuple, CellSums]:
    cells: dict[tuple, CellSums] = {}
    seen: set[bytes] = set()
    pending = total = 0
    for row_number, row in read_rows(path):
        rollout = check_row(task, path, row_number, row)
        _refuse_duplicate(path, row_number, rollout, seen)
        cells.setdefault(rollout.cell, CellSums()).pending.append(rollout)
        pending, total = pending + rollout.rollout_logprobs.size + 1, total + rollout.rollout_logprobs.size
        if pending >= FLUSH_TOKENS:
            _fold_all(cells, total)
            pending = 0
    _fold_all(cells, total)
    return cells


def _fold_all(cells: dict[tuple, CellSums], total: int) -> None:
    for cell in cells.values():
        cell.fold(keep_tokens=total <= KEPT_TOKENS)
        if total > KEPT_TOKENS:
            cell.tokens = []


def _refuse_duplicate(path: Path, row_number: int, rollout: Rollout, seen: set[bytes]) -> None:
    if rollout.sample_id is None:
        return
    key = hashlib.blake2b(repr((rollout.cell, rollout.prompt_id, rollout.sample_id)).encode(), digest_size=16).digest()
    if key in seen:
        found = {
            "arm": rollout.arm,
            "seed": rollout.seed,
            "prompt_id": rollout.prompt_id,
            "sample_id": rollout.sample_id,
        }
        raise row_error(path, row_number, "sample_id", found, "each (arm, seed, grid point, prompt_id, sample_id) once")
    seen.add(key)


def required_arms(task: Task) -> list[str]:
    """Arms that the grade block speaks of, controls aside, sorted."""
    controls = {control.name for control in task.controls}
    return sorted({name for grade in task.grade.values() for name in grade.contrast.names} - controls)


def _check_arms(task: Task, path: Path, cells: dict[tuple, CellSums]) -> None:
    required = required_arms(task)
    missing = [arm for arm in required if arm not in {arm for arm, _, _ in cells}]
    if missing:
        found = sorted({arm for arm, _, _ in cells})
        raise TaskError(
            path,
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
                path,
                "seed" + (f" at {at}" if at else ""),
                seeds,
                "the same seeds in every arm: they are compared seed by seed",
            )


def _check_rewards(path: Path, cells: dict[tuple, CellSums]) -> None:
    for (arm, _, seed), cell in cells.items():
        rewarded, rollouts = (int(cell.sums[0][column].sum()) for column in ("num_rewarded", "num_rollouts"))
        if rewarded != rollouts:
            raise TaskError(
                path,
                f"reward of arm {arm}, seed {seed}",
                f"{rewarded} of {rollouts} rollouts rewarded",
                "all of them",
                "a claim of this task is about the reward",
            )


def _run(task: Task, path: Path, digest: str, key: tuple, cell: CellSums) -> Run:
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
    record = {
        "schema": RECORD_SCHEMA,
        "status": "success",
        "task": {
            "id": task.id,
            "version": task.version,
            "grade_version": task.grade_version,
            "text": task.source.text if task.source else "",
        },
        "cell": {
            "name": name,
            "arm": arm,
            "point": point,
            "seed": seed,
            "settings": {},
            "is_control": arm in {control.name for control in task.controls},
        },
        "run_key": hashlib.sha256(f"{digest} {name}".encode()).hexdigest(),
        "limit": None,
        "evidence_parts": False,
        "environment": {"evidence": {"file": path.name, "sha256": digest}},
        "fingerprint": f"evidence-{digest[:12]}",
        "precision_asked": {},
        "precision_executed": {},
        "counts": counts,
        "series_summary": series,
        "timings": {},
        "error": None,
        "started_utc": None,
        "finished_utc": None,
    }
    return Run(path, record, [{"step": 0, **counts, **series}], summary)


def _grid_value(task: Task, axis: str, label: str) -> Any:
    return next(value for value in task.grid[axis] if axis_label(value) == label)
