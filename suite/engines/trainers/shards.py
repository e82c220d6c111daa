"""A model spread over the ranks by FSDP2: each holds an equal part of every weight, in fp32, and gathers a layer, in the
compute dtype, for as long as that layer is at work.

The fp32 parts are the masters that AdamW moves: at lr 1e-6 a step is far below the spacing of bf16 numbers. Gradients are
summed over micro-batches and ranks, not averaged: losses are normalised by the counts of the whole mini-batch (losses.py).
The sum is in fp32, as in the authors' VeRL; or, where a task says so, in the compute dtype, as DeepSpeed does in OAT: every
addition is then rounded, and a sum in fp16 can overflow.

    rank 0   part of W, fp32 --.                                          .-- part of dW, fp32 --> AdamW on the part
                               +-- gather, round --> W --> forward, backward --> dW -- sum, scatter
    rank 1   part of W, fp32 --'                                          '-- part of dW, fp32 --> AdamW on the part
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from suite.engines.checkpoint import Saved
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.optimizer import held, local, new_adamw, take_over, take_step
from suite.engines.world import World
from suite.spec.precision import dtype_name


class Policy(nn.Module):
    """A model, as the one module whose forward FSDP2 sees: whatever is run inside it finds the weights gathered. What went
    past this forward, straight to the output head say, would find a part of them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable, *args):
        return work(*args)


class ShardedWeights:
    """Masters, gradients and optimizer state of a model; all fp32, spread over the ranks of `world`."""

    def __init__(self, policy: Policy, layers: Iterable[nn.Module], world: World, dtype: torch.dtype, optimizer: dict,
                 sum_dtype: torch.dtype = torch.float32):
        """Spreads the model in place, which moves it to the device of the rank. layers: those to be gathered one by one,
        except in one process on a CPU; the rest is gathered together. Trainable weights must come in fp32, frozen ones in `dtype`. Gradients are summed in
        `sum_dtype`, which is fp32 or `dtype`."""
        self._policy, self._settings = policy, optimizer
        # Sums in the dtype of the gradients themselves form where these arise, on whole weights, and are scattered once.
        self._sums_first = sum_dtype == dtype
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=sum_dtype)
        # On one CPU there is nothing to gather, only to round, and a unit for each layer would cost a tenth of a small step.
        self._layers = list(layers) if world.size > 1 or world.device.type != "cpu" else []
        for module in (*self._layers, policy):
            # The root too: what it kept gathered after a score would hide a change of its weights from the next one.
            fully_shard(module, mesh=world.mesh, mp_policy=precision, reshard_after_forward=True)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum that divides
        named = dict(policy.model.named_parameters())
        self.masters = {name: weight for name, weight in named.items() if weight.requires_grad}
        self.frozen = {name: weight for name, weight in named.items() if not weight.requires_grad}
        self.optimizer = new_adamw(self.masters, optimizer)
        self.compute_dtypes: set[str] = set()  # of the gathered weights, as the last forward saw them
        self._hooks = {module: module.register_forward_pre_hook(self._look) for module in (*self._layers, policy)}
        self._lost, self._num_seen, self._embedding = [], 0, policy.model.get_input_embeddings()

    def _look(self, module: nn.Module, _) -> None:
        """At the first forward: note the dtype of weights that have just been gathered, and watch the gradients of matrices
        among them. FSDP2 gathers into the same tensors every time."""
        self._hooks.pop(module).remove()
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):  # of a layer whose turn has not come
                continue
            self.compute_dtypes.add(dtype_name(parameter.dtype))
            if parameter.requires_grad and parameter.dim() > 1 and parameter is not self._embedding.weight:
                if parameter.dtype == torch.float32:  # of which the sum so far is looked at, in all records
                    parameter.register_post_accumulate_grad_hook(lambda summed: self._count(summed.grad))
                else:
                    parameter.register_hook(self._count)

    @torch.no_grad()
    def _count(self, gradient: torch.Tensor) -> None:
        self._lost.append((gradient.abs() < torch.finfo(gradient.dtype).tiny).sum())
        self._num_seen += gradient.numel()

    def underflow_share(self) -> float:
        """Of the gradients since it was last asked for: as health.underflow_share."""
        lost, num = sum(self._lost), self._num_seen
        self._lost, self._num_seen = [], 0
        return float(lost) / max(1, num)

    def expect(self, is_last: bool) -> None:
        """Say before a backward pass whether it is the last one of its step."""
        self._policy.set_requires_gradient_sync(is_last or not self._sums_first)

    def collect(self) -> None:
        """FSDP2 has summed the gradients already."""

    def step(self, scaler: LossScaler, grad_clip: float | None) -> dict[str, float]:
        """Unscale, check, clip, update (optimizer.take_step)."""
        return take_step(self.masters, self.optimizer, self._settings, scaler, grad_clip)

    @contextmanager
    @torch.no_grad()
    def moved(self, move: Callable[[Iterable[tuple[str, torch.Tensor]]], None]):
        """Inside the context every weight is changed by `move(named parts of this rank)`, in place; afterwards they are what
        they were, to the bit. What they were is kept in the memory of the host."""
        parts = {name: local(weight.detach()) for name, weight in (self.masters | self.frozen).items()}
        kept = {name: part.to("cpu", copy=True) for name, part in parts.items()}
        move(parts.items())
        try:
            yield
        finally:
            for name, part in parts.items():
                part.copy_(kept[name])

    def executed(self) -> dict[str, str]:
        """Dtypes of the live tensors; those of optimizer state and gradients once a step was taken."""
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        points = {"master_weights": _dtypes(self.masters.values())}
        points |= {"compute": "+".join(sorted(self.compute_dtypes))} if self.compute_dtypes else {}
        if moments:
            points |= {"optimizer_state": _dtypes(moments), "gradient_reduction": self._reduction()}
        return points

    def _reduction(self) -> str:
        """The dtype in which the live FSDP2 units sum gradients up."""
        units = [module for module in self._policy.modules() if isinstance(module, FSDPModule)]
        return "+".join(sorted({dtype_name(unit._get_fsdp_state()._mp_policy.reduce_dtype) for unit in units}))

    def held(self) -> tuple[dict[str, torch.Tensor], dict]:
        return held(self.masters, self.optimizer)

    def take_over(self, saved: Saved) -> None:
        take_over(self.masters, self.optimizer, saved)


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return "+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
