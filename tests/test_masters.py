"""Sums of gradients: exact enough in fp32, rounded at every addition in 16 bits, and said in the record."""

import pytest
import torch

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
