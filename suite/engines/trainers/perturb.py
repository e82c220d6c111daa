"""The control that a working measurement must catch: one tensor of a trainer scaled on purpose (train.perturb)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from suite.errors import UserError

NUM_SHOWN = 6


@torch.no_grad()
def scale_one(tensors: Mapping[str, torch.Tensor], parameter: str, scale: float, of: str) -> None:
    """Multiply the tensor called `parameter` by `scale`, in place. UserError for a name that `tensors` does not have; `of`
    says in the error what they are tensors of."""
    if parameter not in tensors:
        known = ", ".join(sorted(tensors)[:NUM_SHOWN])
        raise UserError(f"train.perturb.parameter: found {parameter!r}, allowed: a {of} ({known}, ...)")
    tensors[parameter].mul_(scale)
