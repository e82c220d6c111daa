"""What fp16 would do to a checkpoint: the largest activation of every module against 65,504, the weights that fp16 cannot
hold well, and the module to look at first. The forward runs in fp32 (bf16 where that does not fit), whose range is never the
limit; fp16's own rounding is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

LARGEST = 65504.0  # largest fp16 number
SMALLEST_NORMAL = 2.0**-14  # below it fp16 loses bits of the mantissa
VANISHES = 2.0**-25  # at most half the smallest subnormal: rounds to 0
WARN_SHARE = 0.25  # of the range: activations grow with length and in training
PROBE_TOKENS = 32
CHUNK = 2**24  # elements of a weight looked at at a time


@dataclass(frozen=True)
class Module:
    """Largest |input| and |output| of one module over all sequences."""

    name: str
    kind: str
    largest: float

    @property
    def share(self) -> float:
        return self.largest / LARGEST


@dataclass(frozen=True)
class Weight:
    """One tensor as fp16 would hold it: shares of its elements."""

    name: str
    num: int
    subnormal: float
    vanished: float
    largest: float


@dataclass(frozen=True)
class Preflight:
    """modules and weights: the worst first. dtype: of the forward. share_*: over all weights. plain_head: whether logits are the
    product of head and last hidden state and nothing more, which the trainer takes for granted."""

    modules: tuple[Module, ...]
    weights: tuple[Weight, ...]
    share_subnormal: float
    share_vanished: float
    num_sequences: int
    num_tokens: int
    dtype: str
    plain_head: bool

    @property
    def first(self) -> Module:
        return self.modules[0]

    @property
    def word(self) -> str:
        """overflows | close | fits."""
        over = self.first.share > 1 or any(weight.largest > LARGEST for weight in self.weights)
        return "overflows" if over or self.first.largest != self.first.largest else "close" if self.first.share > WARN_SHARE else "fits"


def preflight(folder: Path, sequences: list[list[int]], dtype: torch.dtype, attention: str) -> Preflight:
    """Of one checkpoint over sequences of token ids."""
    from transformers import AutoModelForCausalLM

    from suite.spec.precision import dtype_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    model = model.eval().to(device)
    plain_head = _has_plain_head(model, torch.tensor([sequences[0][:PROBE_TOKENS]], device=device))
    largest = _largest(model, sequences, device)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    modules = sorted((Module(name, kinds[name], value) for name, value in largest.items()), key=lambda one: -_rank(one.largest))
    weights = sorted(weights_in_fp16(folder), key=lambda one: (-one.vanished - one.subnormal, one.name))
    total = sum(one.num for one in weights) or 1
    return Preflight(
        tuple(modules), tuple(weights), sum(one.subnormal * one.num for one in weights) / total,
        sum(one.vanished * one.num for one in weights) / total, len(sequences), sum(map(len, sequences)), dtype_name(dtype), plain_head,
    )  # fmt: skip


@torch.inference_mode()
def _has_plain_head(model: torch.nn.Module, tokens: torch.Tensor) -> bool:
    whole = model(input_ids=tokens, use_cache=False).logits.float()
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    product = model.get_output_embeddings()(states).float()
    return bool((whole - product).abs().max() <= 1e-2 * whole.abs().max())


def _rank(value: float) -> float:
    return float("inf") if value != value else value  # nan is the worst


@torch.inference_mode()
def _largest(model: torch.nn.Module, sequences: list[list[int]], device: torch.device) -> dict[str, float]:
    """Largest |value| at the input or output of every module without children, by name."""
    seen: dict[str, float] = {}

    def watch(name: str):
        def note(module, args, kwargs, output) -> None:
            for tensor in _tensors((args, kwargs, output)):
                value = float(tensor.abs().amax())
                if value != value or not value <= seen.get(name, -1.0):
                    seen[name] = value

        return note

    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules()
             if name and not any(True for _ in module.children())]  # fmt: skip
    try:
        for tokens in sequences:
            model(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel() and not _is_mask(value):
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _is_mask(value: torch.Tensor) -> bool:
    """An additive attention mask holds the smallest number of its dtype on purpose."""
    return bool((value == torch.finfo(value.dtype).min).any())


def weights_in_fp16(folder: Path) -> Iterator[Weight]:
    """Every tensor of a checkpoint, one at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel():
                    yield _weight(name, tensor)


def _weight(name: str, tensor: torch.Tensor) -> Weight:
    small = gone = 0
    largest = 0.0
    for part in tensor.flatten().split(CHUNK):
        size = part.float().abs()
        small += int(((size < SMALLEST_NORMAL) & (size > VANISHES)).sum())
        gone += int(((size <= VANISHES) & (size > 0)).sum())
        largest = max(largest, float(size.max()))
    return Weight(name, tensor.numel(), small / tensor.numel(), gone / tensor.numel(), largest)
