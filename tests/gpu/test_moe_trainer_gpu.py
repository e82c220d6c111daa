"""The MoE trainer on a GPU, where megatron-core runs as it is. On a node: .venv/bin/python -m pytest tests/gpu -q"""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_models import write_model  # noqa: E402
from test_dense_trainer import BF16, FP16, FP32, minibatch, plain_logprobs, sequences  # noqa: E402
from test_moe_routing import planted  # noqa: E402
from test_moe_trainer import trainer  # noqa: E402

from suite.measure.routing import disagreement  # noqa: E402
from suite.spec.algorithms import resolve  # noqa: E402

pytestmark = pytest.mark.engine


def test_scores_in_fp32_are_those_of_transformers_on_the_cpu_and_no_shim_is_loaded(tmp_path):
    folder, rows = write_model(tmp_path, experts=True), sequences()
    found, expected = trainer(folder, FP32).score(rows), plain_logprobs(folder, rows)[1]
    assert max(np.abs(a - b.detach().numpy()).mean() for a, b in zip(found, expected, strict=True)) < 1e-4
    assert "suite.engines.trainers.megatron_cpu" not in sys.modules


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_a_16_bit_step_uses_native_products_and_stays_near_fp32(tmp_path, precision):
    folder, rows = write_model(tmp_path, experts=True), sequences(6)
    norms = []
    for asked in (FP32, precision):
        ours = trainer(folder, asked)
        norms.append(ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO"))["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.1)
    executed = ours.executed()
    assert (executed["arithmetic"], executed["compute"], executed["master_weights"]) == ("native", precision["train"], "fp32")


def test_planted_experts_are_followed_in_every_token_and_layer(tmp_path):
    rows = sequences(6)
    ours, told = trainer(write_model(tmp_path, experts=True), BF16), planted(rows)
    assert disagreement(told, ours.expert_choices(rows)) > 0.5
    ours.follow(rows, told)
    assert disagreement(told, ours.expert_choices(rows)) == 0
    assert np.isfinite(ours.update(minibatch(rows, ours.score(rows)), resolve("GRPO"))["grad_norm"])
