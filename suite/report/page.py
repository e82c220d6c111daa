"""results/index.html, and a page per published task: static, no server, no network; templates/ holds how they look."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup, escape

from suite.record.run import Run
from suite.report.figures.svg import scientific
from suite.report.findings import Finding
from suite.report.interval_plot import interval_plot
from suite.report.matrix import claim_lines
from suite.report.rows import GRADED, TIERS, Row, headlines
from suite.report.tables import PRECISIONS, ArmTable, Matrix, cells
from suite.report.templating import render_page

PAGES = "pages"  # below results/; the page of a task is <task>.html


@dataclass(frozen=True)
class Place:
    """What one machine gave for a task. figures: (path below results/, caption)."""

    fingerprint: str
    verdict: dict
    runs: list[Run] = field(repr=False)
    figures: list[tuple[str, str]] = field(default_factory=list)
    arms: ArmTable | None = None


def render(rows: list[Row], figures: list[tuple[str, str, str, str]], matrices: list[tuple[str, str, Matrix]],
           findings: list[Finding] = (), titles: dict[str, str] | None = None) -> str:
    """The page of all results. figures: (task, hardware, path below results/, caption); matrices: (task, hardware, matrix);
    titles: of the paper's claims."""
    published = {row.task for row in rows if row.fingerprint}
    present = {(row.verdict or "REPORTED") if row.fingerprint else "NOT_RUN" for row in rows}

    def task_link(task: str) -> Markup:
        return Markup('<a href="{}">{}</a>').format(f"{PAGES}/{task}.html", task) if task in published else escape(task)

    return render_page(
        "suite.report", "results.html.j2", rows=rows, published=bool(published), figures=figures, matrices=matrices, findings=findings,
        headlines=headlines(rows) or [("all", "no tasks")], claims=claim_lines(rows, titles or {}), cells=cells, plot=interval_plot,
        tiers=[tier for tier in TIERS if any(row.tier == tier for row in rows)], task_link=task_link, precisions=PRECISIONS,
        words=[word for word in (*GRADED, "REPORTED") if word in present], scientific=scientific,
        machines=sorted({row.fingerprint for row in rows if row.fingerprint}),
    )  # fmt: skip


def render_task(task: str, rows: list[Row], places: list[Place]) -> str:
    """The page of one published task. rows: of all tasks. The text is that of the newest run's record."""
    mine = [row for row in rows if row.task == task and row.fingerprint]
    newest = max((run for place in places for run in place.runs), key=lambda run: str(run.record.get("started_utc")), default=None)
    about = newest.record["task"] if newest else {}
    return render_page(
        "suite.report", "task.html.j2", task=task, title=mine[0].title if mine else "", tier=mine[0].tier if mine else "", cells=cells,
        plot=interval_plot, text=about.get("text", ""), version=about.get("version", ""), places=[_shown(place, mine) for place in places],
    )  # fmt: skip


def _shown(place: Place, rows: list[Row]) -> dict:
    verdict = place.verdict
    return {
        "fingerprint": place.fingerprint, "verdict": verdict["verdict"], "reason": verdict["reason"], "controls": verdict["controls"],
        "rows": [row for row in rows if row.fingerprint == place.fingerprint], "figures": place.figures, "arms": place.arms,
        "precision": _precision(place.runs), "runs": [_run(run) for run in place.runs],
    }  # fmt: skip


def _precision(runs: list[Run]) -> dict | None:
    """What the engines of each arm ran in; where launches of an arm differ, all that was seen."""
    seen: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for point, value in run.record["precision_executed"].items():
            values = seen.setdefault(run.arm, {}).setdefault(point, [])
            values += [value] if value not in values else []
    points = sorted({point for found in seen.values() for point in found})
    return {"arms": list(seen), "lines": [(point, [", ".join(found.get(point, [])) for found in seen.values()]) for point in points]} if points else None


def _run(run: Run) -> dict:
    record = run.record
    seconds, tokens = record["timings"].get("total_s"), record["counts"].get("num_response_tokens")
    return {
        "cell": record["cell"]["name"], "status": record["status"], "started": (record.get("started_utc") or "").replace("T", " ").rstrip("Z"),
        "minutes": "" if seconds is None else f"{seconds / 60:.1f}", "tokens": "" if tokens is None else f"{tokens:,}",
        "key": record["run_key"][:12],
    }  # fmt: skip
