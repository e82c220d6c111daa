"""What a desk model does, measured: accuracy greedy and sampled, entropy, lengths, how solutions end, loss on unseen
noisy solutions.
"""

import random
from dataclasses import dataclass

import torch

from suite.desk import recipe
from suite.problems import desk as problems

EVAL_SEED = 12_345
MAX_NEW_TOKENS = {"trained": 256, "between": 448, "long": 1280}
REGIMES = {"trained": problems.TRAINED_TERMS, "between": problems.BETWEEN_TERMS, "long": problems.LONG_TERMS}


@dataclass(frozen=True)
class Generation:
    """One response: its text, its length in tokens (eos included), whether it ended by itself, and its mean entropy per
    token.
    """

    text: str
    num_tokens: int
    stopped: bool
    entropy_nats: float


def is_correct(text: str, answer: str) -> bool:
    """The response closes its thinking once and boxes the right integer at the end. The suite's graders live in
    suite/problems/rewards.py.
    """
    chain, mark, tail = text.partition("</think>")
    return bool(mark) and "</think>" not in tail and tail.strip() == f"\\boxed{{{answer}}}"


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[str], max_new_tokens: int, sample: bool, seed: int = 0
) -> list[Generation]:
    """Decode all prompts in one batch, greedily or at temperature 1 over the full vocabulary."""
    torch.manual_seed(seed)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    num_prompt = batch.input_ids.shape[1]
    output = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=sample, temperature=1.0 if sample else None,
        top_k=0 if sample else None, top_p=1.0 if sample else None, return_dict_in_generate=True, output_logits=sample,
    )
    ids = output.sequences[:, num_prompt:]
    eos = tokenizer.eos_token_id
    lengths = response_lengths(ids, eos)
    entropy = mean_entropies(output.logits, lengths) if sample else [float("nan")] * len(prompts)
    return [
        Generation(tokenizer.decode(row[:n], skip_special_tokens=True), n, (row[n - 1] == eos).item(), h)
        for row, n, h in zip(ids, lengths, entropy, strict=True)
    ]


def response_lengths(ids: torch.Tensor, eos: int) -> list[int]:
    """Tokens of each row (B, T) up to and including its first eos; T where there is none."""
    return [hits[0].item() + 1 if len(hits := (row == eos).nonzero()) else ids.shape[1] for row in ids]


def mean_entropies(logits: tuple[torch.Tensor, ...], lengths: list[int]) -> list[float]:
    """Mean entropy in nats over the response tokens of each row; logits is a tuple over time of (B, V)."""
    per_step = [torch.distributions.Categorical(logits=step.float()).entropy() for step in logits]
    per_token = torch.stack(per_step, dim=1)  # (B, T)
    return [per_token[i, :n].mean().item() for i, n in enumerate(lengths)]


def measure_regime(model, tokenizer, regime: str, num_problems: int, samples: int) -> dict[str, float]:
    """Greedy accuracy once per problem and sampled figures over `samples` responses per problem."""
    asked = problems.sample_problems(num_problems, REGIMES[regime], EVAL_SEED)
    prompts, budget = [problems.prompt_text(problem) for problem in asked], MAX_NEW_TOKENS[regime]
    greedy = generate(model, tokenizer, prompts, budget, sample=False)
    sampled = generate(model, tokenizer, prompts * samples, budget, sample=True)
    correct = [is_correct(one.text, problem.answer) for one, problem in zip(sampled, asked * samples, strict=True)]
    lengths = torch.tensor([float(one.num_tokens) for one in sampled])
    return {
        "greedy_accuracy": sum(is_correct(g.text, p.answer) for g, p in zip(greedy, asked, strict=True)) / num_problems,
        "sampled_accuracy": sum(correct) / len(sampled),
        "entropy_nats": sum(one.entropy_nats * one.num_tokens for one in sampled) / lengths.sum().item(),
        "response_tokens_mean": lengths.mean().item(),
        "response_tokens_sd": lengths.std().item(),
        "stopped_share": sum(one.stopped for one in sampled) / len(sampled),
    }


@torch.no_grad()
def held_out_loss(model, tokenizer, num_batches: int = 8) -> float:
    """Nats per response token on noisy solutions of trained lengths that no training batch held."""
    losses = []
    for index in range(num_batches):
        batch = recipe.draw_batch(random.Random(EVAL_SEED + index), tokenizer, 6000, problems.TRAINED_TERMS[1])
        losses.append(recipe.batch_loss(model, batch).item())
    return sum(losses) / num_batches


def measure(model, tokenizer, regimes=tuple(REGIMES), num_problems: int = 128, samples: int = 2) -> dict:
    """All figures of a checkpoint: {"held_out_loss_nats": ..., regime: {...}}."""
    figures = {regime: measure_regime(model, tokenizer, regime, num_problems, samples) for regime in regimes}
    return {"held_out_loss_nats": held_out_loss(model, tokenizer), **figures}
