"""The files of a dump, and their rows one at a time: parquet or JSON lines (also gzip), told apart by their first bytes.

A dump may be one file, several, or a folder of shards (`step_0/rank_1.jsonl`, `part-0.parquet`), read in the order of
their names. Names that begin with `.` or `_` are passed over; folders called `arm=bf16` say the value of a column, as
partitioned writers have it. Every byte comes through suite/door.py; the budgets of this module bound what one row and one
row group may take, whatever their compression promises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from suite import door
from suite.door import FileError

MAX_ROLLOUT_VALUES = 2**20  # entries of one list: response tokens, or prompt and response
MAX_GROUP_VALUES = 2**25  # of one column in one row group: 256 MiB of float64
MAX_GROUP_BYTES = 2**29  # the same in pages, uncompressed
MAX_LINE_BYTES = 2**24  # of one JSON row: 300,000 tokens with two log-probs of 20 letters each
MAX_ROWS = 1_000_000  # of all files together
MAX_BYTES = 2**40  # of a file, and of what gzip makes of it: rows and lines are bounded, and read one by one
BATCH_VALUES = 2**18  # what a batch of rows should hold of one column

SUFFIXES = (".parquet", ".pq", ".jsonl", ".ndjson", ".json", ".pt")
MARKERS = ("STABLE",)  # empty files that say a folder is complete
UNUSED = ("step", "trainer_entropies")  # of the suite's own evidence rows
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
SMALLER_GROUPS = "write smaller row groups, such as row_group_size=1000"


@dataclass(frozen=True)
class Shard:
    """One file of a dump; `constants` are the columns that its folders name."""

    path: Path
    constants: dict[str, Any] = field(default_factory=dict)


def shards(paths: Sequence[Path]) -> list[Shard]:
    """The files behind what stands after --evidence, folders looked through. FileError for what is neither."""
    found = [shard for path in paths for shard in _behind(path)]
    places = [shard.path for shard in found]
    if twice := sorted({str(path) for path in places if places.count(path) > 1}):
        raise FileError(twice[0], "", "given twice", "each file once")
    return found


def _behind(path: Path) -> list[Shard]:
    with door.whatever_fails(path, "a file or a folder of files"):
        return _in_folder(path) if path.is_dir() else [Shard(path.resolve())]


def _in_folder(folder: Path) -> list[Shard]:
    listing = door.look_through(folder.resolve())
    names = [name for name in [*listing.files, *listing.foreign] if not _passed_over(name)]
    if not names:
        raise FileError(folder, "", "a folder without files", f"files of rollouts ({', '.join(SUFFIXES)})")
    return [_shard(folder, name, listing.foreign.get(name)) for name in sorted(names)]


def _passed_over(name: str) -> bool:
    parts = name.split("/")
    return parts[-1] in MARKERS or any(part[0] in "._" for part in parts)


def _shard(folder: Path, name: str, kind: str | None) -> Shard:
    path = (folder / name).resolve()
    if not name.lower().removesuffix(".gz").endswith(SUFFIXES) or kind not in (None, "a link"):
        what = kind or "a file of another kind"
        raise FileError(folder / name, "", what, f"{', '.join(SUFFIXES)}, also .gz", "move it out of the folder")
    pairs = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
    return Shard(path, {key: int(text) if re.fullmatch(r"\d{1,18}", text) else text for key, _, text in pairs})


def read_rows(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row from 1, or line of a JSON lines file; the row) of one file. FileError for whatever cannot be read."""
    with door.open_file(shard.path, MAX_BYTES) as file:
        head = file.read(4)
    if not head:
        raise FileError(shard.path, "rows", "an empty file", "one row per rollout")
    for number, row in _parquet_rows(shard.path) if head == b"PAR1" else _json_rows(shard.path):
        yield number, row if not shard.constants else _with_constants(shard, number, row)


def _with_constants(shard: Shard, number: int, row: dict[str, Any]) -> dict[str, Any]:
    for name, value in shard.constants.items():
        if row.get(name, value) != value:
            raise FileError(shard.path, f"row {number}: {name}", repr(row[name]), f"{value!r}, as the folder says")
    return row | shard.constants


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in door.json_lines(path, MAX_BYTES, MAX_LINE_BYTES):
        if not isinstance(row, dict):
            raise FileError(path, f"row {number}", f"a {type(row).__name__}", "one JSON object per line")
        yield number, {name: value for name, value in row.items() if _is_used(name)}


