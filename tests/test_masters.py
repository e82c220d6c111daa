"""Sums of gradients: exact enough in fp32, rounded at every addition in 16 bits, and said in the record."""

import pytest
import torch

from suite.engines.trainers.health import layer_groups
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.masters import MasterWeights

OPTIMIZER = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def masters(dtype, sum_dtype=torch.float32):
    return MasterWeights({"w": torch.nn.Parameter(torch.ones(2)), "idle": torch.nn.Parameter(torch.ones(1))}, dtype, OPTIMIZER, sum_dtype)


def norm_after(weights, gradients):
    """Norm of the gradient that a step saw, after these micro-batches."""
    for value in gradients:
        weights.compute["w"].grad = torch.tensor(value, dtype=weights.compute["w"].dtype)
        weights.collect()
        assert weights.compute["w"].grad is None or weights.masters["w"] is weights.compute["w"]
    return weights.step(LossScaler(enabled=False), None)["grad_norm"]


@pytest.mark.parametrize(("dtype", "half_a_step"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_a_sum_in_16_bits_loses_what_a_sum_in_fp32_keeps(dtype, half_a_step):
    """1 and eight times a quarter of its spacing: every addition rounds it away, in fp32 it is two spacings."""
    parts = [[1.0, 0.0], *[[half_a_step, 0.0]] * 8]
    assert norm_after(masters(dtype), parts) == 1 + 8 * half_a_step
    assert norm_after(masters(dtype, dtype), parts) == 1.0


def test_the_dtype_of_the_sum_is_what_the_record_says():
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        weights = masters(torch.float32 if name == "fp32" else dtype, dtype)
        norm_after(weights, [[1.0, 1.0]])
        assert weights.gradient_dtypes == {name}


def test_ranks_add_up_the_sums_themselves_and_a_step_empties_them():
    weights = masters(torch.bfloat16, torch.bfloat16)
    weights.compute["w"].grad = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    weights.collect()
    for total in weights.gradients():
        assert total.dtype == torch.bfloat16
        total.add_(total)  # another rank with the same gradients
    assert weights.step(LossScaler(enabled=False), None)["grad_norm"] == pytest.approx(20**0.5)
    assert weights.step(LossScaler(enabled=False), None)["grad_norm"] == 0.0


def test_a_sum_that_overflows_fp16_skips_the_step():
    weights = masters(torch.float16, torch.float16)
    for value in (60000.0, 60000.0):
        weights.compute["w"].grad = torch.tensor([value, 0.0], dtype=torch.float16)
        weights.collect()
    assert weights.step(LossScaler(init_scale=1024.0), None)["step_skipped"] == 1


def test_the_squared_norms_of_the_layer_groups_add_up_to_that_of_the_gradient_before_it_is_clipped():
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)), "model.norm.weight", "lm_head.weight"]
    weights = MasterWeights({name: torch.nn.Parameter(torch.ones(2)) for name in names}, torch.float32, OPTIMIZER)
    for size, name in enumerate(names, start=1):
        weights.masters[name].grad = torch.tensor([float(size), 0.0])
    found = weights.step(LossScaler(enabled=False), 0.5)
    squares = {"embedding": 1, "first_layers": 4 + 9, "middle_layers": 16 + 25, "last_layers": 36, "head": 49 + 64}  # 5 layers: 2, 2, 1
    assert {group: found[f"grad_norm_{group}"] ** 2 for group in squares} == pytest.approx(squares)
    assert found["grad_norm"] ** 2 == pytest.approx(sum(squares.values()))


def test_a_skipped_step_has_no_norms_by_layer_and_a_group_without_gradient_has_none():
    weights = MasterWeights({"model.layers.0.w": torch.nn.Parameter(torch.ones(1)), "lm_head.weight": torch.nn.Parameter(torch.ones(1))},
                            torch.float32, OPTIMIZER)
    for gradient, taken in ((2.0, True), (float("nan"), False)):
        weights.masters["lm_head.weight"].grad = torch.tensor([gradient])
        found = weights.step(LossScaler(enabled=False), None)
        assert {name: value for name, value in found.items() if name.startswith("grad_norm_")} == ({"grad_norm_head": 2.0} if taken else {})


@pytest.mark.parametrize("names", [
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight"),
    ("decoder.layers.0.self_attention.linear_proj.weight", "decoder.layers.2.mlp.router.weight"),
])
def test_layers_are_found_in_the_names_of_adapters_and_of_megatron(names):
    others = {"embedding.word_embeddings.weight": "grad_norm_embedding", "output_layer.weight": "grad_norm_head"}
    found = layer_groups([*names, *others])
    assert [found[name] for name in names] == ["grad_norm_first_layers", "grad_norm_last_layers"] and others.items() <= found.items()
