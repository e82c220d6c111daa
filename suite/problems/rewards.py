"""Rewards: find the answer in a response, compare it with the gold answer, 1 or 0, within a hard time limit.

Equal text and equal integers are seen at once; the rest is judged (answers.py, algebra.py) in processes that can be
killed (workers.py), so that a hostile answer costs one reward of 0 and at most the time limit. No torch.

Where an answer stands, by format (sources: sail-sg/Precision-RL oat/main.py and the math_grader.py of sail-sg/oat):

    boxed_after_think   exactly one `</think>`; the last \\boxed{...} after it (R1-Distill, VeRL and OAT settings)
    answer_tags         has `</think> <answer>` and `</answer>`; what follows the last `<answer>`, or the last
                        \\boxed{...} in that (OctoThinker)
    qwen_math           the last \\boxed{...} of the response (LoRA on Qwen2.5-Math)
    desk                as boxed_after_think; the answer is an integer in decimal digits and compared as such

Who compares is the grader: `suite`, or by name one of those that made the paper's numbers (paper_graders.py).

OAT gives 0 to a response that was cut at the length limit, whatever it holds; VeRL does not: `zero_truncated`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from suite.problems.grader_pool import Workers

Format = Literal["boxed_after_think", "answer_tags", "qwen_math", "desk"]
Outcome = Literal["correct", "wrong", "no_answer", "format", "truncated", "timeout", "crashed"]
Grader = Literal["suite", "mathd_sympy", "oat"]
Gold = str | tuple[str, ...]  # several golds: any of them counts

# The format in which a prompt template (data.py) asks for the answer.
FORMAT_OF_TEMPLATE: dict[str, Format] = {
    "desk": "desk",
    "r1": "boxed_after_think",
    "verl_r1": "boxed_after_think",
    "qwen_math": "qwen_math",
    "octothinker": "answer_tags",
    "none": "qwen_math",
}
THINK_END = "</think>"
BOX = "\\boxed"
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
MAX_ANSWER_CHARS = 1_000  # the longest gold answer of the published sets has 230


@dataclass(frozen=True)
class Reward:
    """1.0 for outcome `correct`, 0.0 for every other; the outcome says why."""

    value: float
    outcome: Outcome


def reward(outcome: Outcome) -> Reward:
    return Reward(1.0 if outcome == "correct" else 0.0, outcome)


# --- where the answer stands: pure ------------------------------------------------------------------------------------


def answer_region(text: str, format: Format) -> str | None:
    """The part of a response in which its format wants the answer; None if the format is violated."""
    if format == "qwen_math":
        return text
    if format == "answer_tags":
        follows = f"{THINK_END} <answer>" in text and "</answer>" in text
        return text.rsplit("<answer>", 1)[1].replace("</answer>", "") if follows else None
    before, end, after = text.partition(THINK_END)
    return after if end and THINK_END not in after else None


def last_boxed(text: str) -> str | None:
    """What stands in the braces of the last \\boxed; None if there is none or its braces do not close.

    Escaped braces count like others, and an unclosed last box hides the closed ones before it, as for the authors.
    """
    start = text.rfind(BOX + "{")
    if start < 0 or text.rfind(BOX) > start:
        return None
    depth, first = 0, start + len(BOX)
    for brace in re.compile(r"[{}]").finditer(text, first):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[first + 1 : brace.start()]
    return None


def extract_answer(text: str, format: Format) -> str | None:
    """The answer of a response, stripped; None if the format is violated or there is no answer in its place."""
    region = answer_region(text, format)
    if region is None:
        return None
    bare = format == "answer_tags" and BOX not in region
    return (region if bare else last_boxed(region) or "").strip() or None


def quick_verdict(answer: str, gold: Gold, integers: bool = True) -> bool | None:
    """Equality that needs no algebra: the same text, or, with `integers`, two integers. None where a worker has to say."""
    golds = _as_tuple(gold)
    if answer in (one.strip() for one in golds):
        return True
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if integers and all(INTEGER.fullmatch(one.strip()) for one in (answer, *golds)):
        return int(answer) in (int(one) for one in golds)
    return None


def desk_reward(text: str, gold: Gold) -> Reward:
    """The desk family's check: an integer in \\boxed{} after exactly one `</think>`, equal to the gold integer."""
    if answer_region(text, "desk") is None:
        return reward("format")
    answer = extract_answer(text, "desk")
    if answer is None or not INTEGER.fullmatch(answer):
        return reward("no_answer")
    return reward("correct" if int(answer) in (int(one) for one in _as_tuple(gold)) else "wrong")


