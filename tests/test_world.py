"""Several ranks that run one cell together: who does what, a trainer spread over two of them beside the same one in one
process, and a whole run beside the same run in one process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import OPTIMIZER, TRAIN, weights_of, write_model  # noqa: E402
from test_dense_trainer import BF16, FP16, FP32, minibatch, sequences  # noqa: E402
from test_launch import ON_CPU, REPO, finish, needs_two_cores, on_cores  # noqa: E402
from test_record import OneTask  # noqa: E402

from suite.cli import main as cli  # noqa: E402
from suite.engines.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from suite.engines.trainers.load import load_trainer  # noqa: E402
from suite.engines.trainers.loss_scale import LossScaler  # noqa: E402
from suite.engines.trainers.masters import MasterWeights  # noqa: E402
from suite.engines.world import TORCHRUN, PeerLost, ReplicaError, World, ensure_group, join, keeping_the_group  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.protocols.session import Session  # noqa: E402
from suite.record.run import read_metrics  # noqa: E402
from suite.record.writer import SilentWriter, open_run  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402
from suite.spec.plan import Cell  # noqa: E402


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_list(size):
    for length in (0, 1, 5, 16):
        items = list(range(length))
        shares = [World(rank, size).share(items) for rank in range(size)]
        assert [item for share in shares for item in share] == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_piece_of_work_is_dealt_once_and_all_ranks_have_equally_many(size):
    draw = np.random.default_rng(size)
    for num in (0, 1, 5, 16, 17, 64):
        costs = draw.integers(1, 1000, num).tolist()
        dealt = [World(rank, size).deal(costs) for rank in range(size)]
        assert sorted(piece for own in dealt for piece in own if piece is not None) == list(range(num))
        assert {len(own) for own in dealt} == {-(-num // size)}, "as many forwards on every rank"
        for own in dealt:
            pieces = [piece for piece in own if piece is not None]
            assert own == [None] * (len(own) - len(pieces)) + sorted(pieces)


def test_the_longest_pieces_do_not_come_to_one_rank():
    """Costs as micro-batches sorted by length have them: equal blocks would give rank 7 nearly twice the mean."""
    costs = np.sort(np.random.default_rng(0).lognormal(8, 0.7, 64)).astype(int).tolist()
    loads = [sum(costs[piece] for piece in World(rank, 8).deal(costs)) for rank in range(8)]
    assert max(loads) < 1.1 * np.mean(loads)
    assert max(sum(costs[8 * r : 8 * r + 8]) for r in range(8)) > 1.9 * np.mean(loads)


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join()
    assert alone == World() and alone.is_first and alone.gather(3) == [3] and alone.first("x") == "x"
    assert alone.spread([1, 2, 3], lambda share: [-item for item in share]) == [-1, -2, -3]
    assert alone.deal([3, 1, 2]) == [0, 1, 2]


def test_a_number_of_processes_that_no_torchrun_has_set_is_refused(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE: found 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, allowed: what torchrun sets"):
        join()


def test_a_library_that_takes_the_process_group_down_leaves_ours():
    ensure_group()
    with keeping_the_group():
        torch.distributed.destroy_process_group()
    assert torch.distributed.is_initialized()


# --- in two processes -------------------------------------------------------------------------------------------------

LORA = {"lora": {"rank": 4, "alpha": 8, "targets": ("q_proj", "down_proj")}}
SMOOTH = OPTIMIZER | {"eps": 1e-4}  # so that a gradient near 0 moves its weight by next to nothing, whatever its sign
ROWS = 9  # micro-batches of two: one rank has three of them, the other two and an empty one
NUM_STEPS = 3


def trainer(model, world, precision=FP32, **changes):
    train = TRAIN | {"optimizer": SMOOTH, "grad_clip": 1.0, "micro_batch_size": 2, "score_batch_size": 2} | changes
    return load_trainer(model, train, precision, 1.0, 0, world)


def step(ours, number):
    rows = sequences(ROWS)
    advantages = np.random.default_rng(number).normal(size=ROWS).astype(np.float32)
    return ours.update(minibatch(rows, ours.score(rows), advantages), resolve("GRPO-Token-TIS"))


def steps(world, model, precision=FP32, **changes):
    """What a few steps give: scores before and after, reports, weights."""
    ours = trainer(model, world, precision, **changes)
    before = ours.score(sequences(ROWS))
    reports = [step(ours, number) for number in range(NUM_STEPS)]
    return {"before": before, "after": ours.score(sequences(ROWS)), "reports": reports, "weights": weights_of(ours),
            "wire": {name: weight.clone() for name, weight in ours.named_weights(torch.float16)}}  # fmt: skip


def one_overflow(world, model):
    """One row has an advantage whose scaled gradient overflows in fp16."""
    ours, rows = trainer(model, world, FP16), sequences(8)
    advantages = np.array([1, -1] * 3 + [1e6, -1e6], np.float32)
    before = weights_of(ours)
    report = ours.update(minibatch(rows, ours.score(rows), advantages), resolve("REINFORCE"))
    same = all(torch.equal(weight, before[name]) for name, weight in weights_of(ours).items())
    return {"skipped": report["step_skipped"], "scale": ours.scaler.scale_value, "same": same}


def moved(world, model):
    """Whether a change of every weight in place is seen by the next score, and undone to the bit."""
    ours, rows = trainer(model, world, FP16), sequences(3)
    before, weights = ours.score(rows), weights_of(ours)
    with ours.moved_weights(lambda named: [part.mul_(1.5) for _, part in named]):
        assert all(torch.equal(now, 1.5 * weights[name]) for name, now in weights_of(ours).items())
        inside = ours.score(rows)
    after = ours.score(rows)
    return {"seen": not np.allclose(np.concatenate(inside), np.concatenate(before)),
            "undone": all(map(np.array_equal, before, after))}  # fmt: skip


def save_and_go_on(world, model, folder, precision):
    """Two steps, a checkpoint, and the third."""
    ours = trainer(model, world, precision)
    step(ours, 0), step(ours, 1)
    save_checkpoint(folder, 2, *ours.held(), world)
    return step(ours, 2)


def go_on_from(world, model, folder, precision):
    """The third step, from somebody's checkpoint."""
    ours = trainer(model, world, precision)
    done, saved, passed_over = load_checkpoint(folder, 2, world)
    assert (done, passed_over) == (2, [])
    ours.take_over(saved)
    return step(ours, 2)


