"""The one door for bytes that somebody else wrote: dumps, bundles, published folders, run folders. No torch.

    open_file(path)               a regular file, opened without following a link or waiting for a FIFO
    read_bytes(path, max_bytes)   all of it
    unzip(data, max_bytes)        gzip in memory; whole, with its trailer, within the budget
    parse_json(data, file)        one JSON value: UTF-8, bounded depth and digits, no key twice
    typed(value, shape, file)     the same value, once pydantic agrees that it has this shape
    json_lines(path)              (line number, value) of JSON lines, plain or gzip, one line at a time
    read_parquet(path, ...)       a table, after its metadata has said how much it is
    look_through(folder)          its regular files with their sizes, and everything in it that is none

Whatever is wrong with such a file is a FileError, which is a UserError: file, place in it, found, allowed, what to do.
Nothing else leaves here, and nothing is allocated that a limit does not cover. Only the last component of a path is kept
from being a link: who takes a path from the command line resolves it first (`Path.resolve`).
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from suite.errors import UserError

MIB = 2**20
MAX_FILE_BYTES = 64 * MIB
MAX_DEPTH = 64  # of nested JSON lists and objects; records have 7
MAX_DIGITS = 40  # of a whole number in JSON; a sha256 is text
MAX_FILES = 100_000  # in one folder
GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = MIB


class FileError(UserError):
    """Bytes of somebody else that cannot be used. `place` is a key, row, line or column, or "" for the whole file."""

    def __init__(self, file, place: str, found: str, allowed: str, hint: str | None = None):
        self.file, self.place, self.found, self.allowed, self.hint = str(file), place, found, allowed, hint
        where = ": ".join(printable(part) for part in (str(file), place) if part)
        super().__init__(f"{where}: found {printable(found)}, allowed: {allowed}" + (f" ({hint})" if hint else ""))


def printable(text: str, most: int = 200) -> str:
    """Text of somebody else's as it may stand in a message: one line, no control characters, bounded."""
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in str(text)[: 2 * most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


_FAILURES = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, MemoryError,
             NotImplementedError, zlib.error, pa.lib.ArrowException)  # fmt: skip


@contextmanager
def whatever_fails(file, allowed: str, place: str = "", hint: str | None = None):
    """Whatever json, zlib, gzip, pyarrow or the system raises inside becomes a FileError about `file`."""
    try:
        yield
    except FileError:
        raise
    except _FAILURES as problem:
        raise FileError(file, place, _what(problem), allowed, hint) from None


def _what(problem: BaseException) -> str:
    if isinstance(problem, OSError) and problem.errno is not None:
        return os.strerror(problem.errno)
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__


# --- bytes -----------------------------------------------------------------------------------------------------------


def open_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> BinaryIO:
    """A regular file of at most `max_bytes`, open for reading. A link, a folder, a FIFO or a device is a FileError, and
    no FIFO is waited for."""
    with whatever_fails(path, "a regular file"):
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise FileError(path, "", "a link", "a regular file")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        about = os.fstat(handle)
        wrong = None if stat.S_ISREG(about.st_mode) else kind_of(about.st_mode)
        if wrong is None and about.st_size > max_bytes:
            wrong = f"{about.st_size} bytes"
        if wrong is not None:
            os.close(handle)
            raise FileError(path, "", wrong, f"a regular file of at most {max_bytes} bytes")
        return os.fdopen(handle, "rb")


def kind_of(mode: int) -> str:
    """What a file mode says the thing is, in words."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a FIFO",
             stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something that is no file")


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a regular file; never more than `max_bytes`, also if it grows meanwhile."""
    with open_file(path, max_bytes) as file, whatever_fails(path, "a readable file"):
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileError(path, "", f"more than {max_bytes} bytes", f"at most {max_bytes}")
    return data


