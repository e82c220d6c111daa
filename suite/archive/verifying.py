"""Recompute every published verdict from the published records and compare it with the one that stands there.

Every folder results/<task>/<fingerprint> is judged for itself, in this order:

    files      what is not as the manifest says, or has no place there, is named and not believed (published.py)
    records    which do not follow from the task of this checkout or from their own machine (ties.py)
    views      metrics, sums and summary of a run that contradict each other (views.py)
    verdict    recomputed from the records, and compared key by key

Remarks, which are no differences, say what a reader should know: planned cells that are not there, records that do not
say which weights they had. No torch, no figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from suite.archive import opening
from suite.archive.points import read_points
from suite.archive.published import (
    JUDGED,
    METRICS,
    POINTS,
    SUMMARY,
    VERDICT,
    exists,
    is_leaving,
    manifest_differences,
    read_published,
    read_verdict,
    records_of,
    run_folders,
)  # fmt: skip
from suite.archive.publishing import compute_verdict
from suite.archive.ties import missing_attempts, missing_cells, untied, untied_from_itself
from suite.archive.views import contradictions
from suite.door import FileError, look_through, printable, read_bytes, read_json
from suite.errors import UserError
from suite.record.run import Run
from suite.spec.kinds import kind_of
from suite.spec.plan import ResolvedTask, resolve_task

RELATIVE_TOLERANCE = 1e-9
GRADED_BY = ("suite", "version")  # which version of the suite graded: may differ, the numbers may not
GENERATED = ("RESULTS.md", "results.tex", "results.csv", "index.html")  # `report --check` compares these
WRITTEN = ("README.md",)  # by hand
_SHOWN = 8


@dataclass(frozen=True)
class Verified:
    """Folders that were checked; differences and remarks, one sentence each."""

    checked: list[Path] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def verify_published(target: str | None, results_dir: Path) -> Verified:
    """Check all published folders, those of one task, or those in a bundle (a file) or a folder like results/.

    Raises UserError for a bundle that cannot be opened, or a path that does not exist.
    """
    tasks = _tasks()
    if target is None:
        return verify_folder(results_dir, tasks)
    if target in tasks:
        return verify_folder(results_dir, tasks, target)
    path = Path(target)
    if path.is_dir():
        inside = path / "results"
        return verify_folder(inside if inside.is_dir() and not inside.is_symlink() else path, tasks)
    if path.exists() or path.is_symlink() or "/" in target or "." in target:
        with opening.opened(path) as results:
            return _named_after(verify_folder(results, tasks), results, path)
    return verify_folder(results_dir, tasks, target)


def _tasks() -> dict:
    from suite.spec.reading import load_all

    return load_all()


def _named_after(found: Verified, results: Path, bundle: Path) -> Verified:
    """Sentences about a bundle speak of the bundle, not of the folder in which it was looked at."""
    lines = [[line.replace(str(results), f"{bundle}: results") for line in lines] for lines in (found.differences, found.remarks)]
    return Verified(found.checked, *lines)


def verify_folder(results_dir: Path, tasks: Mapping, task_id: str | None = None) -> Verified:
    """Check a folder like results/: of one task, or of all with whatever else lies there."""
    if not results_dir.is_dir():
        return Verified()
    listing = look_through(results_dir.resolve())
    everything = {name: "a file" for name in listing.files} | listing.foreign
    folders = sorted({tuple(name.split("/")[:2]) for name in everything if name.count("/") >= 2 and not name.startswith("bench/")})
    folders = [pair for pair in folders if task_id in (None, pair[0])]
    checked, differences, remarks = [], [] if task_id else _strays(results_dir, everything), []
    for task, machine in folders:
        folder = results_dir / task / machine
        if f"{task}/{machine}/{VERDICT}" not in everything:
            differences.append(f"{folder}: records without a {VERDICT}; publish the task again")
            continue
        found = examine(folder, tasks)
        checked.append(folder)
        differences += found.differences
        remarks += found.remarks
    return Verified(checked, differences, remarks)


def _strays(results_dir: Path, everything: Mapping[str, str]) -> list[str]:
    """What lies above the folders of machines and is neither generated nor a result of `suite bench`."""
    found = []
    for name, kind in everything.items():
        parts = name.split("/")
        generated = name in GENERATED + WRITTEN or _is_page(parts, everything)
        if is_leaving(name) or len(parts) > 2 and parts[0] != "bench" or (generated and kind == "a file"):
            continue
        if parts[0] != "bench" or len(parts) != 2 or kind != "a file" or not name.endswith((".json", ".md")):
            found.append(f"{results_dir / printable(name)}: {kind} that is not published by `suite publish`")
        elif name.endswith(".json"):
            found += _bench_differences(results_dir / name)
        elif f"{name[:-3]}.json" not in everything:
            found.append(f"{results_dir / name}: a table without its {Path(name).stem}.json")
    return found


def _is_page(parts: list[str], everything: Mapping[str, str]) -> bool:
    """pages/<task>.html of a task that has results."""
    task = parts[-1].removesuffix(".html")
    return parts == ["pages", f"{task}.html"] and any(name.startswith(f"{task}/") and name.endswith(VERDICT) for name in everything)


def _bench_differences(path: Path) -> list[str]:
    """A table of `suite bench` must be the one that its figures give."""
    from suite.bench.tables import markdown

    try:
        with records_of(path):
            wanted = markdown(read_json(path)).encode()
        same = read_bytes(path.with_suffix(".md")) == wanted
    except FileError as problem:
        return [str(problem)]
    return [] if same else [f"{path.with_suffix('.md')}: not the table of {path.name}"]


def folder_differences(folder: Path, tasks: Mapping) -> list[str]:
    """What is wrong with one results/<task>/<fingerprint>, one sentence each; empty if all is as published."""
    return examine(folder, tasks).differences


def examine(folder: Path, tasks: Mapping) -> Verified:
    """One results/<task>/<fingerprint>. Raises nothing about what stands in it."""
    path, task = folder / VERDICT, tasks.get(folder.parent.name)
    try:
        differences, broken = manifest_differences(folder)
        published = None if VERDICT in broken else read_verdict(path)
    except FileError as problem:
        return Verified([folder], [*differences, str(problem)] if "differences" in locals() else [str(problem)])
    stale = _stale(path, task, published)
    resolved = resolve_task(task) if not stale or stale[0] == "grade_version" else None
    runs, lines, remarks = _examine_runs(folder, resolved, broken)
    differences += [*lines, *stale[1:]]
    if stale:
        return Verified([folder], differences, remarks)
    if judged := sorted(name for name in broken if name.rsplit("/", 1)[-1] in JUDGED):
        differences.append(f"{path}: not recomputed, since {len(judged)} files behind it are not to be believed, such as {judged[0]}")
    elif published is not None and runs is not None:
        differences += _verdict_differences(path, resolved, published, runs)
    return Verified([folder], differences, remarks)


def _stale(path: Path, task, published: dict | None) -> tuple[str, str] | tuple[()]:
    """(what has moved on, the sentence) where the task of the checkout is no longer that of the verdict, else ().

    The verdict is not compared then; its records still must agree with each other and with their machine.
    """
    if task is None:
        return "task", f"{path}: the task {path.parents[1].name!r} no longer exists in tasks/"
    for key, now, what in (("task_version", task.version, "run and publish"), ("grade_version", task.grade_version, "publish")):
        if published is not None and published[key] != now:
            return key, f"{path}: stale: {key} {published[key]}, the task is at {now}; {what} it again"
    return ()


def _verdict_differences(path: Path, resolved: ResolvedTask, published: dict, runs: list[Run]) -> list[str]:
    try:
        with records_of(path.parent):
            computed = json.loads(json.dumps(compute_verdict(resolved, path.parent.name, path.parents[2], runs)))
    except UserError as problem:
        return [f"{path}: cannot be recomputed: {problem}"]
    for verdict in (published, computed):
        if isinstance(verdict.get(GRADED_BY[0]), dict):
            verdict[GRADED_BY[0]] = verdict[GRADED_BY[0]] | {GRADED_BY[1]: "any"}
    return [f"{path}: {line}" for line in compare(published, computed)]


def _examine_runs(folder: Path, resolved: ResolvedTask | None, broken: set[str]) -> tuple[list[Run] | None, list[str], list[str]]:
    """(the runs, or None where one cannot be read; what is wrong with them; remarks). None: the task is another by now."""
    cells = {cell.name: cell for cell in resolved.cells} if resolved else {}
    runs, lines, whole = [], [], True
    folders = run_folders(folder)
    for place in folders:
        inside = place.relative_to(folder).as_posix()
        if any(name.startswith(f"{inside}/") and not name.endswith(POINTS) for name in broken):
            continue
        try:
            runs.append(run := read_published(place))
            lines += [f"{place}: {line}" for line in (untied(run, resolved.task, cells) if resolved else untied_from_itself(run))]
            with records_of(place):
                points = {} if f"{inside}/{POINTS}" in broken else read_points(place / POINTS) if exists(place / POINTS) else None
                lines += [f"{place}: {line}" for line in contradictions(run, kind_of(resolved.task), points)] if resolved else []
        except UserError as problem:
            lines.append(str(problem))
            whole = whole and bool(runs) and runs[-1].folder == place
    lines += missing_attempts(folders)
    beside = {path.parent for name in (METRICS, SUMMARY, POINTS) for path in folder.glob(f"*/*/{name}")} - set(folders)
    lines += [f"{place}: files of a run without its record.json" for place in sorted(beside)]
    return (runs if whole else None), lines, _remarks(folder, runs, cells)


def _remarks(folder: Path, runs: list[Run], cells: Mapping) -> list[str]:
    missing, found = missing_cells(runs, cells), []
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        found.append(f"{folder}: {len(missing)} of {len(cells)} planned cells are not there: {names}")
    if unsaid := sum(not run.record.get("weights") for run in runs if run.summary is not None):
        found.append(f"{folder}: {unsaid} of {len(runs)} records do not say the hash of their weights")
    return found


def compare(published, computed, at: str = "") -> list[str]:
    """Where two JSON values differ, one line per leaf; floats may differ by RELATIVE_TOLERANCE."""
    if isinstance(published, dict) and isinstance(computed, dict):
        keys = sorted(published.keys() | computed.keys())
        found = [
            compare(published.get(k, "(absent)"), computed.get(k, "(absent)"), f"{at}.{k}" if at else k) for k in keys
        ]
        return [line for lines in found for line in lines]
    if isinstance(published, list) and isinstance(computed, list) and len(published) == len(computed):
        return [line for i, pair in enumerate(zip(published, computed)) for line in compare(*pair, f"{at}[{i}]")]
    if _same(published, computed):
        return []
    return [f"{printable(at)}: published {_short(published)}, recomputed {_short(computed)}"]


def _same(a, b) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    if numbers:
        return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0)
    return type(a) is type(b) and a == b


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
