"""Recompute every published verdict from the published records and compare it with the one that stands there.

Named as differences: a file that is changed, missing or not in the manifest; a verdict that comes out otherwise; a
cell whose settings moved without a new task version; a verdict of an older task version or grade version (stale); a
published task that no longer exists. No torch, no figures.
"""

from __future__ import annotations

import json
import math
import tarfile
import tempfile
from pathlib import Path

from suite.errors import UserError
from suite.record import check_manifest
from suite.report.publishing import compute_verdict, fingerprint_folders, published_runs

RELATIVE_TOLERANCE = 1e-9
_NOT_COMPARED = ("suite",)  # which revision of the suite graded: may differ, the numbers may not


def verify_published(target: str | None, results_dir: Path) -> tuple[list[Path], list[str]]:
    """Check all published folders, those of one task, or those in a bundle (a folder or .tar.gz like results/).

    Returns (folders checked, differences as sentences).
    """
    if target is not None and str(target).endswith((".tar.gz", ".tgz")):
        return _verify_archive(Path(target))
    if target is not None and ("/" in str(target) or Path(target).is_dir()):
        return _verify_folders(Path(target), None)
    return _verify_folders(results_dir, target)


def _verify_archive(path: Path) -> tuple[list[Path], list[str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such bundle")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        roots = {found.parents[2] for found in Path(folder).rglob("verdict.json") if len(found.parents) > 2}
        results = [_verify_folders(root, None) for root in sorted(roots)]
    return [f for checked, _ in results for f in checked], [d for _, differences in results for d in differences]


def _verify_folders(results_dir: Path, task_id: str | None) -> tuple[list[Path], list[str]]:
    from suite.task import load_all

    tasks = load_all()
    folders = [f for f in fingerprint_folders(results_dir) if task_id in (None, f.parent.name)]
    differences = [] if task_id else _strays(results_dir, folders)
    return folders, differences + [line for folder in folders for line in folder_differences(folder, tasks)]


def _strays(results_dir: Path, folders: list[Path]) -> list[str]:
    """Records that lie where no verdict speaks for them."""
    orphans = {path.parents[2] for path in results_dir.glob("*/*/*/*/record.json")} - set(folders)
    return [f"{folder}: records without a verdict.json; publish the task again" for folder in sorted(orphans)]


def folder_differences(folder: Path, tasks: dict) -> list[str]:
    """What is wrong with one results/<task>/<fingerprint>, one sentence each; empty if all is as published."""
    path = folder / "verdict.json"
    task = tasks.get(folder.parent.name)
    if task is None:
        return [f"{path}: the task {folder.parent.name!r} no longer exists in tasks/"]
    published = json.loads(path.read_text())
    differences = check_manifest(folder)
    for key, now in (("task_version", task.version), ("grade_version", task.grade_version)):
        if published[key] != now:
            what = "run and publish" if key == "task_version" else "publish"
            return [*differences, f"{path}: stale: {key} {published[key]}, the task is at {now}; {what} it again"]
    differences += _moved_cells(folder, task)
    computed = json.loads(json.dumps(compute_verdict(task, folder.name, folder.parents[1])))
    return differences + [
        f"{path}: {line}" for line in compare(published, computed) if not line.startswith(_NOT_COMPARED)
    ]


def _moved_cells(folder: Path, task) -> list[str]:
    """Published cells whose run key is not the one that the task gives the cell of that name today."""
    from suite.plan import plan

    keys = {cell.name: cell.run_key() for cell in plan(task)}
    moved = []
    for run in published_runs(folder.parents[1], task.id, folder.name):
        name, key = run.record["cell"]["name"], run.record["run_key"]
        if keys.get(name, key) != key:
            moved.append(f"{run.folder}: run_key {key[:12]}, but the task now gives this cell {keys[name][:12]}: "
                         "a setting changed without a new version")  # fmt: skip
    return moved


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
    return [f"{at}: published {_short(published)}, recomputed {_short(computed)}"]


def _same(a, b) -> bool:
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    if numbers:
        return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0)
    return type(a) is type(b) and a == b


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
