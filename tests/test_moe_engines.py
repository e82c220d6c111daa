"""megatron-core, transformers and vLLM on one Qwen3-MoE: one function in fp32, before training and after three steps."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

from safetensors.torch import save_file  # noqa: E402
from small_models import EOS, ROLLOUT, as_sequences, some_requests, write_model  # noqa: E402
from test_dense_trainer import FP32, plain_logprobs  # noqa: E402
from test_moe_trainer import steps, trainer  # noqa: E402

from suite.engines.samplers.load import load_sampler  # noqa: E402
from suite.engines.sync import sync_weights  # noqa: E402
from suite.measure.routing import routing_disagreement  # noqa: E402

pytestmark = pytest.mark.engine


def written(folder, ours, like):
    """The trainer's weights as a checkpoint that transformers reads."""
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in ours.named_weights(torch.float32)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((like / "config.json").read_text())
    return folder


def assert_pairwise(rows, sampler, ours, folder):
    transformers = np.concatenate([one.detach().numpy() for one in plain_logprobs(folder, rows)[1]])
    found = {"vllm": np.concatenate(sampler.score(rows)), "megatron": np.concatenate(ours.score(rows)), "transformers": transformers}
    gaps = {f"{a}-{b}": float(np.abs(found[a] - found[b]).mean()) for a in found for b in found if a < b}
    assert len(gaps) == 3 and max(gaps.values()) < 1e-5, json.dumps(gaps)


def test_three_engines_agree_in_fp32_before_training_and_after_three_steps_and_syncs(tmp_path):
    folder = write_model(tmp_path / "model", experts=True)
    sampler = load_sampler(folder, ROLLOUT, "fp32", [EOS])
    try:
        ours = trainer(folder, FP32)
        rows = as_sequences(sampler.sample(some_requests(8)))
        assert_pairwise(rows, sampler, ours, folder)
        chosen = sampler.expert_choices(rows)
        assert routing_disagreement(rows, chosen, ours) == {"routing_disagreement": 0.0}, "in fp32 no choice differs"
        before = np.concatenate(ours.score(rows))
        ours.follow(rows, chosen)
        assert np.abs(np.concatenate(ours.score(rows)) - before).max() < 1e-6, "so to follow the sampler's changes nothing"
        ours.follow([], [])
        for seed in range(3):
            steps(ours, rows, [seed])
            sync_weights(ours, sampler, "fp32")
        assert np.abs(np.concatenate(ours.score(rows)) - before).mean() > 1e-2, "training moved the policy"
        assert routing_disagreement(rows, sampler.expert_choices(rows), ours)["routing_disagreement"] == 0
        assert_pairwise(rows, sampler, ours, written(tmp_path / "trained", ours, folder))
    finally:
        sampler.close()
