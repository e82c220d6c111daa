"""Bytes on disk: written whole or not at all, hashed, and JSON that any reader takes. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,199}")


def is_folder_name(text: str) -> bool:
    """Whether a name may become a folder: letters, digits and `_ . = + -`, so that it stays where it is put, on any file
    system, and means nothing to a shell or a terminal."""
    return FOLDER_NAME.fullmatch(text) is not None


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old content or all of the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk, or Ctrl-C: no half-written file stays
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value) -> None:
    write_atomic(path, json_bytes(value))


def json_bytes(value) -> bytes:
    """What `write_json` writes: sorted keys, one blank a level."""
    return (json.dumps(json_safe(value), indent=1, sort_keys=True) + "\n").encode()


def write_parquet(path: Path, table: pa.Table) -> None:
    write_atomic(path, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def json_safe(value):
    """JSON has no NaN: a number that is not finite is written as its name, so that it cannot be read as a measurement."""
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


_NAMED_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def with_numbers(row: dict) -> dict:
    """The numbers that `json_safe` wrote by name, as numbers again; of a flat mapping."""
    return {k: _NAMED_NUMBERS.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_once(path: Path) -> str:
    """The same, read once per process for as long as the file system says that the file is untouched."""
    about = os.stat(path)
    return _sha256_as_it_stands(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@lru_cache(maxsize=100_000)
def _sha256_as_it_stands(path: Path, *_state: int) -> str:
    return sha256_file(path)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
