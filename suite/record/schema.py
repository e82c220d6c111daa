"""record.json as a model: what every record holds, built in one place by who runs a cell, reads a dump or tests with one.

Entries that come later, or in some protocols only, stand beside these (weights, algorithm, error, recovered ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from suite.files import FOLDER_NAME

RECORD_SCHEMA = 1
Status = Literal["planned", "running", "success", "diverged", "failed", "killed", "invalidated"]
FolderName = Annotated[str, Field(pattern=f"^{FOLDER_NAME.pattern}$")]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


class TaskPart(Part):
    """The task that was run, written out in full in `text`."""

    id: FolderName
    version: int
    grade_version: int


class CellPart(Part):
    """The cell. settings: as they ran; defaults: of these, what the task does not say (spec/defaults.py), absent in records
    that are older than that table."""

    name: FolderName
    arm: FolderName
    point: dict[str, Any]
    seed: int
    is_control: bool
    settings: dict[str, Any]
    defaults: dict[str, Any] | None = None


class Record(Part):
    """What readers rely on."""

    status: Status
    task: TaskPart
    cell: CellPart
    run_key: Hash
    limit: int | None  # of --limit; such a run is never graded
    fingerprint: FolderName
    environment: dict[str, Any]
    precision_asked: dict[str, Any]
    precision_executed: dict[str, str]
    counts: dict[str, Any]
    series_summary: dict[str, Any]
    timings: dict[str, Any]


def new_record(task, cell: Mapping[str, Any], run_key: str, *, fingerprint: str, environment: dict[str, Any], **entries) -> dict[str, Any]:
    """A record of this version, as it stands in record.json. cell: the entries of CellPart; entries: others than those of a
    run that begins."""
    said = {name: getattr(task, name) for name in ("id", "version", "grade_version", "text")}
    beginning = {
        "status": "running", "limit": None, "evidence_parts": False, "precision_asked": dict(cell["settings"].get("precision") or {}),
        "precision_executed": {}, "counts": {}, "series_summary": {}, "timings": {}, "error": None, "started_utc": None, "finished_utc": None,
    }  # fmt: skip
    whole = beginning | {"run_key": run_key, "fingerprint": fingerprint, "environment": environment} | entries
    record = Record(task=said, cell=dict(cell), **whole).model_dump()
    record["cell"] = {name: value for name, value in record["cell"].items() if name != "defaults" or value is not None}
    return {"schema": RECORD_SCHEMA} | record
