"""Records to verdicts: three values with a reason, or the plain statement that nothing can be said. No torch.

    PASS          every planned launch is there, every interval inside the accept region, the controls hold, enough seeds
    FAIL          every planned launch is there, an interval disjoint from the region, with at least two seeds (counts
                  without noise: as they are)
    INCONCLUSIVE  everything else, with the reason and what would resolve it
    INVALID       a control, the precision as executed or the one-factor check failed
    ERROR         a run that the claim needs failed
    NOT_RUN       a run that the claim needs is not there

A task is the first of INVALID, ERROR, NOT_RUN, FAIL, INCONCLUSIVE, PASS that one of its graded claims has. A verdict
is a function of task and records alone: no clock, no order of files, no machine enters it.

The way through: planned, sameness and fitness (which records count), events and launches (records -> one value per
launch), contrasts (values -> intervals), judge (intervals -> the
verdict of a claim), controls, and here the verdict of the task. power says beforehand what a design can decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import suite
from suite.errors import UserError
from suite.files import write_json
from suite.grade.arms import arm_metrics
from suite.grade.contrasts import Levels, in_sequence, shares_of
from suite.grade.controls import grade_controls, unfinished
from suite.grade.fitness import violations
from suite.grade.judge import (
    Evidence,
    Judgement,
    below_floor,
    claim_row,
    disjoint,
    display_interval,
    event_rule,
    findings_of,
    judge,
    num_pairs,
    require_grade,
    too_many_skips,
)
from suite.grade.launches import FINISHED, need_of
from suite.grade.planned import missing_launches, split_by_plan
from suite.grade.power import design_power  # noqa: F401  (offered where people look for it)
from suite.grade.sameness import name_across, same_runs, twins
from suite.spec.kinds import kind_of
from suite.spec.plan import ResolvedTask, canonical_json, resolve_task
from suite.spec.reading import load_task
from suite.spec.task import Task
from suite.spec.validate import unpinned_inputs

SCHEMA = 1
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 10, "ERROR": 11, "NOT_RUN": 12, "INVALID": 13}
ORDER = ("INVALID", "ERROR", "NOT_RUN", "FAIL", "INCONCLUSIVE", "PASS")
WEAK_TOLERANCE = "P5"
NOT_PLANNED = "the task does not plan this cell"


@dataclass(frozen=True)
class Needed:
    """A task of `needs`, resolved or not, and its runs."""

    task: Task | ResolvedTask
    runs: list


def grade_task(task, runs: list, needed: dict[str, Needed] | None = None, foreign: bool = False) -> dict:
    """The verdict on one fingerprint, laid out as verdict.json.

    runs: those of this task. needed: those of the tasks in `needs`, by id. Runs of another version of their task are left
    out; runs of cells that the task does not plan are listed and not counted. foreign: rollouts of another framework,
    which know nothing of settings and precision. Raises UserError if the runs carry several fingerprints
    (grade_by_fingerprint keeps them apart).
    """
    resolved = resolve_task(task)
    task, needed = resolved.task, {name: replace(need, task=resolve_task(need.task)) for name, need in (needed or {}).items()}
    tasks = {name: need.task.task for name, need in needed.items()}
    runs, strangers = ([], []) if kind_of(task).compares else split_by_plan(task, _of_version(task, runs))
    sorted_out = {name: split_by_plan(tasks[name], _of_version(tasks[name], need.runs)) for name, need in needed.items()}
    others = {name: counted for name, (counted, _) in sorted_out.items()}
    everything = runs + [run for name in task.needs for run in others.get(name, [])]
    strangers = strangers + [run for name in task.needs for run in sorted_out.get(name, ([], []))[1]]
    fingerprints = sorted({run.fingerprint for run in everything})
    if len(fingerprints) > 1:
        raise UserError(f"{task.id}: runs of different machines cannot be graded together: {', '.join(fingerprints)}")
    broken = violations(resolved, runs, foreign) + [
        (f"{name}-{arm}", f"{name}: {line}") for name in others for arm, line in violations(needed[name].task, others[name])
    ]
    from_others = [run for found in others.values() for run in found]
    broken += same_runs(from_others, name_across, across_seeds_only=True)
    unpinned = unpinned_inputs(resolved) + [f"{name}: {path}" for name in needed for path in unpinned_inputs(needed[name].task)]
    evidence = Evidence(task, runs, others, Levels(0.90, 0.90), tuple(unpinned), tasks)
    controls = grade_controls(evidence)
    for name in needed:
        controls += _controls_of_needed(name, replace(evidence, task=tasks[name], runs=others[name]))
    controls = _said_once(controls, twins([run for run in from_others if run.is_control]))
    rows: dict[str, dict] = {}
    for claim in in_sequence(task):
        rows[claim.id] = _grade_claim(evidence, claim, controls, broken, tuple(name for name, row in rows.items() if _excluded(row)))
    claims = [rows[claim.id] for claim in task.claims]
    verdict, reason = _of_task([row for row in claims if row["kind"] != "report"], controls, everything, len(strangers))
    environment = everything[0].record.get("environment") or {} if everything else {}
    return {
        "schema": SCHEMA,
        "task": task.id,
        "task_version": task.version,
        "grade_version": task.grade_version,
        "tier": task.tier,
        "fingerprint": fingerprints[0] if fingerprints else None,
        "verdict": verdict,
        "reason": reason,
        "claims": claims,
        "metrics": arm_metrics(task, runs),
        "controls": controls,
        "runs": [_run_row(run) for run in everything] + [_run_row(run) | {"not_counted": NOT_PLANNED} for run in strangers],
        "environment": environment,
        "suite": _suite_block(everything),
    }


def with_needed(task, runs_of: Callable[[str], list]) -> dict[str, Needed]:
    """The tasks in `needs`, as the checkout has them, with the runs that `runs_of` finds for their ids."""
    resolved = resolve_task(task)
    return {name: Needed(resolved.needed.get(name) or load_task(name), runs_of(name)) for name in resolved.task.needs}


def grade_by_fingerprint(task, runs: list, needed: dict[str, Needed] | None = None) -> dict[str, dict]:
    """One verdict per fingerprint: cells of different machines are never mixed. Empty without runs."""
    task, needed = resolve_task(task), needed or {}
    everything = [*runs, *(run for need in needed.values() for run in need.runs)]
    return {
        fingerprint: grade_task(
            task, _on(fingerprint, runs), {name: replace(n, runs=_on(fingerprint, n.runs)) for name, n in needed.items()}
        )
        for fingerprint in sorted({run.fingerprint for run in everything})
    }


def write_verdict(verdict: dict, runs_dir: Path) -> Path:
    """Put verdict.json into the task's folder and a copy of it beside all tasks as last.json. Returns the former."""
    path = Path(runs_dir) / verdict["task"] / "verdict.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, verdict)
    write_json(Path(runs_dir) / "last.json", verdict)
    return path


