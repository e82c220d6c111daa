"""Bundles from strangers: opened by content, never extracted, and whatever is wrong with one is a line with its name."""

import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import published as fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak import PEAK_MIB

from suite.archive import opening
from suite.archive.publishing import publish_task
from suite.archive.verifying import verify_published
from suite.door import MIB, FileError
from suite.errors import UserError
from suite.record.manifest import write_manifest
from suite.report import verbs as report_verbs
from suite.spec.reading import load_task

PLACE = f"results/desk-tiny/{fakes.FINGERPRINT}"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A checkout with one published task of a single seed: small, since every mutation is verified whole."""
    repo = fakes.checkout(tmp_path_factory.mktemp("bundles") / "checkout", fakes.TASK.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    fakes.make_runs(repo)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        publish_task(load_task("desk-tiny"), repo / "runs", repo / "results")
    return repo


@pytest.fixture(autouse=True)
def inside(repo, monkeypatch):
    monkeypatch.chdir(repo)


def files(repo) -> dict[str, bytes]:
    return {str(path.relative_to(repo)): path.read_bytes() for path in sorted((repo / "results").rglob("*")) if path.is_file()}


def packed(members, **options) -> bytes:
    """A .tar of (name or TarInfo, data)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for member, data in members:
            entry = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            entry.size = len(data) if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def whole(repo, **options) -> bytes:
    return packed(files(repo).items(), **options)


def verified(tmp_path, data: bytes, name: str = "bundle.tar.gz"):
    (tmp_path / name).write_bytes(data)
    return verify_published(str(tmp_path / name), tmp_path / "nowhere")


def refused(tmp_path, data: bytes, *words, name: str = "bundle.tar.gz") -> None:
    with pytest.raises(FileError) as caught:
        verified(tmp_path, data, name)
    message = str(caught.value)
    assert all(word in message for word in (name, *words)) and "\n" not in message, message


@pytest.mark.parametrize("name, pack", [
    ("x.tar", bytes), ("x.tar.gz", gzip.compress), ("x.tgz", gzip.compress), ("x.tar.gz.1", gzip.compress), ("X.TAR.GZ", gzip.compress),
    ("desk", gzip.compress),
])  # fmt: skip
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_bundle_is_known_by_its_content(repo, tmp_path, name, pack, form):
    found = verified(tmp_path, pack(whole(repo, format=form)), name)
    assert len(found.checked) == 1 and not found.differences and not found.remarks


def test_a_macs_leavings_and_a_leading_dot_are_passed_over(repo, tmp_path):
    members = [(f"./{name}", data) for name, data in files(repo).items()]
    members += [(f"./{PLACE}/._verdict.json", b"\0\x05\x16\x07"), (f"{PLACE}/.DS_Store", b"x"), ("__MACOSX/._results", b"x")]
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    assert not verified(tmp_path, gzip.compress(packed([(folder, b""), *members]))).differences


@pytest.mark.parametrize("data, word", [
    (b"", "not a bundle"), (b"x", "not a bundle"), (b"<html>please log in</html>" * 100, "not a bundle"), (b"\xfd7zXZ\0...", ".xz"),
    (b"PK\3\4....", ".zip"), (gzip.compress(b"x" * 2000), "not a bundle"), (b"\x1f\x8b", "not a whole .tar.gz"),
], ids=["nothing", "a letter", "a login page", "xz", "zip", "gzip of text", "two bytes"])  # fmt: skip
def test_what_is_no_bundle_is_said_so(tmp_path, data, word):
    refused(tmp_path, data, word)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_bundle_cut_short_is_to_be_downloaded_again(repo, tmp_path, share):
    for data, kind in ((gzip.compress(whole(repo)), ".tar.gz"), (whole(repo).rstrip(b"\0"), ".tar")):
        refused(tmp_path, data[: int(share * len(data))], f"not a whole {kind}", "download it again")


def test_a_wrong_or_missing_trailer_and_bytes_behind_the_end_are_seen(repo, tmp_path):
    data = gzip.compress(whole(repo))
    refused(tmp_path, data[:-8], "not a whole .tar.gz")
    refused(tmp_path, data[:-8] + bytes(8), "not a whole .tar.gz")
    refused(tmp_path, whole(repo) + b"evil", "after the end")


def test_a_bundle_packed_from_inside_says_what_is_missing_and_looks_nowhere_else(repo, tmp_path):
    (tmp_path / "results" / "t" / "f").mkdir(parents=True)
    (tmp_path / "results" / "t" / "f" / "verdict.json").write_text("{}")
    for start in ("results/desk-tiny/", "results/"):
        members = [(name.removeprefix(start), data) for name, data in files(repo).items()]
        refused(tmp_path, gzip.compress(packed(members)), "no results/<task>/<fingerprint>/ in it")


