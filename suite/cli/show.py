"""How tasks, claims, plans and verdicts look on a terminal. Reads values, prints tables, decides nothing."""

import json
import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.cli.layout import COLUMNS, print_layout
from suite.errors import UserError
from suite.grade.arms import arm_label
from suite.grade.judge import short
from suite.spec.plan import ResolvedTask, arm_names
from suite.spec.strict_yaml import TaskErrors, read_yaml
from suite.spec.task import Claim, Contrast, Task, axis_label
from suite.spec.validate import check, unpinned_inputs

TIERS = ("paper", "node", "desk")  # in the order of their weight
COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}


def summary(resolved: ResolvedTask) -> dict:
    """One task as one row, in plain values."""
    task = resolved.task
    graded = [claim for claim in task.claims if claim.kind != "report"]
    return {
        "id": task.id,
        "tier": task.tier,
        "version": task.version,
        "title": task.title,
        "protocol": task.protocol,
        "claims": sorted({claim.about for claim in task.claims}, key=_claim_number),
        "num_graded": len(graded),
        "num_cells": len(resolved.cells),
        "seeds": list(task.seeds),
        "needs": machine(task),
        "tags": list(task.tags),
    }


def machine(task: Task) -> str:
    """What one cell asks of a machine, in words."""
    wanted = task.resources
    if wanted.gpus == 0:
        return "any CPU"
    where = f"{wanted.nodes} nodes x " if wanted.nodes > 1 else ""
    return f"{where}{wanted.gpus} GPU{'s' * (wanted.gpus > 1)} x {wanted.gpu_mem_gib:g} GiB" + (
        " or CPU" if wanted.cpu_ok else ""
    )


NARROW = 80  # columns below which a table would break every word


def print_list(tasks: list[ResolvedTask]) -> None:
    """One row a task; on a narrow terminal a few lines each."""
    console, rows = _console(), [summary(one) for tier in TIERS for one in tasks if one.task.tier == tier]
    if console.width < NARROW:
        for row in rows:
            about = f"{row['tier']}, {' '.join(row['claims'])}, {row['num_cells']} cells, {row['needs']}"
            console.print(f"[bold]{row['id']}[/]\n{escape(row['title'])}\n[dim]{about}[/]")
        return
    table = _table("task", "tier", "claims", "cells", "seeds", "machine", "title")
    for row in rows:
        counts = str(row["num_cells"]), str(len(row["seeds"]))
        table.add_row(row["id"], row["tier"], " ".join(row["claims"]), *counts, row["needs"], escape(row["title"]))
    console.print(table)


def print_heading(task: Task, num_cells: int) -> None:
    console = _console()
    console.print(f"[bold]{escape(task.id)}[/] ({task.tier} tier): {escape(task.title)}")
    budget = f", at most {task.budget.minutes:g} minutes" if task.budget else ""
    console.print(f"{num_cells} cells on {machine(task)}{budget}\n")


def print_task(resolved: ResolvedTask) -> None:
    """A task as it runs: claims with their accept regions, arms, grid, controls and resolved settings, and what is
    wrong with it.
    """
    console, task = _console(), resolved.task
    print_heading(task, len(resolved.cells))
    for claim in task.claims:
        console.print(f"[bold]{claim.id}[/] ({claim.kind}, about {claim.about}) {escape(claim.statement)}")
        for line in _claim_lines(task, claim):
            console.print(f"    {escape(line)}")
    console.print(
        f"\narms      {_joined(arm_names(task))}; vary: {_joined(task.vary) or 'nothing'}; seeds {_joined(task.seeds)}"
    )
    for path, values in task.grid.items():
        console.print(escape(f"grid      {path}: {', '.join(axis_label(value) for value in values)}"))
    for control in task.controls:
        where = f"{control.estimand} of {contrast_text(control.contrast)} in {region_text(control.accept)}"
        console.print(
            escape(
                f"control   {control.name} ({control.kind}, like {control.like}, "
                f"seeds {_joined(control.seeds)}): {where}"
            )
        )
    for path in unpinned_inputs(resolved):
        console.print(f"unpinned  {path}: verdicts are capped at INCONCLUSIVE until it is pinned")
    console.print("\nsettings shared by all arms (arms and grid go on top):")
    for line in _setting_lines({name: values for name, values in task.settings.items() if values}):
        console.print(f"    {escape(line)}")
    errors, _ = check(resolved)
    if errors:
        raise TaskErrors(errors)


def print_falls(task: Task, results: Path) -> None:
    """What the published launches of a task say beside its verdict (falls.py)."""
    from suite.cli import falls

    falls.print_falls(_console(), _table, task, results)