def replicas_apart(world):
    """Whether whole masters that differ between ranks are caught when they step."""
    weights = MasterWeights({"w": torch.nn.Parameter(torch.ones(2) + 1e-3 * world.rank)}, torch.float32, OPTIMIZER, world=world)
    weights.masters["w"].grad = torch.ones(2)
    try:
        weights.step(LossScaler(enabled=False), None)
    except ReplicaError:
        return True
    return False


def _rank(rank: int, model, folder) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ |= dict(zip(TORCHRUN, (str(rank), "2", str(rank), "127.0.0.1", "0"), strict=True))
    world = join()
    assert world == World(rank, 2, rank)
    tensor = torch.full((3,), 1.0 + rank)
    world.add_up([tensor])
    found = {
        "gathered": world.gather({"rank": rank, "text": "x" * (1 + 1000 * rank)}),
        "first": world.first(f"from {rank}"),
        "spread": world.spread(list(range(5)), lambda share: [(rank, item) for item in share]),
        "sum": tensor,
        "fp32": steps(world, model),
        "lora": steps(world, model, **LORA),
        "recomputed": steps(world, model, FP16, gradient_checkpointing=True, head_chunk_tokens=10),
        "summed in bf16": steps(world, model, BF16 | {"gradient_reduction": "bf16"}),
        "overflow": one_overflow(world, model),
        "moved": moved(world, model),
        "apart": replicas_apart(world),
        "straight": save_and_go_on(world, model, folder / "of-two", FP16),
        "resumed": go_on_from(world, model, folder / "of-one", FP16),
    }
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def of_one(model, folder):
    """The third step of one process, which has left a checkpoint of the second."""
    return save_and_go_on(World(), model, folder / "of-one", FP16)