def unzip(data: bytes, file, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """What gzip bytes hold. FileError if that is more than `max_bytes`, or the end or the checksum is missing or wrong."""
    return b"".join(unzipped(iter([data]), file, max_bytes))


def unzipped(chunks: Iterator[bytes], file, max_bytes: int) -> Iterator[bytes]:
    """The same, chunk by chunk, so that a caller may stop. Several gzip members follow each other as one."""
    total, decoder, rest = 0, zlib.decompressobj(wbits=31), b""
    whole = True
    for chunk in chunks:
        rest += chunk
        while rest:
            with whatever_fails(file, "a whole gzip file", hint="make or download it again"):
                out = decoder.decompress(rest, _CHUNK)
            whole = decoder.eof
            total += len(out)
            if total > max_bytes:
                raise FileError(file, "", f"more than {max_bytes} bytes once unzipped", f"at most {max_bytes}")
            if out:
                yield out
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if decoder.eof:
                decoder = zlib.decompressobj(wbits=31)
            elif not out and not rest:
                break
    if not whole:
        raise FileError(file, "", "a gzip file that ends too early", "a whole gzip file", "make or download it again")


# --- JSON ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, shape: Any = dict, max_bytes: int = MAX_FILE_BYTES) -> Any:
    """The value of a JSON file, which must have the shape (see `typed`)."""
    return typed(parse_json(read_bytes(path, max_bytes), path), shape, path)


def parse_json(data: bytes, file, place: str = "", finite: bool = False) -> Any:
    """One JSON value. With `finite`, NaN, Infinity and numbers beyond float64 are refused too."""
    with whatever_fails(file, "JSON in UTF-8", place):
        text = data.decode("utf-8")
        numbers = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_int=_bounded, **numbers)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for half a surrogate pair
    # A value is never deeper than it has brackets, so that rows of many numbers need no walk.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise FileError(file, place, f"values nested more than {MAX_DEPTH} deep", f"at most {MAX_DEPTH}")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _bounded(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits (at most {MAX_DIGITS})")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text[:40]}, which is no finite number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


@cache
def _adapter(shape: Any) -> TypeAdapter:
    return TypeAdapter(shape)


def typed(value: Any, shape: Any, file, place: str = "") -> Any:
    """`value` itself, if it has the shape: anything pydantic takes, such as dict, list[int] or a TypedDict, strictly. A
    FileError names the first key that has not."""
    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        where = ".".join([place] * bool(place) + [str(part) for part in first["loc"]])
        found = "nothing" if first["type"] == "missing" else f"{type(first['input']).__name__} {first['input']!r}"
        raise FileError(file, where, found, first["msg"].removeprefix("Input should be ")) from None
    return value


