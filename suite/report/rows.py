"""Published verdicts and the tasks -> the rows of every table, and the headline above them.

One row per claim and fingerprint; a claim of a task that was never run, or was run at an older version, is a NOT_RUN
row. Rows are ordered by tier (paper, node, desk), then by claim, never by verdict.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from suite.archive.published import VERDICT, read_verdict, records_of
from suite.archive.publishing import fingerprint_folders

TIERS = ("paper", "node", "desk")
GRADED = ("PASS", "FAIL", "INCONCLUSIVE", "NOT_RUN", "INVALID", "ERROR")
_SAYS_NOTHING = ("INVALID", "ERROR", "NOT_RUN")  # of a whole task: no claim of it can stand as a pass


@dataclass(frozen=True)
class Row:
    """One claim on one fingerprint. `verdict` is None for kind `report`; `fingerprint` is None if never run."""

    claim: str  # the paper's claim, C1 ... C37
    claim_id: str  # the task's own id for it
    statement: str
    kind: str
    task: str
    title: str
    tier: str
    fingerprint: str | None
    estimand: str
    unit: str
    estimate: object
    interval: list | None
    accept: list | None
    paper_value: object
    paper_unit: str
    paper_source: str
    num_seeds: int | None
    verdict: str | None
    reason: str
    consistent_with_paper: bool | None
    chance: float  # probability of a false PASS, at most; 0 if nothing was estimated

    @property
    def order(self) -> tuple:
        return TIERS.index(self.tier), claim_number(self.claim), self.task, self.claim_id, self.fingerprint or ""


def claim_number(claim: str) -> int:
    """C7 -> 7, so that C10 comes after C2."""
    return int(re.sub(r"\D", "", claim) or 0)


def result_rows(results_dir: Path, tasks: dict) -> list[Row]:
    """All rows, in order. A published folder whose task is gone has no row; `verify` names it."""
    rows, shown = [], set()
    for folder in fingerprint_folders(results_dir):
        task = tasks.get(folder.parent.name)
        if task is None:
            continue
        verdict = read_verdict(folder / VERDICT)
        if verdict["task_version"] == task.version:
            with records_of(folder / VERDICT):
                rows += [_graded_row(task, claim, verdict, folder.name) for claim in verdict["claims"]]
        else:
            reason = f"stale: published at version {verdict['task_version']}, the task is at version {task.version}"
            rows += [_empty_row(task, claim, reason, folder.name) for claim in task.claims]
        shown.add(task.id)
    for task in tasks.values():
        if task.id not in shown:
            rows += [_empty_row(task, claim, "no published run") for claim in task.claims]
    return sorted(rows, key=lambda row: row.order)


def _graded_row(task, claim: dict, verdict: dict, fingerprint: str) -> Row:
    declared = next((c for c in task.claims if c.id == claim["id"]), None)
    beside = [claim.get("remark"), claim.get("event_rule")]
    word, reason = claim["verdict"], "; ".join(filter(None, (claim["reason"], *beside)))
    if claim["kind"] == "report":
        word, reason = None, "; ".join(filter(None, beside))
    elif verdict["verdict"] in _SAYS_NOTHING and word != verdict["verdict"]:
        word, reason = verdict["verdict"], "; ".join(filter(None, (verdict["reason"], reason)))
    return Row(
        claim=declared.about if declared else claim["id"].split("-")[0],
        claim_id=claim["id"],
        statement=claim["statement"],
        kind=claim["kind"],
        task=task.id,
        title=task.title,
        tier=task.tier,
        fingerprint=fingerprint,
        estimand=claim["estimand"] or "",
        unit=claim["unit"] or "",
        estimate=claim["estimate"],
        interval=claim["interval"],
        accept=claim["accept"],
        paper_value=claim["paper_value"],
        paper_unit=_paper(declared, "unit"),
        paper_source=claim["paper_source"] or "",
        num_seeds=claim["num_seeds"] if claim["estimand"] else None,
        verdict=word,
        reason=reason,
        consistent_with_paper=claim["consistent_with_paper"],
        chance=_chance(task, claim),
    )


def _empty_row(task, claim, reason: str, fingerprint: str | None = None) -> Row:
    grade = task.grade.get(claim.id)
    return Row(
        claim=claim.about,
        claim_id=claim.id,
        statement=claim.statement,
        kind=claim.kind,
        task=task.id,
        title=task.title,
        tier=task.tier,
        fingerprint=fingerprint,
        estimand=grade.estimand if grade else "",
        unit="",
        estimate=None,
        interval=None,
        accept=list(grade.accept) if grade and grade.accept else None,
        paper_value=claim.paper.value if claim.paper else None,
        paper_unit=_paper(claim, "unit"),
        paper_source=_paper(claim, "source"),
        num_seeds=None,
        verdict=None if claim.kind == "report" else "NOT_RUN",
        reason=reason,
        consistent_with_paper=None,
        chance=0.0,
    )


def _paper(claim, key: str) -> str:
    return getattr(claim.paper, key) if claim is not None and claim.paper else ""


def _chance(task, claim: dict) -> float:
    """The one-sided error of the claim's interval; counts and claims without an estimate cannot pass by chance."""
    grade = task.grade.get(claim["id"])
    if claim["estimate"] is None or claim["kind"] in ("count", "report") or grade is None:
        return 0.0
    if grade.interval is not None and grade.interval.method == "exact":
        return 0.0
    level = grade.interval.level if grade.interval is not None else 0.90
    return (1 - level) / 2


def headline(rows: list[Row]) -> str:
    """ "k PASS, m FAIL, j INCONCLUSIVE, u NOT_RUN of N claims", with the false passes to expect beside it."""
    graded = [row for row in rows if row.verdict is not None]
    counts = Counter(row.verdict for row in graded)
    words = [f"{counts[word]} {word}" for word in GRADED if counts[word] or word not in ("INVALID", "ERROR")]
    chance = sum(row.chance for row in graded)
    return f"{', '.join(words)} of {len(graded)} claims; by chance alone at most {chance:.2g} false passes expected"


def headlines(rows: list[Row]) -> list[tuple[str, str]]:
    """The headline of all rows, then one per tier: [("all", ...), ("paper", ...), ...]."""
    groups = [("all", rows)] + [(tier, [row for row in rows if row.tier == tier]) for tier in TIERS]
    return [(name, headline(group)) for name, group in groups if group]
