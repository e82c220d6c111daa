"""Runs that are one and the same run under two names: a seed that was ignored, or files that were copied. No torch.

Where tokens are drawn at random, two launches never have the same log-probabilities to the last bit. A record is
recognised by its sums: per problem, and per iteration. Cells of one seed may share their rollouts by design (arms that
differ in the trainer alone, the first iteration before any step), and are the same only if trainer and sampler agree. Where
one of them follows the sampler's experts (train.routing_replay), they agree wherever the free router chose the same.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

from suite.grade.launches import FINISHED
from suite.grade.planned import key_of

SHARED = 0.25  # share of a run's marks in another one from which on the two are one
OF_SAMPLER = ("entropy_nats", "num_response_tokens")
OF_BOTH = ("k1_nats_per_token", "k2_nats_per_token", "k3_nats_per_token", "prob_diff_mean", "logprob_diff_mean")
SUMS_OF_BOTH = ("sum_k1", "sum_k2", "sum_k3", "sum_abs_prob_diff")
OF_STEP = ("grad_norm", "loss", "loss_scale", "reward_mean")
SAMPLER, BOTH, PROBLEMS = "iterations of the sampler", "iterations", "problems"


def same_runs(runs: list, label=lambda run: run.arm, across_seeds_only: bool = False) -> list[tuple[str, str]]:
    """(label, sentence) for both of every two cells whose finished runs are one.

    across_seeds_only: for cells of several tasks. At one seed two algorithms may well take the same steps, as with a mask
    that never masks anything.
    """
    marked = [(run, marks(run)) for run in _one_per_cell(runs) if is_random(run)]
    holders: dict[tuple, list[int]] = {}
    for index, (_, mine) in enumerate(marked):
        for mark in mine:
            holders.setdefault(mark, []).append(index)
    shared = Counter((*pair, mark[0]) for mark, found in holders.items() for pair in combinations(found, 2))
    lines = []
    for (a, b, kind), num in shared.items():
        (one, mine), (other, theirs) = marked[a], marked[b]
        size = min(sum(mark[0] == kind for mark in part) for part in (mine, theirs))
        if num >= _least(one, other) * size and (one.seed != other.seed or not (across_seeds_only or kind == SAMPLER)):
            names = [f"{label(run)} seed {run.seed}" for run in (one, other)]
            line = f"{names[0]} and {names[1]} are one and the same run: {num} of {size} {kind} agree to the last bit"
            lines += [(label(one), line), (label(other), line)]
    return list(dict.fromkeys(lines))


def _least(one, other) -> float:
    """From which share of common marks on two runs are one."""
    replayed = {(run.record["cell"]["settings"].get("train") or {}).get("routing_replay") for run in (one, other)}
    return 1.0 if one.seed == other.seed and len(replayed) == 2 else SHARED


def name_across(run) -> str:
    """`<task>-<arm>`, as a comparison calls it."""
    return f"{run.record['task']['id']}-{run.arm}"


def twins(runs: list) -> dict[str, str]:
    """`<task>-<arm>` -> the first one whose runs are the same in all they are recognised by."""
    first, found = {}, {}
    for run in _one_per_cell(runs):
        its = frozenset(marks(run))
        if its and first.setdefault(its, name_across(run)) != name_across(run):
            found[name_across(run)] = first[its]
    return found


def is_random(run) -> bool:
    """Whether tokens are drawn: at temperature 0, or from one candidate, equal runs are no surprise."""
    rollout = run.record["cell"]["settings"].get("rollout") or {}
    return rollout.get("temperature", 1.0) != 0 and rollout.get("top_k") != 1


def marks(run) -> set[tuple]:
    """What a run is recognised by: (kind, numbers...). Nothing where there is no number of log-probs, or where every
    iteration has the same."""
    rows = run.metrics
    found = _distinct(SAMPLER, [_numbers(row, OF_SAMPLER, OF_SAMPLER) for row in rows])
    found |= _distinct(BOTH, [_numbers(row, (*OF_BOTH, *OF_STEP), OF_BOTH) for row in rows])
    if run.summary is not None and SUMS_OF_BOTH[0] in run.summary:
        sums = zip(*(run.summary[name] for name in SUMS_OF_BOTH), strict=True)
        found |= {(PROBLEMS, *map(float, row)) for row in sums if any(row)}
    return found


def _numbers(row: dict, names: tuple, telling: tuple) -> tuple | None:
    """The row's numbers; None where none of the telling ones is a number that has to do with chance."""
    known = [row.get(name) for name in telling]
    is_telling = any(isinstance(value, float) and math.isfinite(value) and value != 0 for value in known)
    return tuple(row.get(name) for name in names) if is_telling else None


def _distinct(kind: str, rows: list) -> set[tuple]:
    found = {row for row in rows if row is not None}
    return {(kind, *row) for row in found} if len(found) > 1 or len(rows) == 1 else set()


def _one_per_cell(runs: list) -> list:
    """The first finished attempt of each cell: attempts of one cell may well be equal."""
    first = {}
    for run in runs:
        if run.status in FINISHED:
            first.setdefault((run.record["task"]["id"], key_of(run)), run)
    return list(first.values())