def _is_used(column: str) -> bool:
    return column not in UNUSED and not PANDAS_INDEX.fullmatch(column)


# ---- parquet -------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with door.open_parquet(path, max_rows=MAX_ROWS, max_bytes=MAX_BYTES, max_file_bytes=MAX_BYTES) as file:
        with door.whatever_fails(path, "a readable parquet file"):
            names, number = _columns(file.schema_arrow), 0
        for group in range(file.num_row_groups):
            size = _batch_size(path, file, group, names)
            for batch in _batches(path, file, group, size, names):
                for i in range(batch.num_rows):
                    number += 1
                    yield number, {name: _value(path, number, name, batch.column(name), i) for name in names}


def _columns(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if _is_used(name)]


def _batch_size(path: Path, file: pq.ParquetFile, group: int, names: list[str]) -> int:
    """How many rows of a group to decode at once, from its metadata. FileError for a group, or a row, beyond the budget."""
    about, place = file.metadata.row_group(group), f"row group {group}"
    with door.whatever_fails(path, "a readable parquet file"):
        chunks = {chunk.path_in_schema: chunk for chunk in map(about.column, range(about.num_columns))}
    chunks = {name: chunk for name, chunk in chunks.items() if name.split(".")[0] in names}
    for name, chunk in chunks.items():
        if chunk.num_values > min(MAX_GROUP_VALUES, about.num_rows * MAX_ROLLOUT_VALUES):
            found = f"{chunk.num_values} values in {about.num_rows} rows"
            allowed = f"at most {MAX_ROLLOUT_VALUES} a row and {MAX_GROUP_VALUES} a row group"
            raise FileError(path, f"{place}: {name}", found, allowed, SMALLER_GROUPS)
        if chunk.total_uncompressed_size > MAX_GROUP_BYTES:
            found = f"{chunk.total_uncompressed_size} bytes of pages"
            raise FileError(path, f"{place}: {name}", found, f"at most {MAX_GROUP_BYTES} bytes", SMALLER_GROUPS)
    most = max((chunk.num_values for chunk in chunks.values()), default=0)
    size = max(1, min(1024, BATCH_VALUES * about.num_rows // max(1, most)))
    for name in {name.split(".")[0] for name, chunk in chunks.items() if chunk.num_values > MAX_ROLLOUT_VALUES}:
        _refuse_long_rows(path, file, group, size, name)
    return size


def _refuse_long_rows(path: Path, file: pq.ParquetFile, group: int, size: int, name: str) -> None:
    """One column alone, before all are decoded side by side: metadata know its sum, and not how it is spread over rows."""
    first = 1 + sum(file.metadata.row_group(i).num_rows for i in range(group))
    for batch in _batches(path, file, group, size, [name]):
        column = batch.column(0)
        lengths = column.value_lengths().to_pylist() if hasattr(column, "value_lengths") else []
        for i, length in enumerate(lengths):
            if (length or 0) > MAX_ROLLOUT_VALUES:
                raise FileError(path, f"row {first + i}: {name}", f"{length} values", f"at most {MAX_ROLLOUT_VALUES}")
        first += batch.num_rows


def _batches(path: Path, file: pq.ParquetFile, group: int, size: int, names: list[str]) -> Iterator[pa.RecordBatch]:
    with door.whatever_fails(path, "a readable parquet file"):
        batches = file.iter_batches(batch_size=size, row_groups=[group], columns=names, use_threads=False)
    while True:
        with door.whatever_fails(path, "a readable parquet file"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _value(path: Path, number: int, name: str, column: pa.Array, i: int) -> Any:
    """A plain value; a list without nulls as a numpy array, which keeps long rows cheap."""
    with door.whatever_fails(path, "a value of a plain type, texts in UTF-8", f"row {number}: {name}"):
        value = column[i]
        if not value.is_valid or not isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)):
            return value.as_py()
        items = value.values
        plain = pa.types.is_integer(items.type) or pa.types.is_floating(items.type) or pa.types.is_boolean(items.type)
        return items.to_numpy(zero_copy_only=False) if plain and items.null_count == 0 else items.to_pylist()
