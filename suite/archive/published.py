"""Reads published folders as what they are: somebody else's files. No torch.

    results/<task>/<fingerprint>/<cell>/<run_key12>[.<attempt>]/
        record.json  metrics.jsonl.gz  evidence_summary.parquet  plot_points.parquet
    results/<task>/<fingerprint>/verdict.json  figures/*.svg  MANIFEST.sha256

Everything comes in by suite/door.py and has the keys and types that the rest of the suite relies on, or is a FileError with
file, key, found and allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import pyarrow as pa
from annotated_types import Len
from typing_extensions import TypedDict

from suite.door import (
    FileError,
    Listing,
    json_lines,
    look_through,
    open_parquet,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_parquet,
    typed,
)
from suite.errors import UserError
from suite.files import sha256_file
from suite.measure.mismatch import COUNTS, PROMPT_SUM_COLUMNS, SAMPLED_COLUMNS, is_scored
from suite.record.run import Run
from suite.record.schema import RECORD_SCHEMA

MANIFEST, VERDICT, RECORD = "MANIFEST.sha256", "verdict.json", "record.json"
METRICS, SUMMARY, POINTS = "metrics.jsonl.gz", "evidence_summary.parquet", "plot_points.parquet"
# One letter more than a name may have makes it another file system's problem: letters, digits and . _ = + - , only.
NAME = r"[A-Za-z0-9][A-Za-z0-9._=+,-]{0,119}"
IN_FOLDER = re.compile(rf"{MANIFEST}|{VERDICT}|figures/{NAME}\.svg|{NAME}/[0-9a-f]{{12}}(?:\.[1-9][0-9]{{0,3}})?/(?:{RECORD}|{METRICS}|{SUMMARY}|{POINTS})")
JUDGED = (RECORD, METRICS, SUMMARY, VERDICT)  # what a verdict rests on; the rest is drawn
_DIGEST = re.compile(r"[0-9a-f]{64}")


Leaf = int | float | str | bool | None  # a number that is not finite stands there by name
Value = Leaf | list[Leaf] | dict[str, Leaf]
Pair = Annotated[list[int | float | str | None], Len(2, 2)]


class TaskPart(TypedDict):
    id: str
    version: int
    grade_version: int
    text: str


class CellPart(TypedDict):
    name: str
    arm: str
    point: dict[str, Any]
    seed: int
    is_control: bool
    settings: dict[str, dict[str, Any] | None]
    defaults: NotRequired[dict[str, int | float | str]]


class RecordShape(TypedDict):
    """What the suite reads of record.json; other keys may stand beside these."""

    schema: Literal[RECORD_SCHEMA]
    task: TaskPart
    cell: CellPart
    run_key: str
    limit: int | None
    status: str
    evidence_parts: bool
    precision_asked: dict[str, Any]
    precision_executed: dict[str, str]
    counts: dict[str, int]
    series_summary: dict[str, int | float | str | None]
    environment: dict[str, Any]
    fingerprint: str
    started_utc: str
    finished_utc: str | None
    error: NotRequired[dict[str, str] | None]
    weights: NotRequired[dict[str, Any]]
    algorithm: NotRequired[dict[str, int | float | str | bool | None]]
    sync_floor: NotRequired[dict[str, int | float | str]]
    timings: NotRequired[dict[str, int | float]]
    earlier_environments: NotRequired[list[dict[str, Any]]]


class ClaimShape(TypedDict):
    id: str
    kind: str
    statement: str
    estimand: str | None
    unit: str | None
    estimate: Value
    interval: Pair | None
    accept: Pair | list[Pair] | None
    paper_value: Value
    paper_source: str | None
    num_seeds: int
    verdict: str | None
    reason: str
    consistent_with_paper: bool | None


class ControlShape(TypedDict):
    name: str
    estimate: Value
    interval: Pair | None
    outcome: str


class ArmShape(TypedDict):
    values: dict[str, Value]


class VerdictShape(TypedDict):
    """What the suite reads of verdict.json."""

    task: str
    task_version: int
    grade_version: int
    tier: str
    fingerprint: str | None
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT_RUN", "INVALID", "ERROR"]
    reason: str
    claims: list[ClaimShape]
    controls: list[ControlShape]
    metrics: NotRequired[list[ArmShape]]
    environment: dict[str, Any]


@contextmanager
def records_of(folder) -> Iterator[None]:
    """Whatever computing with a stranger's records raises becomes a FileError about their folder: they have the right
    types, and may still say what no code can make sense of."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # noqa: BLE001  (any class: what it is depends on what stands in the records)
        raise FileError(folder, "", f"{type(problem).__name__}: {problem}", "records as `suite publish` writes them") from None


