"""Advantages by hand, and the inputs that advantages and losses refuse."""

import math
from typing import get_type_hints

import pytest
import torch
from jaxtyping import jaxtyped

from suite.engines.losses import advantages, policy_loss
from suite.spec.algorithms import ALGORITHMS

# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand_with_groups_interleaved():
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0])
    groups = torch.tensor([7, 2, 7, 2, 7])  # 7: 1, 0, 2 (mean 1, std 1); 2: 0, 3 (mean 1.5, std 3/sqrt 2)
    assert advantages(rewards, groups, "group_mean").tolist() == [0.0, -1.5, -1.0, 1.5, 1.0]
    expected = [0.0, -(0.5**0.5), -1.0, 0.5**0.5, 1.0]
    assert advantages(rewards, groups, "group_mean_std").tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(advantages(rewards, groups, "reward"), rewards)


@pytest.mark.parametrize("kind", ["group_mean", "group_mean_std"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(kind, value, dtype):
    rewards = torch.full((8,), value, dtype=dtype)
    assert (advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]), kind) == 0).all()


@pytest.mark.parametrize("kind", ["group_mean", "group_mean_std"])
def test_advantages_do_not_change_when_every_reward_of_a_group_shifts(kind):
    rewards, groups = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    shifted = rewards + torch.tensor([5.0, 5.0, 5.0, -2.0, -2.0, -2.0])
    torch.testing.assert_close(advantages(rewards, groups, kind), advantages(shifted, groups, kind))


def test_advantages_refuse_what_they_cannot_use():
    groups = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="group_mean_std"):
        advantages(torch.zeros(2), groups, "gae")
    with pytest.raises(ValueError, match="not finite"):
        advantages(torch.tensor([0.0, math.nan]), groups, "group_mean")


# --- broken inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"old_trainer_logprobs": None}, "needs old_trainer_logprobs"),
        ({"length_norm": None}, "length_norm"),
        ({"num_sequences": 0}, "num_sequences"),
        ({"advantages": torch.zeros(4, 1)}, r"advantages has shape \(4, 1\)"),
        ({"rollout_logprobs": torch.zeros(4)}, "rollout_logprobs has shape"),
        ({"loss_mask": torch.ones(4, 3)}, "torch.bool"),
    ],
)
def test_missing_or_misshapen_inputs_are_refused(change, says):
    arguments = {"num_sequences": 4, "length_norm": 16, "loss_mask": torch.ones(4, 3, dtype=torch.bool)}
    arguments |= {k: torch.zeros(4, 3) for k in ("new_logprobs", "old_trainer_logprobs", "rollout_logprobs")}
    with pytest.raises(ValueError, match=says):
        policy_loss(ALGORITHMS["GRPO"], **(arguments | {"advantages": torch.zeros(4)} | change))


def test_token_mean_needs_the_token_count_of_the_mini_batch():
    arguments = [torch.zeros(2, 3)] * 3 + [torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)]
    with pytest.raises(ValueError, match="num_tokens"):
        policy_loss(ALGORITHMS["DAPO"], *arguments, num_sequences=2)


def fits_signature(function, *arguments):
    """True if the arguments have the dtypes and, taken together, the shapes of the function's jaxtyping annotations."""
    hints = list(get_type_hints(function).values())
    with jaxtyped("context"):  # binds B, T and N across the arguments of one call
        return all(isinstance(argument, hint) for argument, hint in zip(arguments, hints, strict=False))


def test_the_shapes_in_the_signatures_are_the_shapes_the_functions_take():
    groups, mask = torch.zeros(2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    assert fits_signature(advantages, torch.zeros(2), groups, "reward")
    assert not fits_signature(advantages, torch.zeros(3), groups, "reward")
    logprobs, advantage = torch.zeros(2, 3), torch.zeros(2)
    good = (ALGORITHMS["GRPO"], logprobs, logprobs, logprobs, mask, advantage)
    assert fits_signature(policy_loss, *good) and policy_loss(*good, num_sequences=2, length_norm=3).loss.shape == ()
    assert fits_signature(policy_loss, ALGORITHMS["REINFORCE"], logprobs, None, logprobs, mask, advantage)
    assert not fits_signature(policy_loss, *good[:-1], torch.zeros(3))
    assert not fits_signature(policy_loss, *good[:4], mask.float(), advantage)
