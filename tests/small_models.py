"""Small random checkpoints, written once per test session: real architectures, real engines, no training."""

from pathlib import Path

VOCABULARY, EOS = 64, 2
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, dtype="float32",
)  # fmt: skip
ROLLOUT = dict(
    engine="vllm", temperature=1.0, top_p=1.0, top_k=0, max_tokens=48, max_model_len=256, max_num_seqs=64,
    enforce_eager=True, prefix_caching=False, chunked_prefill=False, cascade_attention=False,
    max_num_batched_tokens=4096, kv_cache_gib=1.0,
)  # fmt: skip
TRAIN = dict(engine="dense", score_batch_size=8, head_chunk_tokens=128)
OPTIMIZER = dict(name="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)


def write_model(folder: Path, *, tied: bool = False, experts: bool = False, seed: int = 0) -> Path:
    """A random Qwen2 (or Qwen3-MoE) checkpoint whose weights are bf16 numbers, large enough to give peaked distributions."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    if experts:
        config = Qwen3MoeConfig(**SHAPE, tie_word_embeddings=tied, head_dim=32, num_experts=4, num_experts_per_tok=2,
                                moe_intermediate_size=64, decoder_sparse_step=1)
        model = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    return folder


def weights_of(trainer):
    """{name: fp32 master}, each whole and a copy."""
    from suite.engines.trainers.health import whole

    return {name: whole(master.detach()).clone() for name, master in trainer.masters.masters.items()}


def passed_on(ours, other, folder: Path):
    """`other`, after it has gone on from a checkpoint of `ours`."""
    from suite.engines.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(folder, 1, *ours.held())
    other.take_over(load_checkpoint(folder, 1)[1])
    return other


def some_requests(num: int = 12, seed: int = 0):
    import random

    from suite.engines.batch import Request, request_seed

    draw = random.Random(seed)
    return [
        Request(f"p{i}", 0, tuple(draw.randrange(3, VOCABULARY) for _ in range(8 + i % 3)), request_seed(seed, i))
        for i in range(num)
    ]


def as_sequences(rollouts):
    return [(rollout.token_ids, len(rollout.request.prompt_token_ids)) for rollout in rollouts]
