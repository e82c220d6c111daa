"""What a cell needs of the memory of each GPU, and how long its GPUs are at work: arithmetic on the shape of its model, so
that a layout that cannot fit is refused before anything starts. No torch.

    trainer   fp32 masters, Adam's two moments and gradients, spread over the ranks (FSDP2); the weights of two layers and of
              embedding and head, gathered in the compute dtype; and the largest of three moments of a backward pass, made of
              the activations of one micro-batch, the logits of one chunk of the head, and gradients not yet spread
    sampler   what vLLM takes: a share of the card, or its weights and kv_cache_gib
    rest      CUDA context, buffers of NCCL, fragments

A mixture of experts (megatron-core) spreads its experts over the expert-parallel ranks and holds the rest, masters included,
on every one. Of three small models in fp32 on a CPU, the trainer's measured peak is 1, 6 and 17 % above what this says
(baselines/memory.json); nobody has measured it on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from suite.spec.defaults import default
from suite.spec.plan import Cell
from suite.spec.shapes import Shape, shape_of

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
REST_GIB = 2.0  # assumed: nobody has measured it
FITS = 0.97  # of the card's size, to which its parts may add up
DEFAULT_SHARE = 0.92  # of the card, that vLLM takes where nothing is said (0.25.1)
DEFAULT_MICRO_BATCH, DEFAULT_HEAD_CHUNK_LOGITS = default("train.micro_batch_size"), default("constants.head_chunk_logits")

Parts = dict[str, float]  # bytes by name


@dataclass(frozen=True)
class Need:
    """Bytes that a cell needs on each GPU, by part, and tokens."""

    trainer: Parts
    sampler: Parts
    kv_tokens: int  # that the sampler's cache has room for
    longest: int  # of a sequence

    @property
    def trainer_gib(self) -> float:
        return sum(self.trainer.values()) / GIB

    @property
    def sampler_gib(self) -> float:
        return sum(self.sampler.values()) / GIB

    @property
    def total_gib(self) -> float:
        return self.trainer_gib + self.sampler_gib + REST_GIB


def need_of(cell: Cell, card_gib: float) -> Need | None:
    """What a cell needs on each of its GPUs, of `card_gib`; None where the shape of its model is not known, or it runs no
    engine."""
    settings = cell.settings
    shape = shape_of(settings["model"]) if settings.get("model") and settings.get("rollout") else None
    if shape is None:
        return None
    train, length = settings.get("train"), longest(settings)
    trainer = trainer_parts(shape, train, settings["precision"], length, num_ranks(cell)) if train else {}
    sampler, tokens = sampler_parts(shape, settings["rollout"], settings["precision"], card_gib)
    return Need(trainer, sampler, tokens, length)


def why_not(need: Need, card_gib: float) -> str | None:
    """Why a need is not that of a card: what was found and what is allowed; None where it fits."""
    room = FITS * card_gib - need.trainer_gib - REST_GIB
    parts = f"trainer {need.trainer_gib:.1f}, sampler {need.sampler_gib:.1f}, rest {REST_GIB:g}"
    if need.total_gib > FITS * card_gib:
        share = math.floor(100 * room / card_gib) / 100
        less = f"at most {room:.1f} for the sampler (rollout.gpu_memory_utilization {share:.2f}), or " if room > 0 else ""
        return f"found {need.total_gib:.1f} GiB on each GPU of {card_gib:g} ({parts}), allowed: {less}more ranks for the trainer"
    if need.kv_tokens < need.longest:
        return f"found room for {need.kv_tokens} tokens in the sampler's KV cache ({parts} GiB), allowed: {need.longest}, one sequence, or more"
    return None


def num_ranks(cell: Cell) -> int:
    """The GPUs that run a cell together."""
    return math.prod(cell.get(f"train.parallel.{way}", None) or 1 for way in ("data", "tensor", "pipeline"))


def longest(settings: Mapping) -> int:
    """Tokens of the longest sequence that may come: what prompt and response may have together."""
    rollout = settings["rollout"]
    prompt = (settings.get("data") or {}).get("max_prompt_tokens") or 1024
    return min(rollout.get("max_model_len") or 10**9, rollout["max_tokens"] + prompt)


def trainer_parts(shape: Shape, train: Mapping, precision: Mapping, length: int, num_ranks: int) -> Parts:
    """Bytes on one rank: what is held throughout, and the largest of the moments of a pass; a scoring pass where nothing is
    trained."""
    width = BYTES[precision["train"]]
    if not train.get("optimizer"):
        tokens = length * train["score_batch_size"]
        head = _head_bytes(shape, train, precision, tokens, is_training=False)
        return {"weights": width * shape.parameters, "activations": tokens * _layer_bytes(shape, width), "head": head}
    tokens = length * (train.get("micro_batch_size") or DEFAULT_MICRO_BATCH)
    held = _moe_weights(shape, train, width) if train.get("engine") == "moe" else _spread_weights(shape, train, precision, num_ranks)
    return held | max(_moments(shape, train, precision, tokens), key=lambda parts: sum(parts.values()))


def _spread_weights(shape: Shape, train: Mapping, precision: Mapping, num_ranks: int) -> Parts:
    """FSDP2. With adapters the base is frozen, in the compute dtype, and has no gradients."""
    width = BYTES[precision["train"]]
    lora = train.get("lora")
    trained = _adapter_parameters(shape, lora) if lora else shape.parameters
    layer, outer = shape.layer_parameters + shape.expert_parameters, shape.outer_parameters
    in_16_bit = (precision.get("gradient_reduction") or "fp32") != "fp32"  # whole gradients wait for the last micro-batch
    return {
        "masters": 4 * trained / num_ranks + (width * shape.parameters / num_ranks if lora else 0),
        "optimizer": 8 * trained / num_ranks,
        "gradients": 4 * trained / num_ranks + (width * trained if in_16_bit else 0),
        "gathered weights": width * (outer + 2 * layer),
    }


def _moments(shape: Shape, train: Mapping, precision: Mapping, tokens: int) -> list[Parts]:
    """What a backward pass holds besides: at the head; in the first layer that it reaches, when the head's gradient waits
    for that of the embedding; and at its end, when both are summed over the ranks in fp32."""
    width = BYTES[precision["train"]]
    layer = tokens * _layer_bytes(shape, width)
    recomputes = train.get("gradient_checkpointing")
    kept = tokens * width * shape.hidden * shape.layers if recomputes else shape.layers * layer
    apart = train.get("lora") or train.get("engine") == "moe"  # gradients of adapters are small; those of moe are held throughout
    head, own, outer = (0, 0, 0) if apart else (shape.vocab * shape.hidden, shape.layer_parameters, shape.outer_parameters)
    return [
        {"activations": kept, "head": _head_bytes(shape, train, precision, tokens, is_training=True), "gradients in hand": width * head},
        {"activations": kept + (layer if recomputes else 0), "gradients in hand": width * head + (width + 4) * own},
        {"gradients in hand": (width + 4) * outer},
    ]


def _adapter_parameters(shape: Shape, lora: Mapping) -> int:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {
        "q_proj": shape.hidden + queries, "k_proj": shape.hidden + keys, "v_proj": shape.hidden + keys,
        "o_proj": queries + shape.hidden, "gate_proj": shape.hidden + shape.intermediate,
        "up_proj": shape.hidden + shape.intermediate, "down_proj": shape.intermediate + shape.hidden,
    }  # fmt: skip
    return shape.layers * lora["rank"] * sum(sides.get(target, 2 * shape.hidden) for target in lora["targets"])


def _moe_weights(shape: Shape, train: Mapping, width: int) -> Parts:
    spread = (train.get("parallel") or {}).get("expert") or 1
    own = shape.layers * (shape.layer_parameters + shape.expert_parameters / spread) + shape.outer_parameters
    return {"masters": 4 * own, "optimizer": 8 * own, "gradients": (4 + width) * own, "weights": width * own}


def _layer_bytes(shape: Shape, width: int) -> float:
    """Of one token in one layer, kept for its backward pass: norms in fp32, q, k, v as wide as the queries (K and V are
    repeated for grouped heads), the attention's output, and of the MLP gate, up, silu(gate) and their product."""
    norms = 2 * (8 + width) * shape.hidden
    attention = 4 * width * shape.heads * shape.head_dim
    mlp = 4 * width * shape.intermediate * max(1, shape.experts_per_token)
    return norms + attention + mlp


