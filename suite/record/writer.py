"""The run record as it is written, so that a kill at any moment loses at most the part in flight (suite/record/run.py says what
lies where).

A part is complete when its evidence file and its metrics line both exist; the line is written last and holds the hash of
the evidence. A resume keeps the parts up to the first that is damaged or not complete, and says so in `recovered`.
`--fresh` never overwrites: it opens the next attempt beside the first, and every finished attempt is graded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from suite import signals
from suite.door import FileError
from suite.errors import DataError, NotRunnable, UserError
from suite.files import is_folder_name, json_bytes, parquet_bytes, sha256_file, write_atomic, write_parquet
from suite.record.lines import Line, sealed
from suite.record.manifest import write_manifest
from suite.record.run import (
    BESIDES,
    FINISHED,
    LOCK_NAME,
    MANIFEST,
    SEAL,
    STATUSES,
    Run,
    check_run,
    metrics_lines,
    read_part,
    read_record,
    read_run,
    record_seal,
)  # fmt: skip
from suite.record.schema import new_record

PART = re.compile(r"\.?part-(\d{5,})\.parquet(\.tmp)?")


class RunWriter:
    """The one writer of a run folder; holds a lock on it for as long as the run goes on.

    Opening the folder of an unfinished run resumes it: parts stay up to the first that is damaged or not complete.
    `parts_done` says how many there are, `metrics` what they measured.

    damage: what is wrong with the record that was found; then no part is kept, since nothing says what it ran in.
    is_sealed: whether the record that was found is of a version that seals its lines.
    """

    def __init__(self, folder: Path, record: dict, lock, damage: str | None = None, is_sealed: bool = True):
        self.folder, self.record, self._lock = folder, record, lock
        self._started = time.monotonic()
        self._lines: list[Line] = []
        if damage:
            self.note_recovery(f"{damage}: every part is made again")
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        else:
            self._keep_whole_parts(is_sealed)
        (folder / MANIFEST).unlink(missing_ok=True)  # a kill came between the manifest and the record that ends a run
        self.rewind(len(self._lines))

    @property
    def metrics(self) -> list[dict]:
        return [line.row for line in self._lines]

    @property
    def parts_done(self) -> int:
        return len(self._lines)

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def _keep_whole_parts(self, is_sealed: bool) -> None:
        try:
            lines, fault = metrics_lines(self.folder)
        except FileError as problem:
            lines, fault = [], str(problem)
        if is_sealed and any(line.seal is None for line in lines):
            lines, fault = [], "lines without their hash"
        if fault:
            self.note_recovery(f"metrics.jsonl: {fault}; dropped from there on")
        for index, line in enumerate(lines):
            if what := self._fault_of_part(index, line):
                self.note_recovery(f"{self._part_path(index).relative_to(self.folder)}: {what}, made again from here on")
                break
            evidence = line.evidence
            if self.record["evidence_parts"] and not evidence:  # of an older run
                evidence = sha256_file(self._part_path(index))
            before = self._lines[-1].seal if self._lines else None
            self._lines.append(line if line.seal else sealed(line.row, before, evidence))

    def _fault_of_part(self, index: int, line: Line) -> str | None:
        path = self._part_path(index)
        if not self.record["evidence_parts"]:
            return None
        if not path.is_file():
            return "missing"
        if line.seal:
            return None if sha256_file(path) == line.evidence else "its content does not have the recorded hash"
        try:
            read_part(path)
        except FileError as problem:
            return f"found {problem.found}"
        return None

    def _part_path(self, index: int) -> Path:
        return self.folder / "evidence" / f"part-{index:05d}.parquet"

    def rewind(self, num_parts: int) -> None:
        """Keep the first `num_parts` parts and drop what comes after them (an RL resume goes back to its checkpoint)."""
        self._lines = self._lines[:num_parts]
        write_atomic(self.folder / "metrics.jsonl", b"".join(line.data for line in self._lines))
        for path in sorted((self.folder / "evidence").iterdir()):
            match = PART.fullmatch(path.name)
            if match and (match[2] or path.name.startswith(".") or int(match[1]) >= num_parts):
                path.unlink()

    def append(self, metrics: dict, evidence: pa.Table | None = None) -> None:
        """Add one part. The evidence is on disk before the metrics line that makes the part count."""
        signals.check()
        content = None if evidence is None else parquet_bytes(evidence)
        if content is not None:
            write_atomic(self._part_path(len(self._lines)), content)
        before = self._lines[-1].seal if self._lines else None
        line = sealed(metrics, before, content and hashlib.sha256(content).hexdigest())
        with open(self.folder / "metrics.jsonl", "ab") as file:
            file.write(line.data)
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)

    def read_parts(self) -> Iterator[pa.Table]:
        """The evidence of each part that there is, one at a time."""
        return (read_part(self._part_path(index)) for index in range(self.parts_done))

    def note_recovery(self, *what: str) -> None:
        """Say in the record what was found broken and passed over."""
        self.record["recovered"] = [*self.record.get("recovered", []), *what]

    def note_executed(self, executed: dict[str, str]) -> None:
        """Take in the dtypes that live engines report; two that differ, of two attempts say, stand side by side."""
        before = self.record["precision_executed"]
        both = {point: _joined(before.get(point), found) for point, found in executed.items()}
        self.update(precision_executed=before | both)

    def note_weights(self, weights: dict) -> None:
        """Take in which checkpoint runs. Raises DataError where the parts before ran with another one."""
        before = self.record.get("weights") or {}
        for name in ("sha256", "files_sha256") if self.parts_done else ():
            if name in before and before[name] != weights.get(name):
                found = f"found {weights.get(name)}, allowed: {before[name]}, with which it began"
                raise DataError(f"{self.folder}: weights.{name}: {found} (put the model back, or move this folder away)")
        self.update(weights=weights)

    def update(self, **fields) -> None:
        """Set entries of the record; a record that says so already is not written again."""
        if fields and all(name in self.record and self.record[name] == value for name, value in fields.items()):
            return
        self.record.update(fields)
        write_atomic(self.folder / "record.json", self._record_bytes())

    def _record_bytes(self) -> bytes:
        return json_bytes(self.record | {SEAL: record_seal(self.record)})

    def finish(self, status: str, *, summary: dict[str, np.ndarray] | None = None, **fields) -> Run:
        """Write the summary, the manifest and the final record, and release the folder. A signal waits until that is done.

        Raises FileError where a file is no longer what was written: the run is then resumed from the part before it.
        """
        assert status in STATUSES, status
        with signals.held():
            if summary is not None:
                write_parquet(self.folder / "evidence_summary.parquet", pa.table(summary))
            seconds = self.record["timings"].get("total_s", 0.0) + time.monotonic() - self._started
            timings = self.record["timings"] | fields.pop("timings", {}) | {"total_s": round(seconds, 3)}
            self.record |= {"status": status, "timings": timings, "finished_utc": _utc_now(), **fields}
            content = self._record_bytes()
            self._check_hashes(write_manifest(self.folder, {"record.json": content}, BESIDES))
            write_atomic(self.folder / "record.json", content)  # last: it says that the run is finished
            self.close()
        return read_run(self.folder)

    def _check_hashes(self, found: dict[str, str]) -> None:
        whole = hashlib.sha256(b"".join(line.data for line in self._lines)).hexdigest()
        written = {"metrics.jsonl": whole} | {
            str(self._part_path(index).relative_to(self.folder)): line.evidence
            for index, line in enumerate(self._lines)
            if line.evidence
        }
        for name, sha256 in written.items():
            if found.get(name) != sha256:
                (self.folder / MANIFEST).unlink()
                raise FileError(self.folder / name, "", "another content than was written", "that one", "run it again: it goes on before this part")

    def fail(self, phase: str, error: BaseException) -> None:
        """Close a run that an error ended. Where the record cannot be written either, the error gets a note of it, and
        stays the one that is told."""
        try:
            with signals.held():
                self.update(**failure(phase, error))
        except OSError as problem:
            error.add_note(f"{self.folder}: the record does not say so: {problem.strerror}")
        finally:
            self.close()

    def close(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.folder / LOCK_NAME).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def failure(phase: str, error: BaseException) -> dict:
    """What a record says of an error: `failed` with class, phase and message, `killed` after a signal, `planned` where this
    machine lacks something that the run needs."""
    is_end = isinstance(error, (KeyboardInterrupt, SystemExit)) or signals.heard() is not None
    status = "killed" if is_end else "planned" if isinstance(error, NotRunnable) else "failed"
    return {"status": status, "error": {"class": type(error).__name__, "phase": phase, "message": str(error)[:2000]}}


class SilentWriter(RunWriter):
    """A RunWriter as ranks above 0 have it: it knows what rank 0 has recorded, and writes nothing."""

    def __init__(self, folder: Path, record: dict, metrics: list[dict]):
        self.folder, self.record, self._rows, self._lock = folder, record, metrics, None

    @property
    def metrics(self) -> list[dict]:
        return self._rows

    @property
    def parts_done(self) -> int:
        return len(self._rows)

    def rewind(self, num_parts: int) -> None:
        self._rows = self._rows[:num_parts]

    def append(self, metrics: dict, evidence: pa.Table | None = None) -> None:
        signals.check()
        self._rows.append(dict(metrics))

    def read_parts(self) -> Iterator[pa.Table]:
        return iter(())

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
    Raises UserError when another process writes the same cell; FileError when a finished run is no longer as it was written.
    """
    key = cell.run_key(limit)
    first = run_folder(runs_root, task.id, cell.name, key)
    there = [_Attempt.at(path, key) for path in _attempts(first)]
    mine = [attempt for attempt in there if attempt.record.get("fingerprint", fingerprint) == fingerprint]
    unfinished = [attempt for attempt in mine if not attempt.is_finished]
    if mine and not fresh and not unfinished:
        check_run(mine[-1].folder)
        return read_run(mine[-1].folder)
    folder = unfinished[-1].folder if unfinished else (first.with_suffix(f".{len(there) + 1}") if there else first)
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    found = _Attempt.at(folder, key)
    said = {name: getattr(cell, name) for name in ("name", "arm", "seed", "is_control", "settings")}
    said |= {"point": dict(cell.point), "defaults": dict(cell.defaults)}
    record = found.record or new_record(task, said, key, limit=limit, evidence_parts=evidence_parts, started_utc=_utc_now(),
                                        environment=environment, fingerprint=fingerprint)  # fmt: skip
    if record.get("environment") not in (None, environment):  # resumed by another checkout or with other packages
        record["earlier_environments"] = [*record.get("earlier_environments", []), record["environment"]]
    record |= {"status": "running", "environment": environment, "fingerprint": fingerprint, "error": None}
    writer = RunWriter(folder, record, lock, found.damage, found.is_sealed)
    writer.update()
    return writer


