"""16-bit products on a CPU: fp32 accumulation, one rounding, and the same numbers as native 16-bit kernels."""

import math
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from suite.engines.arithmetic import CachedAs, RoundedProducts, arithmetic_for, on_grid, round_to  # noqa: E402
from suite.spec.precision import COARSE_FORMATS  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16]


def operands(dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ulps_apart(a, b):
    """Distance of two 16-bit tensors in steps of the format; monotone integer codes of the bit patterns."""

    def code(x):
        bits = x.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (code(a) - code(b)).abs()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_product_is_the_fp32_product_rounded_once(dtype):
    a, b, c = operands(dtype, 6, 40), operands(dtype, 40, 5, seed=1), operands(dtype, 5, seed=2)
    x, y = operands(dtype, 3, 6, 40, seed=3), operands(dtype, 3, 40, 5, seed=4)
    bias = operands(dtype, 6, 5, seed=5)
    cases = {
        "linear": (lambda: F.linear(a, b.T, c), lambda: F.linear(a.float(), b.T.float(), c.float())),
        "matmul": (lambda: torch.matmul(a, b), lambda: a.float() @ b.float()),
        "operator": (lambda: a @ b, lambda: a.float() @ b.float()),
        "method": (lambda: a.matmul(b), lambda: a.float() @ b.float()),
        "mm": (lambda: torch.mm(a, b), lambda: a.float() @ b.float()),
        "bmm": (lambda: torch.bmm(x, y), lambda: torch.bmm(x.float(), y.float())),
        "addmm": (lambda: torch.addmm(bias, a, b), lambda: torch.addmm(bias.float(), a.float(), b.float())),
        "baddbmm": (lambda: torch.baddbmm(bias, x, y), lambda: torch.baddbmm(bias.float(), x.float(), y.float())),
        "einsum": (lambda: torch.einsum("bij,bjk->bik", x, y), lambda: torch.bmm(x.float(), y.float())),
    }
    for name, (rounded, reference) in cases.items():
        with RoundedProducts():
            found = rounded()
        assert found.dtype == dtype, name
        assert torch.equal(found, reference().to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_equal_native_kernels_up_to_flips_at_rounding_boundaries(dtype):
    def run(mode):
        x = operands(dtype, 64, 96).requires_grad_()
        w = (operands(torch.float32, 80, 96, seed=1) / 10).to(dtype).requires_grad_()
        upstream = operands(dtype, 64, 80, seed=2)
        with mode():
            out = F.linear(x, w)
        out.backward(upstream)
        return out.detach(), x.grad, w.grad

    for name, native, rounded in zip(("y", "dX", "dW"), run(nullcontext), run(RoundedProducts), strict=True):
        distance = ulps_apart(native, rounded)
        close = (native.float() - rounded.float()).abs() <= 1e-6 * 96 + 2 * _spacing(native)
        assert close.all(), f"{name}: further apart than a rounding flip"
        assert (distance == 0).float().mean() > 0.98, f"{name}: more than 2 % of the elements differ"




def _spacing(x):
    return torch.nextafter(x.abs(), torch.full_like(x, torch.inf)).float() - x.abs().float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_fp32_attention_rounded_once_and_masks_survive(dtype):
    q, k, v = (operands(dtype, 2, 4, 10, 16, seed=s) for s in range(3))
    with RoundedProducts():
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    reference = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(found, reference.to(dtype))
    assert torch.equal(found[..., 0, :], v[..., 0, :]), "the first position sees itself alone"


def test_fp32_products_are_left_alone():
    a, b = operands(torch.float32, 7, 9), operands(torch.float32, 9, 3, seed=1)
    with RoundedProducts():
        found = a @ b
    assert torch.equal(found, a @ b)


def test_fp16_overflow_is_infinite_as_on_a_device():
    a = torch.full((1, 4), 300.0, dtype=torch.float16)
    with RoundedProducts():
        assert torch.isinf(a @ a.T).all(), "4 * 300^2 is beyond 65,504"


def test_only_16_bit_products_on_a_cpu_are_rounded():
    assert arithmetic_for("cpu", torch.float16)[0] == "rounded-fp32-accumulate"
    assert arithmetic_for("cpu", torch.bfloat16)[0] == "rounded-fp32-accumulate"
    assert arithmetic_for("cpu", torch.float32)[0] == "native"
    assert arithmetic_for("cuda", torch.float16)[0] == "native"


def wide_values(num=4000):
    """fp32 numbers over many powers of two, and what sits on an edge."""
    draw = torch.Generator().manual_seed(0)
    body = torch.randn(num, generator=draw) * torch.exp(20 * torch.randn(num, generator=draw))
    return torch.cat([body, torch.tensor([0.0, -0.0, 1.0, 1.25, 1.75, -1.25, 1.5, 3.0, -0.75, 2.0**-126])])


def slowly_rounded(value: float, bits: int) -> float:
    """Round to nearest even with exact fractions, one number at a time."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(Fraction(value)) >= Fraction(2) ** (exponent + 1)) - (abs(Fraction(value)) < Fraction(2) ** exponent)
    spacing = Fraction(2) ** (max(exponent, -126) - bits)
    return float(round(Fraction(value) / spacing) * spacing)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 7, 10, 22])
def test_a_coarse_format_rounds_to_nearest_even(bits):
    values = wide_values(500)
    expected = torch.tensor([slowly_rounded(value, bits) for value in values.tolist()])
    assert torch.equal(round_to(values, f"m{bits}"), expected)


def test_seven_bits_are_bf16():
    values = wide_values()
    assert torch.equal(round_to(values, "m7"), values.bfloat16().float())


def test_ten_bits_are_fp16_where_fp16_has_its_full_mantissa():
    values = wide_values()
    values = values[(values.abs() >= 2.0**-14) & (values.abs() < 65504)]
    assert len(values) > 500 and torch.equal(round_to(values, "m10"), values.half().float())


def test_infinities_and_nan_stay_and_the_largest_numbers_overflow():
    found = round_to(torch.tensor([math.inf, -math.inf, math.nan, 3.4e38]), "m2")
    assert found[:2].tolist() == [math.inf, -math.inf] and found[2].isnan() and found[3] == math.inf


@pytest.mark.parametrize("name", COARSE_FORMATS)
def test_what_was_rounded_is_on_the_grid_and_stays_there(name):
    rounded = round_to(wide_values(), name)
    assert on_grid(rounded, name) and torch.equal(round_to(rounded, name), rounded)
    assert not on_grid(wide_values(), name) and not on_grid(rounded.bfloat16(), name)


def test_a_dtype_is_its_own_grid():
    assert on_grid(torch.ones(2, dtype=torch.float16), "fp16") and not on_grid(torch.ones(2), "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("experts", [False, True])
def test_no_16_bit_product_of_a_trainer_or_a_plain_sampler_reaches_a_native_kernel(tmp_path, experts, precision):
    """Whatever the operator is called: one that multiplies and is given 16-bit numbers, forward or backward, is one too many."""
    from small_models import OPTIMIZER, ROLLOUT, TRAIN, some_requests, write_model
    from torch.utils._python_dispatch import TorchDispatchMode

    from suite.engines.batch import MiniBatch
    from suite.engines.samplers.load import load_sampler
    from suite.engines.trainers.load import load_trainer
    from suite.spec.algorithms import resolve

    products = ("mm", "bmm", "addmm", "matmul", "linear", "attention", "dot", "conv")

    class Native(TorchDispatchMode):
        found: set[str] = set()
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(part in function.__name__ for part in products):
                dtypes = {x.dtype for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                Native.seen += 1
                if dtypes & {torch.float16, torch.bfloat16}:
                    Native.found.add(str(function))
            return function(*args, **(kwargs or {}))

    folder = write_model(tmp_path, experts=experts)
    trainer = load_trainer(folder, TRAIN | {"optimizer": OPTIMIZER}, {"rollout": precision, "train": precision}, 1.0)
    sampler = load_sampler(folder, ROLLOUT | {"engine": "hf", "max_tokens": 2}, precision, [2])
    rows = [(list(range(3, 20)), 4), (list(range(5, 30)), 4)]
    with Native():
        old = trainer.score(rows)
        trainer.update(MiniBatch(rows, old, old, np.array([1, -1], np.float32), 32), resolve("GRPO"))
        sampler.sample(some_requests(2))
    assert trainer.executed()["arithmetic"] == sampler.executed()["sampler_products"] == "rounded-fp32-accumulate"
    assert Native.seen > 50 and Native.found == set()


def test_the_flags_of_products_are_told_as_words():
    from suite.engines.arithmetic import matmul_flags

    assert set(matmul_flags().values()) <= {"true", "false", "highest", "high", "medium"} | {"(true, true)"}
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        assert matmul_flags()["bf16_reduced_precision_reduction"] == "false"
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize(("cache", "bits"), [("fp8_e4m3", 3), ("fp8_e5m2", 2)])
def test_a_cache_of_8_bits_on_a_cpu_cuts_keys_and_values_off_and_leaves_the_query_alone(cache, bits):
    def cut(x):  # towards zero, with exact powers of two
        spacing = torch.pow(2.0, torch.floor(torch.log2(x.abs())) - bits)
        return torch.sign(x) * torch.floor(x.abs() / spacing) * spacing

    q, k, v = (operands(torch.float32, 1, 2, 5, 16, seed=s) for s in range(3))
    k, v = (torch.where(x.abs() < 2.0**-6, 1.0, x) for x in (k, v))  # the smallest normal number of e4m3
    with CachedAs(cache):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(found, F.scaled_dot_product_attention(q, cut(k), cut(v), is_causal=True))
    assert not torch.equal(cut(k), k)