@pytest.fixture(scope="module")
def pair(model, folder, of_one):
    """What each of two ranks found."""
    torch.multiprocessing.spawn(_rank, args=(model, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_gather_spread_and_add_up(pair):
    for said in pair:
        assert [(one["rank"], len(one["text"])) for one in said["gathered"]] == [(0, 1), (1, 1001)]
        assert said["first"] == "from 0" and said["sum"].tolist() == [3.0] * 3
        assert said["spread"] == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]


KINDS = {
    "fp32": (FP32, {}, 1e-6), "lora": (FP32, LORA, 1e-6),
    "recomputed": (FP16, {"gradient_checkpointing": True, "head_chunk_tokens": 10}, 1e-3),
    "summed in bf16": (BF16 | {"gradient_reduction": "bf16"}, {}, 3e-2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one(model, pair, kind):
    precision, changes, tolerance = KINDS[kind]
    alone, (first, second) = steps(World(), model, precision, **changes), (found[kind] for found in pair)
    assert all(map(np.array_equal, first["before"], alone["before"])), "a score is the same bits on any number of ranks"
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], weight, atol=tolerance, rtol=0)
    for found, other, expected in zip(first["reports"], second["reports"], alone["reports"], strict=True):
        assert found == other
        assert found["step_skipped"] == expected["step_skipped"] == 0
        for name in ("loss", "grad_norm", "importance_weight_mean", "activation_max_abs", "grad_underflow_share"):
            assert found[name] == pytest.approx(expected[name], rel=10 * tolerance, abs=tolerance), name
    assert first["wire"].keys() == alone["wire"].keys()
    assert all(torch.equal(first["wire"][name], second["wire"][name]) for name in first["wire"])


def test_a_gradient_that_overflows_on_one_rank_skips_the_step_on_both(model, pair):
    expected = {"skipped": 1, "scale": 32768.0, "same": True}
    assert one_overflow(World(), model) == expected and [found["overflow"] for found in pair] == [expected] * 2


def test_weights_moved_in_place_are_seen_by_the_next_score_and_come_back(pair):
    assert [found["moved"] for found in pair] == [{"seen": True, "undone": True}] * 2


def test_whole_masters_of_ranks_that_have_come_apart_are_caught(pair):
    assert [found["apart"] for found in pair] == [True] * 2


def test_a_checkpoint_of_two_ranks_goes_on_in_one_and_the_other_way_round(model, folder, of_one, pair):
    """The next loss is that of the run that was not stopped, to the bit; the norm is a sum in another order."""
    assert sorted(path.name for path in (folder / "of-two" / "step-00002").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    of_two, resumed = pair[0]["straight"], pair[0]["resumed"]
    assert pair[1]["straight"] == of_two and pair[1]["resumed"] == resumed
    for straight, found in ((of_two, go_on_from(World(), model, folder / "of-two", FP16)), (of_one, resumed)):
        assert found["loss"] == straight["loss"]
        assert found["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-5)
        assert found["loss_scale"] == straight["loss_scale"]


def test_what_ended_another_rank_stands_in_the_record(tmp_path):
    """Rank 1 runs out of memory; rank 0, which waits for it, loses its peer."""
    def session(rank):
        open_cell = lambda cell: open_run(tmp_path, OneTask(), cell, {}, "cpu") if rank == 0 else SilentWriter(folder, {}, [])  # noqa: E731
        return Session(OneTask(), None, lambda *a: None, open_cell, World(rank, 2))

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


def pid_of_rank(rank: int, word: str) -> int:
    """The process whose environment has this rank, of those whose command line has the word."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environ = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has just ended
            continue
        if word.encode() in words and f"RANK={rank}".encode() in environ:
            return int(process.name)
    raise AssertionError(f"no rank {rank} of {word}")


@needs_two_cores
@pytest.mark.engine
def test_a_rank_that_dies_ends_its_group_and_the_same_command_goes_on_bit_for_bit(tmp_path, whole):
    with start(tmp_path, 2, "hf", "--arm", "fp32", start_new_session=True) as running:
        next(line for line in running.stderr if "fp32.s0 2/4" in line)
        os.kill(pid_of_rank(1, f"{tmp_path}/2/together.yaml"), signal.SIGKILL)
        began = time.monotonic()
        said = running.stderr.read()
        assert running.wait(60) == 11 and time.monotonic() - began < 60
        assert "rank 1 failed first (exit -9); the others were ended" in said and "worker 0 (exit 11) of 1 failed" in said
    record, _ = run_of(tmp_path, 2, "fp32")
    assert record["status"] in ("failed", "killed"), "the rank that was left has closed its record"
    (series,) = tmp_path.glob("runs2/together/*/*/metrics.jsonl")
    before = series.read_text().splitlines()[:2]
    finish(start(tmp_path, 2, "hf", "--arm", "fp32"))
    assert series.read_text().splitlines()[:2] == before, "times included: what was done is not done again"
    assert run_of(tmp_path, 2, "fp32")[1] == run_of(whole, 2, "fp32")[1]


@pytest.mark.engine
def test_ranks_that_torchrun_has_started_run_a_task_together_and_one_process_goes_on(tmp_path):
    """Two ranks, started by hand, are stopped half way; the rest is done by one, and is that of one alone up to rounding."""
    task = write_task(tmp_path, 1, "hf")
    words = ["suite", "run", str(task), "--arm", "fp32", "--out"]
    by_hand = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m"]
    more = dict(cwd=REPO, env=ON_CPU, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=on_cores(1))
    with subprocess.Popen([*by_hand, *words, str(tmp_path / "runs1")], **more) as running:
        next(line for line in running.stderr if "fp32.s0 2/4" in line)
        running.terminate()
        running.communicate()
    record, before = run_of(tmp_path, 1, "fp32")
    assert record["status"] == "killed" and record["environment"]["env"]["WORLD_SIZE"] == "2" and len(before) >= 2
    finish(subprocess.Popen([sys.executable, "-m", *words, str(tmp_path / "runs1")], **more))
    (_, resumed), (record, _) = run_of(tmp_path, 1, "fp32"), run_of(tmp_path, 1, "fp32")
    assert record["status"] == "success" and resumed[: len(before)] == before and len(resumed) == 4
    assert "recovered" not in record, "the checkpoint of two ranks served one"


@pytest.mark.parametrize(("ranks", "flags", "env", "said"), [
    (2, ["--nproc", "3"], {}, "--nproc: found 3, allowed: a multiple of 2 (train.parallel.data)"),
    (2, [], {"WORLD_SIZE": "2"}, "WORLD_SIZE: found 2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, allowed: what torchrun sets"),
    (2, ["--nproc", "2"], {"WORLD_SIZE": "2"}, "--nproc: found 2, allowed: nothing in processes that torchrun has started"),
    (100_000, [], {}, "--nproc: found 100000, allowed: at most"),
])  # fmt: skip
def test_numbers_of_processes_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, ranks, flags, env, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPO)
    assert cli.main(["run", str(write_task(tmp_path, ranks, "hf")), "--out", str(tmp_path / "runs"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_ranks_have_nothing_to_do_together_outside_rl(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(REPO)
    assert cli.main(["run", "desk-offline-mismatch", "--out", str(tmp_path)]) == 2
    assert "torchrun: found 2 processes, allowed: 1 with protocol offline_mismatch; --nproc deals out its cells" in capsys.readouterr().err
