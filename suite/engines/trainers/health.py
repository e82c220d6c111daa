"""How close fp16 training came to the ends of its range: largest activations, and gradients that underflowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch


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