def _as_tuple(gold: Gold) -> tuple[str, ...]:
    return (gold,) if isinstance(gold, str) else tuple(gold)


class RewardPool:
    """Rewards for responses of one format.

    Args:
        timeout_seconds: wall time for one answer, hard. (The authors allow 10 s in VeRL and 1 s in OAT.)
        num_workers: processes; `desk` starts none.
        zero_truncated: a response cut at the length limit gets 0 (OAT's rule).
        grader: null is `suite`; `desk` has none but its own.
    """

    def __init__(
        self, format: Format, timeout_seconds: float = 5.0, num_workers: int = 2, zero_truncated: bool = False,
        grader: Grader | None = None,
    ):  # fmt: skip
        if format not in get_args(Format):
            raise ValueError(f"format: found {format!r}, allowed: {', '.join(get_args(Format))}")
        graders = ("desk's own (null)",) if format == "desk" else get_args(Grader)
        if grader is not None and grader not in graders:
            raise ValueError(f"grader: found {grader!r}, allowed with format {format}: {', '.join(graders)}")
        self.format, self.zero_truncated, self.grader = format, zero_truncated, grader or "suite"
        self.workers = Workers(num_workers, timeout_seconds)
        self._known: dict[tuple, Outcome] = {}  # verdicts of the workers; rollouts of one prompt repeat each other

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self.workers.close()

    def score(
        self, texts: Sequence[str], golds: Sequence[Gold], truncated: Sequence[bool] | None = None
    ) -> list[Reward]:
        """One Reward per response, in order. Raises ValueError if the three lists differ in length."""
        cut = [False] * len(texts) if truncated is None else list(truncated)
        if not len(texts) == len(golds) == len(cut):
            raise ValueError(f"{len(texts)} texts, {len(golds)} golds and {len(cut)} truncated flags: must be as many")
        outcomes = [self._quick(*row) for row in zip(texts, golds, cut, strict=True)]
        open_pairs = {one for one in outcomes if isinstance(one, tuple)}
        judged = self._judge(sorted(open_pairs))
        return [reward(judged[one] if isinstance(one, tuple) else one) for one in outcomes]

    def _quick(self, text: str, gold: Gold, cut: bool) -> Outcome | tuple[str, ...]:
        """The outcome where no algebra is needed, else the pair (answer, *golds) to judge."""
        if cut and self.zero_truncated:
            return "truncated"
        if self.format == "desk":
            return desk_reward(text, gold).outcome
        if answer_region(text, self.format) is None:
            return "format"
        answer = extract_answer(text, self.format)
        if answer is None:
            return "no_answer"
        golds = _as_tuple(gold)
        if self.grader != "suite":
            golds = tuple(last_boxed(one) or one for one in golds)
        same = quick_verdict(answer, golds, integers=self.grader == "suite")
        return (answer, *golds) if same is None else "correct" if same else "wrong"

    def _judge(self, pairs: list[tuple[str, ...]]) -> dict[tuple[str, ...], Outcome]:
        known = {pair: self._known[pair] for pair in pairs if pair in self._known}
        new = [pair for pair in pairs if pair not in known]
        for pair, (status, same) in zip(new, self.workers.run([(self.grader, *pair) for pair in new]), strict=True):
            known[pair] = status if status != "done" else "correct" if same else "wrong"
            if status != "crashed" and len(self._known) < 100_000:  # a late answer is not paid for twice
                self._known[pair] = known[pair]
        return known
