"""How long the GPUs of an RL cell are at work: arithmetic on products and memory traffic, with the shares of a card's peak that
such loops reach assumed and not measured. An order of magnitude for a budget, not a forecast. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from suite.machine.memory import BYTES, need_of, num_ranks
from suite.spec.plan import Cell
from suite.spec.shapes import Shape, shape_of


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet: dense products a second in 16 bits and in fp32, bytes a second of its memory."""

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float


CARDS = (Card("A100 80 GB", 312e12, 19.5e12, 2.0e12), Card("H100 80 GB", 989e12, 67e12, 3.35e12))
SHARE_OF_FLOPS, SHARE_OF_BANDWIDTH, MEAN_LENGTH = 0.3, 0.5, 0.75  # assumed; the last of rollout.max_tokens
FORWARDS = 4  # of an update: forward, again in recomputation, and a backward pass of two
ASSUMED = (
    f"assumed: {SHARE_OF_FLOPS:.0%} of the card's products, {SHARE_OF_BANDWIDTH:.0%} of its bandwidth, "
    f"responses of {MEAN_LENGTH:.0%} of max_tokens"
)


def seconds_per_step(cell: Cell, card_gib: float, card: Card) -> float | None:
    """Sampling, scoring and training of one iteration of an RL cell, seconds; None where the model's shape is not known or
    its sequences do not fit."""
    settings = cell.settings
    need = need_of(cell, card_gib)
    if need is None or need.kv_tokens < need.longest or not settings.get("schedule") or not settings.get("train"):
        return None
    shape = shape_of(settings["model"])
    num = settings["schedule"]["prompts_per_step"] * settings["rollout"]["samples_per_prompt"] / num_ranks(cell)
    length = MEAN_LENGTH * settings["rollout"]["max_tokens"]
    passes = 1 + FORWARDS
    per_token = 2 * shape.active_parameters + 2 * shape.layers * shape.heads * shape.head_dim * length
    flops = card.flops_32 if settings["precision"]["train"] == "fp32" else card.flops_16
    learning = num * length * per_token * passes / flops / SHARE_OF_FLOPS
    return learning + _sampling_seconds(shape, settings, num, length, need.kv_tokens, card)


def _sampling_seconds(shape: Shape, settings: Mapping, num: float, length: float, kv_tokens: int, card: Card) -> float:
    """Every decoding step reads all weights and the cache of the sequences in flight; the longest response decides."""
    rollout, width = settings["rollout"], BYTES.get(settings["precision"]["rollout"], 4)
    at_once = max(1.0, min(num, rollout.get("max_num_seqs") or 256, kv_tokens / length))
    read = width * (shape.parameters + at_once * length / 2 * shape.cached_per_token)
    return num / at_once * rollout["max_tokens"] * read / card.bandwidth / SHARE_OF_BANDWIDTH


def gpu_hours(cells: list[Cell], card_gib: float, card: Card) -> float | None:
    """Of all cells together."""
    seconds = [seconds_per_step(cell, card_gib, card) for cell in cells]
    if not seconds or None in seconds:
        return None
    return sum(one * cell.get("schedule.steps") * num_ranks(cell) for one, cell in zip(seconds, cells, strict=True)) / 3600
