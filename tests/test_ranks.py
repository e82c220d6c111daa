"""Several ranks that run one cell together: shares, sums, and a whole run beside the same run in one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import OPTIMIZER, TRAIN, write_model  # noqa: E402
from test_dense_trainer import FP16, FP32, minibatch, sequences  # noqa: E402
from test_launch import ON_CPU, REPO, finish, needs_two_cores  # noqa: E402
from test_record import OneTask  # noqa: E402

from suite.cli import main as cli  # noqa: E402
from suite.engines.ranks import PeerLost, Ranks, ReplicaError, join  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.machine.processes import _as_ranks  # noqa: E402
from suite.protocols.session import Session  # noqa: E402
from suite.record.run import read_metrics  # noqa: E402
from suite.record.writer import SilentWriter, open_run  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402
from suite.spec.plan import Cell  # noqa: E402


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_list(size):
    for length in (0, 1, 5, 16):
        items = list(range(length))
        shares = [Ranks(rank, size).share(items) for rank in range(size)]
        assert [item for share in shares for item in share] == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_its_own_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join()
    assert alone == Ranks() and alone.is_first and alone.gather(3) == [3] and alone.first("x") == "x"
    assert alone.spread([1, 2, 3], lambda share: [-item for item in share]) == [-1, -2, -3]


# --- in two processes -------------------------------------------------------------------------------------------------

LORA = {"lora": {"rank": 4, "alpha": 8, "targets": ("q_proj", "down_proj")}}


def talk(ranks):
    """What a pair of ranks says to each other."""
    tensor = torch.full((3,), 1.0 + ranks.rank)
    ranks.add_up([tensor])
    return {
        "gathered": ranks.gather({"rank": ranks.rank, "text": "x" * (1 + 1000 * ranks.rank)}),
        "first": ranks.first(f"from {ranks.rank}"),
        "spread": ranks.spread(list(range(5)), lambda share: [(ranks.rank, item) for item in share]),
        "sum": tensor,
    }


def trainer(model, ranks, precision=FP32, **changes):
    return load_trainer(model, TRAIN | {"optimizer": OPTIMIZER, "grad_clip": 1.0, "micro_batch_size": 2} | changes, precision, 1.0, 0, ranks)


def steps(ranks, model, changes):
    """Three steps; masters and reports."""
    ours, rows, reports = trainer(model, ranks, **changes), sequences(9), []
    for seed in range(3):
        advantages = np.random.default_rng(seed).normal(size=9).astype(np.float32)
        reports.append(ours.update(minibatch(rows, ours.score(rows), advantages), resolve("GRPO-Token-TIS")))
    return {"masters": {name: p.detach() for name, p in ours.masters.masters.items()}, "reports": reports}


def one_overflow(ranks, model):
    """The longest rows, which are rank 1's, have an advantage whose scaled gradient overflows in fp16."""
    ours, rows = trainer(model, ranks, FP16), sorted(sequences(8), key=lambda row: len(row[0]))
    advantages = np.array([1, -1] * 3 + [1e6, -1e6], np.float32)
    report = ours.update(minibatch(rows, ours.score(rows), advantages), resolve("REINFORCE"))
    return {"skipped": report["step_skipped"], "scale": ours.scaler.scale_value}


def apart(ranks, model, fault):
    """Whether ranks are caught that do not add their gradients up, or one of which holds another weight."""
    ours, rows = trainer(model, ranks), sequences(8)
    if fault == "gradients":
        ours.masters.gradients = list
    elif not ranks.is_first:
        next(iter(ours.masters.masters.values())).data.flatten()[0] += 1e-3
    try:
        ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO"))
    except ReplicaError:
        return True
    return False


