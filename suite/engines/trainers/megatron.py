"""A Qwen3-MoE as a GPTModel of megatron-core, on one process or with its experts spread over several: megatron's own layers (embedding, linear layers, norms, rotary
embedding, router, dispatcher, experts), with torch's scaled_dot_product_attention inside, whose memory grows with the
sequence where megatron's own attention grows with its square.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo

from suite.engines.trainers.megatron_names import MoeShape
from suite.errors import UserError
from suite.measure.routing import OWN

ALONE = ("tp", "pp", "mp", "embd", "pos_embd", "cp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp", "tp_dp_cp", "dp", "dp_cp", "expt_dp")


class SdpaAttention(DotProductAttention):
    """softmax(Q K^T / sqrt(d)) V under the causal mask; keys and values of a group serve all of its query heads."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        """(T, B, heads, d) and twice (T, B, groups, d) -> (T, B, heads x d)."""
        per_head = [one.permute(1, 2, 0, 3) for one in (query, key, value)]  # (B, heads or groups, T, d)
        repeats = query.shape[2] // key.shape[2]
        key, value = (one.repeat_interleave(repeats, dim=1) for one in per_head[1:])
        mixed = F.scaled_dot_product_attention(per_head[0], key, value, is_causal=True, scale=self.softmax_scale)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def build(shape: MoeShape, dtype: torch.dtype, expert_group: ProcessGroup | None = None) -> GPTModel:
    """The model with empty weights in `dtype`. Its forward gives the hidden states after the last norm, (T, B, H): the head
    is left to the caller.

    expert_group: the ranks over which the experts of every layer are spread in equal parts, in order; a forward and a
    backward are then collectives, of batches of one shape (`in_one_shape`). Everything else is held by every rank.
    Raises UserError for a number of experts that the ranks do not divide.
    """
    num_ranks = expert_group.size() if expert_group else 1
    if shape.num_experts % num_ranks:
        raise UserError(f"train.parallel.expert: found {num_ranks}, allowed: a divisor of the model's {shape.num_experts} experts")
    spec = get_gpt_layer_local_spec(
        num_experts=shape.num_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    model = GPTModel(
        _config(shape, dtype, num_ranks), spec, shape.vocabulary, shape.max_positions, position_embedding_type="rope",
        rotary_base=shape.rope_theta, share_embeddings_and_output_weights=False, parallel_output=False,
        pg_collection=_groups(expert_group),
    )  # fmt: skip
    model.post_process = False
    for layer in model.decoder.layers:
        layer.mlp.router.router_replay = Followed()
    return model.to(dtype)


def _config(shape: MoeShape, dtype: torch.dtype, expert_ranks: int) -> TransformerConfig:
    """megatron's words for the shape; every fusion off that needs Apex or Transformer Engine. The router takes the softmax
    over the chosen experts, which is that over all of them, normalised (norm_topk_prob)."""
    return TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden, num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_key_heads, kv_channels=shape.head_dim, qk_layernorm=True,
        ffn_hidden_size=shape.expert_width, moe_ffn_hidden_size=shape.expert_width, num_moe_experts=shape.num_experts,
        moe_router_topk=shape.experts_per_token, moe_router_pre_softmax=not shape.normalise_top_k,
        moe_router_score_function="softmax", moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="allgather", moe_grouped_gemm=False, expert_model_parallel_size=expert_ranks,
        activation_func=F.silu, gated_linear_unit=True, normalization="RMSNorm", layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False, add_qkv_bias=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, perform_initialization=False,
        params_dtype=dtype, pipeline_dtype=dtype, fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True, apply_query_key_layer_scaling=False,
        masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip


def _groups(expert_group: ProcessGroup | None) -> ProcessGroupCollection:
    """The experts' group, and groups of this process alone for every other way of splitting a model. None of the latter is
    torch's default: vLLM makes and destroys that one."""
    for name, module in list(sys.modules.items()):  # each has the function under its own name
        if name.startswith("megatron.core") and hasattr(module, "get_tensor_model_parallel_group_if_none"):
            module.get_tensor_model_parallel_group_if_none = _as_given
    alone = ProcessGroupGloo(HashStore(), 0, 1)
    groups = dict.fromkeys(ALONE, alone)
    if expert_group is not None:
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # into which the dispatcher gathers
            parallel_state._set_global_memory_buffer()
        groups |= {"ep": expert_group, "tp_ep": expert_group, "tp_ep_pp": expert_group}
    return ProcessGroupCollection(**groups)


class Followed:
    """What a router asks for its choice (megatron's RouterReplay, without its list of all routers of the process): the
    experts it is told, or, where it is told none, those of the highest scores."""

    told: torch.Tensor | None = None  # (T x B, k) int64; OWN: the router's own choice

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """(T x B, experts) scores -> the chosen ones' scores and numbers, (T x B, k) each."""
        own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.told is None:
            return own
        experts = torch.where(self.told == OWN, own[1], self.told)
        return scores.gather(1, experts), experts


def follow(model: GPTModel, routes: torch.Tensor | None) -> None:
    """Tell every router which experts the next forward takes, (B, T, layers, k), also where a layer runs again in the backward
    pass; with None they choose themselves."""
    for number, layer in enumerate(model.decoder.layers):
        told = None if routes is None else routes[:, :, number].transpose(0, 1).flatten(0, 1)
        layer.mlp.router.router_replay.told = None if told is None else told.to(layer.mlp.router.weight.device)


def _as_given(tp_group, *_, **__):
    """In place of a function that drops the group that it is given where torch has no default group."""
    return tp_group


def hidden_states(model: GPTModel, token_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) ids -> (B, T, H)."""
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    return model(token_ids, positions, attention_mask=None).transpose(0, 1)
