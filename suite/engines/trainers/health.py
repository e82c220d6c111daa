"""How training fares inside: how close fp16 came to the ends of its range (largest activations, gradients that underflowed),
and how large the gradient is in which part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

THIRDS = ("grad_norm_first_layers", "grad_norm_middle_layers", "grad_norm_last_layers")
GROUPS = ("grad_norm_embedding", *THIRDS, "grad_norm_head")


class ActivationWatch:
    """Largest |activation| at the output of any decoder layer while the watch is on; reset when it is entered."""

    def __init__(self, layers):
        self._on, self._largest = False, []
        for layer in layers:
            layer.register_forward_hook(self._note)

    def _note(self, module, args, output) -> None:
        if self._on:
            hidden = output[0] if isinstance(output, tuple) else output
            self._largest.append(hidden.detach().abs().amax().float())

    def __enter__(self):
        self._on, self._largest = True, []
        return self

    def __exit__(self, *_):
        self._on = False

    @property
    def largest(self) -> float:
        """To be read against 65,504, the largest fp16 number."""
        return torch.stack(self._largest).amax().item() if self._largest else 0.0


@torch.no_grad()
def underflow_share(parameters: Iterable[torch.nn.Parameter], embedding: torch.Tensor) -> float:
    """Share of the elements of weight-matrix gradients (that of the embedding left out: most of its rows are zero by right)
    that are zero or below the smallest normal number of their dtype: where a scaled gradient has lost bits or vanished."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.dim() > 1 and p is not embedding]
    lost = sum((g.abs() < torch.finfo(g.dtype).tiny).sum() for g in gradients)
    return float(lost) / max(1, sum(g.numel() for g in gradients))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over the ranks, gathered; every rank must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def layer_groups(names: Iterable[str]) -> dict[str, str]:
    """{parameter: the metric of its group}: embedding (a head that shares its weight included), decoder layers by thirds
    of their number, and head, which is all behind the last layer. Of L layers the i-th, from 0, is in third 3 i / L."""
    names = list(names)
    layer_of = {name: int(found[1]) for name in names if (found := re.search(r"\blayers\.(\d+)\.", name))}
    num = max(layer_of.values(), default=0) + 1

    def group(name: str) -> str:
        if name in layer_of:
            return THIRDS[3 * layer_of[name] // num]
        return "grad_norm_embedding" if "embed" in name else "grad_norm_head"

    return {name: group(name) for name in names}


@torch.no_grad()
def group_norms(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """{metric: L2 norm} of the gradients of each group that has any; their squares add up to that of the whole gradient."""
    group_of, gradients = layer_groups(parameters), {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            gradients.setdefault(group_of[name], []).append(parameter.grad)
    return {group: whole(torch.nn.utils.get_total_norm(gradients[group])).item() for group in GROUPS if group in gradients}