def _claim_lines(task: Task, claim: Claim) -> list[str]:
    lines = []
    if claim.paper is not None:
        lines.append(
            f"paper: {value_text(claim.paper.value)} {claim.paper.unit}; {claim.paper.source} ({claim.paper.level})"
        )
    grade = task.grade.get(claim.id)
    if grade is None:
        return lines
    at = ", ".join(f"{path.rsplit('.', 1)[-1]}={axis_label(value)}" for path, value in grade.at.items())
    text = f"{grade.estimand} of {contrast_text(grade.contrast)}" + (f" at {at}" if at else "")
    if grade.accept is not None:
        text += f"; accepted in {region_text(grade.accept)}, at least {grade.min_seeds} seeds"
    if grade.interval is not None:
        text += f"; {grade.interval.level:.0%} {grade.interval.method} over {grade.interval.unit}s"
    lines.append(text)
    if grade.tolerance is not None:
        lines.append(f"tolerance {grade.tolerance.level}: {grade.tolerance.derivation} ({grade.tolerance.date})")
    return lines


def is_claim(name: str) -> bool:
    """Whether a name is one of the paper's claims (C1 ... C37), or a task's claim about one (C19-order)."""
    return re.fullmatch(r"[cC]\d{1,2}(-.*)?", name) is not None


def print_claim(claim_id: str, tasks: dict[str, ResolvedTask], repo: Path) -> None:
    """A claim with the paper's value and source, the tasks that test it, and what is published for it by tier and
    hardware.
    """
    baselines, problems = read_yaml(repo / "baselines" / "paper.yaml")
    if problems:
        raise TaskErrors(problems)
    if claim_id not in baselines:
        raise UserError(f"no claim {claim_id}; there are: {', '.join(baselines)}")
    console, entry = _console(), baselines[claim_id]
    console.print(f"[bold]{claim_id}[/] {escape(str(entry.get('title', '')))}")
    for key, value in entry.items():
        if key != "title":
            console.print(escape(f"    {key}: {value_text(value)}"))
    table = _table("task", "tier", "claim", "hardware", "estimate", "interval", "verdict")
    for task in sorted((one.task for one in tasks.values()), key=lambda task: (TIERS.index(task.tier), task.id)):
        for claim in task.claims:
            if claim.about == claim_id:
                for row in _published_rows(task, claim, repo / "results") or [("not published", "", "", "")]:
                    table.add_row(task.id, task.tier, claim.id, *row)
    console.print(table)


def _published_rows(task: Task, claim: Claim, results: Path) -> list[tuple[str, str, str, str]]:
    from suite.archive.published import read_verdict

    rows = []
    for path in sorted((results / task.id).glob("*/verdict.json")):
        verdict = read_verdict(path)
        for found in verdict["claims"]:
            if found["id"] == claim.id:
                interval = region_text(found["interval"]) if found.get("interval") else ""
                rows.append(
                    (
                        escape(str(verdict["fingerprint"])),
                        number_text(found.get("estimate")),
                        interval,
                        escape(found.get("verdict") or "reported"),
                    )
                )
    return rows


def print_plan(resolved: ResolvedTask, power: dict[str, dict]) -> None:
    """Cells, what they need, and what the design can decide. `power`: claim id -> {p_pass_if_true, p_fail_if_null}."""
    task, cells = resolved.task, resolved.cells
    console, wanted = _console(), task.resources
    print_heading(task, len(cells))
    table = _table("cell", "rollout", "train", "seed", "run key")
    for cell in cells:
        pair = (cell.get("precision.rollout", None) or "-", cell.get("precision.train", None) or "-")
        table.add_row(escape(cell.name), *pair, str(cell.seed), cell.run_key()[:12])
    console.print(table)
    memory = f"{wanted.gpu_mem_gib:g} GiB per GPU" if wanted.gpus else "no GPU"
    console.print(f"needs {machine(task)}: {memory}, {wanted.disk_gib:g} GiB of disk")
    print_layout(console, _table(*COLUMNS), task, cells)
    if task.budget:
        gpu_hours = wanted.gpus * wanted.nodes * task.budget.minutes / 60
        console.print(
            f"budget {task.budget.minutes:g} minutes for all cells"
            + (f", {gpu_hours:.1f} GPU-hours" if wanted.gpus else "")
        )
    table = _table("claim", "kind", "seeds", "accept", "P(PASS) if the paper is right", "P(FAIL) if no effect")
    for claim in task.claims:
        grade = task.grade.get(claim.id)
        if claim.kind != "report" and grade is not None:
            chances = [(power.get(claim.id) or {}).get(name) for name in ("p_pass_if_true", "p_fail_if_null")]
            shown = ["-" if chance is None else f"{chance:.2f}" for chance in chances]
            region = region_text(grade.accept) if grade.accept else contrast_text(grade.contrast)
            table.add_row(claim.id, claim.kind, f"{len(task.seeds)} of {grade.min_seeds}", escape(region), *shown)
    console.print(table)
    for path in unpinned_inputs(resolved):
        console.print(f"unpinned: {path} (caps every verdict at INCONCLUSIVE)")


