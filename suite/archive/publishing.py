"""Runs of this machine -> results/<task>/<fingerprint>/: small, free of names and paths, and enough to grade from.

    results/<task>/<fingerprint>/<cell>/<run_key12>[.<attempt>]/
        record.json  metrics.jsonl.gz  evidence_summary.parquet  plot_points.parquet
    results/<task>/<fingerprint>/verdict.json  figures/*.svg  MANIFEST.sha256

Every run of the task's current version that was begun is published, each attempt of a cell in a folder of its own, as in
runs/; what was published before stays, except that an unfinished run gives way to its own resumption.
Runs of an older version leave with the first publication of a newer one.
The verdict is computed from the published files, never copied, so that anyone can compute it again.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from suite.archive.points import plot_points, write_points
from suite.archive.published import VERDICT, read_published, read_record, run_folders
from suite.archive.scrubbing import scrub, scrub_record
from suite.files import json_safe, write_atomic, write_json
from suite.record.manifest import write_manifest
from suite.record.run import FINISHED, STATUSES, Run, find_runs, read_metrics
from suite.spec.kinds import kind_of
from suite.spec.plan import resolve_task

# Whatever was begun: a launch that failed or was killed is seen by whoever grades, and hiding it would be choosing.
PUBLISHED_STATUSES = tuple(status for status in STATUSES if status != "planned")


def publish_task(task, runs_dir: Path, results_dir: Path) -> list[Path]:
    """Publish one task. Returns the fingerprint folders written (those of `compare` tasks hold a verdict only)."""
    for run in _publishable(task, runs_dir):
        folder = results_dir / task.id / run.fingerprint
        _drop_other_versions(folder, task.version)
        _publish_run(run, folder)
    if kind_of(task).compares:
        return _publish_comparison(task, results_dir)
    folders = sorted(path for path in (results_dir / task.id).glob("*") if path.is_dir())
    return [folder for folder in folders if _seal(task, folder)]


def published_runs(results_dir: Path, task_id: str, fingerprint: str) -> list[Run]:
    """The published runs of a task on one fingerprint, sorted by folder. FileError for a record that is none."""
    return [read_published(folder) for folder in run_folders(Path(results_dir) / task_id / fingerprint)]


def fingerprint_folders(results_dir: Path) -> list[Path]:
    """Every results/<task>/<fingerprint> that holds a verdict, sorted."""
    return sorted(path.parent for path in Path(results_dir).glob(f"*/*/{VERDICT}"))


def compute_verdict(task, fingerprint: str, results_dir: Path, runs: list[Run] | None = None) -> dict:
    """The verdict of a task on one fingerprint, from published records alone. runs: those of the task, if read already."""
    from suite.grade.verdict import grade_task, with_needed

    resolved = resolve_task(task)
    runs = published_runs(results_dir, resolved.task.id, fingerprint) if runs is None else runs
    return grade_task(resolved, runs, with_needed(resolved, lambda name: published_runs(results_dir, name, fingerprint)))


def _publishable(task, runs_dir: Path) -> list[Run]:
    runs = find_runs(runs_dir, task.id)
    return [r for r in runs if r.status in PUBLISHED_STATUSES and r.record["task"]["version"] == task.version]


def _drop_other_versions(folder: Path, version: int) -> None:
    for place in run_folders(folder):
        if read_record(place)["task"]["version"] != version:
            shutil.rmtree(place)
            if not any(place.parent.iterdir()):
                place.parent.rmdir()


def _publish_run(run: Run, folder: Path) -> Path:
    """Write one run into the folder of its fingerprint, under the first attempt name that is free or its own."""
    record = scrub_record(run.record)
    first = folder / record["cell"]["name"] / record["run_key"][:12]
    target, attempt = first, 1
    while (target / "record.json").exists() and not _same_run(target, record):
        attempt += 1
        target = first.with_name(f"{first.name}.{attempt}")
    if (target / "record.json").exists() and _status(target) in FINISHED:
        return target  # published before: never written again
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "metrics.jsonl.gz", _zipped_metrics(run.folder))
    if run.summary is not None:
        shutil.copyfile(run.folder / "evidence_summary.parquet", target / "evidence_summary.parquet")
    if points := plot_points(run.folder / "evidence"):
        write_points(target / "plot_points.parquet", points)
    write_json(target / "record.json", record)  # last: a folder without it is not a published run
    return target


def _same_run(folder: Path, record: dict) -> bool:
    """Whether the folder holds this run, or the failed run that this one went on from. Two attempts may begin within the same
    second, so finished ones are compared by what they measured as well."""
    there, keys = read_record(folder), ("run_key", "started_utc", "fingerprint")
    both_finished = there["status"] in FINISHED and record["status"] in FINISHED
    return all(there[key] == record[key] for key in (*keys, "series_summary") if key in keys or both_finished)


def _status(folder: Path) -> str:
    return read_record(folder)["status"]


def _zipped_metrics(folder: Path) -> bytes:
    """The metrics, scrubbed and zipped without a time stamp or a file name: the same lines give the same bytes."""
    rows = json_safe(read_metrics(folder))  # without the hashes of the raw run: scrubbed lines have none
    lines = [json.dumps(scrub(row, names=False), sort_keys=True) + "\n" for row in rows]
    return gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)


def _seal(task, folder: Path) -> bool:
    """Grade the published runs of one fingerprint and write verdict and manifest. False if none is of this version."""
    versions = {read_record(place)["task"]["version"] for place in run_folders(folder)}
    if versions != {task.version}:
        return False
    write_json(folder / "verdict.json", compute_verdict(task, folder.name, folder.parents[1]))
    write_manifest(folder)
    return True


def _publish_comparison(task, results_dir: Path) -> list[Path]:
    """A `compare` task has no runs: it is graded on every fingerprint on which all tasks it needs are published."""
    fingerprints = [{p.name for p in (results_dir / need).glob("*") if p.is_dir()} for need in task.needs]
    folders = [results_dir / task.id / name for name in sorted(set.intersection(*fingerprints) if fingerprints else ())]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "verdict.json", compute_verdict(task, folder.name, results_dir))
        write_manifest(folder)
    return folders
