"""A Qwen3-MoE checkpoint in the hub's names and its weights in megatron-core's, both ways: which tensors make which parameter
of the local layer spec, streamed one parameter at a time and exact to the bit. No megatron-core.

    q, k, v        one matrix, interleaved: of each group of heads its query rows, then its key rows, then its value rows
    gate, up       one matrix of an expert's first layer, gate first
    all others     as they are
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from suite.errors import DataError

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class MoeShape:
    """What config.json says of a Qwen3-MoE: counts and widths; every layer has experts."""

    num_layers: int
    hidden: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    vocabulary: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    normalise_top_k: bool


# What the mapping and the model below stand for; another value would be another model. None: the key may be absent.
FIXED = {
    "model_type": ("qwen3_moe",), "hidden_act": ("silu", None), "attention_bias": (False, None),
    "tie_word_embeddings": (False, None), "use_sliding_window": (False, None), "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None), "rope_scaling": (None,),
}  # fmt: skip


def read_shape(folder: Path) -> MoeShape:
    """The shape of the checkpoint in `folder`. Raises DataError, with file, key, found and allowed."""
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text())
    rope = config.get("rope_parameters") or {}
    for key, allowed in FIXED.items():
        if config.get(key) not in allowed:
            raise DataError(f"{file}: {key}: found {config[key]!r}, allowed in the moe trainer: {allowed[0]!r}")
    if rope.get("rope_type", "default") != "default":
        raise DataError(f"{file}: rope_parameters.rope_type: found {rope['rope_type']!r}, allowed in the moe trainer: 'default'")
    # transformers 5 writes num_local_experts and rope_parameters, earlier ones num_experts and rope_theta
    both = config | {"num_experts": config.get("num_experts", config.get("num_local_experts")),
                     "rope_theta": rope.get("rope_theta", config.get("rope_theta"))}  # fmt: skip
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps",
            "rope_theta", "norm_topk_prob")  # fmt: skip
    for key in keys:
        if not isinstance(both.get(key), (int, float)):
            raise DataError(f"{file}: {key}: found {both.get(key)!r}, allowed: a number")
    return MoeShape(*(both[key] for key in keys))


@dataclass(frozen=True)
class Row:
    """One parameter of the local layer spec and the checkpoint's tensors that make it: (name, shape) each."""

    parameter: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    how: Literal["same", "qkv", "stacked"] = "same"


def table(shape: MoeShape, experts: range | None = None) -> Iterator[Row]:
    """Every parameter of the model, from the embedding to the head; of a rank that holds a part of each layer's experts,
    which megatron counts from 0, those of its own `experts`."""
    held = experts or range(shape.num_experts)
    width, dim, expert = shape.hidden, shape.head_dim, shape.expert_width
    queries, keys = shape.num_heads * dim, shape.num_key_heads * dim
    yield Row("embedding.word_embeddings.weight", (("model.embed_tokens.weight", (shape.vocabulary, width)),))
    for layer in range(shape.num_layers):
        ours, hub = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        yield Row(f"{ours}.input_layernorm.weight", ((f"{hub}.input_layernorm.weight", (width,)),))
        yield Row(f"{ours}.self_attention.linear_qkv.weight",
                  tuple((f"{hub}.self_attn.{name}.weight", (rows, width)) for name, rows in qkv.items()), "qkv")  # fmt: skip
        yield Row(f"{ours}.self_attention.q_layernorm.weight", ((f"{hub}.self_attn.q_norm.weight", (dim,)),))
        yield Row(f"{ours}.self_attention.k_layernorm.weight", ((f"{hub}.self_attn.k_norm.weight", (dim,)),))
        yield Row(f"{ours}.self_attention.linear_proj.weight", ((f"{hub}.self_attn.o_proj.weight", (width, queries)),))
        yield Row(f"{ours}.pre_mlp_layernorm.weight", ((f"{hub}.post_attention_layernorm.weight", (width,)),))
        yield Row(f"{ours}.mlp.router.weight", ((f"{hub}.mlp.gate.weight", (shape.num_experts, width)),))
        for number in held:
            one, theirs = f"{ours}.mlp.experts.local_experts.{number - held.start}", f"{hub}.mlp.experts.{number}"
            first = tuple((f"{theirs}.{name}.weight", (expert, width)) for name in ("gate_proj", "up_proj"))
            yield Row(f"{one}.linear_fc1.weight", first, "stacked")
            yield Row(f"{one}.linear_fc2.weight", ((f"{theirs}.down_proj.weight", (width, expert)),))
    yield Row("decoder.final_layernorm.weight", (("model.norm.weight", (width,)),))
    yield Row("output_layer.weight", (("lm_head.weight", (shape.vocabulary, width)),))


def joined(row: Row, tensors: list[torch.Tensor], shape: MoeShape) -> torch.Tensor:
    """The parameter that the row's tensors make."""
    if row.how == "qkv":
        by_group = [one.view(shape.num_key_heads, -1, shape.hidden) for one in tensors]  # (groups, rows of one group, H)
        return torch.cat(by_group, dim=1).reshape(-1, shape.hidden)
    return torch.cat(tensors) if row.how == "stacked" else tensors[0]


def parted(row: Row, parameter: torch.Tensor, shape: MoeShape) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors of a parameter, with their names: `joined` undone."""
    parts = [parameter]
    if row.how == "stacked":
        parts = parameter.chunk(2)
    elif row.how == "qkv":
        per_group = [rows // shape.num_key_heads for _, (rows, _) in row.tensors]
        by_group = parameter.view(shape.num_key_heads, -1, shape.hidden).split(per_group, dim=1)
        parts = [part.reshape(-1, shape.hidden) for part in by_group]
    yield from zip((name for name, _ in row.tensors), parts, strict=True)


def experts_of(shape: MoeShape, rank: int, num_ranks: int) -> range:
    """The numbers of the experts that a rank holds, of as many ranks as divide them."""
    share = shape.num_experts // num_ranks
    return range(rank * share, (rank + 1) * share)


def read_weights(folder: Path, shape: MoeShape, experts: range | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, value in the file's dtype) of every parameter, or of those of a rank with these experts; one is held at a
    time.

    Raises DataError for a tensor that is missing, of another shape, not a float, or not part of the model: all of them
    before any is read.
    """
    from safetensors import safe_open

    rows, headers = list(table(shape)), {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                piece = tensors.get_slice(name)
                headers[name] = (file, tuple(piece.get_shape()), piece.get_dtype())
    _check(Path(folder), rows, headers)
    for row in table(shape, experts):
        yield row.parameter, joined(row, [_read(headers[name][0], name) for name, _ in row.tensors], shape)


def _read(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _check(folder: Path, rows: Iterable[Row], headers: dict) -> None:
    expected = {name: shape for row in rows for name, shape in row.tensors}
    found = {name: (shape, kind) for name, (_, shape, kind) in headers.items()}
    problems = []
    for name, shape in expected.items():
        if name not in found:
            problems.append(f"{name}: found nothing, expected {list(shape)}")
        elif found[name][0] != shape:
            problems.append(f"{name}: found {list(found[name][0])}, expected {list(shape)}")
        elif found[name][1] not in FLOATS:
            problems.append(f"{name}: found {found[name][1]}, expected one of {', '.join(FLOATS)}")
    problems += [f"{name}: found {list(found[name][0])}, expected no such tensor" for name in sorted(set(found) - set(expected))]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise DataError(f"{folder}: the weights are not those that config.json speaks of: {shown}")
