"""fp32 master weights behind parameters of any compute dtype, and the AdamW that moves them.

16-bit weights cannot hold an RL update: at lr 1e-6 a step is far below the spacing of bf16 numbers and would round to
nothing. So the optimizer works on fp32 copies and the compute parameters are rounded from them after every step. For an
fp32 trainer the parameters are their own masters.

Gradients of micro-batches and ranks are summed in fp32, as FSDP2 does in the authors' VeRL; or, where a task says so, in
the compute dtype, as DeepSpeed does in OAT: every addition is then rounded, and a sum in fp16 can overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

from suite.engines.trainers.health import group_norms
from suite.engines.trainers.loss_scale import LossScaler
from suite.spec.learning_rate import learning_rate
from suite.spec.precision import dtype_name


class MasterWeights:
    """Masters, gradients and optimizer state of a list of compute parameters; all fp32, on the parameters' device."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], dtype: torch.dtype, optimizer: dict,
                 sum_dtype: torch.dtype = torch.float32):
        """Takes fp32 parameters by name, keeps their values as masters, and turns the parameters into `dtype` ones; their
        gradients are summed in `sum_dtype`, which is fp32 or `dtype`."""
        self.compute, self.masters = parameters, {}
        self._sums: dict[str, torch.Tensor] | None = None if sum_dtype == torch.float32 else {}
        for name, parameter in parameters.items():
            if dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = torch.nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.data.to(dtype)
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=optimizer["lr"], betas=tuple(optimizer["betas"]), eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"], fused=True,
        )  # fmt: skip
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

    def step(self, scaler: LossScaler, grad_clip: float | None) -> dict[str, float]:
        """Unscale, check, clip, update, round. A step with a gradient that is not finite is skipped and counted.

        Returns grad_norm (before clipping; nan for a skipped step), its parts by layer (of a step that was taken),
        learning_rate (of this update, taken or skipped), loss_scale (that the gradients were made with), step_skipped (0
        or 1) and the headroom of the scaled gradients.
        """
        masters = list(self.masters.values())
        loss_scale = scaler.scale_value
        summed = self._sums if self._sums is not None else {}
        for name, total in summed.items():
            self.masters[name].grad = total.float()
        sums = summed.values() or [master.grad for master in masters if master.grad is not None]
        self.gradient_dtypes = {dtype_name(total.dtype) for total in sums}
        skipped = scaler.unscale_and_check(masters)
        norm = math.nan
        by_group = group_norms(self.masters)
        if not skipped:
            norm = torch.nn.utils.clip_grad_norm_(masters, grad_clip or math.inf).item()
            skipped = not math.isfinite(norm)  # finite elements whose norm overflows: clipping would make them zero
        rate = learning_rate(self._settings, scaler.num_steps - scaler.num_skipped)
        if not skipped:
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.round()
        for master in masters:
            master.grad = None
        summed.clear()
        largest = scaler.max_abs_scaled_grad
        scaler.update(skipped)
        return {"grad_norm": norm, "learning_rate": rate, "loss_scale": loss_scale, "step_skipped": int(skipped),
                "grad_scaled_max_abs": largest} | ({} if skipped else by_group)  # fmt: skip

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

    def state_dict(self) -> dict:
        return {"masters": {n: m.detach() for n, m in self.masters.items()}, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round()


def _dtypes(tensors: Iterable[torch.Tensor]) -> str:
    return "+".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
