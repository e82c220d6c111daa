"""Cells dealt out to several processes: who gets what, where it runs, what becomes of failures, interrupts and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import cli
from suite.errors import UserError, WorkersFailed
from suite.launch import Place, deal, places, run_workers

REPO = Path(__file__).resolve().parents[1]
CELLS = [SimpleNamespace(name=f"c{i}") for i in range(7)]
TASK = """\
schema: 1
id: two-cells
version: 1
grade_version: 1
tier: desk
title: Two cells
extends: [desk-model]
protocol: offline_mismatch
data: {num_prompts: 3, num_terms: [3, 6]}
rollout: {engine: hf, samples_per_prompt: 2, temperature: 1.0, top_p: 1.0, max_tokens: 24, prompts_per_batch: 1}
train: {engine: dense, score_batch_size: 2}
arms:
  bf16: {precision: {rollout: bf16, train: bf16}}
  fp16: {precision: {rollout: fp16, train: fp16}}
vary: [precision]
seeds: [0]
claims:
  - {id: C1-x, about: C1, kind: report, statement: s}
grade:
  C1-x: {estimand: k3_nats_per_token, contrast: {arm: bf16}}
resources: {gpus: 0, gpu_mem_gib: 0, disk_gib: 1, cpu_ok: true}
"""


@pytest.mark.parametrize(("num", "sizes"), [(1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (7, [1] * 7), (9, [1] * 7)])
def test_every_cell_is_dealt_once_in_order(num, sizes):
    blocks = deal(CELLS, num)
    assert [len(block) for block in blocks] == sizes
    assert [cell for block in blocks for cell in block] == CELLS


def test_workers_share_the_cores_or_have_a_gpu_each():
    assert [(place.cores, place.env["OMP_NUM_THREADS"]) for place in places(2, [], [0, 1, 4, 5, 6])] == [
        (frozenset({0, 1}), "2"), (frozenset({4, 5, 6}), "3"),
    ]  # fmt: skip
    assert places(2, ["3", "GPU-ab"], [0]) == [Place(env={"CUDA_VISIBLE_DEVICES": name}) for name in ("3", "GPU-ab")]
    with pytest.raises(UserError, match="--nproc: found 3, allowed: at most 2, the cores"):
        places(3, [], [0, 1])
    with pytest.raises(UserError, match="--nproc: found 3, allowed: at most 1, the GPUs"):
        places(3, ["0"], list(range(8)))


def stub(tmp_path, body: str) -> str:
    """A launcher that runs `body` in place of the command it is given."""
    path = tmp_path / "launcher.py"
    path.write_text(f"import os, sys, time\nnames = sys.argv[-1].split(',')\n{body}\n")
    return f"{sys.executable} {path}"


def test_a_launcher_starts_every_worker_with_its_cells_and_lines_are_passed_on(tmp_path, capfd):
    launcher = stub(tmp_path, "print(len(sys.argv), sys.argv[-6:-1], names, os.environ.get('MARK'), file=sys.stderr)")
    run_workers(deal(CELLS, 2), [Place(env={"MARK": m}) for m in "ab"], ["t", "--limit", "2"], launcher)
    said = sorted(capfd.readouterr().err.splitlines())
    assert said == [
        "[worker 0] 10 ['run', 't', '--limit', '2', '--cell'] ['c0', 'c1', 'c2'] a",
        "[worker 1] 10 ['run', 't', '--limit', '2', '--cell'] ['c3', 'c4', 'c5', 'c6'] b",
    ]


def test_one_failing_worker_is_told_and_the_others_finish_first(tmp_path):
    body = f"time.sleep(0.5 * ('c6' in names)); open({str(tmp_path)!r} + '/' + names[0], 'w'); sys.exit(11 * ('c0' in names))"
    with pytest.raises(WorkersFailed, match=r"worker 0 \(exit 11\) of 2 failed") as problem:
        run_workers(deal(CELLS, 2), [Place()] * 2, [], stub(tmp_path, body))
    assert problem.value.code == 11 and (tmp_path / "c3").exists()


@pytest.mark.parametrize(("code", "told"), [(11, 11), (2, 2), (12, 12), (-9, 11)])
def test_the_exit_code_is_that_of_the_worker(monkeypatch, capsys, code, told):
    def fail(*_):
        raise WorkersFailed("worker 0 failed", code)

    monkeypatch.setattr("suite.launch.run_workers", fail)
    monkeypatch.setattr("suite.verbs._check_machine", lambda task, runs_dir: None)
    monkeypatch.chdir(REPO)
    assert cli.main(["reproduce", "desk-offline-mismatch", "--nproc", "1", "--launcher", "nice"]) == told
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("verdict=NOT_RUN" in last) == (told == 12) and ("verdict=ERROR" in last) == (told == 11)


def test_a_cell_that_the_plan_does_not_have_is_refused(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    assert cli.main(["run", "desk-sanity-grpo", "--cell", "bf16.s7"]) == 2
    assert "--cell: desk-sanity-grpo has no cell 'bf16.s7'; it has bf16.s0, bf16.s1" in capsys.readouterr().err


# --- on real engines --------------------------------------------------------------------------------------------------


def records(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("two-cells/*/*/record.json"))]
    return {record["cell"]["name"]: record for record in found}


def series(folder: Path) -> list[dict]:
    rows = [json.loads(line) for path in sorted(folder.glob("two-cells/*/*/metrics.jsonl")) for line in path.open()]
    return [{key: value for key, value in row.items() if not key.startswith("t_")} for row in rows]


@pytest.fixture
def task(tmp_path):
    (tmp_path / "two-cells.yaml").write_text(TASK)
    return tmp_path / "two-cells.yaml"


def start(task: Path, out: Path, *flags: str, **more) -> subprocess.Popen:
    words = [sys.executable, "-m", "suite", "run", str(task), "--out", str(out), *flags]
    return subprocess.Popen(words, cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def finish(process: subprocess.Popen) -> str:
    """What it said, once it has ended well."""
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


@needs_two_cores
@pytest.mark.engine
def test_two_workers_record_what_one_process_with_their_cores_records(task, tmp_path):
    pytest.importorskip("torch")
    said = finish(start(task, tmp_path / "two", "--nproc", "2"))
    assert "[worker 0] " in said and "[worker 1] " in said
    core = min(os.sched_getaffinity(0))
    finish(start(task, tmp_path / "one", preexec_fn=lambda: os.sched_setaffinity(0, {core})))
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    assert list(two) == ["bf16.s0", "fp16.s0"] and {record["status"] for record in two.values()} == {"success"}
    assert {record["fingerprint"] for record in (two | one).values()} == {one["bf16.s0"]["fingerprint"]}
    assert "-1c_" in one["bf16.s0"]["fingerprint"]
    assert series(tmp_path / "two") == series(tmp_path / "one")


@needs_two_cores
@pytest.mark.engine
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent_and_the_same_command_finishes(task, tmp_path, how):
    pytest.importorskip("torch")
    with start(task, tmp_path / "out", "--nproc", "2", "--limit", "3", start_new_session=True) as running:
        next(line for line in running.stderr if "[worker" in line and "cells" in line)
        os.kill(running.pid, how)
        assert running.wait(60) in (130, -9)
    deadline = time.monotonic() + 30
    while (left := workers_of(task)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    finish(start(task, tmp_path / "out", "--nproc", "2", "--limit", "3"))
    assert {record["status"] for record in records(tmp_path / "out").values()} == {"success"}


def workers_of(task: Path) -> list[int]:
    """Processes that run a cell of this task."""
    found = subprocess.run(["pgrep", "-f", f"{task}.*--cell"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]
