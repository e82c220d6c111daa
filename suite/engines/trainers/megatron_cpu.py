"""What megatron-core 0.16.1 needs changed to run without a GPU. A machine with one never imports this file.

    current device     the rotary embedding, the router, and what expert parallelism gathers and scatters stand on
                       torch.cuda.current_device()
    random numbers     the tracker of dropout's generators seeds CUDA; RL has no dropout, so the one for inference will do
    te_general_gemm    the router's module reads this name, which exists only beside Transformer Engine
    products           linear layers and routers are autograd Functions, in whose backward no function mode is active: 16-bit
                       gradients would come from native kernels while the record says rounded-fp32-accumulate. At tensor
                       parallel 1 they do what F.linear does, so F.linear takes their place
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import utils
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.tensor_parallel import layers, mappings, random
from megatron.core.transformer.moe import moe_utils, router


class _CudaOfCpu:
    """torch.cuda, whose current device is the CPU."""

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)


class _TorchOfCpu:
    """torch, with that cuda."""

    cuda = _CudaOfCpu

    def __getattr__(self, name: str):
        return getattr(torch, name)


def plain_linear(input, weight, bias=None, gradient_accumulation_fusion=False, allreduce_dgrad=False,
                 sequence_parallel=False, *rest, **more):  # fmt: skip
    """F.linear in the place of megatron's linear functions, for what they do at tensor parallel 1."""
    if gradient_accumulation_fusion or allreduce_dgrad or sequence_parallel:
        raise NotImplementedError("megatron-core without a GPU: no fused or tensor-parallel linear layers")
    return F.linear(input, weight, bias)


def plain_gate(input, weight, bias, router_dtype):
    """The router's product in its dtype, as F.linear."""
    return F.linear(input.to(router_dtype), weight.to(router_dtype), None if bias is None else bias.to(router_dtype))


def apply() -> None:
    """Change megatron-core in this process; a second call changes nothing more."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU shims of megatron-core were asked for beside a GPU")
    for module in (rotary_pos_embedding, router, mappings, utils):
        module.torch = _TorchOfCpu()
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    moe_utils.te_general_gemm = None
    layers.linear_with_grad_accumulation_and_async_allreduce = plain_linear
    layers.linear_with_frozen_weight = plain_linear
    router.router_gating_linear = moe_utils.router_gating_linear = plain_gate
