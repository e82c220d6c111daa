"""`suite bundle TASK`: what one would publish, in one file to send; `suite verify FILE` recomputes its verdicts.

The file holds results/<task>/<fingerprint>/ as `publish` would write it: records without paths and names, metrics,
evidence sums, verdict and manifest. The same runs give the same bytes. Whoever sends it sees first what it tells.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from suite.archive.published import read_record, run_folders
from suite.archive.publishing import publish_task
from suite.files import write_atomic


@dataclass(frozen=True)
class Bundle:
    """folders: as they lie in results/. files: their sizes in bytes, by name. tells: what records say besides numbers, one
    line each."""

    folders: list[Path]
    files: dict[str, int]
    tells: list[str]


def bundle_task(task, runs_dir: Path, out: Path | None) -> Bundle:
    """Write the finished runs of the task's current version to `out` (.tar.gz), or nowhere where it is None. No file is
    written if there is nothing to send.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        folders = publish_task(task, runs_dir, results)
        files = {str(path.relative_to(scratch)): path.stat().st_size for path in _files(results)}
        records = [read_record(place) for folder in folders for place in run_folders(folder)]
        if folders and out is not None:
            write_atomic(out, _packed(results))
        return Bundle([folder.relative_to(scratch) for folder in folders], files, tells(records))


def tells(records: list[dict]) -> list[str]:
    """The lines of text in records that came from a machine or a library, each once."""
    found: dict[str, None] = {}
    for record in records:
        environment = record["environment"]
        found[f"machine: {record['fingerprint']}, {environment.get('os')}, {(environment.get('cpu') or {}).get('model')}"] = None
        found |= {f"variable: {name}={value}": None for name, value in (environment.get("env") or {}).items()}
        found |= {f"recovered: {line}": None for line in record.get("recovered", [])}
        error = record.get("error")
        found |= {f"error: {error.get('message')}": None} if error else {}
    return list(found)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _packed(folder: Path) -> bytes:
    """The folder as .tar.gz, without times, owners or an order of its own."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for path in _files(folder):
            entry = tarfile.TarInfo(str(path.relative_to(folder.parent)))
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return packed.getvalue()