def verdict_line(verdict: dict, path: Path | str) -> str:
    """The last line of `suite reproduce`, which scripts read."""
    graded = [row for row in verdict["claims"] if row["kind"] != "report"]
    passed = sum(row["verdict"] == "PASS" for row in graded)
    return (
        f"VERDICT task={verdict['task']} verdict={verdict['verdict']} claims={passed}/{len(graded)} verdict_file={path}"
    )


def _excluded(row: dict) -> bool:
    """Whether the numbers alone fail a claim."""
    open_ends = [end if end is not None else infinite for end, infinite in zip(row["interval_fail"] or (), (-math.inf, math.inf))]
    return row["kind"] != "report" and bool(open_ends) and row["accept"] is not None and disjoint(open_ends, row["accept"])


def _grade_claim(
    evidence: Evidence, claim, controls: list[dict], broken: list[tuple[str, str]], failed: tuple[str, ...]
) -> dict:
    if claim.kind == "report" and claim.id not in evidence.task.grade:
        return _bare_row(claim)
    grade = require_grade(evidence.task, claim)
    stated = grade.interval.level if grade.interval else 0.90
    levels = Levels.of(stated, shares_of(evidence.task, failed).get(claim.id, 1.0), num_pairs(grade))
    evidence, controls = _concerned(replace(evidence, levels=levels), grade, controls)
    compared = findings_of(evidence, claim, grade)
    row = claim_row(claim, grade, compared, display_interval(evidence, claim, grade))
    row["event_rule"] = event_rule(evidence, grade)
    if claim.kind == "report":
        return row | {"verdict": None, "reason": "reported, not graded", "resolve": "", "consistent_with_paper": None}
    missing = _nothing_to_judge(evidence, grade)
    judgement = missing or _capped(evidence, grade, judge(compared, grade, claim.kind), controls)
    guards = [control["name"] for control in controls]
    faults = [line for arm, line in broken if arm in grade.contrast.names or any(name == arm or name.startswith(arm + "-") for name in guards)]
    faults += [f"{control['name']}: {control['reason']}" for control in controls if control["outcome"] == "broken"]
    if faults:
        judgement = Judgement(
            "INVALID", "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        )
    return row | {"verdict": judgement.verdict, "reason": judgement.reason, "resolve": judgement.resolve}


def _concerned(evidence: Evidence, grade, controls: list[dict]) -> tuple[Evidence, list[dict]]:
    """What a claim of a comparison rests on: unpinned inputs and controls of the needed tasks whose arms it names."""
    task = evidence.task
    if not kind_of(task).compares:
        return evidence, controls
    named = {need_of(task, name) for name in grade.contrast.names}
    unpinned = tuple(path for path in evidence.unpinned if path.partition(": ")[0] in named)
    return replace(evidence, unpinned=unpinned), [row for row in controls if need_of(task, row["name"]) in named]


def _nothing_to_judge(evidence: Evidence, grade) -> Judgement | None:
    """ERROR or NOT_RUN where an arm of the claim has no finished run; a failed cell is an error also where other
    seeds finished.
    """
    for name in grade.contrast.names:
        runs = evidence.arm(name, grade.at)
        failed = [run for run in unfinished(runs) if run.status == "failed"]
        if failed:
            error = failed[0].record.get("error") or {}
            what = f"{error.get('class')} in {error.get('phase')}: {error.get('message')}"
            return Judgement(
                "ERROR", f"{failed[0].record['cell']['name']}: {what}", "run the task again; finished cells are kept"
            )
    for name in grade.contrast.names:
        if not any(run.status in FINISHED for run in evidence.arm(name, grade.at)):
            return Judgement("NOT_RUN", f"no finished run of {name}", f"suite run {need_of(evidence.task, name) or evidence.task.id}")
    return None


def _capped(evidence: Evidence, grade, judgement: Judgement, controls: list[dict]) -> Judgement:
    """What holds a verdict at INCONCLUSIVE: both ways for launches that are missing, a weak tolerance or an unpinned
    input, a PASS only for the rest.
    """
    if judgement.verdict in ("PASS", "FAIL"):
        missing = missing_launches(evidence.task, evidence.runs, evidence.other_tasks, evidence.other_runs, grade)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            return _cap(judgement, f"missing_launches: {shown}", "run them: a verdict rests on every planned launch")
        if grade.tolerance is not None and grade.tolerance.level == WEAK_TOLERANCE:
            return _cap(judgement, "weak_tolerance: its level is P5, judgement", "a tolerance with a better source")
        if evidence.unpinned:
            return _cap(judgement, f"unpinned_input: {', '.join(evidence.unpinned)} unknown", "pin it in the task file")
    if judgement.verdict == "PASS":
        if below := below_floor(evidence, grade):
            return _cap(judgement, below, "a run that learns")
        if skips := too_many_skips(evidence, grade):
            return _cap(judgement, skips, "a smaller loss scale or learning rate")
        unsure = [control for control in controls if control["outcome"] != "holds"]
        if unsure:
            text = "; ".join(f"{control['name']} {control['outcome']} ({control['reason']})" for control in unsure)
            return _cap(judgement, f"controls: {text}", "run the controls, or more seeds of them")
    return judgement


def _cap(judgement: Judgement, why: str, resolve: str) -> Judgement:
    return Judgement("INCONCLUSIVE", f"{why}; otherwise {judgement.verdict}: {judgement.reason}", resolve)


def _of_task(graded: list[dict], controls: list[dict], runs: list, num_strangers: int) -> tuple[str, str]:
    """The task's word and the sentence for it."""
    if not runs:
        more = f", but {num_strangers} records of cells that the task does not plan" if num_strangers else ""
        return "NOT_RUN", f"nothing recorded{more}"
    if not graded:
        return "INCONCLUSIVE", "no claim of this task is graded: it only reports"
    words = [row["verdict"] for row in graded]
    broken = [control for control in controls if control["outcome"] in ("broken", "error")]
    words += ["INVALID" if control["outcome"] == "broken" else "ERROR" for control in broken]
    word = next(word for word in ORDER if word in words)
    if word == "PASS":
        return word, f"all {len(graded)} graded claims pass and the controls hold"
    reasons = [f"{row['id']}: {row['reason']}" for row in graded if row["verdict"] == word]
    reasons += [f"{control['name']}: {control['reason']}" for control in broken]
    return word, reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def _bare_row(claim) -> dict:
    """A reported claim without a grade block: its statement and what the paper says."""
    empty = "estimand unit estimator estimate interval interval_method interval_fail display_interval accept remark"
    empty += " consistent_with_paper event_rule verdict"
    return dict.fromkeys(empty.split()) | {
        "id": claim.id,
        "kind": claim.kind,
        "statement": claim.statement,
        "at": {},
        "num_seeds": 0,
        "per_seed": [],
        "pairs": [],
        "paper_value": claim.paper.value if claim.paper else None,
        "paper_source": f"{claim.paper.source} ({claim.paper.level})" if claim.paper else None,
        "reason": "reported, not graded",
        "resolve": "",
    }


def _controls_of_needed(name: str, evidence: Evidence) -> list[dict]:
    """The controls of a needed task: what they say of its runs holds for whoever compares them."""
    return [row | {"name": f"{name}-{row['name']}"} for row in grade_controls(evidence)]


def _said_once(controls: list[dict], same: dict[str, str]) -> list[dict]:
    """A control whose run is that of another task's, as where nothing moves, is no second witness, and says so."""
    return [
        row | {"reason": f"{row['reason']} (the same run as {same[row['name']]})"} if row["name"] in same else row for row in controls
    ]


def _of_version(task, runs: list) -> list:
    return sorted((run for run in runs if run.record["task"]["version"] == task.version), key=_place)


def _run_row(run) -> dict:
    cell = run.record["cell"]
    return {
        "task": run.record["task"]["id"],
        "cell": cell["name"],
        "arm": run.arm,
        "seed": run.seed,
        "is_control": run.is_control,
        "run_key": run.record["run_key"],
        "status": run.status,
        "started_utc": run.record.get("started_utc"),
    }


def _suite_block(runs: list) -> dict:
    """Which revisions of the suite made the records: from them, so that a verdict can be recomputed anywhere. `commit` is
    that of the first run, `commits` are all of them; dirty if any had changes."""
    records = [run.record for run in runs]
    environments = [env for r in records for env in (r.get("environment"), *r.get("earlier_environments", [])) if env]
    states = [env.get("git") or {} for env in environments]
    commits = list(dict.fromkeys(state.get("revision") for state in states))
    dirty = [state.get("dirty") for state in states]
    return {
        "version": suite.__version__,
        "commit": commits[0] if commits else None,
        "commits": sorted(filter(None, commits)),
        "dirty": None if not any(known is not None for known in dirty) else any(dirty),
    }


def _place(run) -> tuple:
    return (
        run.is_control,
        run.arm,
        canonical_json(run.point),
        run.seed,
        str(run.record.get("started_utc")),
        run.record["run_key"],
    )


def _on(fingerprint: str, runs: list) -> list:
    return [run for run in runs if run.fingerprint == fingerprint]
