"""The findings at the top of README.md and of the results page: a question, what the records answer, in which numbers.

Every word and number comes from published verdicts. A question is asked of named claims; a claim that several machines
published is answered for each of them, and the numbers shown are those of the machine that comes last by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from suite.report.rows import Row
from suite.report.tables import number, region

NOT_YET = "not published yet"


@dataclass(frozen=True)
class Asked:
    """One claim behind a question: what its numbers are, and what PASS and FAIL of it mean as an answer."""

    task: str
    claim_id: str
    numbers: str
    passed: str = "yes"
    failed: str = "no"


@dataclass(frozen=True)
class Finding:
    """One row: the question, its answer in words, the numbers, the tasks that hold the records."""

    question: str
    answer: str
    numbers: str
    tasks: tuple[str, ...]


QUESTIONS: tuple[tuple[str, tuple[Asked, ...]], ...] = (
    ("Does fp16 shrink the mismatch between sampler and trainer?", (
        Asked("desk-offline-mismatch", "C1-k3-ratio", "k3 in bf16 / fp16"),
        Asked("desk-offline-mismatch", "C3-prob-diff-ratio", "mean abs(pi - mu) in bf16 / fp16"),
    )),
    ("Does it do so in a mixture of experts, where the engines also choose other experts?", (
        Asked("desk-moe-offline", "C1-k3-ratio", "k3 in bf16 / fp16"),
        Asked("desk-moe-offline", "C22-routing-ratio", "other experts in bf16 / fp16"),
        Asked("desk-moe-offline", "C22-replay-precision-k3-ratio", "k3 in bf16 / fp16 where the trainer follows the sampler's experts"),
    )),
    ("Does the mismatch itself, without 16-bit training, make training collapse?", (
        Asked("desk-collapse", "C36-coarse-sampler-collapses", "share of launches that collapse with a coarse sampler"),
        Asked("desk-collapse", "C36-without-mismatch-stable", "and with an exact one", "none without it", "no: also without it"),
        Asked("desk-collapse", "C36-gap", "accuracy lost at the end"),
    )),
    ("Does truncated importance sampling rescue it?", (
        Asked("desk-collapse", "C36-tis-rescues", "share of launches that collapse with GRPO-Token-TIS"),
    )),
    ("Does plain bf16 training of a small model collapse?", (
        Asked("desk-sanity-grpo", "C8-bf16-collapses", "GRPO, share of launches"),
        Asked("desk-sanity-gspo", "C10-bf16-collapses", "GSPO, share of launches"),
        Asked("desk-lora", "C20-bf16-collapses", "LoRA, share of launches"),
    )),
    ("Does GRPO in fp16 reach 95 % on the sanity test?", (
        Asked("desk-sanity-grpo", "C6-fp16-accuracy", "accuracy at the end"),
    )),
)  # fmt: skip


def findings(rows: list[Row]) -> list[Finding]:
    """The questions in order, each answered from the rows of published verdicts."""
    latest = {(row.task, row.claim_id): row for row in rows if row.fingerprint}
    return [_finding(question, asked, latest) for question, asked in QUESTIONS]


def _finding(question: str, asked: tuple[Asked, ...], latest: dict[tuple[str, str], Row]) -> Finding:
    known = [(one, latest[one.task, one.claim_id]) for one in asked if (one.task, one.claim_id) in latest]
    tasks = tuple(dict.fromkeys(one.task for one in asked))
    if not known:
        return Finding(question, NOT_YET, "", tasks)
    words = dict.fromkeys(_answer(one, row) for one, row in known)
    numbers = [f"{one.numbers}: {_estimate(row)}" for one, row in known if row.estimate is not None]
    return Finding(question, "; ".join(words), "; ".join(numbers), tasks)


def _estimate(row: Row) -> str:
    return " ".join(filter(None, (number(row.estimate), region(row.interval))))


def _answer(one: Asked, row: Row) -> str:
    return {"PASS": one.passed, "FAIL": one.failed, "INCONCLUSIVE": "undecided"}.get(row.verdict or "", "no answer")
