"""16-bit products on a CPU as a tensor core forms them: 16-bit operands, fp32 accumulation, result rounded to 16 bits.

A CPU has no fast fp16 product (torch falls back to a scalar loop, some 50 times slower than fp32), and its bf16 kernels
are not those of its fp16 path. Multiplying in fp32 and rounding once gives the same numbers for both formats at fp32
speed, forward and backward: the cast up hands its gradient back rounded to 16 bits, which is what a 16-bit dX or dW is.

The mode works on torch functions, so it serves transformers, peft and megatron-core alike.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from suite.precision import NATIVE, ROUNDED

SIXTEEN_BIT = (torch.float16, torch.bfloat16)

PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,  # the whole attention in fp32, its output rounded: as fused kernels keep S and P
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.addmm, torch.Tensor.baddbmm,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
}  # fmt: skip


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
