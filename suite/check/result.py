"""What a check found, and how it reads: one table of numbers, one of bars, a few sentences. The screen and the page show the
same. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from suite.check.bars import NO, NO_LIMIT, YES, Answer
from suite.check.measures import ABOUT, SHOWN, Estimate

if TYPE_CHECKING:
    from suite.check.preflight import Preflight

DOUBTFUL = "doubtful"


@dataclass(frozen=True)
class Result:
    """estimates: arm -> statistic -> estimate. doubts: why the numbers may not be what they say; with one, no chosen bar
    counts as cleared. figure: SVG. commands: how to run it again."""

    title: str
    about: list[tuple[str, str]]
    estimates: dict[str, dict[str, Estimate]]
    ratios: dict[tuple[str, str], dict[str, Estimate | None]]
    answers: list[Answer]
    chosen: list[str]
    doubts: list[str]
    notes: list[str]
    commands: list[str]
    figure: bytes | None
    preflight: Preflight | None

    @property
    def arms(self) -> list[str]:
        return list(self.estimates)

    @property
    def headline(self) -> str:
        """The answer in a sentence: k3 of each arm, and the first ratio."""
        parts = [f"k3 {number(self.estimates[arm]['k3_nats_per_token'].value)} nats per token in {arm}" for arm in self.arms]
        for (first, second), found in self.ratios.items():
            if (one := found.get("k3_nats_per_token")) is not None:
                parts.append(f"{first} / {second}: {number(one.value)}")
        return "; ".join(parts)

    @property
    def code(self) -> int:
        """0, or 1 where a chosen bar is not cleared."""
        asked = [one for one in self.answers if one.bar.name in self.chosen]
        return 1 if asked and (self.doubts or any(one.word != YES for one in asked)) else 0


def number(value: float) -> str:
    """Four significant digits; near 1, where a multiplicative error lives, four of what lies beside 1."""
    return f"{value:.4g}" if not 0.9 < value < 1.1 else f"{value:.6f}".rstrip("0").rstrip(".")


def with_interval(one: Estimate | None) -> str:
    if one is None:
        return "no value"
    if one.interval is None:
        return f"{number(one.value)} (no interval)"
    return f"{number(one.value)} [{number(one.interval[0])}, {number(one.interval[1])}]"


def number_rows(result: Result) -> list[dict]:
    """One per quantity: name, formula, unit, and (arm, text) of each arm."""
    return [
        {"name": name, "formula": ABOUT[name][0], "unit": ABOUT[name][1],
         "cells": [(arm, with_interval(found[name])) for arm, found in result.estimates.items()]}
        for name in SHOWN
    ]  # fmt: skip


def ratio_rows(result: Result) -> list[tuple[str, str, str]]:
    return [(f"{a} / {b}", name, with_interval(one)) for (a, b), found in result.ratios.items() for name, one in found.items()]


def bar_rows(result: Result) -> list[dict]:
    """One per bar: the bar, whether it was chosen, and of each arm its word, how it is shown, and the number behind it."""
    names = list(dict.fromkeys(one.bar.name for one in result.answers))
    rows = []
    for name in names:
        found = [one for one in result.answers if one.bar.name == name]
        rows.append({"bar": found[0].bar, "chosen": name in result.chosen, "answers": [_shown(one, result) for one in found]})
    return rows


def _shown(one: Answer, result: Result) -> dict:
    word = DOUBTFUL if result.doubts and one.word == YES else one.word
    unsure = "?" if word in (YES, NO) and not one.is_sure and one.estimate and one.estimate.interval else ""
    text = "" if word == NO_LIMIT else word + unsure
    return {"arm": one.arm, "word": word.replace(" ", "-"), "text": text, "number": number(one.estimate.value) if one.estimate else ""}


def flight_lines(flight: Preflight) -> list[str]:
    """The preflight in sentences, the answer first."""
    answer = {
        "fits": "fp16 holds this model's activations.",
        "close": "fp16 holds these activations, but they come close to its end.",
        "overflows": "fp16 overflows on these prompts.",
    }[flight.word]
    first = flight.first
    lines = [answer, f"Largest activation: {number(first.largest)} at {first.name} ({first.kind}), {100 * first.share:.3g} % of 65,504; "
             f"look there first. Over {flight.num_sequences} sequences, {flight.num_tokens:,} tokens, computed in {flight.dtype}."]  # fmt: skip
    lines.append(f"Weights: {100 * flight.share_subnormal:.3g} % are subnormal in fp16, {100 * flight.share_vanished:.3g} % round to 0"
                 + (f"; most of them in {flight.weights[0].name}." if flight.share_subnormal + flight.share_vanished else "."))  # fmt: skip
    lines.append("In training, gradients overflow or vanish before activations do: switch on loss scaling.")
    return lines
