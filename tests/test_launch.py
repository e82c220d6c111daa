"""Cells dealt out to several processes: who gets what, where it runs, what becomes of failures, interrupts and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from suite.cli import main as cli
from suite.errors import UserError, WorkersFailed
from suite.machine.processes import Place, deal, places, run_workers
from suite.record.run import read_metrics
from suite.spec.kinds import KINDS, kind_of
from suite.spec.plan import Cell, plan
from suite.spec.reading import load_task

REPO = Path(__file__).resolve().parents[1]
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


def cell(number: int, rollout: str = "bf16", seed: int | None = None, steps: int | None = None) -> Cell:
    settings = {"model": {}, "data": {}, "rollout": {}, "precision": {"rollout": rollout}, "schedule": {"steps": steps}}
    return Cell("t", 1, f"c{number}", (), number if seed is None else seed, settings)


CELLS = [cell(number) for number in range(7)]
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
    blocks = deal(CELLS, num, KINDS["offline_mismatch"])
    assert [len(block) for block in blocks] == sizes
    assert [cell for block in blocks for cell in block] == CELLS


def test_cells_that_share_rollouts_stay_together_and_samplers_are_neighbours():
    pairs = [cell(0, "fp32", 0), cell(1, "bf16", 0), cell(2, "fp32", 1), cell(3, "fp32", 0), cell(4, "bf16", 1)]
    assert [[one.arm for one in block] for block in deal(pairs, 2, KINDS["offline_mismatch"])] == [["c0", "c3", "c2"], ["c1", "c4"]]
    alike = [cell(number, "bf16", 0, steps=3) for number in range(4)]  # RL: the same seed, but runs of their own
    assert [len(block) for block in deal(alike, 4, KINDS["rl"])] == [1, 1, 1, 1]
    for name, num in (("desk-precision-matrix", 3), ("desk-sanity-grpo", 2), ("desk-offline-mismatch", 4)):
        task = load_task(name)
        cells = plan(task)
        blocks = deal(cells, num, kind_of(task))
        assert sorted(one.name for block in blocks for one in block) == sorted(one.name for one in cells)
        assert len(blocks) == num and max(map(len, blocks)) <= 1.5 * len(cells) / num


def test_workers_have_equal_shares_of_the_cores_or_a_gpu_each():
    shares = [(place.cores, place.env["OMP_NUM_THREADS"]) for place in places(2, [], [0, 1, 4, 5, 6])]
    assert shares == [(frozenset({0, 1}), "2"), (frozenset({4, 5}), "2")], "one fingerprint for both"
    assert [place.env["CUDA_VISIBLE_DEVICES"] for place in places(2, ["3", "GPU-ab"], [0])] == ["3", "GPU-ab"]
    with pytest.raises(UserError, match="--nproc: found 3, allowed: at most 2, the cores"):
        places(3, [], [0, 1])
    with pytest.raises(UserError, match="--nproc: found 3, allowed: at most 1, the GPUs"):
        places(3, ["0"], list(range(8)))


def stub(tmp_path, body: str) -> str:
    """A launcher that runs `body` in place of the command it is given."""
    path = tmp_path / "launcher.py"
    path.write_text(f"import os, signal, sys, time\nnames = [name.partition('.')[0] for name in sys.argv[-1].split(',')]\n{body}\n")
    return f"{sys.executable} {path}"


def test_a_launcher_starts_every_worker_with_its_cells_and_lines_are_passed_on(tmp_path, capfd):
    launcher = stub(tmp_path, "print(len(sys.argv), sys.argv[-6:-1], names, os.environ.get('MARK'), file=sys.stderr)")
    run_workers([CELLS[:3], CELLS[3:]], [Place(env={"MARK": m}) for m in "ab"], ["t", "--limit", "2"], launcher=launcher)
    said = sorted(capfd.readouterr().err.splitlines())
    assert said == [
        "[worker 0] 10 ['run', 't', '--limit', '2', '--cell'] ['c0', 'c1', 'c2'] a",
        "[worker 1] 10 ['run', 't', '--limit', '2', '--cell'] ['c3', 'c4', 'c5', 'c6'] b",
    ]


def test_one_failing_worker_is_told_and_the_others_finish_first(tmp_path, monkeypatch):
    monkeypatch.setattr("suite.machine.processes.GRACE_SECONDS", 0)
    body = f"time.sleep(0.5 * ('c6' in names)); open({str(tmp_path)!r} + '/' + names[0], 'w'); sys.exit(11 * ('c0' in names))"
    with pytest.raises(WorkersFailed, match=r"worker 0 \(exit 11\) of 2 failed") as problem:
        run_workers([CELLS[:3], CELLS[3:]], [Place()] * 2, [], launcher=stub(tmp_path, body))
    assert problem.value.code == 11 and (tmp_path / "c3").exists()


def test_workers_that_end_differently_are_an_error(tmp_path):
    with pytest.raises(WorkersFailed) as problem:
        run_workers([CELLS[:3], CELLS[3:]], [Place()] * 2, [], launcher=stub(tmp_path, "sys.exit(12 if 'c0' in names else 1)"))
    assert problem.value.code == 11


SLEEPER = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
open({folder!r} + '/' + str(os.getpid()), 'w').close()
time.sleep(300)
"""
PARENT = """
import sys
from pathlib import Path
from suite.machine import processes as launch
from test_launch import CELLS, SLEEPER, stub
launch.GRACE_SECONDS = 1
folder = Path(sys.argv[1])
launch.run_workers([CELLS[:3], CELLS[3:]], [launch.Place()] * 2, [], launcher=stub(folder, SLEEPER.format(folder=str(folder / "pids"))))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, how):
    (tmp_path / "pids").mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    environ = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path)], env=environ, cwd=REPO,
                              stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    os.kill(parent.pid, how)
    parent.wait(20)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def wait_until(holds, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("code", "told"), [(11, 11), (2, 2), (12, 12), (-9, 11)])
def test_the_exit_code_is_that_of_the_worker(monkeypatch, capsys, code, told):
    def fail(*_, **__):
        raise WorkersFailed("worker 0 failed", code)

    monkeypatch.setattr("suite.machine.processes.run_workers", fail)
    monkeypatch.setattr("suite.cli.verbs.check_machine", lambda task, runs_dir: None)
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
    rows = [row for path in sorted(folder.glob("two-cells/*/*/metrics.jsonl")) for row in read_metrics(path.parent)]
    return [{key: value for key, value in row.items() if not key.startswith("t_")} for row in rows]


@pytest.fixture
def task(tmp_path):
    (tmp_path / "two-cells.yaml").write_text(TASK)
    return tmp_path / "two-cells.yaml"


def start(task: Path, out: Path, *flags: str, **more) -> subprocess.Popen:
    words = [sys.executable, "-m", "suite", "run", str(task), "--out", str(out), *flags]
    return subprocess.Popen(words, cwd=REPO, env=ON_CPU, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def on_cores(num: int):
    """A preexec_fn: this many of the cores, whatever the machine has."""
    return lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num])


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
    said = finish(start(task, tmp_path / "two", "--nproc", "2", preexec_fn=on_cores(2)))
    assert "[worker 0] " in said and "[worker 1] " in said
    finish(start(task, tmp_path / "one", preexec_fn=on_cores(1)))
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    assert list(two) == ["bf16.s0", "fp16.s0"] and {record["status"] for record in two.values()} == {"success"}
    assert {record["fingerprint"] for record in (two | one).values()} == {one["bf16.s0"]["fingerprint"]}
    assert "-1c_" in one["bf16.s0"]["fingerprint"]
    assert series(tmp_path / "two") == series(tmp_path / "one")
