"""Dynamic loss scaling for fp16 training, and the skip rule that every precision shares.

fp16 has no value between 0 and 6e-8: a smaller gradient becomes 0 on its way back through the network. So the loss is
multiplied by a power of two before backward and the gradients divided by it before the step; a gradient that is not
finite means the scale was too high, so the step is skipped and the scale halved. The rule is that of
torch.amp.GradScaler with the growth interval of the paper's VeRL code (ShardedGradScaler, 400); added to it are a floor
for the scale, the agreement over ranks for any sharding, counters that a record can hold, and a state that resumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed
from torch import Tensor

_FP32_MAX = torch.finfo(torch.float32).max
_CONFIGURATION = ("enabled", "init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale")


@dataclass
class LossScaler:
    """Settings, the current scale and the counters of one training run; all ranks hold the same values.

    A step reads: `scaler.scale(loss).backward()`, `found_inf = scaler.unscale_and_check(parameters)`, the optimizer's
    step unless found_inf, `scaler.update(found_inf)`. With enabled=False (bf16, fp32) the scale stays 1 and gradients
    that are not finite are still found, skipped and counted.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 400  # steps without a skip before the scale grows; the paper's VeRL code
    min_scale: float = 1.0
    enabled: bool = True

    scale_value: float = 0.0  # 0.0 = start at init_scale (1 if not enabled)
    growth_tracker: int = 0  # steps since the last growth or skip
    num_steps: int = 0  # updates seen, skipped ones included
    num_skipped: int = 0
    consecutive_skips: int = 0
    consecutive_skips_at_min: int = 0  # skips in a row with no room left below; ten of them are a graded event
    max_abs_scaled_grad: float | None = None  # last check, all ranks, before unscaling; inf if any is not finite
    unscaled: bool = False  # gradients were divided already and update() has not been called

    def __post_init__(self):
        for name, good, allowed in (
            ("growth_factor", self.growth_factor > 1, "above 1"),
            ("backoff_factor", 0 < self.backoff_factor < 1, "between 0 and 1"),
            ("growth_interval", self.growth_interval >= 1, "at least 1"),
            ("min_scale", self.min_scale > 0, "above 0"),
            ("init_scale", self.min_scale <= self.init_scale <= _FP32_MAX, f"between {self.min_scale} and fp32's max"),
        ):
            if not good:
                raise ValueError(f"loss scaling: {name} is {getattr(self, name)}, must be {allowed}")
        if self.scale_value == 0.0:
            self.scale_value = float(self.init_scale) if self.enabled else 1.0

    def scale(self, loss: Tensor) -> Tensor:
        """loss x scale in fp32 at least (a scaled fp16 loss would overflow by itself); the loss itself if disabled."""
        if not self.enabled:
            return loss
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.scale_value

    @torch.no_grad()
    def unscale_and_check(self, parameters: Iterable[Tensor], group=None) -> bool:
        """Divide the gradients by the scale in place; True if any of them, on any rank of `group`, is not finite.

        Takes the parameters; those without a gradient are passed over, of a DTensor each rank handles its own shard.
        Every rank must call it. Raises ValueError for fp16 gradients (dividing would underflow them: keep fp32 master
        weights) and RuntimeError if called twice before update().
        """
        if self.unscaled:
            raise RuntimeError("unscale_and_check() was called twice before update(): gradients would be divided twice")
        grads = [_local(p.grad) for p in parameters if p.grad is not None]
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("loss scaling: a gradient is fp16; master weights and their gradients must be fp32")
        self.max_abs_scaled_grad = _largest_over_ranks(grads, group)
        if self.enabled and grads:
            torch._foreach_mul_(grads, 1.0 / self.scale_value)
        self.unscaled = True
        return not math.isfinite(self.max_abs_scaled_grad)

    def update(self, found_inf: bool) -> None:
        """End of a step: back off and count after a skip, grow after `growth_interval` steps without one."""
        self.unscaled = False
        self.num_steps += 1
        at_min = not self.enabled or self.scale_value <= self.min_scale
        self.num_skipped += found_inf
        self.consecutive_skips = self.consecutive_skips + 1 if found_inf else 0
        self.consecutive_skips_at_min = self.consecutive_skips_at_min + 1 if found_inf and at_min else 0
        if self.enabled:
            self._move_scale(found_inf)

    def _move_scale(self, found_inf: bool) -> None:
        if found_inf:
            self.scale_value = max(self.scale_value * self.backoff_factor, self.min_scale)
            self.growth_tracker = 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            grown = self.scale_value * self.growth_factor
            self.scale_value = grown if grown <= _FP32_MAX else self.scale_value
            self.growth_tracker = 0

    def state_dict(self) -> dict:
        """Everything, as plain numbers: a resumed run continues exactly as the uninterrupted one."""
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        """Take over a saved state. Raises ValueError if a key is missing or unknown or the settings differ."""
        expected = {f.name for f in fields(self)}
        if set(state) != expected:
            raise ValueError(f"loss scaler state: missing or unknown keys {sorted(expected ^ set(state))}")
        for key in _CONFIGURATION:
            if state[key] != getattr(self, key):
                raise ValueError(f"loss scaler state: {key} is {state[key]}, this run has {getattr(self, key)}")
        for key, value in state.items():
            setattr(self, key, value)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if hasattr(grad, "to_local") else grad  # FSDP2 gradients are DTensors


def _largest_over_ranks(grads: list[Tensor], group) -> float:
    """max |gradient| over all ranks; inf if any element anywhere is not finite."""
    device = grads[0].device if grads else _default_device()
    filled = [grad for grad in grads if grad.numel()]  # a rank may hold an empty shard
    norms = torch._foreach_norm(filled, math.inf) if filled else [torch.zeros(())]
    largest = torch.stack([norm.to(device, torch.float32) for norm in norms]).amax()
    largest = torch.where(torch.isfinite(largest), largest, math.inf)  # a MAX over ranks may drop a nan; inf survives
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return largest.item()


def _default_device() -> torch.device:
    """Where a rank without gradients reduces: NCCL knows only the current GPU."""
    nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
