"""The perturbations of the loss, on vectors worked by hand and by what each must keep."""

import numpy as np
import pytest

from suite.spec.perturbations import PERTURBATIONS, dealt_to_others, perturbed

OLD = [np.log(np.array([0.5, 0.05], np.float32)), np.log(np.array([0.9], np.float32))]
ROLLOUT = [np.log(np.array([0.4, 0.06], np.float32)), np.log(np.array([0.8], np.float32))]
COARSE = [np.log(np.array([0.25, 0.10], np.float32)), np.log(np.array([0.45], np.float32))]


def weights(name, coarse=None, seed=0):
    """u = exp(old - rollout), the weight that a row of old/rollout gives each token."""
    old, rollout = perturbed(name, OLD, ROLLOUT, coarse, seed)
    assert [len(part) for part in rollout] == [2, 1] and all(part.dtype == np.float32 for part in old + rollout)
    return np.exp(np.concatenate(old) - np.concatenate(rollout))


def test_rounded_weighs_a_token_by_the_rounded_policy_over_the_policy():
    np.testing.assert_allclose(weights("rounded", COARSE), [0.5, 2.0, 0.5], rtol=1e-6)


def test_biased_low_weighs_unlikely_tokens_by_a_fifth_more():
    np.testing.assert_allclose(weights("biased-low"), [1.0, 1.2, 1.0], rtol=1e-6)


def test_aligned_and_hidden_leave_no_weight_and_keep_one_side_each():
    for name, kept in (("aligned", ROLLOUT), ("hidden", OLD)):
        old, rollout = perturbed(name, OLD, ROLLOUT, None, 0)
        for one, other, expected in zip(old, rollout, kept, strict=True):
            assert np.array_equal(one, other) and np.array_equal(one, expected)


def many_tokens(num=20_000):
    draw = np.random.default_rng(1)
    logprobs = np.log(draw.uniform(0.01, 1, num))
    return logprobs, 0.2 * draw.standard_normal(num) * (1 - np.exp(logprobs)) - 0.05 * logprobs  # depends on the probability


def test_permuted_keeps_the_multiset_and_what_probability_explains_and_kills_the_rest_of_the_correlation():
    logprobs, ratios = many_tokens()
    dealt = dealt_to_others(ratios, logprobs, np.random.default_rng(0))
    assert np.array_equal(np.sort(dealt), np.sort(ratios)) and not np.array_equal(dealt, ratios)

    def within(values):  # what is left once tokens of like probability have given up their mean
        order = np.argsort(logprobs)
        return np.concatenate([values[part] - values[part].mean() for part in np.array_split(order, 64)])

    assert abs(np.corrcoef(within(dealt), within(ratios))[0, 1]) < 0.03
    for low in (0.0, 0.5):  # the mean in a band of probability stays
        band = (np.exp(logprobs) > low) & (np.exp(logprobs) < low + 0.5)
        assert dealt[band].mean() == pytest.approx(ratios[band].mean(), abs=2e-3)


def test_unbiased_noise_has_mean_one_and_the_size_of_what_it_replaces():
    logprobs, ratios = many_tokens()
    _, rollout = perturbed("unbiased-noise", [logprobs], [logprobs], [logprobs + ratios], seed=3)
    log_u = logprobs - rollout[0].astype(np.float64)
    size = np.sqrt(np.mean(ratios**2))
    assert np.exp(log_u).mean() == pytest.approx(1.0, abs=4 * size / np.sqrt(len(log_u)))
    assert log_u.std() == pytest.approx(size, rel=0.03)
    assert abs(np.corrcoef(log_u, ratios)[0, 1]) < 0.03


@pytest.mark.parametrize("name", [row.name for row in PERTURBATIONS.values() if row.needs_format])
def test_a_perturbation_is_a_function_of_its_seed_and_nothing_moves_where_nothing_was_rounded(name):
    logprobs, ratios = many_tokens(500)
    again = [perturbed(name, [logprobs], [logprobs], [logprobs + ratios], seed=5)[1][0] for _ in range(2)]
    assert np.array_equal(*again)
    np.testing.assert_allclose(perturbed(name, [logprobs], [logprobs], [logprobs], seed=5)[1][0], logprobs, rtol=1e-6)
