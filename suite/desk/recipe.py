"""How a desk model is trained: architecture by size, noisy solutions, one loop of AdamW in fp32, weights rounded to
bf16 at the end.

The solutions it learns from are wrong on purpose at a known rate: each line slips by one or by ten with probability
SLIP_RATE, and the rest of the chain carries the slip on. A calibrated model therefore slips at about that rate when
sampled at temperature 1, and far less when decoded greedily: sampled accuracy falls with length, and RL has something
to sharpen. Each line adds one or two terms, a fair coin: correct solutions differ.
"""

import math
import random
from dataclasses import dataclass

import torch

from suite.problems import desk as problems
from suite.problems.desk import draw_int, draw_terms

SLIP_RATE = 0.03
SLIPS = (-10, -1, 1, 10)
MAX_POSITIONS = 2048
TRAIN_SEED_BASE = 1_000_003  # seeds of batches start here; tasks use small seeds


@dataclass(frozen=True)
class Recipe:
    """Architecture and training budget of one size. Qwen2 models have a head of their own; Llama models are built like
    Llama 3.2: no biases, the head tied to the embedding, two query heads to a key. Qwen3-MoE models have two query heads
    to a key too, and in every layer `num_experts` experts of width `intermediate`, of which a token's router takes two.
    """

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    steps: int
    tokens_per_step: int
    peak_lr: float
    init_std: float = 0.06
    rope_theta: float = 1e4
    max_gap: int = 0  # positions by which a response may start late, see draw_batch; 0 in every shipped model
    warmup_steps: int = 50
    weight_decay: float = 0.01
    num_threads: int = 2
    seed: int = 0
    family: str = "qwen2"
    num_experts: int = 0
    balance: float = 0.0  # weight of the load-balancing loss beside the cross-entropy, so that no expert goes unused


SIZES = {
    "1m": Recipe(5, hidden=128, intermediate=256, num_heads=4, steps=4000, tokens_per_step=2500, peak_lr=3e-3),
    "5m": Recipe(6, hidden=256, intermediate=768, num_heads=8, steps=4000, tokens_per_step=2500, peak_lr=1.5e-3),
    "30m": Recipe(8, hidden=512, intermediate=1792, num_heads=16, steps=4000, tokens_per_step=4000, peak_lr=7e-4),
    "llama-1m": Recipe(
        5, hidden=128, intermediate=256, num_heads=4, steps=4000, tokens_per_step=2500, peak_lr=3e-3, family="llama"
    ),
    "qwen3-moe-2m": Recipe(
        4, hidden=128, intermediate=128, num_heads=4, steps=4000, tokens_per_step=2500, peak_lr=3e-3, num_threads=1,
        family="qwen3_moe", num_experts=8, balance=0.01,
    ),
}


def noisy_solution(terms, rng: random.Random) -> str:
    """A training solution: groups of one or two terms per line by a fair coin, each line slipping with probability
    SLIP_RATE.
    """
    sizes, slips, left = [], [], len(terms)
    while left:
        size = min(left, draw_int(rng, 1, 2))
        sizes.append(size)
        slips.append(SLIPS[draw_int(rng, 0, len(SLIPS) - 1)] if rng.random() < SLIP_RATE else 0)
        left -= size
    lines, answer = problems.solution_lines(terms, sizes, slips)
    return problems.finish(lines, answer)


def new_model(recipe: Recipe, tokenizer) -> torch.nn.Module:
    """A randomly initialised model of this family and size, fp32, vocabulary of the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.num_layers, num_attention_heads=recipe.num_heads,
        max_position_embeddings=MAX_POSITIONS, initializer_range=recipe.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    if recipe.family == "llama":
        num_key_heads = recipe.num_heads // 2
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=num_key_heads, tie_word_embeddings=True))
    if recipe.family == "qwen3_moe":
        return _mixture(recipe, shape)
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=recipe.num_heads, tie_word_embeddings=False))


def _mixture(recipe: Recipe, shape: dict) -> torch.nn.Module:
    """A Qwen3-MoE whose every layer has experts; each expert is a plain loop's turn, which any build of torch can do."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **shape, num_key_value_heads=recipe.num_heads // 2, head_dim=recipe.hidden // recipe.num_heads,
        num_experts=recipe.num_experts, num_experts_per_tok=2, moe_intermediate_size=recipe.intermediate,
        norm_topk_prob=True, decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: ids, positions and labels, all int64 (B, T); labels are -100 on the prompt and on
    padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor


def draw_batch(rng: random.Random, tokenizer, num_tokens: int, max_terms: int, max_gap: int = 0) -> Batch:
    """Noisy solutions of about `num_tokens` tokens together, prompts included.

    All problems of a batch have the same number of terms, so little is padded; padding is on the right, where causal
    attention never looks back at it. In half of the rows the response's positions begin up to max_gap late, as if the
    prompt were longer: digits are then looked up at distances that only longer problems have, without the cost of long
    sequences.
    """
    count = draw_int(rng, 1, max_terms)
    batch_size = max(1, num_tokens // (8 * count + 25))  # tokens of a problem, prompt and solution, to within a tenth
    rows, prompt_lengths, gaps = [], [], []
    for _ in range(batch_size):
        problem = problems.make_problem(draw_terms(rng, (count, count)))
        prompt = tokenizer.encode(problems.prompt_text(problem))
        solution = tokenizer.encode(noisy_solution(problem.terms, rng)) + [tokenizer.eos_token_id]
        rows.append(prompt + solution)
        prompt_lengths.append(len(prompt))
        gaps.append(draw_int(rng, 0, max_gap) * draw_int(rng, 0, 1))
    width = max(map(len, rows))
    ids = torch.full((batch_size, width), tokenizer.pad_token_id)
    labels = torch.full((batch_size, width), -100)
    positions = torch.arange(width).repeat(batch_size, 1)
    for i, (row, num_prompt, gap) in enumerate(zip(rows, prompt_lengths, gaps, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, num_prompt : len(row)] = ids[i, num_prompt : len(row)]
        positions[i, num_prompt:] += gap
    return Batch(ids, positions, labels)


def batch_loss(model, batch: Batch, balance: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy in nats per response token; the head runs on response positions only. With `balance` that many
    times the load-balancing loss of the routers is added, over all positions.

    The mask of ones is not idle: without one, transformers reads a jump in the positions as the start of another
    sequence.
    """
    attend = torch.ones_like(batch.ids)
    wanted_too = {"output_router_logits": True} if balance else {}
    output = model.model(
        input_ids=batch.ids, position_ids=batch.positions, attention_mask=attend, use_cache=False, **wanted_too
    )
    hidden = output.last_hidden_state[:, :-1]  # (B, T-1, H)
    wanted = batch.labels[:, 1:]
    kept = wanted != -100
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]).float(), wanted[kept])
    return loss + balance * _imbalance(model, output.router_logits) if balance else loss


def _imbalance(model, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The routers' load-balancing loss: number of experts x sum over experts of (share of tokens) x (mean probability);
    the number of experts per token where all are used alike."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    return load_balancing_loss_func(router_logits, model.config.num_experts, model.config.num_experts_per_tok)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    return recipe.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def max_terms_at(step: int, steps: int) -> int:
    """Short problems first: the longest trained length is reached after the first quarter."""
    low, high = problems.TRAINED_TERMS
    return min(high, low + int((high - low) * step / (0.25 * steps)))


def train(recipe: Recipe, tokenizer, steps: int | None = None, log=print) -> torch.nn.Module:
    """Train from scratch and round the weights to bf16; the model comes back in fp32 holding bf16 values.

    Deterministic on one machine and thread count; across machines matmuls differ in their last bits, and so will the
    weights.
    """
    steps = steps or recipe.steps
    torch.set_num_threads(recipe.num_threads)
    model = new_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    for step in range(steps):
        rng = random.Random(TRAIN_SEED_BASE + step)
        batch = draw_batch(rng, tokenizer, recipe.tokens_per_step, max_terms_at(step, steps), recipe.max_gap)
        loss = batch_loss(model, batch, recipe.balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            log(f"step {step}/{steps} loss {loss.item():.4f}")
    return round_to_bf16(model)


@torch.no_grad()
def round_to_bf16(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight replaced by the nearest bf16 value, kept in fp32: what a released bf16 checkpoint loads as."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model.eval()