def special(kind: bytes, name: str = f"{PLACE}/bf16.s0/0123456789ab/record.json", target: str = "/etc/passwd") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize("member, word", [
    *[((special(kind), b""), "regular files") for kind in
      (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"S", b"?")],
    *[((name, b"x"), "name") for name in ("../evil", "/etc/evil", f"{PLACE}/../../evil", f"{PLACE}/a b.txt", f"{PLACE}/{'x' * 3000}",
                                          f"{PLACE}/\x1b[31m", f"{PLACE}/a\\b", f"{PLACE}/<img>", "results/\u0430/b/verdict.json")],
    *[((name, b"x"), "another file") for name in (f"{PLACE}/evil.sh", f"{PLACE}/checkpoint/x", f"{PLACE}/bf16.s0/0123456789ab/x.json",
                                                  f"{PLACE}/bf16.s0/zzz/record.json")],
    *[((name, b"x"), "outside") for name in ("README.md", "results/evil.html")],
    ((f"{PLACE}/verdict.json", b"{}"), "a second time"), ((f"{PLACE}/Verdict.json", b"{}"), "second time"),
])  # fmt: skip
def test_a_member_that_has_no_place_is_named_and_nothing_is_written(repo, tmp_path, member, word):
    members = [*files(repo).items(), member]
    name = member[0].name if isinstance(member[0], tarfile.TarInfo) else member[0]
    before = sorted(path.name for path in tmp_path.parent.rglob("evil*"))
    refused(tmp_path, gzip.compress(packed(members)), word, ascii(name[:20]).strip("'")[:12] if name.isascii() else word)
    assert sorted(path.name for path in tmp_path.parent.rglob("evil*")) == before


def test_a_header_that_lies_about_sizes_is_refused(repo, tmp_path):
    entry = tarfile.TarInfo(f"{PLACE}/verdict.json")
    for size in (-512, -(2**40), 2**40):
        entry.size = size
        block = entry.tobuf(tarfile.GNU_FORMAT)
        refused(tmp_path, block + bytes(2048), "bytes", "verdict.json")
    entry.size, entry.type = 2**30, tarfile.XHDTYPE
    refused(tmp_path, entry.tobuf() + bytes(2048), "header of")
    entry.size, entry.type = 512, tarfile.XHDTYPE
    for text in (b"30 path=x\n", b"9999999999999999999 path=x\n", b"-5 path=x\n", b"17 GNU.sparse=1\n"):
        refused(tmp_path, entry.tobuf() + text.ljust(512, b"\0") + bytes(2048), "header")