def print_rehearsal(task: Task, runs: list, breaches: dict[str, list[str]]) -> None:
    """What every cell of a rehearsal did, and whether its engines ran in the dtypes that it asks for."""
    console = _console()
    table = _table("cell", "status", "response tokens", "k3", "sampler", "precision as executed")
    for run in runs:
        name, executed = run.record["cell"]["name"], run.record["precision_executed"]
        k3 = run.record["series_summary"].get("k3_nats_per_token")
        table.add_row(
            escape(name), run.status, str(run.record["counts"]["num_response_tokens"]), "-" if k3 is None else f"{k3:.1e}",
            executed.get("sampler_engine", "-"), escape("; ".join(breaches[name]) or "as asked"),
        )  # fmt: skip
    console.print(table)
    model = runs[0].record["cell"]["settings"]["model"]["id"]
    console.print(f"{task.id}: a rehearsal of {len(runs)} cells on {model}; nothing of it is kept or graded")


def print_sections(sections: list) -> None:
    """Tables of suite/report/side_by_side.py."""
    console = _console()
    for section in sections:
        table = _table(*section.columns)
        for row in section.rows:
            table.add_row(*map(escape, row))
        console.print(f"[bold]{escape(section.title)}[/bold]")
        console.print(table)


def print_findings(findings: list[dict], fingerprint: str) -> None:
    """What `doctor` found: one row per check."""
    table = _table("check", "", "found", "needed")
    for finding in findings:
        mark = "[green]ok[/]" if finding["ok"] else "[red]no[/]"
        table.add_row(
            *(
                escape(str(finding["name"])),
                mark,
                escape(str(finding["detail"])),
                escape(str(finding.get("needed") or "")),
            )
        )
    console = _console()
    console.print(f"this machine: {escape(fingerprint)}")
    console.print(table)


def print_verdict(verdict: dict) -> None:
    """A verdict as a table: estimate, interval, accept region, paper's value and reason of every claim, then the
    controls.
    """
    console = _console()
    table = _table("claim", "estimate", "interval", "accepted", "paper", "seeds", "verdict", "reason")
    for claim in verdict["claims"]:
        word = claim.get("verdict") or "reported"
        table.add_row(
            escape(claim["id"]),
            number_text(claim.get("estimate")),
            region_text(claim.get("interval")),
            region_text(claim.get("accept")),
            escape(value_text(claim.get("paper_value"))),
            str(claim.get("num_seeds", "")),
            _coloured(word),
            escape(claim.get("reason") or ""),
        )
    console.print(table)
    for claim in verdict["claims"]:
        if claim.get("event_rule"):
            console.print(f"{escape(claim['id'])}: {claim['event_rule']}")
    _print_metrics(console, verdict.get("metrics", []))
    for control in verdict["controls"]:
        mark = {"holds": "[green]holds[/]", "broken": "[red]broken[/]"}.get(control["outcome"], control["outcome"])
        console.print(f"{escape(control['name'])}: {mark}; {escape(control['reason'] or '')}")
    console.print(
        f"\n{verdict['task']} on {escape(verdict['fingerprint'] or 'no machine')}: "
        f"{_coloured(verdict['verdict'])}. {escape(verdict.get('reason') or '')}"
    )


MOST_ARMS_SHOWN = 6


def _print_metrics(console: Console, rows: list[dict]) -> None:
    """The metrics of a few arms side by side; more of them stand in verdict.json alone."""
    if not 0 < len(rows) <= MOST_ARMS_SHOWN:
        return
    table = _table("mean over launches", *(arm_label(row) for row in rows))
    for name in rows[0]["values"]:
        table.add_row(name, *(number_text(row["values"][name]) for row in rows))
    console.print(table)


def contrast_text(contrast: Contrast) -> str:
    """A contrast in words: `bf16 / fp16`, `a - b`, `a < b < c`, or the arm."""
    signs = {"arm": "", "ratio": " / ", "difference": " - ", "order": " < "}
    return signs[contrast.form].join(contrast.names)


def region_text(bounds) -> str:
    """`[16, 128]`; an open end is shown as an infinity, no region as nothing."""
    if bounds is None:
        return ""
    low, high = bounds
    return f"[{'-inf' if low is None else number_text(low)}, {'inf' if high is None else number_text(high)}]"


def number_text(value) -> str:
    """Four significant digits, counts in full; nothing for null."""
    return "" if value is None else short(value) if isinstance(value, (int, float)) else str(value)


def value_text(value) -> str:
    """A baseline value as text: number, list, mapping, or words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_text(inner) for inner in value) + "]"
    return "no number" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _setting_lines(values: dict, prefix: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _setting_lines(value, f"{prefix}{name}.")
        elif value is not None:
            lines.append(f"{prefix}{name} = {json.dumps(value)}")
    return lines


def _claim_number(claim_id: str) -> int:
    return int(claim_id[1:])


def _joined(numbers) -> str:
    return ", ".join(map(str, numbers))


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word}[/]" if word in COLOURS else word


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _console() -> Console:
    """As wide as the terminal; wide enough for whole rows where the output goes to a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160, soft_wrap=False)
