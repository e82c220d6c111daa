"""The door for foreign bytes: what is whole, regular and small enough comes in unchanged, everything else is one FileError."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak import PEAK_MIB, peak_mib, reset_peak
from typing_extensions import TypedDict

from suite import door
from suite.door import FileError


def refused(call, *words):
    with pytest.raises(FileError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 1000
    return message


# --- bytes ---


def test_a_regular_file_comes_in_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert door.read_bytes(tmp_path / "x") == b"abc" == door.read_bytes(tmp_path / "x", max_bytes=3)
    refused(lambda: door.read_bytes(tmp_path / "x", max_bytes=2), str(tmp_path / "x"), "3 bytes", "at most 2")


@pytest.mark.parametrize("kind, word", [
    ("link", "a link"), ("dangling", "a link"), ("folder", "a folder"), ("fifo", "a FIFO"), ("socket", "a"),
    ("absent", "No such file"), ("long", "File name too long"), ("nul", "null"),
])  # fmt: skip
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, kind, word, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = {"long": Path("y" * 3000), "nul": Path("a\0b")}.get(kind, Path("x"))
    (tmp_path / "target").write_text("{}")
    if kind in ("link", "dangling"):
        os.symlink("target" if kind == "link" else "nowhere", "x")
    elif kind == "folder":
        os.mkdir("x")
    elif kind == "fifo":
        os.mkfifo("x")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("x")
    refused(lambda: door.read_bytes(path), word)


def test_an_endless_device_is_refused():
    refused(lambda: door.read_bytes(Path("/dev/zero")), "/dev/zero", "a device")


def test_gzip_comes_in_whole_or_not_at_all():
    data = os.urandom(5000) * 3
    zipped = gzip.compress(data)
    assert door.unzip(zipped, "x.gz") == data and door.unzip(zipped + zipped, "x.gz") == 2 * data
    assert door.unzip(gzip.compress(b""), "x.gz") == b""
    for cut in (1, 4, 8, 9, 200, len(zipped) - 5):
        refused(lambda cut=cut: door.unzip(zipped[:-cut], "x.gz"), "x.gz", "again")
    wrong_checksum = zipped[:-8] + bytes(4) + zipped[-4:]
    refused(lambda: door.unzip(wrong_checksum, "x.gz"), "x.gz")
    refused(lambda: door.unzip(zipped + b"tail", "x.gz"), "x.gz")
    refused(lambda: door.unzip(b"<html>", "x.gz"), "x.gz")


def test_a_gzip_bomb_costs_its_budget_and_no_more():
    bomb = gzip.compress(bytes(200 * door.MIB))
    reset_peak()
    before = peak_mib()
    refused(lambda: door.unzip(bomb, "bomb.gz", max_bytes=3 * door.MIB), "bomb.gz", "more than")
    assert peak_mib() - before < 30


# --- JSON ---


@pytest.mark.parametrize("text, word", [
    ("", "JSONDecodeError"), ("{", "JSONDecodeError"), ("{} x", "Extra data"), ('{"a": 1, "a": 2}', "'a' twice"),
    ("[" * 200_000, "Recursion"), ("[" * 100 + "]" * 100, "nested"), ("9" * 5000, "5000 digits"), ("9" * 41, "41 digits"),
    ('"\\ud800"', "surrogates"), ("\xff", "utf-8"),
])  # fmt: skip
def test_what_is_not_plain_json_is_refused(text, word):
    refused(lambda: door.parse_json(text.encode("latin-1"), "x.json"), "x.json", word)


def test_numbers_that_are_not_finite_come_in_only_where_they_may():
    assert door.parse_json(b"[NaN, 1e999]", "x")[1] == float("inf")
    for text in (b"NaN", b"-Infinity", b"1e999"):
        refused(lambda text=text: door.parse_json(text, "x", "line 3", finite=True), "x: line 3", "finite")
    assert door.parse_json(b"[1.5, 2, -3e-3]", "x", finite=True) == [1.5, 2, -0.003]


def test_json_that_is_allowed_comes_in_as_json_reads_it():
    value = {"a": [1, 2.5, None, True, "\u03c0 \U0001f600"], "b": {"c": [[[]]]}, "n": 10**39}
    assert door.parse_json(json.dumps(value).encode(), "x") == value


class Shape(TypedDict):
    name: str
    seeds: list[int]


@pytest.mark.parametrize("value, place, found", [
    ([], "", "list"), ({"name": "x"}, "seeds", "nothing"), ({"name": 1, "seeds": []}, "name", "int 1"),
    ({"name": "x", "seeds": [0, "1"]}, "seeds.1", "str '1'"), ({"name": "x", "seeds": [True]}, "seeds.0", "bool"),
])  # fmt: skip
def test_a_value_of_another_shape_names_the_key(tmp_path, value, place, found):
    (tmp_path / "x.json").write_text(json.dumps(value))
    refused(lambda: door.read_json(tmp_path / "x.json", Shape), f"x.json: {place}", found, "allowed")


def test_a_value_of_the_shape_comes_back_as_it_is():
    value = {"name": "x", "seeds": [1], "more": 2.5}
    assert door.typed(value, Shape, "x") is value


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_json_lines_count_from_one_and_pass_over_blank_lines(tmp_path, pack):
    path = tmp_path / "x.jsonl"
    path.write_bytes(pack(b'{"a": 1}\n\n{"a": 2}'))
    assert list(door.json_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    assert list(door.json_lines(path, cut=True)) == [(1, {"a": 1})]
    path.write_bytes(pack(b'{"a": 1}\n{"a": }\n'))
    refused(lambda: list(door.json_lines(path)), "x.jsonl: line 2")


def test_long_lines_split_over_chunks_are_one_line_and_a_longer_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "_CHUNK", 7)
    rows = [[i] * (i % 40) for i in range(100)]
    (tmp_path / "x").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert [row for _, row in door.json_lines(tmp_path / "x")] == rows
    refused(lambda: list(door.json_lines(tmp_path / "x", max_line=100)), "line ", "at most 100 a line")


# --- parquet ---


def written(path, table):
    pq.write_table(table, path)
    return path


def test_parquet_comes_in_as_pyarrow_reads_it(tmp_path):
    table = pa.table({
        "n": [1, 2], "s": ["x", None], "l": [["p", "q"], []], "f": [[1.5], None], "b": [b"\xff", b""],
        "d": [{"role": "user", "tags": ["a"]}, None],
    })  # fmt: skip
    path = written(tmp_path / "x.parquet", table)
    pq.write_table(table, tmp_path / "groups.parquet", row_group_size=1)
    assert door.read_parquet(tmp_path / "groups.parquet").to_pylist() == table.to_pylist()
    assert door.read_parquet(written(tmp_path / "none.parquet", table[:0])).schema == table.schema
    assert door.read_parquet(path).to_pylist() == table.to_pylist()
    assert door.read_parquet(path).schema.types == pq.read_table(path).schema.types
    assert door.read_parquet(path, {"n": pa.types.is_integer}).to_pylist() == [{"n": 1}, {"n": 2}]


def test_parquet_that_does_not_fit_is_named_by_column(tmp_path):
    path = written(tmp_path / "x.parquet", pa.table({"n": [1, 2], "s": ["x", "y"]}))
    refused(lambda: door.read_parquet(path, {"s": pa.types.is_integer}), "x.parquet: s: found a column of string")
    refused(lambda: door.read_parquet(path, {"k": pa.types.is_integer}), "x.parquet: k: found no such column", "n, s")
    refused(lambda: door.read_parquet(path, max_rows=1), "2 rows", "at most 1")
    twice = written(tmp_path / "y.parquet", pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["n", "n"]))
    refused(lambda: door.read_parquet(twice), "y.parquet: n", "two columns")
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    refused(lambda: door.read_parquet(written(tmp_path / "z.parquet", pa.table({"s": bad}))), "z.parquet", "UTF8")


REFUSES_BOMBS = """
import os, sys
from pathlib import Path
from suite.door import FileError, read_parquet
for path in map(Path, sys.argv[1:]):
    assert path.stat().st_size < 200_000, path
    try:
        read_parquet(path)
    except FileError as refused:
        assert "MiB" in str(refused)
    else:
        sys.exit(f"{path}: came in")
