"""The run record: one folder per cell, written so that a kill at any moment loses at most the part in flight.

    runs/<task>/<cell>/<run_key12>[.<attempt>]/
        record.json                what ran, where, in which precision, how it ended
        metrics.jsonl              one line per part (prompt batch or RL step), fsynced: what grading reads
        evidence/part-00000.parquet   one row per rollout, one file per part, each written atomically
        evidence_summary.parquet   per-prompt sums of all evidence (columns: mismatch.PROMPT_SUM_COLUMNS)
        MANIFEST.sha256            every file with its hash; an unlisted file is an error

A part is complete when its evidence file and its metrics line both exist; the line is written last. `--fresh` never
overwrites: it opens the next attempt beside the first, and every finished attempt is graded.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from suite.errors import NotRunnable, UserError

RECORD_SCHEMA = 1
STATUSES = ("planned", "running", "success", "diverged", "failed", "killed", "invalidated")
FINISHED = ("success", "diverged")
LOCK_NAME = "running.lock"

EVIDENCE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample_id", pa.int32()),
        ("step", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),  # prompt, then response
        ("num_prompt_tokens", pa.int32()),
        ("rollout_logprobs", pa.list_(pa.float32())),  # log mu of the response tokens, nats
        ("trainer_logprobs", pa.list_(pa.float32())),  # log pi of the response tokens, nats
        ("finish_reason", pa.string()),  # stop | length
        ("reward", pa.float32()),  # NaN = not rewarded
        ("trainer_entropies", pa.list_(pa.float32())),  # entropy of pi where each response token was drawn, nats; or null
    ]
)


# --- bytes on disk ---------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old content or all of the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value) -> None:
    write_atomic(path, (json.dumps(_json_safe(value), indent=1, sort_keys=True) + "\n").encode())


def write_parquet(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json_safe(value):
    """JSON has no NaN: a number that is not finite is written as its name, so that it cannot be read as a measurement."""
    if isinstance(value, dict):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


_NAMED_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _metrics_row(line: bytes) -> dict:
    return {k: _NAMED_NUMBERS.get(v, v) if isinstance(v, str) else v for k, v in json.loads(line).items()}


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """MANIFEST.sha256 in the format of `sha256sum`, sorted by path."""
    lines = [f"{sha256_file(path)}  {path.relative_to(folder)}\n" for path in _manifest_files(folder)]
    write_atomic(folder / "MANIFEST.sha256", "".join(lines).encode())


def check_manifest(folder: Path) -> list[str]:
    """What differs between the folder and its manifest, one sentence each; empty when all files are as written."""
    manifest = folder / "MANIFEST.sha256"
    if not manifest.exists():
        return [f"{manifest}: missing"]
    listed = dict(reversed(line.split("  ", 1)) for line in manifest.read_text().splitlines())
    present = {str(path.relative_to(folder)): path for path in _manifest_files(folder)}
    problems = [f"{folder / name}: not in the manifest" for name in sorted(present.keys() - listed.keys())]
    problems += [f"{folder / name}: in the manifest, but missing" for name in sorted(listed.keys() - present.keys())]
    for name in sorted(present.keys() & listed.keys()):
        if (found := sha256_file(present[name])) != listed[name]:
            problems.append(f"{folder / name}: sha256 {found}, the manifest says {listed[name]}")
    return problems


def _manifest_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(p for p in files if p.name not in ("MANIFEST.sha256", LOCK_NAME) and "checkpoint" not in p.parts)


# --- reading ---------------------------------------------------------------------------------------------------------


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


def read_metrics(folder: Path) -> list[dict]:
    """All complete lines of metrics.jsonl (or .gz). A last line cut short by a kill is left out."""
    return _metrics(folder)[0]


def _metrics(folder: Path) -> tuple[list[dict], bool]:
    """(the complete lines, whether a line cut short by a kill follows them)."""
    plain, zipped = folder / "metrics.jsonl", folder / "metrics.jsonl.gz"
    if zipped.exists():
        data = gzip.decompress(zipped.read_bytes())
    else:
        data = plain.read_bytes() if plain.exists() else b""
    end = data.rfind(b"\n") + 1
    return [_metrics_row(line) for line in data[:end].splitlines()], end < len(data)


def read_summary(folder: Path) -> dict[str, np.ndarray] | None:
    path = folder / "evidence_summary.parquet"
    if not path.exists():
        return None
    table = pq.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def read_run(folder: Path) -> Run:
    return Run(folder, json.loads((folder / "record.json").read_text()), read_metrics(folder), read_summary(folder))


def read_evidence(folder: Path) -> pa.Table:
    """All rollouts of a run, in the order of their parts. Columns: EVIDENCE_SCHEMA."""
    parts = sorted((folder / "evidence").glob("part-*.parquet"))
    tables = [pq.read_table(part) for part in parts]
    return pa.concat_tables(tables, promote_options="default") if tables else EVIDENCE_SCHEMA.empty_table()


def find_runs(runs_root: Path, task_id: str) -> list[Run]:
    """Every run of a task below `runs_root`/<task>, sorted by folder; runs made with --limit are left out."""
    records = sorted((Path(runs_root) / task_id).rglob("record.json"))
    runs = [read_run(path.parent) for path in records]
    return [run for run in runs if run.record["limit"] is None]


# --- writing ---------------------------------------------------------------------------------------------------------


class RunWriter:
    """The one writer of a run folder; holds a lock on it for as long as the run goes on.

    Opening the folder of an unfinished run resumes it: complete parts stay, everything after the last complete part is
    dropped. `parts_done` says how many parts there are.

    Raises UserError when another process writes the same cell, when the cell was begun on another fingerprint, or when
    the folder cannot be written.
    """

    def __init__(self, folder: Path, record: dict, lock):
        self.folder, self.record, self._lock = folder, record, lock
        self.metrics, cut_short = _metrics(folder)
        if cut_short:
            self.note_recovery(f"metrics.jsonl: a line cut short after line {len(self.metrics)} was dropped")
        self._started = time.monotonic()
        self.rewind(self._complete_parts())

    @property
    def parts_done(self) -> int:
        return len(self.metrics)

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def _complete_parts(self) -> int:
        rows = len(self.metrics)
        if self.record["evidence_parts"]:
            rows = next((i for i in range(rows) if not self._part_path(i).exists()), rows)
        return rows

    def _part_path(self, index: int) -> Path:
        return self.folder / "evidence" / f"part-{index:05d}.parquet"

    def rewind(self, num_parts: int) -> None:
        """Keep the first `num_parts` parts and drop what comes after them (an RL resume goes back to its checkpoint)."""
        self.metrics = self.metrics[:num_parts]
        lines = "".join(json.dumps(_json_safe(row), sort_keys=True) + "\n" for row in self.metrics)
        write_atomic(self.folder / "metrics.jsonl", lines.encode())
        for path in sorted((self.folder / "evidence").glob("*")):
            if path.name.startswith(".") or int(path.stem.split("-")[1]) >= num_parts:
                path.unlink()

    def append(self, metrics: dict, evidence: pa.Table | None = None) -> None:
        """Add one part. The evidence is on disk before the metrics line that makes the part count."""
        if evidence is not None:
            write_parquet(self._part_path(len(self.metrics)), evidence)
        line = json.dumps(_json_safe(metrics), sort_keys=True) + "\n"
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.metrics.append(dict(metrics))

    def note_recovery(self, *what: str) -> None:
        """Say in the record what was found broken and passed over."""
        self.record["recovered"] = [*self.record.get("recovered", []), *what]

    def note_executed(self, executed: dict[str, str]) -> None:
        """Take in the dtypes that live engines report; two that differ, of two attempts say, stand side by side."""
        before = self.record["precision_executed"]
        both = {point: _joined(before.get(point), found) for point, found in executed.items()}
        self.update(precision_executed=before | both)

    def update(self, **fields) -> None:
        """Set entries of the record; a record that says so already is not written again."""
        if fields and all(name in self.record and self.record[name] == value for name, value in fields.items()):
            return
        self.record.update(fields)
        write_json(self.folder / "record.json", self.record)

    def finish(self, status: str, *, summary: dict[str, np.ndarray] | None = None, **fields) -> Run:
        """Write the summary, the final record and the manifest, and release the folder."""
        assert status in STATUSES, status
        if summary is not None:
            write_parquet(self.folder / "evidence_summary.parquet", pa.table(summary))
        seconds = self.record["timings"].get("total_s", 0.0) + time.monotonic() - self._started
        timings = self.record["timings"] | fields.pop("timings", {}) | {"total_s": round(seconds, 3)}
        self.update(status=status, timings=timings, finished_utc=_utc_now(), **fields)
        write_manifest(self.folder)
        self.close()
        return read_run(self.folder)

    def fail(self, phase: str, error: BaseException) -> None:
        """Close a run that an error ended."""
        try:
            self.update(**failure(phase, error))
        finally:
            self.close()

    def close(self) -> None:
        if self._lock is not None:
            (self.folder / LOCK_NAME).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def failure(phase: str, error: BaseException) -> dict:
    """What a record says of an error: `failed` with class, phase and message, `killed` after Ctrl-C, `planned` where this
    machine lacks something that the run needs."""
    status = "killed" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
    status = "planned" if isinstance(error, NotRunnable) else status
    return {"status": status, "error": {"class": type(error).__name__, "phase": phase, "message": str(error)[:2000]}}


class SilentWriter(RunWriter):
    """A RunWriter as ranks above 0 have it: it knows what rank 0 has recorded, and writes nothing."""

    def __init__(self, folder: Path, record: dict, metrics: list[dict]):
        self.folder, self.record, self.metrics, self._lock = folder, record, metrics, None

    def rewind(self, num_parts: int) -> None:
        self.metrics = self.metrics[:num_parts]

    def append(self, metrics: dict, evidence: pa.Table | None = None) -> None:
        self.metrics.append(dict(metrics))

    def update(self, **fields) -> None:
        self.record.update(fields)

    def finish(self, *_, **__) -> Run:
        raise AssertionError("rank 0 alone finishes a run")


def _joined(before: str | None, found: str) -> str:
    return "+".join(sorted({*(before.split("+") if before else ()), *found.split("+")}))


def open_run(runs_root: Path, task, cell, environment: dict, fingerprint: str, *, limit: int | None = None,
             fresh: bool = False, evidence_parts: bool = True) -> RunWriter | Run:
    """The run folder of a cell: a finished Run if there is one (and not `fresh`), else a RunWriter to start or resume it.

    Args:
        environment: as environment.collect() returns it; fingerprint: its short name. Attempts of another fingerprint (another kind of machine, other
            engine versions) are left alone: this one begins its own.
        limit: as given to --limit; a limited run has a key of its own.
        fresh: begin a new attempt even if a finished one exists. An unfinished attempt is resumed all the same.
        evidence_parts: whether each part of this protocol carries an evidence file.
    """
    key = cell.run_key(limit)
    first = Path(runs_root) / task.id / cell.name / key[:12]
    attempts = [first, *sorted(first.parent.glob(f"{key[:12]}.*"), key=lambda p: int(p.suffix[1:]))]
    there = [path for path in attempts if path.exists()]
    mine = [path for path in there if _head(path).get("fingerprint", fingerprint) == fingerprint]
    finished = [path for path in mine if _head(path).get("status") in FINISHED]
    unfinished = [path for path in mine if path not in finished]
    if finished and not fresh and not unfinished:
        return read_run(finished[-1])
    folder = unfinished[-1] if unfinished else (first.with_suffix(f".{len(attempts) + 1}") if there else first)
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    record = _head(folder) or _new_record(task, cell, key, limit, evidence_parts)
    if record.get("environment") not in (None, environment):  # resumed by another checkout or with other packages
        record["earlier_environments"] = [*record.get("earlier_environments", []), record["environment"]]
    record |= {"status": "running", "environment": environment, "fingerprint": fingerprint, "error": None}
    writer = RunWriter(folder, record, lock)
    writer.update()
    return writer


def _head(folder: Path) -> dict:
    """record.json, or {} of an attempt that was stopped before it wrote one."""
    path = folder / "record.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _lock(folder: Path):
    lock = open(folder / LOCK_NAME, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder}: another process is running this cell; wait for it or choose another --runs-dir")
    return lock


def _new_record(task, cell, key: str, limit: int | None, evidence_parts: bool) -> dict:
    return {
        "schema": RECORD_SCHEMA,
        "task": {"id": task.id, "version": task.version, "grade_version": task.grade_version, "text": task.text},
        "cell": {"name": cell.name, "arm": cell.arm, "point": dict(cell.point), "seed": cell.seed,
                 "is_control": cell.is_control, "settings": cell.settings},
        "run_key": key,
        "limit": limit,
        "evidence_parts": evidence_parts,
        "precision_asked": dict(cell.settings.get("precision") or {}),
        "precision_executed": {},
        "counts": {},
        "series_summary": {},
        "timings": {},
        "started_utc": _utc_now(),
        "finished_utc": None,
    }


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