def run_folder(runs_root: Path, task_id: str, cell_name: str, key: str) -> Path:
    """Where the first attempt of a cell lies; the one place where names of a task become a path."""
    for name in (task_id, cell_name):
        if not is_folder_name(name):
            raise UserError(f"found {name[:200]!r} as a folder of {runs_root}, allowed: at most 200 letters, digits and _ . = + -")
    return Path(runs_root) / task_id / cell_name / key[:12]


def _attempts(first: Path) -> list[Path]:
    """The folders of a cell's attempts that exist, in their order; one that somebody renamed is none."""
    later = {int(path.suffix[1:]): path for path in first.parent.glob(f"{first.name}.*") if path.suffix[1:].isdecimal()}
    return [path for path in (first, *(later[number] for number in sorted(later))) if path.exists()]


class _Attempt:
    """What lies in the folder of an attempt: its record ({} if it has none, or a damaged one), and what is wrong with it."""

    def __init__(self, folder: Path, record: dict, damage: str | None, is_sealed: bool):
        self.folder, self.record, self.damage, self.is_sealed = folder, record, damage, is_sealed

    @classmethod
    def at(cls, folder: Path, key: str) -> _Attempt:
        if not os.path.lexists(folder / "record.json"):
            metrics = folder / "metrics.jsonl"
            return cls(folder, {}, "record.json: missing" if metrics.exists() and metrics.stat().st_size else None, True)
        try:
            record, is_sealed = read_record(folder)
        except FileError as problem:
            return cls(folder, {}, str(problem).removeprefix(f"{folder}/"), True)
        other = record["run_key"] != key
        return cls(folder, {}, "record.json: of another cell", True) if other else cls(folder, record, None, is_sealed)

    @property
    def is_finished(self) -> bool:
        """A record that cannot be read is that of a finished run where there is a manifest."""
        return self.record["status"] in FINISHED if self.record else (self.folder / MANIFEST).exists()


def _lock(folder: Path):
    lock = open(folder / LOCK_NAME, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder}: another process is running this cell; wait for it or choose another --runs-dir") from None
    return lock


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
