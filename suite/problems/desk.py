"""The desk problem family: add labelled digits modulo 100, with the running sum written out.

A problem of four terms, its prompt and its reference solution:

    Sum mod 100: c7d3e9f1           prompt_text adds "\\n<think>\\n"
    c7=7
    d3=10
    e9=19
    f1=20
    </think>
    \\boxed{20}

Why this family: the answer is an integer that can be checked exactly; the number of terms sets the length of a
solution, from tens of tokens to many hundreds; one line may add one term or two, so correct solutions differ in text
and in length. Labels run through a-z and A-Z and begin again after 52 terms. Up to 52 terms every label names one
digit; beyond that a label is ambiguous and only its position tells which digit is meant, which models trained on short
problems do not know: there they are uncertain, and small differences between two engines show.

Standard library only, and only `random.Random(seed).random()`, whose stream Python guarantees across versions and
platforms.
"""

import random
import string
from dataclasses import dataclass

LABELS = string.ascii_letters  # a-z then A-Z; 52 labels, cyclic
MODULUS = 100
QUESTION = "Sum mod 100:"
TEMPLATE_END = "\n<think>\n"

# Three regimes of difficulty, in terms per problem (both ends included). What the shipped model does in each stands in
# its training.json: past the trained lengths it rarely looks up the right digit, so its accuracy there is near zero.
TRAINED_TERMS = (4, 24)
BETWEEN_TERMS = (28, 40)
LONG_TERMS = (60, 120)


@dataclass(frozen=True)
class Problem:
    """One problem: the question as text, the answer as a decimal integer in 0..99, and a correct solution (what follows
    the prompt).
    """

    text: str
    answer: str
    solution: str
    terms: tuple[tuple[str, int], ...]  # (label, digit) in order


def draw_int(rng: random.Random, low: int, high: int) -> int:
    """An integer in low..high, both ends included, from one call of rng.random()."""
    return low + int(rng.random() * (high - low + 1))


def join_terms(terms) -> str:
    """The terms as they stand in a question and at the head of a line: `c7d3`."""
    return "".join(f"{label}{digit}" for label, digit in terms)


def make_problem(terms: tuple[tuple[str, int], ...]) -> Problem:
    """The problem that adds these (label, digit) terms; its solution adds one term per line."""
    text = f"{QUESTION} " + join_terms(terms)
    lines, answer = solution_lines(terms, group_sizes=[1] * len(terms), slips=[0] * len(terms))
    return Problem(text, answer, finish(lines, answer), terms)


def solution_lines(terms, group_sizes: list[int], slips: list[int]) -> tuple[list[str], str]:
    """Lines of a solution and the value it ends with. Line i adds the next group_sizes[i] terms and errs by slips[i].

    A slip is carried on: the later lines add to the wrong value, as a person would.
    """
    lines, total, start = [], 0, 0
    for size, slip in zip(group_sizes, slips, strict=True):
        group = terms[start : start + size]
        total = (total + sum(digit for _, digit in group) + slip) % MODULUS
        lines.append(f"{join_terms(group)}={total}")
        start += size
    if start != len(terms):
        raise ValueError(f"group sizes add up to {start}, the problem has {len(terms)} terms")
    return lines, str(total)


def finish(lines: list[str], answer: str) -> str:
    """The whole response without its end-of-sequence token: the chain, `</think>`, and the boxed answer."""
    return "\n".join([*lines, "</think>", f"\\boxed{{{answer}}}"])


def draw_terms(rng: random.Random, num_terms: tuple[int, int]) -> tuple[tuple[str, int], ...]:
    """Uniformly drawn: the number of terms in num_terms (both ends included), the first label, and each digit 0..9."""
    count = draw_int(rng, *num_terms)
    first = draw_int(rng, 0, len(LABELS) - 1)
    return tuple((LABELS[(first + i) % len(LABELS)], draw_int(rng, 0, 9)) for i in range(count))


def sample_problems(num: int, num_terms: tuple[int, int], seed: int) -> list[Problem]:
    """`num` distinct problems with num_terms = (lo, hi) terms, the same list for the same arguments on every platform.

    A longer list begins with the shorter one. Raises ValueError if lo < 1, hi < lo, or there are fewer than 2 * num
    such problems.
    """
    low, high = num_terms
    if low < 1 or high < low:
        raise ValueError(f"num_terms must be (lo, hi) with 1 <= lo <= hi, found {num_terms}")
    if len(LABELS) * 10**low < 2 * num:
        raise ValueError(f"{num} distinct problems asked for; problems of {low} terms are too few to draw that many")
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    while len(problems) < num:
        problem = make_problem(draw_terms(rng, num_terms))
        problems.setdefault(problem.text, problem)
    return list(problems.values())


def prompt_text(problem: Problem) -> str:
    """What the model is given: the question, and the template's end, which opens the chain."""
    return problem.text + TEMPLATE_END
