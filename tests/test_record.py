"""The run folder: atomic parts, resume, attempts, manifest, and what a full disk or a kill leaves behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from suite import files, signals
from suite.errors import NotRunnable, UserError
from suite.files import write_json
from suite.record.manifest import check_manifest, write_manifest
from suite.record.run import BESIDES, EVIDENCE_SCHEMA, Run, find_runs, read_evidence, read_metrics, read_run
from suite.record.writer import failure, open_run


@dataclass(frozen=True)
class OneTask:
    id: str = "t"
    version: int = 1
    grade_version: int = 1
    text: str = "id: t"
    protocol: str = "offline_mismatch"


@dataclass(frozen=True)
class OneCell:
    name: str = "bf16.s0"
    arm: str = "bf16"
    point: tuple = ()
    seed: int = 0
    is_control: bool = False
    settings: dict = field(default_factory=lambda: {"precision": {"rollout": "bf16", "train": "bf16"}})
    defaults: tuple = ()

    def run_key(self, limit=None):
        return f"{'0123456789abcdef' * 4}" if limit is None else f"{'f' * 64}"


def begin(root, fingerprint="cpu", **options):
    return open_run(root, OneTask(), OneCell(), {"packages": {}}, fingerprint, **options)


def part(step):
    row = {
        "prompt_id": f"p{step}", "sample_id": 0, "step": step, "token_ids": [5, 6, 7], "num_prompt_tokens": 1,
        "rollout_logprobs": [-1.0, -2.0], "trainer_logprobs": [-1.5, -2.0], "finish_reason": "stop", "reward": 1.0,
    }  # fmt: skip
    import pyarrow as pa

    return pa.Table.from_pylist([row], schema=EVIDENCE_SCHEMA)


def test_a_finished_run_is_read_back_and_not_run_again(tmp_path):
    writer = begin(tmp_path)
    writer.append({"step": 0, "k3": 1e-5}, part(0))
    run = writer.finish("success", summary={"prompt_id": np.array(["p0"]), "sum_k3": np.array([2e-5])}, counts={"n": 1})
    assert (run.arm, run.seed, run.status, run.record["counts"]) == ("bf16", 0, "success", {"n": 1})
    assert run.summary["sum_k3"].tolist() == [2e-5]
    again = begin(tmp_path)
    assert isinstance(again, Run) and again.folder == run.folder
    assert check_manifest(run.folder) == []
    assert [found.folder for found in find_runs(tmp_path, "t")] == [run.folder]


def test_resume_keeps_complete_parts_and_drops_what_a_kill_cut(tmp_path):
    writer = begin(tmp_path)
    for step in range(3):
        writer.append({"step": step}, part(step))
    folder = writer.folder
    writer.close()
    (folder / "evidence" / "part-00003.parquet").write_bytes(b"half")  # evidence without its metrics line
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "k')  # a line cut short
    resumed = begin(tmp_path)
    assert resumed.parts_done == 3
    assert not (folder / "evidence" / "part-00003.parquet").exists()
    resumed.append({"step": 3}, part(3))
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert read_evidence(folder)["step"].to_pylist() == [0, 1, 2, 3]


def test_a_metrics_line_without_its_evidence_does_not_count(tmp_path):
    writer = begin(tmp_path)
    for step in range(3):
        writer.append({"step": step}, part(step))
    writer.close()
    (writer.folder / "evidence" / "part-00001.parquet").unlink()
    assert begin(tmp_path).parts_done == 1


def test_fresh_opens_a_second_attempt_and_leaves_the_first(tmp_path):
    first = begin(tmp_path).finish("success")
    second = begin(tmp_path, fresh=True)
    assert second.folder != first.folder and second.parts_done == 0
    second.close()
    assert begin(tmp_path, fresh=True).folder == second.folder, "an unfinished attempt is resumed, not joined by a third"
    assert read_run(first.folder).status == "success"


def test_limited_runs_have_their_own_folder_and_are_never_found_for_grading(tmp_path):
    begin(tmp_path, limit=2).finish("success")
    assert find_runs(tmp_path, "t") == []
    assert not isinstance(begin(tmp_path), Run)


def test_two_writers_of_one_cell_are_refused(tmp_path):
    writer = begin(tmp_path)
    with pytest.raises(UserError, match="another process is running this cell"):
        begin(tmp_path)
    writer.close()
    begin(tmp_path)


@pytest.mark.parametrize("end", ["close", "finish"])
def test_another_fingerprint_begins_an_attempt_of_its_own(tmp_path, end):
    first = begin(tmp_path)
    first.finish("success") if end == "finish" else first.close()
    other = begin(tmp_path, fingerprint="gpu")
    assert other.folder != first.folder and other.parts_done == 0
    other.finish("success")
    mine, theirs = begin(tmp_path), begin(tmp_path, fingerprint="gpu")
    assert mine.folder == first.folder and theirs.folder == other.folder
    assert isinstance(theirs, Run) and isinstance(mine, Run) == (end == "finish")


def test_numbers_that_are_not_finite_come_back_as_such_and_the_file_is_json(tmp_path):
    writer = begin(tmp_path)
    writer.append({"loss": float("nan"), "ratio": float("inf"), "low": float("-inf"), "ok": np.float32(0.5)}, part(0))
    row = read_metrics(writer.folder)[0]
    assert np.isnan(row["loss"]) and row["ratio"] == np.inf and row["low"] == -np.inf and row["ok"] == 0.5
    json.loads((writer.folder / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_manifest_names_changed_missing_and_unlisted_files(tmp_path):
    writer = begin(tmp_path)
    writer.append({"step": 0}, part(0))
    folder = writer.finish("success").folder
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "extra.txt").write_text("x")
    (folder / "evidence" / "part-00000.parquet").unlink()
    problems = "\n".join(check_manifest(folder))
    assert "metrics.jsonl: sha256" in problems and "extra.txt: not in the manifest" in problems
    assert "part-00000.parquet: in the manifest, but missing" in problems


def test_a_failed_run_says_why_and_is_resumed(tmp_path):
    writer = begin(tmp_path)
    writer.append({"step": 0}, part(0))
    writer.fail("score", RuntimeError("no room"))
    assert read_run(writer.folder).record["error"] == {"class": "RuntimeError", "phase": "score", "message": "no room"}
    resumed = begin(tmp_path)
    assert resumed.parts_done == 1 and resumed.record["error"] is None


def test_a_run_that_lacks_something_of_this_machine_is_not_a_failed_one(tmp_path):
    writer = begin(tmp_path)
    writer.fail("offline", NotRunnable("no weights here"))
    assert read_run(writer.folder).status == "planned" and not isinstance(begin(tmp_path), Run)


def test_a_resume_in_another_environment_keeps_the_first_one(tmp_path):
    begin(tmp_path).fail("score", RuntimeError("no room"))
    for _ in range(2):  # the second time nothing is new
        writer = open_run(tmp_path, OneTask(), OneCell(), {"git": {"revision": "b"}}, "cpu")
        assert writer.record["environment"] == {"git": {"revision": "b"}}
        assert writer.record["earlier_environments"] == [{"packages": {}}]
        writer.close()


def test_dtypes_of_two_attempts_that_differ_stand_side_by_side(tmp_path):
    writer = begin(tmp_path)
    writer.note_executed({"compute": "bf16", "wire": "bf16"})
    writer.note_executed({"compute": "fp16", "wire": "bf16", "optimizer_state": "fp32"})
    expected = {"compute": "bf16+fp16", "wire": "bf16", "optimizer_state": "fp32"}
    assert read_run(writer.folder).record["precision_executed"] == expected
    writer.close()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    """The limit on file size is a real failing write, as a full disk is."""
    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    script = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        from suite.files import write_json
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        write_json(Path({str(path)!r}), {{"new": "x" * 100_000}})
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert json.loads(path.read_text()) == {"old": True}
    assert os.listdir(tmp_path) == ["record.json"], "no half-written file is left"


def test_kill_nine_at_any_moment_loses_at_most_the_part_in_flight(tmp_path):
    """A child appends parts as fast as it can and is killed; what it reported as appended must all be there."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        from test_record import begin, part
        writer = begin({str(tmp_path)!r})
        while True:
            writer.append({{"step": writer.parts_done}}, part(writer.parts_done))
            print(writer.parts_done, flush=True)
    """)
    reported = 0
    for reads in (3, 7, 5):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(reads):
            reported = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait()
        reported = max([reported, *map(int, rest)])
        writer = begin(tmp_path)
        assert writer.parts_done in (reported, reported + 1)
        assert read_evidence(writer.folder)["step"].to_pylist() == list(range(writer.parts_done))
        writer.close()


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)


def half_done(root, num: int = 3) -> Path:
    writer = begin(root)
    for step in range(num):
        writer.append({"step": step, "k3": 1e-5 * step}, part(step))
    writer.note_executed({"compute": "bf16"})
    writer.close()
    return writer.folder


def complete(root) -> Run:
    """Resume, or start, a run of four parts, and end it."""
    writer = begin(root)
    for step in range(writer.parts_done, 4):
        writer.append({"step": step, "k3": 1e-5 * step}, part(step))
    writer.note_executed({"compute": "bf16"})
    sums = read_evidence(writer.folder)["step"].to_numpy()
    return writer.finish("success", summary={"sum_step": sums}, series_summary={"k3": sum(row["k3"] for row in writer.metrics)})


def outcome(run: Run) -> tuple:
    content = {name: run.record[name] for name in ("status", "precision_executed", "precision_asked", "series_summary", "cell")}
    return content, run.metrics, run.summary["sum_step"].tolist(), read_evidence(run.folder).to_pylist()


FILES = ("metrics.jsonl", "evidence/part-00001.parquet", "record.json")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_half_done_run_never_changes_its_outcome(tmp_path, name):
    """A fixed sample of places in each file: the run ends as the one that nobody touched, and says what it made again."""
    whole, draw = outcome(complete(tmp_path / "whole")), random.Random(name)
    half_done(tmp_path / "half")
    for attempt in range(12):
        root = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "half", root)
        path = root / "t" / "bf16.s0" / "0123456789ab" / name
        before = path.read_bytes()
        flip(path, draw.randrange(10**6), draw.randrange(8))
        run = complete(root)
        assert outcome(run) == whole, path.read_bytes()
        same = name == "record.json" and json_of(before) == json_of(path.read_bytes())
        assert "recovered" in run.record or same
        assert check_manifest(run.folder, BESIDES) == []


def json_of(data: bytes):
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize(("damage", "kept", "said"), [
    (lambda folder: flip(folder / "evidence" / "part-00001.parquet", 40), 1,
     "evidence/part-00001.parquet: its content does not have the recorded hash, made again from here on"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes().replace(b"2e-05", b"3e-05")), 2,
     "metrics.jsonl: line 3: found a line that its hash does not fit"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes(b"".join((folder / "metrics.jsonl").read_bytes().splitlines(True)[1:])), 0,
     "metrics.jsonl: line 1: found a line that its hash does not fit"),
    (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n'), 0, "metrics.jsonl: lines without their hash"),
    (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\n" * 3), 0, "metrics.jsonl: line 1: found UnicodeDecodeError"),
    (lambda folder: (folder / "record.json").write_text("[]"), 0, "record.json: found list []"),
    (lambda folder: (folder / "record.json").write_text((folder / "record.json").read_text().replace('"bf16"', '"bf17"')), 0,
     "record.json: record_sha256: found a hash that the record does not fit"),
    (lambda folder: (folder / "record.json").unlink(), 0, "record.json: missing"),
])  # fmt: skip
def test_a_resume_makes_again_what_is_damaged_and_says_so(tmp_path, damage, kept, said):
    folder = half_done(tmp_path)
    damage(folder)
    writer = begin(tmp_path)
    assert writer.folder == folder and writer.parts_done == kept
    assert writer.record["recovered"][0].startswith(said)
    assert writer.record["precision_asked"] == {"rollout": "bf16", "train": "bf16"}
    writer.close()
    assert complete(tmp_path).record["recovered"][0].startswith(said), "a second try works as well"


def test_fresh_works_beside_a_damaged_attempt(tmp_path):
    folder = half_done(tmp_path)
    (folder / "record.json").write_bytes(b"\x00")
    assert begin(tmp_path, fresh=True).parts_done == 0


def test_a_half_done_run_of_a_version_without_hashes_is_resumed_and_hashed(tmp_path):
    folder = half_done(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    write_json(folder / "record.json", {name: value for name, value in record.items() if name != "record_sha256"})
    rows = read_metrics(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flip(folder / "evidence" / "part-00002.parquet", 4)  # of the first page: without a hash it is found by reading alone
    writer = begin(tmp_path)
    assert writer.metrics == rows[:2] and "part-00002.parquet: found" in writer.record["recovered"][0]
    writer.close()
    assert b'"evidence_sha256"' in (folder / "metrics.jsonl").read_bytes() and begin(tmp_path).parts_done == 2


def test_a_part_that_changes_while_the_run_goes_on_ends_it_and_is_made_again(tmp_path):
    writer = begin(tmp_path)
    writer.append({"step": 0}, part(0))
    writer.append({"step": 1}, part(1))
    flip(writer.folder / "evidence" / "part-00001.parquet", 60)
    with pytest.raises(UserError, match="part-00001.parquet: found another content than was written"):
        writer.finish("success")
    writer.close()
    assert begin(tmp_path).parts_done == 1


@pytest.mark.parametrize(("damage", "said"), [
    (lambda folder: flip(folder / "metrics.jsonl", 30), "metrics.jsonl: sha256 .* the manifest says"),
    (lambda folder: flip(folder / "evidence" / "part-00003.parquet", 30), "part-00003.parquet: sha256"),
    (lambda folder: flip(folder / "evidence_summary.parquet", 30), "evidence_summary.parquet: sha256"),
    (lambda folder: flip(folder / "record.json", 30), "record.json: sha256"),
    (lambda folder: (folder / "record.json").unlink(), "record.json: in the manifest, but missing"),
    (lambda folder: (folder / "evidence_summary.parquet").unlink(), "evidence_summary.parquet: in the manifest, but missing"),
    (lambda folder: (folder / "extra.txt").write_text("x"), "extra.txt: not in the manifest"),
    (lambda folder: os.mkfifo(folder / "evidence" / "pipe"), "pipe: a FIFO, not a file"),
    (lambda folder: (folder / "link").symlink_to("/dev/zero"), "link: a link, not a file"),
    (lambda folder: (folder / "MANIFEST.sha256").unlink(), "MANIFEST.sha256: missing"),
    (lambda folder: (folder / "MANIFEST.sha256").write_bytes(b"\xff"), "MANIFEST.sha256: line 1 is not"),
    (lambda folder: flip(folder / "MANIFEST.sha256", 3), "."),
])  # fmt: skip
def test_a_finished_run_that_somebody_touched_is_neither_opened_nor_found(tmp_path, damage, said):
    run = complete(tmp_path)
    damage(run.folder)
    for read in (lambda: begin(tmp_path), lambda: find_runs(tmp_path, "t")):
        with pytest.raises(UserError, match=f"{run.folder}.*{said}"):
            read()
    run.folder.rename(run.folder.with_name("moved away"))
    assert find_runs(tmp_path, "t") == [] and begin(tmp_path).parts_done == 0, "what the message says helps"


def test_a_flipped_bit_in_a_finished_run_is_always_named(tmp_path):
    run, draw = complete(tmp_path), random.Random(0)
    for path in [path for path in run.folder.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        for _ in range(4):
            flip(path, draw.randrange(10**6), draw.randrange(8))
            with pytest.raises(UserError, match=str(run.folder)):
                find_runs(tmp_path, "t")
            path.write_bytes(before)
    assert len(find_runs(tmp_path, "t")) == 1


def test_a_resume_with_another_model_is_refused(tmp_path):
    writer = begin(tmp_path)
    writer.note_weights({"sha256": "a", "files_sha256": "b"})
    writer.note_weights({"sha256": "a", "files_sha256": "c"})  # nothing has run with it yet
    writer.append({"step": 0}, part(0))
    with pytest.raises(UserError, match="weights.files_sha256: found d, allowed: c, with which it began"):
        writer.note_weights({"sha256": "a", "files_sha256": "d"})
    writer.update(weights={"sha256": "a"})  # of a version that recorded the weights alone
    writer.note_weights({"sha256": "a", "files_sha256": "d"})


def test_a_limited_run_that_is_damaged_hinders_no_grading(tmp_path):
    folder = begin(tmp_path, limit=2).finish("success").folder
    (folder / "extra.txt").write_text("x")
    assert find_runs(tmp_path, "t") == []


def test_a_kill_between_the_manifest_and_the_last_record_is_resumed(tmp_path):
    folder = half_done(tmp_path)
    write_manifest(folder)
    assert begin(tmp_path).parts_done == 3 and not (folder / "MANIFEST.sha256").exists()


def test_hashes_are_read_once_for_as_long_as_a_file_is_untouched(tmp_path, monkeypatch):
    run, read = complete(tmp_path), []
    monkeypatch.setattr(files, "sha256_file", lambda path, real=files.sha256_file: read.append(path) or real(path))
    find_runs(tmp_path, "t"), find_runs(tmp_path, "t"), begin(tmp_path)
    assert len(read) == len(set(read)) <= 7
    flip(run.folder / "metrics.jsonl", 5)
    assert check_manifest(run.folder, BESIDES)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "..", "[/red]", "a b", "ä", "x" * 201, ".hidden", "a\n"])
def test_a_name_that_is_no_folder_name_opens_no_run(tmp_path, name):
    with pytest.raises(UserError, match="as a folder of"):
        open_run(tmp_path / "runs", OneTask(), OneCell(name=name), {}, "cpu")
    assert not (tmp_path / "runs").exists()


# --- errors and signals ----------------------------------------------------------------------------------------------


def test_a_folder_that_goes_away_leaves_the_first_error_with_a_note(tmp_path):
    writer = begin(tmp_path)
    shutil.rmtree(writer.folder)
    error = RuntimeError("the engine died")
    writer.fail("rl", error)
    assert not writer.is_open and "the record does not say so: No such file" in error.__notes__[0]


def test_whatever_comes_after_a_signal_is_a_killed_run():
    assert failure("rl", RuntimeError("x"))["status"] == "failed"
    with signals.listening():
        with pytest.raises(signals.Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert failure("rl", RuntimeError("trying to pop from empty mode stack"))["status"] == "killed"
        with pytest.raises(signals.Interrupted):
            signals.check()  # for one that a library swallowed
    assert signals.heard() is None


def test_a_signal_waits_while_a_record_is_written_and_one_told_twice_is_one():
    reached = []
    with signals.listening(), pytest.raises(signals.Interrupted, match="SIGHUP"):
        with signals.held():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end of what was held")
        reached.append("never")
    assert reached == ["the end of what was held"]


def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