def _head_bytes(shape: Shape, train: Mapping, precision: Mapping, tokens: int, *, is_training: bool) -> float:
    """Logits of a chunk: in the head's dtype, in fp32, and as log-probs; with gradients, those of the last two as well."""
    chunk = min(tokens, train.get("head_chunk_tokens") or max(64, DEFAULT_HEAD_CHUNK_LOGITS // shape.vocab))
    width = BYTES[precision.get("trainer_head") or precision["train"]]
    copies = (width if width < 4 else 0) + 4 + 4
    return chunk * shape.vocab * (copies + (4 + width if is_training else 0))


def sampler_parts(shape: Shape, rollout: Mapping, precision: Mapping, card_gib: float) -> tuple[Parts, int]:
    """(bytes that the sampler takes, tokens that its cache holds)."""
    width = BYTES.get(precision["rollout"], 4)  # a coarse format is held in fp32
    weights = width * shape.parameters
    per_token = BYTES.get(precision.get("kv_cache") or "", width) * shape.cached_per_token
    sampled = (rollout.get("max_num_seqs") or 256) * shape.vocab * 8  # logits of a step, in fp32, twice
    passing = (rollout.get("max_num_batched_tokens") or 8192) * width * (2 * shape.intermediate + 4 * shape.hidden)
    if rollout.get("kv_cache_gib"):
        cache = rollout["kv_cache_gib"] * GIB
    else:
        cache = (rollout.get("gpu_memory_utilization") or DEFAULT_SHARE) * card_gib * GIB - weights - sampled - passing
    parts = {"weights": weights, "KV cache": max(0.0, cache), "passing": sampled + passing}
    return parts, max(0, int(cache // per_token))