def _rank(rank: int, together, model, folder) -> None:
    torch.set_num_threads(1)
    os.environ |= together[rank]
    ranks = join()
    found = {"talk": talk(ranks), "all": steps(ranks, model, {}), "lora": steps(ranks, model, LORA),
             "overflow": one_overflow(ranks, model), "apart": [apart(ranks, model, fault) for fault in ("gradients", "weight")]}  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(_rank, args=(_as_ranks(2), model, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_gather_spread_and_add_up(pair):
    for said in (found["talk"] for found in pair):
        assert [(one["rank"], len(one["text"])) for one in said["gathered"]] == [(0, 1), (1, 1001)]
        assert said["first"] == "from 0" and said["sum"].tolist() == [3.0] * 3
        assert said["spread"] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_two_ranks_take_the_step_of_one(model, pair, trained):
    alone = steps(Ranks(), model, LORA if trained == "lora" else {})
    first, second = (found[trained] for found in pair)
    for name, master in first["masters"].items():
        assert torch.equal(master, second["masters"][name]), name
        torch.testing.assert_close(master, alone["masters"][name], atol=2e-4, rtol=0)  # Adam's first steps: lr x a sign
    for found, other, expected in zip(first["reports"], second["reports"], alone["reports"], strict=True):
        assert found == other
        assert found == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert first["reports"][0] == pytest.approx(alone["reports"][0], rel=1e-5)


def test_a_gradient_that_overflows_on_one_rank_skips_the_step_on_both(pair):
    assert [found["overflow"] for found in pair] == [{"skipped": 1, "scale": 32768.0}] * 2


def test_ranks_that_take_different_steps_are_caught(pair):
    assert [found["apart"] for found in pair] == [[True, True]] * 2


def test_what_ended_another_rank_stands_in_the_record(tmp_path):
    """Rank 1 runs out of memory; rank 0, which waits for it, loses its peer."""
    def session(rank):
        open_cell = lambda cell: open_run(tmp_path, OneTask(), cell, {}, "cpu") if rank == 0 else SilentWriter(folder, {}, [])  # noqa: E731
        return Session(OneTask(), None, lambda *a: None, open_cell, Ranks(rank, 2))

    def ends_with(error):
        def body(writer):
            raise error
        return body

    cell = Cell("t", 1, "bf16", (), 0, {"precision": {}})
    folder = tmp_path / "t" / cell.name / cell.run_key()[:12]
    folder.mkdir(parents=True)
    with pytest.raises(MemoryError):
        session(1).run_cell(cell, "rl", ends_with(MemoryError("no room for the head")))
    with pytest.raises(PeerLost):
        session(0).run_cell(cell, "rl", ends_with(PeerLost("another rank ended")))
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] == {"class": "MemoryError", "phase": "rl", "message": "no room for the head"}
    assert not list(folder.glob("rank-error*"))


# --- a whole run ------------------------------------------------------------------------------------------------------

TASK = """\
schema: 1
id: together
version: 1
grade_version: 1
tier: desk
title: RL on several ranks
extends: [desk-model]
protocol: rl
data: {num_prompts: 4, num_terms: [4, 6], seed: 0}
rollout: {engine: ENGINE, samples_per_prompt: 4, temperature: 1.0, top_p: 1.0, max_tokens: 64, max_model_len: 128,
          max_num_seqs: 16, max_num_batched_tokens: 2048, kv_cache_gib: 1.0}
train:
  engine: dense
  score_batch_size: 4
  micro_batch_size: 2
  grad_clip: 1.0
  optimizer: {name: adamw, lr: 1.0e-4, betas: [0.9, 0.95], eps: 1.0e-15, weight_decay: 0.0}
  parallel: {data: RANKS}
algorithm: {name: GRPO}
schedule: {steps: 4, prompts_per_step: 4, minibatches: 2, checkpoint_every: 1}
arms:
  fp32: {precision: {rollout: fp32, train: fp32}}
  bf16: {precision: {rollout: bf16, train: bf16}}
vary: [precision]
seeds: [0]
claims:
  - {id: C1-x, about: C1, kind: report, statement: s}
grade:
  C1-x: {estimand: reward_mean, contrast: {arm: bf16}}
resources: {gpus: 0, gpu_mem_gib: 0, disk_gib: 1, cpu_ok: true}
"""


def write_task(tmp_path: Path, ranks: int, engine: str) -> Path:
    task = tmp_path / f"{ranks}" / "together.yaml"
    task.parent.mkdir(exist_ok=True)
    task.write_text(TASK.replace("RANKS", str(ranks)).replace("ENGINE", engine))
    return task


def start(tmp_path: Path, ranks: int, engine: str = "hf", *flags: str, **more) -> subprocess.Popen:
    task = write_task(tmp_path, ranks, engine)
    words = [sys.executable, "-m", "suite", "run", str(task), "--out", str(tmp_path / f"runs{ranks}"), *flags]
    return subprocess.Popen(words, cwd=REPO, env=ON_CPU, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def run_of(tmp_path: Path, ranks: int, arm: str) -> tuple[dict, list[dict]]:
    (path,) = (tmp_path / f"runs{ranks}" / "together").glob(f"{arm}.s0/*/record.json")
    rows = read_metrics(path.parent)
    return json.loads(path.read_text()), [{k: v for k, v in row.items() if not k.startswith("t_")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the run of two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, 2, "hf", "--arm", "fp32"))
    return folder


@needs_two_cores
@pytest.mark.engine
def test_a_run_of_two_ranks_is_that_of_one_up_to_rounding(tmp_path, whole):
    finish(start(tmp_path, 1, "hf", "--arm", "fp32"))
    (one, alone), (two, together) = run_of(tmp_path, 1, "fp32"), run_of(whole, 2, "fp32")
    assert one["status"] == two["status"] == "success" and len(together) == 4
    assert one["counts"] == two["counts"], "the same rollouts, all of them recorded"
    for a, b in zip(alone, together, strict=True):
        for name in ("reward_mean", "num_response_tokens", "step_skipped"):
            assert a[name] == b[name], name
        for name in ("grad_norm", "entropy_nats", "loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    assert max(row["k3_nats_per_token"] for row in together) < 1e-9


@needs_two_cores
@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's GPU build would need a GPU for each rank")
def test_two_ranks_with_vllm_each_follow_their_trainers_through_two_engines(tmp_path):
    pytest.importorskip("vllm")
    finish(start(tmp_path, 2, "vllm", "--nproc", "2"))
    for arm, floor in (("fp32", 1e-9), ("bf16", 1e-3)):
        record, rows = run_of(tmp_path, 2, arm)
        assert record["status"] == "success" and record["precision_executed"]["sampler_engine"] == "vllm"
        assert record["environment"]["env"]["WORLD_SIZE"] == "2" and record["counts"]["num_rollouts"] == 64
        assert max(row["k3_nats_per_token"] for row in rows) < floor


@needs_two_cores
@pytest.mark.engine
def test_a_rank_that_dies_ends_its_group_and_the_same_command_goes_on_bit_for_bit(tmp_path, whole):
    with start(tmp_path, 2, "hf", "--arm", "fp32", start_new_session=True) as running:
        next(line for line in running.stderr if "fp32.s0 2/4" in line)
        found = subprocess.run(["pgrep", "-f", f"{tmp_path}/2/together.yaml.*--cell"], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        said = running.stderr.read()
        assert running.wait(60) == 11 and "(exit -9) of 2 failed" in said
    (series,) = tmp_path.glob("runs2/together/*/*/metrics.jsonl")
    before = series.read_text().splitlines()[:2]
    finish(start(tmp_path, 2, "hf", "--arm", "fp32"))
    assert series.read_text().splitlines()[:2] == before, "times included: what was done is not done again"
    assert run_of(tmp_path, 2, "fp32")[1] == run_of(whole, 2, "fp32")[1]


@pytest.mark.parametrize(("ranks", "flags", "env", "said"), [
    (2, ["--nproc", "3"], {}, "--nproc: found 3, allowed: a multiple of 2 (train.parallel.data)"),
    (2, [], {"WORLD_SIZE": "2"}, "WORLD_SIZE: found 2, allowed: nothing or 1; --nproc starts the processes"),
    (2, ["--launcher", "nice"], {}, "--launcher: found 'nice', allowed: nothing, with train.parallel.data 2"),
    (100_000, [], {}, "--nproc: found 100000, allowed: at most"),
])  # fmt: skip
def test_numbers_of_processes_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, ranks, flags, env, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPO)
    assert cli.main(["run", str(write_task(tmp_path, ranks, "hf")), "--out", str(tmp_path / "runs"), *flags]) == 2
    assert said in capsys.readouterr().err
