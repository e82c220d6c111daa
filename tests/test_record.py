"""The run folder: atomic parts, resume, attempts, manifest, and what a full disk or a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from suite.errors import NotRunnable, UserError
from suite.record import (
    EVIDENCE_SCHEMA, Run, check_manifest, find_runs, open_run, read_evidence, read_metrics, read_run, write_json,
)  # fmt: skip


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
        from suite.record import write_json
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