def read_verdict(path: Path) -> dict:
    """verdict.json, of a published folder or below runs/."""
    return typed(parse_json(read_bytes(path), path, finite=True), VerdictShape, path)


def read_record(folder: Path) -> dict:
    return read_json(folder / RECORD, RecordShape)


def read_published(folder: Path) -> Run:
    """One published run. Raises FileError."""
    return Run(folder, read_record(folder), read_series(folder / METRICS), read_sums(folder / SUMMARY))


_NAMED = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}  # as files.write_json writes them


def read_series(path: Path) -> list[dict]:
    """The lines of metrics; numbers that are not finite are written by name. [] where there is no such file."""
    lines = json_lines(path, finite=True) if exists(path) else ()
    shape = dict[str, int | float | bool | Literal["nan", "inf", "-inf"] | None]
    rows = [typed(row, shape, path, f"line {number}") for number, row in lines]
    return [{name: _NAMED.get(value, value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]


def read_sums(path: Path) -> dict[str, np.ndarray] | None:
    """The sums per prompt (mismatch.PROMPT_SUM_COLUMNS, of rollouts that no trainer scored SAMPLED_COLUMNS), None where there
    is no such file."""
    if not exists(path):
        return None
    types = {name: pa.types.is_floating for name in PROMPT_SUM_COLUMNS} | dict.fromkeys(COUNTS, pa.types.is_integer)
    with open_parquet(path) as parquet:
        columns = PROMPT_SUM_COLUMNS if is_scored(parquet.schema_arrow.names) else SAMPLED_COLUMNS
    fits = {name: types[name] for name in columns} | {"prompt_id": pa.types.is_string}
    table = read_parquet(path, fits, max_rows=1_000_000)
    for name in table.column_names:
        if table[name].null_count:
            raise FileError(path, name, f"{table[name].null_count} empty values", "one in every row")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def exists(path: Path) -> bool:
    """Whether anything is there, a link to nowhere included: then the door says what it is."""
    return path.is_symlink() or path.exists()


def run_folders(folder: Path) -> list[Path]:
    """The run folders of results/<task>/<fingerprint>, sorted."""
    return sorted(path.parent for path in folder.glob(f"*/*/{RECORD}"))


def read_manifest(path: Path) -> dict[str, str]:
    """{name: sha256} of MANIFEST.sha256, in the format of `sha256sum`."""
    with records_of(path):
        text = read_bytes(path).decode("utf-8")
    listed: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        digest, _, name = line.partition("  ")
        if not _DIGEST.fullmatch(digest) or not IN_FOLDER.fullmatch(name) or name == MANIFEST:
            raise FileError(path, f"line {number}", repr(printable(line, 100)), "a sha256, two blanks and the name of a published file")
        if name in listed:
            raise FileError(path, f"line {number}", f"{name} twice", "each file once")
        listed[name] = digest
    return listed


def manifest_differences(folder: Path) -> tuple[list[str], set[str]]:
    """(what differs between a published folder and its manifest, one sentence each; the files that are not to be
    believed). A manifest that cannot be read leaves nothing to be believed."""
    listing = _without_leavings(look_through(folder))
    found = [f"{folder / name}: {kind}, allowed: a regular file" for name, kind in listing.foreign.items()]
    try:
        listed = read_manifest(folder / MANIFEST)
    except FileError as problem:
        return [*found, str(problem)], set(listing.files)
    present = listing.files.keys() - {MANIFEST}
    found += [f"{folder / printable(name)}: not in the manifest" for name in sorted(present - listed.keys())]
    missing = sorted(listed.keys() - listing.files.keys() - listing.foreign.keys())
    found += [f"{folder / name}: in the manifest, but missing" for name in missing]
    changed = {}
    for name in sorted(present & listed.keys()):
        if (digest := sha256_file(folder / name)) != listed[name]:
            changed[name] = f"{folder / name}: sha256 {digest}, the manifest says {listed[name]}"
    return [*found, *changed.values()], {*changed, *missing, *(present - listed.keys()), *listing.foreign}


def _without_leavings(listing: Listing) -> Listing:
    """A file manager's own notes in a folder say nothing about results."""
    return Listing({name: size for name, size in listing.files.items() if not is_leaving(name)}, listing.foreign)


def is_leaving(name: str) -> bool:
    """.DS_Store, and the ._ files in which a Mac keeps what its own file system knows of a file."""
    last = name.rsplit("/", 1)[-1]
    return last == ".DS_Store" or last.startswith("._") or name.split("/", 1)[0] == "__MACOSX"
