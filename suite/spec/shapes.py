"""The shape of a model: what its memory and its work follow from. Read from the config.json of a local folder, or of the
table below, so that a plan needs neither the weights nor the network. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from suite.spec.checkout import find_repo

NEEDED = {"num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads"}


@dataclass(frozen=True)
class Shape:
    """A decoder of grouped-query attention and gated MLPs, or of experts in their place. Sizes are numbers of channels."""

    layers: int
    hidden: int
    intermediate: int  # of the MLP, or of one expert
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False  # whether the output head is the embedding
    attention_bias: bool = False  # of q, k and v
    qk_norm: bool = False
    experts: int = 0  # in a layer; 0: an MLP
    experts_per_token: int = 0

    @property
    def attention_parameters(self) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        products = 2 * self.hidden * queries + 2 * self.hidden * keys
        return products + (queries + 2 * keys) * self.attention_bias + 2 * self.head_dim * self.qk_norm

    @property
    def expert_parameters(self) -> int:
        """All experts of a layer; 0 of a dense model."""
        return self.experts * 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Of a layer, its experts left out."""
        mlp = self.hidden * self.experts if self.experts else 3 * self.hidden * self.intermediate  # the router, or the MLP
        return self.attention_parameters + mlp + 2 * self.hidden

    @property
    def outer_parameters(self) -> int:
        """Embedding, last norm and output head."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * (self.layer_parameters + self.expert_parameters) + self.outer_parameters

    @property
    def active_parameters(self) -> int:
        """Those that a token is multiplied with: its experts alone, and of embedding and head the head."""
        experts = self.experts_per_token * 3 * self.hidden * self.intermediate
        return self.layers * (self.layer_parameters + experts) + self.vocab * self.hidden

    @property
    def cached_per_token(self) -> int:
        """Numbers in the KV cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, config: Mapping) -> Shape:
        """From a config.json of transformers."""
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        kind = str(config.get("model_type", ""))
        return cls(
            layers=config["num_hidden_layers"], hidden=config["hidden_size"],
            intermediate=config["moe_intermediate_size"] if experts else config["intermediate_size"],
            vocab=config["vocab_size"], heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            tied=bool(config.get("tie_word_embeddings")), attention_bias=kind == "qwen2" or bool(config.get("attention_bias")),
            qk_norm=kind.startswith("qwen3"), experts=experts, experts_per_token=config.get("num_experts_per_tok") or 0 if experts else 0,
        )  # fmt: skip


# From the config.json of each repository on the Hugging Face hub. The number of parameters that follows from each is that of
# its model page (tests/test_gpu_memory.py).
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(28, 1536, 8960, 151_936, 12, 2, 128, attention_bias=True),
    "Qwen/Qwen2.5-Math-1.5B": Shape(28, 1536, 8960, 151_936, 12, 2, 128, tied=True, attention_bias=True),
    "OctoThinker/OctoThinker-3B-Hybrid-Base": Shape(28, 3072, 8192, 128_256, 24, 8, 128, tied=True),
    "Qwen/Qwen3-4B-Base": Shape(36, 2560, 9728, 151_936, 32, 8, 128, tied=True, qk_norm=True),
    "Qwen/Qwen3-14B-Base": Shape(40, 5120, 17_408, 151_936, 40, 8, 128, qk_norm=True),
    "Qwen/Qwen3-30B-A3B-Base": Shape(48, 2048, 768, 151_936, 32, 4, 128, qk_norm=True, experts=128, experts_per_token=8),
}


def shape_of(model: Mapping) -> Shape | None:
    """The shape of a resolved `model` section; None where it is neither in a local folder nor in the table, or is not of this
    kind: its config.json names its sizes otherwise."""
    if model.get("path"):
        folder = Path(model["path"]).expanduser()
        file = (folder if folder.is_absolute() else find_repo() / folder) / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else {}
        return Shape.of(config) if config.keys() >= NEEDED else None
    return SHAPES.get(model.get("id") or "")
