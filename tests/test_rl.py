"""The RL loop on real engines: resume, what a step records, and the edges of a batch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_models import OPTIMIZER, ROLLOUT  # noqa: E402
from test_record import OneTask  # noqa: E402

from suite.engines.models import load_tokenizer  # noqa: E402
from suite.errors import UserError  # noqa: E402
from suite.problems.data import load_prompts, token_ids  # noqa: E402
from suite.protocols import rl  # noqa: E402
from suite.protocols.session import Session  # noqa: E402
from suite.record.evidence import whole_rows  # noqa: E402
from suite.record.run import Run, find_runs, read_evidence, read_metrics  # noqa: E402
from suite.record.writer import open_run  # noqa: E402
from suite.spec.checkout import find_repo  # noqa: E402
from suite.spec.kinds import KINDS  # noqa: E402
from suite.spec.plan import Cell  # noqa: E402
from suite.spec.precision import contract_breaches, unsaid_points  # noqa: E402

pytestmark = pytest.mark.engine

NUM_STEPS = 8
SETTINGS = {
    "model": {"path": "baselines/desk/qwen2-1m", "id": None, "revision": None, "sha256": None, "family": "qwen2"},
    "data": {"id": "desk/sum-mod-100", "template": "desk", "num_prompts": 8, "num_terms": [3, 5]},
    "rollout": ROLLOUT | {"engine": "hf", "samples_per_prompt": 4, "max_tokens": 64},
    "train": {"engine": "dense", "score_batch_size": 8, "micro_batch_size": 8, "grad_clip": 1.0, "optimizer": OPTIMIZER | {"lr": 3e-5}},
    "precision": {"rollout": "fp16", "train": "fp16", "loss_scaling": {"enabled": True}},
    "algorithm": {"name": "GRPO"},
    "schedule": {"steps": NUM_STEPS, "prompts_per_step": 4, "minibatches": 2, "checkpoint_every": 2},
}  # fmt: skip


def settings(**changes):
    merged = {section: dict(values) for section, values in SETTINGS.items()}
    for path, value in changes.items():
        section, name = path.split("__")
        merged[section][name] = value
    return merged


def run(root: Path, progress=lambda *a, **k: None, seed: int = 0, **changes) -> Run:
    cell = Cell("t", 1, "fp16", (), seed, settings(**changes))

    def open_cell(cell):
        return open_run(root, OneTask(), cell, {"packages": {}}, "cpu")

    rl.run([cell], Session(OneTask(), None, progress, open_cell))
    return find_runs(root, "t")[0]


def series(run_or_folder) -> list[dict]:
    """The metrics without wall times: what must be bit-equal."""
    rows = read_metrics(run_or_folder) if isinstance(run_or_folder, Path) else run_or_folder.metrics
    return [{name: value for name, value in row.items() if not name.startswith("t_")} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"))


def test_a_run_records_every_step_with_both_log_probs(straight):
    assert straight.status == "success" and len(straight.metrics) == NUM_STEPS
    first = straight.metrics[0]
    assert first["num_rollouts"] == 16 and 0 <= first["reward_mean"] <= 1
    assert 0 < first["k3_nats_per_token"] < 1e-3, "fp16 on both sides"
    for name in ("grad_norm", "grad_norm_embedding", "grad_norm_head", "argmax_flip_share", "loss_scale", "clip_fraction", "importance_weight_mean", "effective_sample_size",
                 "sync_probe_k3", "activation_max_abs", "grad_underflow_share", "t_sample_s", "t_score_s", "t_train_s",
                 "t_sync_s", "t_rest_s", "entropy_nats"):  # fmt: skip
        assert np.isfinite(first[name]), name
    evidence = read_evidence(straight.folder)
    assert evidence.num_rows == NUM_STEPS * 16
    assert straight.record["precision_executed"]["wire"] == "fp16"
    assert straight.record["precision_executed"]["optimizer_state"] == "fp32"
    assert straight.record["precision_executed"]["allow_tf32"] == "false" and "bf16_reduced_precision_reduction" in straight.record["precision_executed"]


def test_every_pass_over_the_problems_takes_each_once(straight):
    ids = read_evidence(straight.folder)["prompt_id"].to_pylist()
    per_pass = 2 * 16  # two steps of four problems, four rollouts each
    passes = [ids[start : start + per_pass] for start in range(0, len(ids), per_pass)]
    for one in passes:
        assert sorted(set(one)) == sorted(set(ids)) and len(set(one)) == 8
    assert passes[0] != passes[1], "a new order each pass"


CHILD = """
import sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
import test_rl
test_rl.run(Path({root!r}), progress=lambda name, done, total, note="": print("step", done, flush=True), **{changes!r})
print("finished", flush=True)
"""


def kill_and_resume(root: Path, num_kills: int, num_steps: int, **changes) -> int:
    """Run in child processes that are killed at random moments until one finishes; how many were killed."""
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root), changes=changes)
    draw, killed = random.Random(0), 0
    for _ in range(num_kills + 1):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if killed < num_kills:
            for _ in range(draw.randint(1, max(1, num_steps // (num_kills + 1)) + 2)):
                line = child.stdout.readline()
            time.sleep(draw.random() * 0.3)
            if "finished" not in line and child.poll() is None:
                child.send_signal(signal.SIGKILL)
                killed += 1
        _, errors = child.communicate()
        if child.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(errors[-2000:])
    return killed


def test_kill_nine_at_random_moments_and_the_series_is_the_uninterrupted_one(straight, tmp_path):
    """Two kills here; SUITE_KILLS=10 SUITE_KILL_ENGINE=vllm runs the long version (30 steps, real vLLM)."""
    num_kills, engine = int(os.environ.get("SUITE_KILLS", "2")), os.environ.get("SUITE_KILL_ENGINE", "hf")
    changes, reference = {}, straight
    if num_kills > 2 or engine != "hf":
        changes = {"schedule__steps": 30, "rollout__engine": engine}
        reference = run(tmp_path / "reference", **changes)
    killed = kill_and_resume(tmp_path / "killed", num_kills, len(reference.metrics), **changes)
    resumed = find_runs(tmp_path / "killed", "t")[0]
    assert killed >= 1 and resumed.status == "success"
    assert json.dumps(series(resumed)) == json.dumps(series(reference))
    a, b = read_evidence(resumed.folder), read_evidence(reference.folder)
    assert a.equals(b), "the evidence is bit-equal too"


def interrupted(root: Path, after: int, **changes) -> Path:
    """The folder of a run that was stopped by an error right after `after` steps."""

    class Stop(Exception):
        pass

    def progress(name, done, total, note=""):
        if done == after:
            raise Stop

    with pytest.raises(Stop):
        run(root, progress=progress, **changes)
    return next((root / "t").rglob("record.json")).parent


def test_damaged_checkpoints_and_a_cut_line_are_recovered_from_the_one_before_and_said_so(straight, tmp_path):
    folder = interrupted(tmp_path, after=7)
    newest = folder / "checkpoint" / "step-00006" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-100])  # a corrupted file
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "rew')  # a truncated line
    notes = []
    resumed = run(tmp_path, progress=lambda name, done, total, note="": notes.append(note))
    assert any("step-00006: its content does not have the recorded hash" in note for note in notes)
    cut = "metrics.jsonl: a line cut short after line 7; dropped from there on"
    assert resumed.record["recovered"] == [cut, "step-00006: its content does not have the recorded hash"]
    assert any(cut in note for note in notes)
    assert json.dumps(series(resumed)) == json.dumps(series(straight))


def test_dynamic_sampling_and_a_sample_of_whole_rows_are_the_same_in_a_resumed_run(tmp_path, monkeypatch):
    """Rounds so far follow from the metrics, sums from the rows that stand for all. Only a resume reads evidence back."""
    changes = {"schedule__dynamic_sampling": {"max_rounds": 2}, "schedule__whole_rows_per_step": 3, "schedule__steps": 4,
               "rollout__max_tokens": 24}  # fmt: skip
    whole = run(tmp_path / "whole", **changes)
    interrupted(tmp_path / "cut", after=3, **changes)
    resumed = run(tmp_path / "cut", **changes)
    assert json.dumps(series(resumed)) == json.dumps(series(whole))
    assert all(row["num_rollouts"] == 16 and row["sampling_rounds"] in (1, 2) for row in whole.metrics)
    assert any(row["sampling_rounds"] == 2 for row in whole.metrics) and {"drawn_reward_mean"} <= whole.metrics[0].keys()
    for column, values in whole.summary.items():
        assert values.tolist() == resumed.summary[column].tolist(), column
    assert whole.record["series_summary"] == resumed.record["series_summary"] and "prob_diff_p999" not in whole.record["series_summary"]
    assert whole_rows(read_evidence(whole.folder)).num_rows == 4 * 3 and whole.summary["num_rollouts"].sum() == 4 * 16

    def read_back(path):
        raise AssertionError(f"{path}: read back")

    monkeypatch.setattr("suite.record.writer.read_part", read_back)
    unthinned = run(tmp_path / "all", **changes | {"schedule__whole_rows_per_step": None})
    assert json.dumps(series(unthinned)) == json.dumps(series(whole)), "what is kept changes nothing that is measured"
    for column, values in whole.summary.items():
        assert values.tolist() == unthinned.summary[column].tolist(), column


def test_no_problem_comes_twice_in_a_round_and_every_pass_has_another_order():
    prompts = list(range(10))
    steps = [rl._prompts_of_round(prompts, 4, 0, step) for step in range(6)]  # two steps a pass, two problems left out
    assert all(len(set(step)) == 4 for step in steps)
    passes = [steps[i] + steps[i + 1] for i in (0, 2, 4)]
    assert all(len(set(one)) == 8 for one in passes) and passes[0] != passes[1]
    with pytest.raises(UserError, match="prompts_per_step: found 11, allowed: at most the 10 problems"):
        rl._prompts_of_round(prompts, 11, 0, 0)


def test_log_probs_that_are_not_finite_end_the_run_as_diverged(tmp_path, monkeypatch):
    from suite.engines.trainers.dense import DenseTrainer

    score = DenseTrainer.score_and_argmax

    def broken(self, sequences):
        logprobs, argmaxes = score(self, sequences)
        moments = next(iter(self.masters.optimizer.state.values()), {"step": 0})
        return [one * np.nan for one in logprobs] if moments["step"] >= 4 else logprobs, argmaxes

    monkeypatch.setattr(DenseTrainer, "score_and_argmax", broken)
    result = run(tmp_path)
    assert result.status == "diverged" and len(result.metrics) == 2  # two steps of two updates each
    assert result.record["diverged"] == {"step": 2, "reason": "log-probs that are not finite"}


def test_a_gap_above_the_old_floor_is_proved_again_and_the_run_goes_on(straight, tmp_path, monkeypatch):
    """Weights may move to where the engines agree less; that is no stale tensor."""
    from suite.engines.sync import Probe

    proofs, answers, prove, holds = [], [], rl.prove_sync, Probe.holds

    def holds_but_once(self, gap, floor):
        answers.append(holds(self, gap, floor))
        return answers[-1] and len(answers) != 4  # 1 and 2 are the challenge at the start, 3 and 4 the first two steps

    monkeypatch.setattr(rl, "prove_sync", lambda *given: proofs.append(1) or prove(*given))
    monkeypatch.setattr(Probe, "holds", holds_but_once)
    result = run(tmp_path)
    assert len(proofs) == 2, "once at the start, once where the gap was above the floor"
    assert json.dumps(series(result)) == json.dumps(series(straight)), "a proof leaves the weights as they were"


def test_skipped_steps_in_a_row_are_counted_over_a_resume():
    rows = [{"step_skipped": 0}] + [{"step_skipped": 2}] * 10
    assert rl._diverged(rows, 2) and not rl._diverged(rows[:-1], 2) and not rl._diverged(rows, 4)


def test_all_responses_cut_short_get_no_reward_and_move_nothing(tmp_path):
    result = run(tmp_path, rollout__max_tokens=3, schedule__steps=2)
    for row in result.metrics:
        assert row["reward_mean"] == 0 and row["truncated_share"] == 1 and row["grad_norm"] == 0


def test_prompts_that_fill_the_context_give_empty_responses_and_no_crash(tmp_path):
    tokenizer = load_tokenizer(find_repo() / SETTINGS["model"]["path"])
    longest = max(len(token_ids(prompt, tokenizer)) for prompt in load_prompts(SETTINGS["data"], 0))
    result = run(tmp_path, rollout__max_model_len=longest, schedule__steps=2)  # two steps: every problem comes once
    lengths = [len(logprobs) for logprobs in read_evidence(result.folder)["rollout_logprobs"].to_pylist()]
    assert 0 in lengths, "some prompts are longer than the context"
    assert result.status == "success"


def test_lr_zero_changes_no_weight_and_no_mismatch_beyond_sampling(tmp_path):
    result = run(tmp_path, train__optimizer=OPTIMIZER | {"lr": 0.0}, schedule__steps=3)
    probes = {row["sync_probe_k3"] for row in result.metrics}
    assert len(probes) == 1, "the probe compares the same weights every time"


def test_a_sampler_that_dies_leaves_a_failed_run_that_resumes(straight, tmp_path, monkeypatch):
    from suite.engines.samplers.hf import HfSampler

    sample, calls = HfSampler.sample, []

    def dying(self, requests):
        calls.append(len(requests))
        if len(calls) == 6:
            raise RuntimeError("engine core died")
        return sample(self, requests)

    monkeypatch.setattr(HfSampler, "sample", dying)
    with pytest.raises(RuntimeError, match="engine core died"):
        run(tmp_path)
    assert find_runs(tmp_path, "t")[0].record["error"]["message"] == "engine core died"
    monkeypatch.setattr(HfSampler, "sample", sample)
    assert json.dumps(series(run(tmp_path))) == json.dumps(series(straight))


def test_vllm_dying_in_mid_run_leaves_a_failed_run_that_resumes_and_says_what_it_ran_in(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm.v1.engine.exceptions import EngineDeadError

    from suite.engines.samplers.vllm import VllmSampler

    changes = {"rollout__engine": "vllm", "schedule__steps": 3, "schedule__checkpoint_every": 1}
    sample, calls = VllmSampler.sample, []

    def dying(self, requests):
        calls.append(len(requests))
        if len(calls) == 3:  # the probe's rollouts, step 0, step 1
            raise EngineDeadError()
        return sample(self, requests)

    monkeypatch.setattr(VllmSampler, "sample", dying)
    with pytest.raises(EngineDeadError):
        run(tmp_path, **changes)
    dead = find_runs(tmp_path, "t")[0]
    assert dead.status == "failed" and dead.record["error"]["class"] == "EngineDeadError" and len(dead.metrics) == 1
    monkeypatch.setattr(VllmSampler, "sample", sample)
    result = run(tmp_path, **changes)
    assert result.status == "success" and [row["step"] for row in result.metrics] == [0, 1, 2]
    assert series(result)[0] == series(dead)[0], "the complete step is not repeated"
    executed = result.record["precision_executed"]
    assert contract_breaches(SETTINGS["precision"], executed) == [] == unsaid_points(KINDS["rl"].must_say, executed)
    assert executed["sampler_engine"] == "vllm" and executed["gradient_reduction"] == executed["optimizer_state"] == "fp32"
    assert "linear" in executed["sampler_products"] or "onednn" in executed["sampler_products"]
    assert result.record["algorithm"]["name"] == "GRPO" and len(result.record["weights"]["sha256"]) == 64


def test_the_wire_is_read_from_what_travelled(tmp_path, monkeypatch):
    from suite.engines.trainers.dense import DenseTrainer

    weights = DenseTrainer.named_weights
    monkeypatch.setattr(DenseTrainer, "named_weights", lambda self, dtype: weights(self, torch.bfloat16))
    executed = run(tmp_path, schedule__steps=1).record["precision_executed"]
    assert contract_breaches(SETTINGS["precision"], executed) == ["wire: ran in bf16, the arm asks for fp16"]


def test_a_shuffled_reward_keeps_the_recorded_reward_true(straight, tmp_path):
    """The control shuffles what is learned from, never what is measured: step 0 records the same rewards."""
    result = run(tmp_path, algorithm__shuffle_rewards=True, schedule__steps=2)
    assert result.metrics[0]["reward_mean"] == straight.metrics[0]["reward_mean"]
    assert result.metrics[0]["loss"] != straight.metrics[0]["loss"]


def test_problems_minibatches_and_noise_are_functions_of_seed_and_step_alone():
    prompts = load_prompts(SETTINGS["data"], 0)
    assert rl._prompts_of_round(prompts, 4, 1, 3) == rl._prompts_of_round(prompts, 4, 1, 3)
    assert rl._prompts_of_round(prompts, 4, 1, 3) != rl._prompts_of_round(prompts, 4, 2, 3)
    assert sorted(rl._shuffled([1.0, 0.0, 0.5], 0, 7)) == [0.0, 0.5, 1.0]


def step_of(num_prompts: int, num_samples: int):
    """Prompts of a step and their rollouts, as far as mini-batches look at them."""
    prompts = [SimpleNamespace(prompt_id=f"p{i}") for i in range(num_prompts)]
    return prompts, [SimpleNamespace(request=SimpleNamespace(prompt_id=one.prompt_id)) for one in prompts for _ in range(num_samples)]


@pytest.mark.parametrize("of", [None, "prompts", "responses"])
def test_every_response_is_in_one_mini_batch_and_a_group_is_parted_only_where_the_task_says_so(of):
    prompts, rollouts = step_of(8, 4)
    schedule = {"minibatches": 4, "minibatch_of": of}
    parts = rl._minibatches(prompts, rollouts, schedule, 0, 3)
    assert sorted(index for part in parts for index in part) == list(range(32)) and {len(part) for part in parts} == {8}
    assert parts == rl._minibatches(prompts, rollouts, schedule, 0, 3) != rl._minibatches(prompts, rollouts, schedule, 0, 4)
    groups_per_part = [len({index // 4 for index in part}) for part in parts]
    assert (groups_per_part == [2, 2, 2, 2]) == (of != "responses")
