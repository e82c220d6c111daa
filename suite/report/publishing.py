"""Runs of this machine -> results/<task>/<fingerprint>/: small, free of names and paths, and enough to grade from.

    results/<task>/<fingerprint>/<cell>/<run_key12>[.<attempt>]/
        record.json  metrics.jsonl.gz  evidence_summary.parquet  plot_points.parquet
    results/<task>/<fingerprint>/verdict.json  figures/*.svg  MANIFEST.sha256

Every finished run of the task's current version is published, each attempt of a cell in a folder of its own, as in
runs/; what was published before stays, except that a failed run gives way to its own resumption once that has finished.
Runs of an older version leave with the first publication of a newer one.
The verdict is computed from the published files, never copied, so that anyone can compute it again.
"""

from __future__ import annotations

import getpass
import gzip
import json
import re
import shutil
import socket
from pathlib import Path

from suite.files import json_safe, write_atomic, write_json
from suite.record import FINISHED, Run, find_runs, read_metrics, write_manifest
from suite.report.points import plot_points, write_points

PUBLISHED_STATUSES = (*FINISHED, "invalidated", "failed")  # a failed cell counts as ERROR; hiding it would be choosing
_PRIVATE_KEYS = {"hostname", "host", "node_name", "user", "username", "cwd", "home"}
# An absolute path: a slash that does not follow a word, a dot, another slash, a colon or a placeholder, then at least
# two components, or one below a well-known root. Fractions (a/b), URLs and relative paths do not match.
_PART = r"[^\s/'\",;:()\[\]{}<>|]+"
_ABSOLUTE = re.compile(
    rf"(?<![\w./:<>\])-])(?:file://)?/(?:(?:{_PART}/)+(?P<name>{_PART})?|(?:home|root|tmp|work|mnt|data|Users)\b)"
)
_WINDOWS = re.compile(r"\b[A-Za-z]:\\(?:[^\s\\'\"]+\\)*(?P<name>[^\s\\'\"]*)")


def publish_task(task, runs_dir: Path, results_dir: Path) -> list[Path]:
    """Publish one task. Returns the fingerprint folders written (those of `compare` tasks hold a verdict only)."""
    for run in _publishable(task, runs_dir):
        folder = results_dir / task.id / run.fingerprint
        _drop_other_versions(folder, task.version)
        _publish_run(run, folder)
    if task.protocol == "compare":
        return _publish_comparison(task, results_dir)
    folders = sorted(path for path in (results_dir / task.id).glob("*") if path.is_dir())
    return [folder for folder in folders if _seal(task, folder)]


_FREE_TEXT = ("environment", "earlier_environments", "error", "recovered", "diverged")  # of a record: may name a machine


def scrub_record(record: dict) -> dict:
    """A record without absolute paths, and without host and user names where text of the machine's own can stand; never
    elsewhere, since a user may well be called like an arm or a task."""
    return {key: scrub(value, names=key in _FREE_TEXT) for key, value in record.items()}


def scrub(value, names: bool = True):
    """The same JSON value without absolute paths and, with `names`, without host and user names.

    An absolute path keeps its last component ("<path>/name"); keys that only hold such names are dropped.
    """
    if isinstance(value, dict):
        return {scrub(k, names): scrub(v, names) for k, v in value.items() if str(k).lower() not in _PRIVATE_KEYS}
    if isinstance(value, (list, tuple)):
        return [scrub(item, names) for item in value]
    return scrub_text(value, names) if isinstance(value, str) else value


def scrub_text(text: str, names: bool = True) -> str:
    text = _ABSOLUTE.sub(_last_component, text)
    text = _WINDOWS.sub(_last_component, text)
    for name in _own_names() if names else ():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


def _last_component(match: re.Match) -> str:
    return "<path>/" + match["name"] if match["name"] else "<path>"


def _own_names() -> list[str]:
    """Names of this machine and user, if they are names and not common words."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    names = {user, socket.gethostname(), socket.gethostname().split(".")[0]}
    return sorted(name for name in names if len(name) > 3 and name not in ("root", "user", "localhost"))


def published_runs(results_dir: Path, task_id: str, fingerprint: str | None = None) -> list[Run]:
    """The published runs of a task, of one fingerprint or of all."""
    return [
        r for r in find_runs(results_dir, task_id) if fingerprint is None or r.folder.parents[1].name == fingerprint
    ]


def fingerprint_folders(results_dir: Path) -> list[Path]:
    """Every results/<task>/<fingerprint> that holds a verdict, sorted."""
    return sorted(path.parent for path in Path(results_dir).glob("*/*/verdict.json"))


def compute_verdict(task, fingerprint: str, results_dir: Path) -> dict:
    """The verdict of a task on one fingerprint, from published records alone."""
    from suite.grade import grade_task, with_needed

    needed = with_needed(task, lambda name: published_runs(results_dir, name, fingerprint))
    return grade_task(task, published_runs(results_dir, task.id, fingerprint), needed)


def _publishable(task, runs_dir: Path) -> list[Run]:
    runs = find_runs(runs_dir, task.id)
    return [r for r in runs if r.status in PUBLISHED_STATUSES and r.record["task"]["version"] == task.version]


def _drop_other_versions(folder: Path, version: int) -> None:
    for path in sorted(folder.glob("*/*/record.json")):
        if json.loads(path.read_text())["task"]["version"] != version:
            shutil.rmtree(path.parent)
            if not any(path.parents[1].iterdir()):
                path.parents[1].rmdir()


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
    if any((run.folder / "evidence").glob("part-*.parquet")):
        write_points(target / "plot_points.parquet", plot_points(run.folder / "evidence"))
    write_json(target / "record.json", record)  # last: a folder without it is not a published run
    return target


def _same_run(folder: Path, record: dict) -> bool:
    there = json.loads((folder / "record.json").read_text())
    return all(there[key] == record[key] for key in ("run_key", "started_utc", "fingerprint"))


def _status(folder: Path) -> str:
    return json.loads((folder / "record.json").read_text())["status"]


def _zipped_metrics(folder: Path) -> bytes:
    """The metrics, scrubbed and zipped without a time stamp or a file name: the same lines give the same bytes."""
    rows = json_safe(read_metrics(folder))  # without the hashes of the raw run: scrubbed lines have none
    lines = [json.dumps(scrub(row, names=False), sort_keys=True) + "\n" for row in rows]
    return gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0)


def _seal(task, folder: Path) -> bool:
    """Grade the published runs of one fingerprint and write verdict and manifest. False if none is of this version."""
    versions = {json.loads(path.read_text())["task"]["version"] for path in folder.glob("*/*/record.json")}
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
