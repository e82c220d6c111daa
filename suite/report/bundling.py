"""`suite bundle TASK`: what one would publish, in one file to send; `suite verify FILE` recomputes its verdicts.

The file holds results/<task>/<fingerprint>/ as `publish` would write it: records without paths and names, metrics,
evidence sums, verdict and manifest. The same runs give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from pathlib import Path

from suite.record import write_atomic
from suite.report.publishing import publish_task


def bundle_task(task, runs_dir: Path, out: Path) -> list[Path]:
    """Write the finished runs of the task's current version to `out` (.tar.gz). Returns the folders in it, as they lie in
    results/; empty, and no file, if there is nothing to send.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        folders = publish_task(task, runs_dir, results)
        if folders:
            write_atomic(out, _packed(results))
        return [folder.relative_to(scratch) for folder in folders]


def _packed(folder: Path) -> bytes:
    """The folder as .tar.gz, without times, owners or an order of its own."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(str(path.relative_to(folder.parent)))
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return packed.getvalue()
