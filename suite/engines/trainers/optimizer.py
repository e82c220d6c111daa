"""AdamW on fp32 masters, whole or spread over ranks: how a step is taken, and what of it a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from suite.engines.checkpoint import Saved
from suite.engines.trainers.health import group_norms, whole
from suite.engines.trainers.loss_scale import LossScaler
from suite.spec.learning_rate import learning_rate

MOMENTS = ("exp_avg", "exp_avg_sq")


def new_adamw(masters: Mapping[str, torch.Tensor], settings: dict) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        masters.values(), lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"],
        weight_decay=settings["weight_decay"], fused=True,
    )  # fmt: skip


def take_step(masters: Mapping[str, torch.Tensor], adamw: torch.optim.AdamW, settings: dict, scaler: LossScaler,
              grad_clip: float | None) -> dict[str, float]:
    """Unscale, check, clip, update. A step with a gradient that is not finite, on any rank, is skipped on all and counted.

    Returns grad_norm (before clipping, of all ranks; nan for a skipped step), its parts by layer (of a step that was taken),
    learning_rate (of this update, taken or skipped), loss_scale (that the gradients were made with), step_skipped (0 or 1)
    and the headroom of the scaled gradients.
    """
    parameters = list(masters.values())
    loss_scale = scaler.scale_value
    skipped = scaler.unscale_and_check(parameters)
    norm = math.nan
    by_group = group_norms(masters)
    if not skipped:
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)).item()
        skipped = not math.isfinite(norm)  # finite elements whose norm overflows: clipping would make them zero
    rate = learning_rate(settings, scaler.num_steps - scaler.num_skipped)
    if not skipped:
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    for master in parameters:
        master.grad = None
    largest = scaler.max_abs_scaled_grad
    scaler.update(skipped)
    return {"grad_norm": norm, "learning_rate": rate, "loss_scale": loss_scale, "step_skipped": int(skipped),
            "grad_scaled_max_abs": largest} | ({} if skipped else by_group)  # fmt: skip


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; writing to it changes the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(masters: Mapping[str, torch.Tensor], adamw: torch.optim.AdamW) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, numbers) that a checkpoint holds of masters and optimizer."""
    tensors, steps = {f"weight.{name}": master.detach() for name, master in masters.items()}, {}
    for name, master in masters.items():
        if state := adamw.state.get(master):
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
            steps[name] = state["step"].item()
    return tensors, {"adamw_steps": steps}


@torch.no_grad()
def take_over(masters: Mapping[str, torch.Tensor], adamw: torch.optim.AdamW, saved: Saved) -> None:
    """Fill masters and optimizer from a checkpoint, whatever number of ranks wrote it."""
    steps = saved.numbers["adamw_steps"]
    state = {
        number: {"step": torch.tensor(steps[name]), **{moment: torch.zeros_like(master) for moment in MOMENTS}}
        for number, (name, master) in enumerate(masters.items())
        if name in steps
    }
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
    saved.read(held(masters, adamw)[0])
