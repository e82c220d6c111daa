"""Low-rank adapters (peft) in a dense trainer: the base stays as loaded, A and B are trained, merged weights travel.

    h = W x + (alpha / rank) B A x        trainer: W in the compute dtype, A and B rounded from fp32 masters
    W' = W + (alpha / rank) B A           sampler: formed in fp32 from the masters, then rounded to the wire's dtype

The merge is made anew from W at every sync and never in place: merging into 16-bit weights and taking the update out again
drifts (TRL issue 6688). What stays is one rounding of W' to the wire, which the trainer's two products do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from suite.errors import UserError

ADAPTER = "default"  # peft's name for the only adapter


def add_adapters(model: nn.Module, lora: dict, seed: int) -> None:
    """Put adapters into the linear layers whose last name is in `lora["targets"]`, in place; nothing else is trained.

    B starts at 0, so the model is the checkpoint at first; A is drawn as peft draws it (Kaiming uniform), from `seed`
    alone. Raises UserError for a target that no linear layer inside the model is called; the output head is none of them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and module is not head}  # fmt: skip
    unknown = [target for target in lora["targets"] if target not in linear]
    if unknown:
        raise UserError(f"train.lora.targets: found {', '.join(unknown)}, allowed: {', '.join(sorted(linear))}")
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=list(lora["targets"]), lora_dropout=0.0, bias="none",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


@torch.no_grad()
def merged_weights(model: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, fp32 tensor) of every weight of the base, with the update of its adapter where it has one; one at a
    time. whole: gathers a weight that is spread over ranks."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        layer, is_adapted, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        weight = whole(parameter.detach()).float()
        if is_adapted and rest == "weight":
            a, b = (whole(getattr(modules[layer], f"lora_{part}")[ADAPTER].weight.detach()) for part in "AB")  # (r, in), (out, r)
            weight = weight + modules[layer].scaling[ADAPTER] * (b @ a)
        yield f"{layer}.{rest}" if is_adapted else name, weight