def json_lines(path: Path, max_bytes: int = MAX_FILE_BYTES, max_line: int = 16 * MIB, finite: bool = False,
               cut: bool = False) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(line, value) of a JSON lines file, lines counted from 1, blank lines passed over; gzip is found by content.

    max_bytes: of the file and of what it unzips to. cut: whether a last line without an end is left out (a writer was
    killed) instead of read.
    """
    for number, line, ended in _lines(path, max_bytes, max_line):
        if line.strip() and (ended or not cut):
            yield number, parse_json(line, path, f"line {number}", finite)


def _lines(path: Path, max_bytes: int, max_line: int) -> Iterator[tuple[int, bytes, bool]]:
    number, rest = 0, b""
    for chunk in _chunks(path, max_bytes):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield number, line, True
        if len(rest) > max_line:
            raise FileError(path, f"line {number + 1}", f"more than {max_line} bytes", f"at most {max_line} a line")
    if rest:
        yield number + 1, rest, False


def _chunks(path: Path, max_bytes: int) -> Iterator[bytes]:
    with open_file(path, max_bytes) as file:
        with whatever_fails(path, "a readable file"):
            first = file.read(_CHUNK)
        chunks = _read_on(file, path, first)
        yield from unzipped(chunks, path, max_bytes) if first.startswith(GZIP_MAGIC) else chunks


def _read_on(file: BinaryIO, path: Path, chunk: bytes) -> Iterator[bytes]:
    while chunk:
        yield chunk
        with whatever_fails(path, "a readable file"):
            chunk = file.read(_CHUNK)


# --- parquet ---------------------------------------------------------------------------------------------------------

Fits = Callable[[pa.DataType], bool]  # whether a column of this type will do
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}  # bytes; texts are counted apart


def read_parquet(path: Path, columns: Mapping[str, Fits] | None = None, max_rows: int = 5_000_000,
                 max_bytes: int = 512 * MIB, max_file_bytes: int = MAX_FILE_BYTES) -> pa.Table:  # fmt: skip
    """A table that fits into `max_bytes` of memory.

    columns: which ones to read, each with what its type must satisfy; None reads all. Metadata comes first: rows, values
    and types. A page that repeats one value a million times is small on disk only.
    """
    with open_parquet(path, columns, max_rows, max_bytes, max_file_bytes) as parquet:
        with whatever_fails(path, "a readable parquet file"):
            names, groups = None if columns is None else list(columns), []
            for i in range(parquet.num_row_groups):
                groups.append(plain(parquet.read_row_group(i, names), path, max_bytes))
                max_bytes -= groups[-1].nbytes
            return pa.concat_tables(groups) if groups else plain(parquet.read(names), path)


@contextmanager
def open_parquet(path: Path, columns: Mapping[str, Fits] | None = None, max_rows: int = 5_000_000,
                 max_bytes: int = 512 * MIB, max_file_bytes: int = MAX_FILE_BYTES) -> Iterator[pq.ParquetFile]:  # fmt: skip
    """The same before anything is decoded, for who reads it by row groups or batches. Texts come as dictionaries, each
    distinct text once: `plain` turns a part into ordinary columns when it has seen how much they are."""
    with open_file(path, max_file_bytes) as file:
        with whatever_fails(path, "a readable parquet file"):
            about = pq.read_metadata(file)
            _check_metadata(about, path, columns, max_rows, max_bytes)
            texts = [about.schema.column(i).path for i in range(about.num_columns)
                     if about.schema.column(i).physical_type == "BYTE_ARRAY"]  # fmt: skip
            file.seek(0)
            parquet = pq.ParquetFile(file, read_dictionary=texts)
        with parquet:
            yield parquet


def plain(table: pa.Table | pa.RecordBatch, path: Path, max_bytes: int = 512 * MIB) -> pa.Table:
    """A table, or one batch, with ordinary text columns. FileError for texts beyond the budget, or not in UTF-8."""
    table = table if isinstance(table, pa.Table) else pa.Table.from_batches([table])
    with whatever_fails(path, "a readable parquet file"):
        for name in table.column_names:
            if (size := sum(_text_bytes(chunk) for chunk in table[name].chunks)) > max_bytes:
                raise FileError(path, name, f"texts of {size // MIB} MiB", f"at most {max_bytes // MIB} MiB")
        table = table.cast(pa.schema([field.with_type(_undictionaried(field.type)) for field in table.schema]))
        table.validate(full=True)
    return table


def _check_metadata(about: pq.FileMetaData, path: Path, columns, max_rows: int, max_bytes: int) -> None:
    schema = about.schema.to_arrow_schema()
    if about.num_rows > max_rows:
        raise FileError(path, "", f"{about.num_rows} rows", f"at most {max_rows}")
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise FileError(path, twice[0], "two columns of this name", "one")
    for name, fits in (columns or {}).items():
        if name not in schema.names:
            raise FileError(path, name, "no such column", f"one; there are {', '.join(map(printable, schema.names[:20]))}")
        if not fits(schema.field(name).type):
            raise FileError(path, name, f"a column of {schema.field(name).type}", "another type")
    if (size := _decoded_bytes(about, columns)) > max_bytes:
        raise FileError(path, "", f"columns of {size // MIB} MiB once read", f"at most {max_bytes // MIB} MiB")


def _decoded_bytes(about: pq.FileMetaData, columns) -> int:
    """What the columns take once decoded: values times width, or the bytes of the pages where those are more."""
    groups = (about.row_group(i) for i in range(about.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    wanted = (chunk for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns)
    return sum(max(chunk.num_values * _WIDTHS.get(chunk.physical_type, 16), chunk.total_uncompressed_size) for chunk in wanted)


def _text_bytes(chunk: pa.Array) -> int:
    """How many bytes the texts of a column take where each stands in its own row; 0 for other columns."""
    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        return _text_bytes(chunk.flatten())
    if pa.types.is_map(chunk.type):
        return _text_bytes(chunk.keys) + _text_bytes(chunk.items)
    if pa.types.is_struct(chunk.type):
        return sum(map(_text_bytes, chunk.flatten()))
    if not pa.types.is_dictionary(chunk.type):
        return 0
    lengths = pc.fill_null(pc.binary_length(chunk.dictionary), 0)
    return pc.sum(pc.take(lengths, chunk.indices).cast(pa.int64())).as_py() or 0


def _undictionaried(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_map(kind):
        return pa.map_(_undictionaried(kind.key_type), _undictionaried(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_undictionaried(field.type)) for field in kind])
    return pa.list_(_undictionaried(kind.value_type)) if pa.types.is_list(kind) else kind


# --- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """What lies in a folder, by its path below it: regular files with their sizes in bytes, and what is neither file nor
    folder (or cannot be listed), in words."""

    files: dict[str, int]
    foreign: dict[str, str]


def look_through(folder: Path, max_files: int = MAX_FILES) -> Listing:
    """Everything below a folder; no link is followed, also not `folder` itself."""
    files, foreign, waiting = {}, {}, [""]
    while waiting:
        place = waiting.pop()
        with whatever_fails(Path(folder) / place, "a folder that can be listed"):
            if place == "" and not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise FileError(folder, "", kind_of(os.lstat(folder).st_mode), "a folder")
            entries = sorted(os.scandir(Path(folder) / place), key=lambda entry: entry.name)
            for entry in entries:
                name, about = f"{place}{entry.name}", entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(about.st_mode):
                    waiting.append(f"{name}/")
                elif stat.S_ISREG(about.st_mode):
                    files[name] = about.st_size
                else:
                    foreign[name] = kind_of(about.st_mode)
        if len(files) + len(foreign) + len(waiting) > max_files:
            raise FileError(folder, "", f"more than {max_files} files", f"at most {max_files}")
    return Listing(dict(sorted(files.items())), dict(sorted(foreign.items())))
