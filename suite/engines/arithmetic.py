"""16-bit products on a CPU as a tensor core forms them: 16-bit operands, fp32 accumulation, result rounded to 16 bits.

A CPU has no fast fp16 product (torch falls back to a scalar loop, some 50 times slower than fp32), and its bf16 kernels
are not those of its fp16 path. Multiplying in fp32 and rounding once gives the same numbers for both formats at fp32
speed, forward and backward: the cast up hands its gradient back rounded to 16 bits, which is what a 16-bit dX or dW is.

Two things are not those of 16-bit kernels, and both formats share them. Attention is one product here, with S and P in
fp32 throughout: FlashAttention-2 and torch's own CPU kernel round P before P V (relative error of the output 2.0e-3 in bf16,
here 1.4e-3). Ratios between formats do not feel it; levels of mismatch, compared with a GPU's, do (k3 of the embedded model
to fp32: 1.02e-3 here, 1.05e-3 with torch's bf16 kernel). And the gradient of an embedding is torch's own: token gradients are
added up in 16 bits (relative error 8e-3 in bf16, 1e-3 in fp16, with 64 entries and 3,584 tokens).

The mode works on torch functions, so it serves transformers, peft and megatron-core alike.

Formats coarser than any dtype (m0 to m22 of precision.FORMATS) are fp32 numbers on a coarser grid: `round_to` puts them
there.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from suite.spec.precision import FORMATS, NATIVE, ROUNDED, dtype_name

SIXTEEN_BIT = (torch.float16, torch.bfloat16)

PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,  # the whole attention in fp32, its output rounded; kernels round P as well, see above
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.addmm, torch.Tensor.baddbmm,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
}  # fmt: skip


FP32_MANTISSA_BITS, FP32_EXPONENT = 23, 0x7F800000


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that holds numbers of the format."""
    return getattr(torch, FORMATS[name].torch_name)


def round_to(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The numbers of `tensor` in a format, rounded to nearest even; held in the format's torch dtype.

    Of a coarse format: fp32 numbers with so many explicit mantissa bits; the exponent range stays that of fp32, subnormals
    keep its fixed spacing, and what rounds beyond the largest number is infinite. Infinities and nan stay what they are.
    """
    row = FORMATS[name]
    if row.is_dtype:
        return tensor.to(torch_dtype(name))
    values = tensor.float()
    dropped = FP32_MANTISSA_BITS - row.mantissa_bits
    bits = values.view(torch.int32)
    half_less_one = (1 << (dropped - 1)) - 1
    last_kept = (bits >> dropped) & 1 if row.mantissa_bits else (bits & FP32_EXPONENT != 0).int()  # the implicit bit
    rounded = ((bits + half_less_one + last_kept) >> dropped << dropped).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values)


def on_grid(tensor: torch.Tensor, name: str) -> bool:
    """Whether every number of `tensor` is one of the format, in the dtype that holds it."""
    row = FORMATS[name]
    right_dtype = dtype_name(tensor.dtype) == row.storage
    return right_dtype and (row.is_dtype or torch.equal(round_to(tensor, name), tensor))


class RoundedProducts(TorchFunctionMode):
    """Inside this mode, products of 16-bit tensors accumulate in fp32 and are rounded once."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in PRODUCTS:
            return function(*args, **kwargs)
        dtype = next((x.dtype for x in _tensors(args) if x.dtype in SIXTEEN_BIT), None)
        if dtype is None:
            return function(*args, **kwargs)
        raised = [_raise(x) for x in args]
        return function(*raised, **{name: _raise(x) for name, x in kwargs.items()}).to(dtype)


class CachedAs(TorchFunctionMode):
    """Inside this mode, attention reads keys and values as vLLM's cache of 8 bits gives them back. On a CPU its
    kernels (0.32) cut the bits off that do not fit, which makes every number smaller (seen for fp8_e5m2, taken for granted for
    fp8_e4m3). On a GPU rounding to nearest even is taken for granted; nobody has looked yet."""

    def __init__(self, cache: str):
        super().__init__()
        self._dtype = getattr(torch, cache.replace("fp8", "float8").replace("e4m3", "e4m3fn"))
        self._mantissa_bits = {"fp8_e4m3": 3, "fp8_e5m2": 2}[cache]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            args = (query, self._kept(key), self._kept(value), *rest)
        return function(*args, **(kwargs or {}))

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(self._dtype).max
        if tensor.device.type == "cpu":
            tensor = _cut(tensor, self._mantissa_bits)
        return tensor.clamp(-largest, largest).to(self._dtype).to(tensor.dtype)


def _cut(tensor: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    """Rounded towards zero to so many explicit mantissa bits."""
    kept = -1 << (FP32_MANTISSA_BITS - mantissa_bits)
    return (tensor.float().view(torch.int32) & kept).view(torch.float32).to(tensor.dtype)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _raise(value):
    if isinstance(value, torch.Tensor) and value.dtype in SIXTEEN_BIT:
        return value.float()
    if isinstance(value, (list, tuple)):
        return type(value)(_raise(item) for item in value)
    return value


def arithmetic_for(device: torch.device | str, dtype: torch.dtype):
    """(name, context factory) of the arithmetic that products of `dtype` use on `device`."""
    if torch.device(device).type == "cpu" and dtype in SIXTEEN_BIT:
        return ROUNDED, RoundedProducts
    return NATIVE, nullcontext


def experts_for(device: torch.device | str) -> dict[str, str]:
    """How transformers is to form the products of experts: on a CPU one expert after the other, each a linear layer. Its own
    choice, a grouped product, is a kernel that RoundedProducts does not reach."""
    return {"experts_implementation": "eager"} if torch.device(device).type == "cpu" else {}


def matmul_flags() -> dict[str, str]:
    """What torch may do to the products of this process, trainer and in-process sampler alike: TF32 in place of fp32, and
    16-bit sums of the parts of a split product. They act on GPUs alone."""
    matmul = torch.backends.cuda.matmul
    flags = {
        "allow_tf32": matmul.allow_tf32,
        "fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "fp32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    return {name: str(value).lower() for name, value in flags.items()}
