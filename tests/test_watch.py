"""The mismatch split by the sign of the advantage, against numbers worked by hand."""

import math

import numpy as np
import pytest

from suite.measure.watch import BAD_UPDATE_DROPS, argmax_flips, by_advantage

MU = np.log([0.5, 0.8, 0.25, 0.9])
PI = np.log([0.75, 0.2, 0.5, 0.9])


def test_the_push_and_the_bad_updates_of_four_tokens():
    found = by_advantage(MU, PI, np.array([1.0, -0.5]), np.array([1, 3]))
    # token 1: -(1.5 - 1) 1;  tokens 2 to 4, A = -0.5: -(0.25 - 1)(-0.5), -(2 - 1)(-0.5), 0
    assert found["mismatch_push_positive"] == pytest.approx(-0.5 / 4)
    assert found["mismatch_push_negative"] == pytest.approx((-0.375 + 0.5) / 4)
    assert found["bad_update_share_0p5"] == found["bad_update_share_0p2"] == 0.25  # 0.2 - 0.8 alone


def test_a_drop_of_a_good_response_is_no_bad_update_and_a_small_one_counts_at_the_small_limit():
    good = by_advantage(MU, PI, np.array([1.0, 0.5]), np.array([1, 3]))
    assert good["bad_update_share_0p5"] == good["bad_update_share_0p2"] == 0
    small = by_advantage(np.log([0.9]), np.log([0.6]), np.array([-1.0]), np.array([1]))
    assert small["bad_update_share_0p5"] == 0 and small["bad_update_share_0p2"] == 1


def test_without_mismatch_or_without_advantage_nothing_pushes():
    for found in (by_advantage(MU, MU, np.ones(2), np.array([2, 2])), by_advantage(MU, PI, np.zeros(2), np.array([2, 2]))):
        assert set(found.values()) == {0.0}


def test_a_huge_ratio_is_held_and_no_tokens_have_no_value():
    held = by_advantage(np.array([-200.0]), np.array([0.0]), np.array([1.0]), np.array([1]))
    assert held["mismatch_push_positive"] == pytest.approx(-math.expm1(20.0))
    nothing = by_advantage(np.array([]), np.array([]), np.array([1.0]), np.array([0]))
    assert set(nothing) == {"mismatch_push_positive", "mismatch_push_negative", *BAD_UPDATE_DROPS}
    assert set(nothing.values()) == {None}


def test_argmax_flips_are_counted_over_tokens_and_not_over_responses():
    sampler, trainer = [[4, 5, 6], [7], []], [[4, 9, 6], [7], []]
    assert argmax_flips(sampler, trainer) == {"argmax_flip_share": 0.25}
    assert argmax_flips(sampler, sampler) == {"argmax_flip_share": 0.0}
    assert argmax_flips([[]], [[]]) == {"argmax_flip_share": None}
