"""Which problems a step trains on: the next ones of the order; or, with dynamic sampling (DAPO, equation 11), the next ones
whose responses do not all get the same reward, since a group that agrees has no advantage and no gradient.

    for at most max_rounds rounds, until enough groups disagree
        draw the next problems of the order, leave out those that this step has drawn already
        sample, reward; keep the groups with 0 < mean reward < 1
    where too few disagree: groups that agree, the first drawn first, fill the step up

So a step has always the same number of groups, and a limit that was reached is seen in its metrics, not in its shape. The
order goes on where the rounds before it ended: it is a function of seed and rounds so far, which the metrics hold, so that a
resumed run draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from suite.engines.batch import Rollout
from suite.problems.data import Prompt

Take = Callable[[list[Prompt]], tuple[list[Rollout], list[float]]]


@dataclass(frozen=True)
class Drawn:
    """The groups of a step, whole and in the order of their prompts."""

    prompts: list[Prompt]
    rollouts: list[Rollout]
    rewards: list[float]
    num_rounds: int = 1
    metrics: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """All responses to one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]
    rewards: list[float]

    @property
    def disagrees(self) -> bool:
        return min(self.rewards) < max(self.rewards)


def draw(next_prompts: Callable[[int], list[Prompt]], take: Take, first_round: int, max_rounds: int | None) -> Drawn:
    """The groups of one step.

    Args:
        next_prompts: the problems of round n of the order, as many as a step has.
        take: samples and rewards problems, whose responses come together, in the order of the problems.
        first_round: number of rounds before this step. max_rounds: null for a step of one round, whatever it brings.
    """
    prompts = next_prompts(first_round)
    if max_rounds is None:
        return Drawn(prompts, *take(prompts))
    groups, num_rounds = _groups(prompts, *take(prompts)), 1
    while num_rounds < max_rounds and _num_disagreeing(groups) < len(prompts):
        seen = {group.prompt.prompt_id for group in groups}
        more = [prompt for prompt in next_prompts(first_round + num_rounds) if prompt.prompt_id not in seen]
        groups += _groups(more, *take(more)) if more else []
        num_rounds += 1
    return _chosen(groups, len(prompts), num_rounds)


def rounds_before(metrics: list[dict]) -> int:
    """How many rounds the steps with these metrics took."""
    return sum(row.get("sampling_rounds", 1) for row in metrics)


def _chosen(groups: list[Group], num: int, num_rounds: int) -> Drawn:
    found = _num_disagreeing(groups)
    ranked = sorted(range(len(groups)), key=lambda place: not groups[place].disagrees)[:num]  # stable: first drawn first
    chosen = [groups[place] for place in sorted(ranked)]
    metrics = {
        "sampling_rounds": num_rounds,
        "sampling_limit_reached": int(found < num),
        "disagreeing_groups_share": found / len(groups),
        "drawn_reward_mean": float(np.mean([reward for group in groups for reward in group.rewards])),
    }
    rollouts = [rollout for group in chosen for rollout in group.rollouts]
    rewards = [reward for group in chosen for reward in group.rewards]
    return Drawn([group.prompt for group in chosen], rollouts, rewards, num_rounds, metrics)


def _num_disagreeing(groups: list[Group]) -> int:
    return sum(group.disagrees for group in groups)


def _groups(prompts: list[Prompt], rollouts: list[Rollout], rewards: list[float]) -> list[Group]:
    size = len(rollouts) // len(prompts)
    return [
        Group(prompt, rollouts[start : start + size], rewards[start : start + size])
        for prompt, start in zip(prompts, range(0, len(rollouts), size), strict=True)
    ]