os._exit(peak_mib() >= 1024)  # pyarrow's threads may abort an exit
"""


def test_parquet_bombs_are_refused_within_a_gibibyte(tmp_path):
    """Rows of 2 million equal numbers, and one long text repeated: a few kB each, 12 GB and 39 GB once decoded."""
    zeros = pa.ListArray.from_arrays(pa.array([0, 2_000_000], pa.int32()), pa.array(np.zeros(2_000_000)))
    with pq.ParquetWriter(tmp_path / "numbers.parquet", pa.schema([("n", zeros.type)])) as writer:
        for _ in range(64):
            writer.write_table(pa.table({"n": zeros}))
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4_000_000, np.int32)), pa.array(["x" * 10_000]))
    for name, column in (("texts", text), ("nested", pa.StructArray.from_arrays([text], ["t"]))):
        written(tmp_path / f"{name}.parquet", pa.table({"s": column}))
    paths = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    environment = os.environ | {"PYTHONPATH": str(Path(door.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PEAK_MIB + REFUSES_BOMBS, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(paths) == 3, done.stderr


def test_damaged_files_of_every_kind_come_in_changed_or_are_refused(tmp_path):
    """Nothing but a FileError leaves: 300 files with a few bytes changed, cut, or said twice."""
    rng = random.Random(0)
    table = pa.table({"p": [f"p{i}" for i in range(50)], "x": np.arange(50.0), "l": [[i, 1] for i in range(50)]})
    lines = "".join(json.dumps({"a": i, "b": [1.5, "x"]}) + "\n" for i in range(50)).encode()
    (tmp_path / "gz").write_bytes(gzip.compress(lines))
    readers = {"gz": lambda path: list(door.json_lines(path)), "parquet": door.read_parquet}
    written(tmp_path / "parquet", table)
    outcomes = set()
    for name, read in readers.items():
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            broken = bytearray(whole)
            for _ in range(rng.choice((1, 1, 4))):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            if rng.random() < 0.2:
                broken = broken[: rng.randrange(len(broken))]
            (tmp_path / "broken").write_bytes(broken)
            try:
                read(tmp_path / "broken")
                outcomes.add((name, "came in"))
            except FileError as error:
                assert str(error).startswith(str(tmp_path / "broken"))
                outcomes.add((name, "refused"))
    assert {("gz", "refused"), ("parquet", "refused"), ("parquet", "came in")} <= outcomes


# --- folders ---


def test_a_folder_tells_files_from_what_is_none(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("12345")
    (tmp_path / ".hidden").write_text("")
    os.symlink("/usr", tmp_path / "a" / "link")
    os.mkfifo(tmp_path / "pipe")
    found = door.look_through(tmp_path)
    assert found.files == {".hidden": 0, "a/b/x": 5} and found.foreign == {"a/link": "a link", "pipe": "a FIFO"}
    refused(lambda: door.look_through(tmp_path, max_files=2), "more than 2 files")
    refused(lambda: door.look_through(tmp_path / "a" / "link"), "a link")
    refused(lambda: door.look_through(tmp_path / "none"), "No such file")
