"""suite check from a checkpoint to its page, with the plain sampler; and the preflight."""

import json
import re

import numpy as np
import pytest
from small_models import SHAPE
from test_check import run

from suite.check.measures import by_arm, estimate, ratio
from suite.check.verb import _launch
from suite.record.run import find_runs

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random checkpoint that is sure of nothing, so that every launch has a mismatch."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, initializer_range=0.1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"token_ids": [3 + i, 9, 20 + i]}) + "\n" for i in range(4)))
    return path


@pytest.fixture(scope="module")
def checked(model, prompts, tmp_path_factory):
    """(exit code, task id, runs folder) of a small check."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ("--sampler", "hf", "--precision", "bf16,fp32", "--seeds", "0,1", "--samples", "2", "--max-tokens", "12", "--prompts", prompts, "--out", runs)
    code = run(model, *flags, "--bar", "nemo-rl")
    (folder,) = (path.parent for path in runs.glob("*/check.html"))
    return code, folder.name, runs, flags


def test_a_check_runs_a_task_of_its_own_and_ends_with_its_bars(checked):
    code, task, runs, _ = checked
    assert code == 0 and {run.arm for run in find_runs(runs, task)} == {"bf16", "fp32"}
    assert (runs / task / f"{task}.yaml").exists() and (runs / task / "prompts.parquet").exists()
    page = (runs / task / "check.html").read_text()
    assert "Before you switch to fp16" in page and "nemo-rl" in page and f"{task}.yaml" in page


def test_its_numbers_are_those_that_grading_gives(checked):
    _, task, runs, _ = checked
    arms = by_arm(_launch(one) for one in find_runs(runs, task))
    verdict = json.loads((runs / task / "verdict.json").read_text())
    rows = {row["id"]: row for row in verdict["claims"]}
    names = ("k1_nats_per_token", "k3_nats_per_token", "prob_diff_mean", "mult_prob_error")
    pairs = [(estimate(arms[arm], name), rows[f"{arm}-{name}"]) for arm in arms for name in names]
    pairs.append((ratio(arms["bf16"], arms["fp32"], "prob_diff_mean"), rows["bf16-over-fp32-prob_diff_mean"]))
    known = [(found, row) for found, row in pairs if row["interval"] is not None]  # two engines in fp32 may agree to the last bit
    assert len(known) >= 4
    for found, row in known:
        assert found.value == pytest.approx(row["estimate"], rel=1e-9) and found.interval == pytest.approx(tuple(row["interval"]), rel=1e-9)


def test_no_reward_is_made_up_for_prompts_without_answers(checked):
    _, task, runs, _ = checked
    assert all(one.record["series_summary"]["reward_mean"] is None for one in find_runs(runs, task))


def test_the_same_check_again_repeats_nothing(checked, model):
    _, task, runs, flags = checked
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("part-*.parquet")}
    assert run(model, *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("part-*.parquet")} == before


def test_a_check_needs_no_checkout(checked, model, tmp_path, monkeypatch):
    _, _, _, flags = checked
    monkeypatch.chdir(tmp_path)
    assert run(model, *flags) == 0


def flight(folder, sequences=((3, 4, 5, 6),)):
    from suite.check.preflight import preflight

    return preflight(folder, [list(one) for one in sequences], torch.float32, "eager")


def changed(model, folder, change, **config):
    """A copy of the checkpoint with changed weights."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | config))
    return folder


def test_a_model_that_fits_is_told_so_with_its_largest_module(model):
    found = flight(model)
    assert found.word == "fits" and found.plain_head and found.dtype == "fp32" and found.num_tokens == 4
    assert found.modules[0].largest == max(one.largest for one in found.modules) and re.search(r"layers|embed|norm|lm_head", found.first.name)


def test_the_module_whose_values_leave_the_range_is_named_first(model, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    loud = changed(model, tmp_path / "loud", lambda weights: weights[f"{name}.weight"].mul_(1e6))
    found = flight(loud)
    assert found.word == "overflows" and found.first.name in (name, "model.layers.1.mlp.down_proj") and found.first.largest > 65504


def test_weights_that_fp16_loses_are_counted_by_tensor(model, tmp_path):
    def change(weights):
        tensor = weights["model.layers.0.mlp.gate_proj.weight"]
        tensor.fill_(1.0)
        tensor.view(-1)[:10] = 2.0**-20  # subnormal
        tensor.view(-1)[10:15] = -(2.0**-30)  # rounds to 0
        tensor.view(-1)[15:20] = 0.0  # is 0

    found = flight(changed(model, tmp_path / "small", change))
    (weight,) = (one for one in found.weights if one.name == "model.layers.0.mlp.gate_proj.weight")
    assert weight.subnormal * weight.num == pytest.approx(10) and weight.vanished * weight.num == pytest.approx(5)
    halved = torch.tensor([2.0**-20, -(2.0**-30)]).half()
    assert halved[0] != 0 and halved[1] == 0


def test_a_step_after_the_head_is_seen_in_the_live_model(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.01)).save_pretrained(tmp_path / "capped")
    assert not flight(tmp_path / "capped").plain_head
    assert np.isfinite(flight(tmp_path / "capped").first.largest)