def test_too_many_members_and_too_many_bytes_are_refused(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_MEMBERS", 5)
    refused(tmp_path, whole(repo), "more than 5 members")
    monkeypatch.setattr(opening, "MAX_MEMBERS", 500)
    monkeypatch.setattr(opening, "MAX_BUNDLE_BYTES", 20_000)
    refused(tmp_path, gzip.compress(whole(repo)), "20000")


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar.gz")
    for name in ("pipe.tar.gz", "absent.tar.gz", "absent/x"):
        with pytest.raises(UserError):
            verify_published(str(tmp_path / name), tmp_path)


BOMB = """
import os, sys
from suite.errors import UserError
from suite.archive.verifying import verify_published
from pathlib import Path
for path in sys.argv[1:]:
    try:
        said = verify_published(path, Path("nowhere")).differences
    except UserError as problem:
        said = [str(problem)]
    print(path, *said, sep="\\n")
    assert any("at most" in line for line in said), path
sys.stdout.flush()
os._exit(peak_mib() >= 1024)  # pyarrow's threads may abort an exit
"""


def test_bombs_are_refused_within_a_gibibyte(repo, tmp_path):
    """Zeros as a bundle; zeros as metrics; two hundred million equal sums in a parquet of a few kB."""
    run = str(next((repo / PLACE).glob("bf16.s0/*")).relative_to(repo))
    zeros = gzip.compress(bytes(80 * MIB), compresslevel=1)
    header = tarfile.TarInfo("results/x/y/verdict.json")
    header.size = 400 * MIB
    (tmp_path / "zeros.tar.gz").write_bytes(gzip.compress(packed([(f"{PLACE}/verdict.json", b"")])[:512]) + zeros * 4)
    sums = pq.read_table(repo / run / "evidence_summary.parquet")
    row, sink = sums.slice(0, 1), io.BytesIO()
    with pq.ParquetWriter(sink, row.schema, compression="zstd") as writer:
        many = row.take(pa.array([0] * 500_000))
        for _ in range(4):
            writer.write_table(many)
    for name, changes in {
        "metrics": {f"{run}/metrics.jsonl.gz": zeros}, "sums": {f"{run}/evidence_summary.parquet": sink.getvalue()},
    }.items():  # fmt: skip
        shutil.copytree(repo / "results", tmp_path / name / "results")
        for path, data in changes.items():
            (tmp_path / name / path).write_bytes(data)
        write_manifest(tmp_path / name / PLACE)
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(packed((str(p.relative_to(tmp_path / name)), p.read_bytes())
            for p in sorted((tmp_path / name).rglob("*")) if p.is_file())))  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(report_verbs.__file__).parents[2])}
    bombs = sorted(str(path) for path in tmp_path.glob("*.tar.gz"))
    done = subprocess.run([sys.executable, "-c", PEAK_MIB + BOMB, *bombs], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(bombs) == 3, done.stdout[-3000:] + done.stderr[-3000:]


# --- mutations: a fixed seed, a sample; SUITE_MUTATIONS=100 takes more ------------------------------------------------

NUM = int(os.environ.get("SUITE_MUTATIONS") or 25)


def flipped(data: bytes, rng: random.Random, num: int = 1) -> bytes:
    out = bytearray(data)
    for _ in range(num):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def test_no_flipped_bit_in_results_gets_through(repo, tmp_path):
    """Every one is a difference that names the file; nothing hangs, nothing is a traceback."""
    rng, names = random.Random(20), list(files(repo))
    shutil.copytree(repo / "results", tmp_path / "results")
    for _ in range(NUM):
        name = rng.choice(names)
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(flipped(before, rng))
        found = verify_published(str(tmp_path / "results"), tmp_path).differences
        listed = name.endswith("MANIFEST.sha256") or any(name.split("/")[-1] in line for line in found)
        assert found and listed, name
        (tmp_path / name).write_bytes(before)
    assert not verify_published(str(tmp_path / "results"), tmp_path).differences


def mutate_json(value, rng: random.Random) -> str:
    """Replace one leaf or branch of a value; returns its path."""
    *above, last = path = rng.choice(list(leaves(value)))
    holder = value
    for part in above:
        holder = holder[part]
    others = [None, [], {}, "x", -1, 1e300, "nan", True, {"a": [1]}, 0]
    holder[last] = rng.choice([other for other in others if other != holder[last]])
    return ".".join(map(str, path))


def leaves(value, path=()):
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from leaves(part, (*path, key))


def mutated(content: dict[str, bytes], rng: random.Random) -> tuple[str, bytes]:
    """(what was done, a bundle): bits flipped in the archive, a file changed with the manifest made to agree, members
    left out, named otherwise or given twice."""
    how = rng.choice(["bits", "json", "bytes", "left out", "renamed", "twice", "cut"])
    tar = packed(content.items())
    if how == "bits":
        return how, gzip.compress(flipped(tar, rng, rng.choice((1, 3))))
    if how == "cut":
        data = gzip.compress(tar)
        return how, data[: rng.randrange(len(data))]
    changed, name = dict(content), rng.choice([name for name in content if not name.endswith(("MANIFEST.sha256", ".svg"))])
    if how == "json":
        name = rng.choice([name for name in content if name.endswith(".json")])
        value = json.loads(content[name])
        how = f"json.{mutate_json(value, rng)}"
        changed[name] = json.dumps(value).encode()
    elif how == "bytes":
        changed[name] = flipped(content[name], rng, 2)
    elif how == "left out":
        del changed[name]
    members = list(changed.items())
    if how == "renamed":
        members = [(n if n != name else n.replace("results", rng.choice(["", "..", "results/..", "Results"]), 1), d) for n, d in members]
    if how == "twice":
        members.insert(rng.randrange(len(members)), (name, b"{}"))
    return how, gzip.compress(packed(members if how in ("renamed", "twice") else resealed(members)))


def resealed(members):
    import hashlib

    lines = [f"{hashlib.sha256(data).hexdigest()}  {name.removeprefix(PLACE + '/')}\n" for name, data in members if not name.endswith("MANIFEST.sha256")]
    return [(name, "".join(sorted(lines, key=lambda line: line[66:])).encode() if name.endswith("MANIFEST.sha256") else data) for name, data in members]


# Of a record: what nothing follows from, and what follows from nothing.
FREE = ("timings", "finished_utc", "started_utc", "earlier_environments", "error", "environment", "precision_executed", "path")


def test_no_mutated_bundle_brings_anything_but_its_own_differences(repo, tmp_path):
    rng, content, outcomes = random.Random(14), files(repo), {}
    for number in range(NUM):
        how, data = mutated(content, rng)
        try:
            outcome = "named" if verified(tmp_path, data).differences else "nothing found"
        except FileError as problem:
            assert "bundle.tar.gz" in str(problem)
            outcome = "refused"
        outcomes.setdefault((how, outcome), []).append(number)
    silent = [how for how, outcome in outcomes if outcome == "nothing found"]
    # bits: the time stamp of a member. bytes: a point of a figure, a digit of a time, with a manifest that agrees.
    meant = [how for how in silent if how not in ("bits", "bytes") and not any(part in FREE for part in how.split("."))]
    assert not meant, meant
