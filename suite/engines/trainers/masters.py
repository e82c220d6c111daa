"""fp32 master weights behind parameters of any compute dtype, and the AdamW that moves them.

16-bit weights cannot hold an RL update: at lr 1e-6 a step is far below the spacing of bf16 numbers and would round to
nothing. So the optimizer works on fp32 copies and the compute parameters are rounded from them after every step. For an
fp32 trainer the parameters are their own masters.

Gradients of micro-batches and ranks are summed in fp32, as FSDP2 does in the authors' VeRL; or, where a task says so, in
the compute dtype, as DeepSpeed does in OAT: every addition is then rounded, and a sum in fp16 can overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

from suite.engines.checkpoint import Saved
from suite.engines.trainers.loss_scale import LossScaler
from suite.engines.trainers.optimizer import held, new_adamw, take_over, take_step
from suite.engines.world import ReplicaError, World
from suite.spec.precision import dtype_name


class MasterWeights:
    """Masters, gradients and optimizer state of a list of compute parameters; all fp32, on the parameters' device."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype, optimizer: dict,
                 sum_dtype: torch.dtype = torch.float32, world: World = World()):
        """Takes fp32 parameters by name, keeps their values as masters, and turns the parameters into `dtype` ones; their
        gradients are summed in `sum_dtype`, which is fp32 or `dtype`, and over the ranks of `world`, which hold the same."""
        self.compute, self.masters, self._world = parameters, {}, world
        self._sums: dict[str, torch.Tensor] | None = None if sum_dtype == torch.float32 else {}
        for name, parameter in parameters.items():
            if dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = torch.nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
        self.optimizer = new_adamw(self.masters, optimizer)
        self.gradient_dtypes: set[str] = set()  # of the gradients that the last step summed and clipped
        self._settings = optimizer

    def collect(self) -> None:
        """Add the compute gradients of one micro-batch to the masters' fp32 gradients, or to the sums, and drop them."""
        for name, p in self.compute.items():
            master = self.masters[name]
            if p is master or p.grad is None:
                continue
            if self._sums is not None:
                self._sums[name] = self._sums[name].add_(p.grad) if name in self._sums else p.grad
                p.grad = None
                continue
            gradient = p.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The gradient of every master in the dtype of the sums, zeros where no micro-batch left one: what ranks add up."""
        if self._sums is not None:
            return [self._sums.setdefault(name, torch.zeros_like(p)) for name, p in self.compute.items()]
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values()]

    def expect(self, is_last: bool) -> None:
        """Whether the next micro-batch is the last one of its step makes no difference here."""

    def step(self, scaler: LossScaler, grad_clip: float | None) -> dict[str, float]:
        """Add up over the ranks; unscale, check, clip, update (optimizer.take_step); round. Raises ReplicaError if the ranks
        took different steps."""
        self._world.add_up(self.gradients() if self._world.size > 1 else [])
        summed = self._sums if self._sums is not None else {}
        for name, total in summed.items():
            self.masters[name].grad = total.float()
        sums = summed.values() or [master.grad for master in self.masters.values() if master.grad is not None]
        self.gradient_dtypes = {dtype_name(total.dtype) for total in sums}
        report = take_step(self.masters, self.optimizer, self._settings, scaler, grad_clip)
        if not report["step_skipped"]:
            self.round()
        summed.clear()
        if self._world.size > 1:
            self._check_replicas(report["grad_norm"])
        return report

    def _check_replicas(self, grad_norm: float) -> None:
        checksum = sum(master.detach().double().sum().item() for master in self.masters.values())
        found = {repr(pair) for pair in self._world.gather((grad_norm, checksum))}
        if len(found) > 1:
            raise ReplicaError(f"the trainers of the ranks have come apart: (gradient norm, sum of weights) {', '.join(sorted(found))}")

    @torch.no_grad()
    def round(self) -> None:
        """Set the compute parameters to the masters, rounded to their dtype."""
        for name, p in self.compute.items():
            if p is not self.masters[name]:
                p.copy_(self.masters[name])

    @contextmanager
    @torch.no_grad()
    def moved(self, move: Callable[[Iterable[tuple[str, torch.Tensor]]], None], frozen: dict[str, torch.Tensor]):
        """Inside the context the masters and the `frozen` weights beside them are changed by `move(named weights)`;
        afterwards they are what they were, to the bit."""
        weights = self.masters | frozen
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        move(weights.items())
        self.round()
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(kept[name])
            self.round()

    def executed(self) -> dict[str, str]:
        """Dtypes of the live tensors; those of optimizer state and gradients once a step was taken."""
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        points = {"master_weights": _dtypes(self.masters.values())}
        points |= {"optimizer_state": _dtypes(moments)} if moments else {}
        points |= {"gradient_reduction": "+".join(sorted(self.gradient_dtypes))} if self.gradient_dtypes else {}
        return points

    def held(self) -> tuple[dict[str, torch.Tensor], dict]:
        return held(self.masters, self.optimizer)

    def take_over(self, saved: Saved) -> None:
        take_over(self.masters, self.optimizer, saved)
        self.round()


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return "+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
