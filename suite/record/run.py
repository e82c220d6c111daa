"""The run record as it is read: one folder per cell. suite/record/writer.py writes it.

    runs/<task>/<cell>/<run_key12>[.<attempt>]/
        record.json                what ran, where, in which precision, how it ended; holds its own hash
        metrics.jsonl              one line per part (prompt batch or RL step), fsynced: what grading reads (suite/record/lines.py)
        evidence/part-00000.parquet   one row per rollout, one file per part, each written atomically
        evidence_summary.parquet   per-prompt sums of all evidence (columns: evidence.summarise)
        MANIFEST.sha256            of a finished run: every file with its hash; an unlisted file is an error

Published runs, in results/, have metrics.jsonl.gz; their manifest is that of the folder above, and `verify` checks it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from suite.door import MIB, FileError, open_file, read_bytes, read_json, read_parquet, typed, unzip, whatever_fails
from suite.errors import DataError
from suite.files import json_safe
from suite.record.lines import Line, read_lines
from suite.record.manifest import NAME as MANIFEST
from suite.record.manifest import check_manifest
from suite.record.schema import Record, Status

STATUSES: tuple[str, ...] = get_args(Status)
FINISHED = ("success", "diverged")
LOCK_NAME = "running.lock"
BESIDES = (LOCK_NAME, "checkpoint")  # in a run folder, and no part of the record
SEAL = "record_sha256"
MAX_METRICS_BYTES, MAX_PART_BYTES = 512 * MIB, 16 * 1024 * MIB
RUN_FOLDER = re.compile(r"[0-9a-f]{12}(\.[0-9]+)?")
HINT = "what is damaged is made again by `suite run`, or with --fresh in a new attempt"
HINT_FINISHED = "nobody may change a finished run: move its folder out of the runs folder and run the task again"

EVIDENCE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("step", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),  # prompt, then response
        ("num_prompt_tokens", pa.int32()),
        ("rollout_logprobs", pa.list_(pa.float32())),  # log mu of the response tokens, nats
        ("trainer_logprobs", pa.list_(pa.float32())),  # log pi of the response tokens, nats; null without a trainer
        ("finish_reason", pa.string()),  # stop | length
        ("reward", pa.float32()),  # NaN = not rewarded
        ("trainer_entropies", pa.list_(pa.float32())),  # entropy of pi where each response token was drawn, nats; or null
    ]
)


@dataclass(frozen=True)
class Run:
    """One run as read back from its folder (a raw one under runs/ or a published one under results/)."""

    folder: Path
    record: dict
    metrics: list[dict] = field(repr=False)
    summary: dict[str, np.ndarray] | None = field(repr=False)  # one entry per prompt in each column

    arm = property(lambda self: self.record["cell"]["arm"])
    point = property(lambda self: self.record["cell"]["point"])
    seed = property(lambda self: self.record["cell"]["seed"])
    is_control = property(lambda self: self.record["cell"]["is_control"])
    status = property(lambda self: self.record["status"])
    fingerprint = property(lambda self: self.record["fingerprint"])


def record_seal(record: dict) -> str:
    """The hash that record.json holds of itself: of its other entries as JSON with sorted keys."""
    content = {name: value for name, value in json_safe(record).items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_record(folder: Path) -> tuple[dict, bool]:
    """(record.json without its own hash, whether it had one: older runs have none). FileError where it cannot be used or
    its hash does not fit."""
    path = folder / "record.json"
    record = typed(read_json(path), Record, path)
    is_sealed = SEAL in record
    if is_sealed and record.pop(SEAL) != record_seal(record):
        raise FileError(path, SEAL, "a hash that the record does not fit", "the record as it was written")
    return record, is_sealed


def read_metrics(folder: Path) -> list[dict]:
    """What metrics.jsonl (or .gz) holds, a row per part, without the hashes. A last line that a kill cut short, or that is
    being written, is left out; FileError for any other line that cannot be used."""
    lines, fault = metrics_lines(folder)
    if fault and not fault.startswith("a line cut short"):
        raise FileError(folder / "metrics.jsonl", "", fault, "lines as they were written", HINT)
    return [line.row for line in lines]


def metrics_lines(folder: Path) -> tuple[list[Line], str | None]:
    """(the lines of metrics.jsonl or .gz up to the first that cannot be used, what is wrong there or None)."""
    plain, zipped = folder / "metrics.jsonl", folder / "metrics.jsonl.gz"
    if zipped.exists():
        return read_lines(unzip(read_bytes(zipped), zipped, MAX_METRICS_BYTES), zipped)
    return read_lines(read_bytes(plain, MAX_METRICS_BYTES) if plain.exists() else b"", plain)


def read_summary(folder: Path) -> dict[str, np.ndarray] | None:
    path = folder / "evidence_summary.parquet"
    if not path.exists():
        return None
    table = read_parquet(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def read_run(folder: Path) -> Run:
    """A run folder as it lies there; FileError for a file that cannot be used. Whether it is as its manifest says is
    `check_run`'s to see."""
    return Run(folder, read_record(folder)[0], read_metrics(folder), read_summary(folder))


def check_run(folder: Path) -> None:
    """Raises DataError where a finished run of this machine is not as its manifest says, FileError where another one has a
    record that its own hash does not fit. Published runs have the manifest of the folder above."""
    if (folder / "metrics.jsonl.gz").exists():
        return
    is_finished = (folder / MANIFEST).exists() or read_record(folder)[0]["status"] in FINISHED
    if is_finished and (problems := check_manifest(folder, BESIDES)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; {HINT_FINISHED}")


def read_part(path: Path) -> pa.Table:
    """One part of the evidence. Columns: EVIDENCE_SCHEMA."""
    with open_file(path, MAX_PART_BYTES) as file, whatever_fails(path, "a readable part", hint=HINT):
        return pq.read_table(file)


def read_evidence(folder: Path) -> pa.Table:
    """All rollouts of a run, in the order of their parts. Columns: EVIDENCE_SCHEMA."""
    tables = [read_part(part) for part in sorted((folder / "evidence").glob("part-*.parquet"))]
    return pa.concat_tables(tables, promote_options="default") if tables else EVIDENCE_SCHEMA.empty_table()


def find_runs(runs_root: Path, task_id: str) -> list[Run]:
    """Every run of a task below `runs_root`/<task>, sorted by folder; runs made with --limit are left out. Raises
    DataError or FileError for a run that is not as it was written (`check_run`)."""
    runs = []
    for folder in run_folders(Path(runs_root) / task_id):
        if not _is_limited(folder):
            check_run(folder)
            runs.append(read_run(folder))
    return runs


def run_folders(task_folder: Path) -> list[Path]:
    """The run folders of a task, in runs/ or results/, also those whose record.json is gone; a folder that somebody renamed
    is none."""
    found = {path.parent for name in ("record.json", MANIFEST) for path in task_folder.rglob(name)}
    return sorted(folder for folder in found if RUN_FOLDER.fullmatch(folder.name))


def _is_limited(folder: Path) -> bool:
    try:
        return read_record(folder)[0]["limit"] is not None
    except FileError:
        return False
