"""Closed forms by hand, a token-by-token reference, and the invariances on which recorded sums rest."""

import math

import numpy as np
import pytest

from suite.measure import mismatch as mm
from suite.measure.bins import bin_sums, full_vocabulary_kl, token_property

HALF, QUARTER, TENTH = math.log(0.5), math.log(0.25), math.log(0.1)


def rollouts(seed: int, num: int = 40, num_prompts: int = 7, spread: float = 0.05):
    """Random rollouts of uneven length (some empty) over a few prompts: ids, lengths, log mu, log pi, rewards,
    truncated."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, num)
    log_mu = -rng.exponential(1.0, lengths.sum()) - 0.5
    log_pi = log_mu + rng.normal(0, spread, lengths.sum())
    rewards = np.where(rng.random(num) < 0.2, np.nan, rng.random(num) < 0.5)
    return [f"p{i}" for i in rng.integers(0, num_prompts, num)], lengths, log_mu, log_pi, rewards, rng.random(num) < 0.3


def take(data, order):
    """The same rollouts in another order, or a part of them."""
    ids, lengths, log_mu, log_pi, rewards, truncated = data
    starts = np.cumsum(lengths) - lengths
    tokens = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in order] or [np.zeros(0)]).astype(int)
    return [ids[i] for i in order], lengths[order], log_mu[tokens], log_pi[tokens], rewards[order], truncated[order]


def assert_same_sums(a, b, rtol=1e-12):
    assert set(a) == set(b) == set(mm.PROMPT_SUM_COLUMNS)
    where = {p: i for i, p in enumerate(b["prompt_id"])}
    order = [where[p] for p in a["prompt_id"]]
    assert len(order) == len(b["prompt_id"])
    for column in mm.PROMPT_SUM_COLUMNS[1:]:
        # signed sums cancel, so the yardstick is the size of what was added, not of what is left
        np.testing.assert_allclose(a[column], b[column][order], rtol=rtol, atol=1e-13, err_msg=column)


def test_two_tokens_by_hand():
    # token 1: mu 1/2, pi 1/4, r = -log 2; token 2: mu 1/4, pi 1/2, r = +log 2
    sums = mm.prompt_sums(["a"], [2], np.array([HALF, QUARTER]), np.array([QUARTER, HALF]), [1.0], [True])
    log2, e = math.log(2), mm.estimates(sums)
    assert e["k1_nats_per_token"] == pytest.approx(0.0, abs=1e-16)
    assert e["k2_nats_per_token"] == pytest.approx(log2**2 / 2)
    assert e["k3_nats_per_token"] == pytest.approx(((0.5 - 1 + log2) + (2 - 1 - log2)) / 2)  # = 1/4
    assert e["k3_nats_per_token"] == pytest.approx(0.25)
    assert e["reverse_k3_nats_per_token"] == pytest.approx(0.25)
    assert e["prob_diff_mean"] == pytest.approx(0.25)
    assert (e["prob_diff_max"], e["prob_diff_min"]) == (pytest.approx(0.25), pytest.approx(-0.25))
    assert e["logprob_diff_mean"] == pytest.approx(log2)
    assert e["mult_prob_error"] == pytest.approx(2.0)
    assert e["out_of_band_share"] == 1.0
    assert e["k3_top_token_share"] == pytest.approx((1 - log2) / 0.5)
    assert e["reward_mean"] == 1.0 and e["truncated_share"] == 1.0 and e["response_tokens_mean"] == 2.0


def test_k3_keeps_its_digits_for_tiny_ratios():
    assert mm.k3(np.array([1e-6]))[0] == pytest.approx(5e-13, rel=1e-6)
    assert mm.k3(np.array([1e-8]))[0] == pytest.approx(5e-17, rel=1e-7)
    assert mm.k3(np.array([0.0]))[0] == 0.0


@pytest.mark.parametrize("r", [-0.9e-3, 0.99e-3, 1.01e-3, -1.01e-3, 0.3, -4.0])
def test_k3_agrees_with_exact_rational_series(r):
    from fractions import Fraction

    x, term, total = Fraction(r), Fraction(1), Fraction(0)
    for n in range(1, 60):
        term = term * x / n
        total += term if n >= 2 else 0
    assert mm.k3(np.array([r]))[0] == pytest.approx(float(total), rel=2e-12)


def test_k3_is_the_kl_on_average():
    # E_mu[e^r - 1 - r] = KL[mu||pi] for normalised pi: three outcomes, weighted by mu
    mu, pi = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.4, 0.1])
    assert mu @ mm.k3(np.log(pi / mu)) == pytest.approx(float(np.sum(mu * np.log(mu / pi))))


def test_sequence_kl_is_the_mean_over_sequences_not_over_tokens():
    # sequences of 1 and 3 tokens, every token with log mu - log pi = 0.1: (0.1 + 0.3) / 2
    log_mu = np.full(4, -1.0)
    e = mm.estimates(mm.prompt_sums(["a", "b"], [1, 3], log_mu, log_mu - 0.1))
    assert e["seq_kl_k1_nats"] == pytest.approx(0.2)
    assert e["k1_nats_per_token"] == pytest.approx(0.1)
    assert e["seq_slope_nats_per_1k_tokens"] == pytest.approx(-100.0)
    assert e["seq_intercept_nats"] == pytest.approx(0.0, abs=1e-12)


def test_sums_equal_a_token_by_token_reference():
    ids, lengths, log_mu, log_pi, rewards, truncated = data = rollouts(0)
    sums = mm.prompt_sums(*data)
    want = {
        p: dict.fromkeys(mm.PROMPT_SUM_COLUMNS, 0.0)
        | {"max_prob_diff": -math.inf, "min_prob_diff": math.inf, "max_k3": -math.inf}
        for p in ids
    }
    start = 0
    for i, prompt in enumerate(ids):
        row, seq = want[prompt], 0.0
        for t in range(start, start + lengths[i]):
            r, diff = log_pi[t] - log_mu[t], math.exp(log_pi[t]) - math.exp(log_mu[t])
            k3 = math.expm1(r) - r
            seq += r
            row["sum_k1"] -= r
            row["sum_k2"] += r * r / 2
            row["sum_k3"] += k3
            row["sum_reverse_k3"] += math.expm1(-r) + r
            row["sum_abs_prob_diff"] += abs(diff)
            row["sum_abs_logprob_diff"] += abs(r)
            row["sum_mult_prob_error"] += math.exp(abs(r))
            row["num_out_of_band"] += not 0.9 <= math.exp(r) <= 1.1
            row["max_prob_diff"] = max(row["max_prob_diff"], diff)
            row["min_prob_diff"] = min(row["min_prob_diff"], diff)
            row["max_k3"] = max(row["max_k3"], k3)
        start += lengths[i]
        x = lengths[i] / 1000
        for column, value in (
            ("num_rollouts", 1),
            ("num_response_tokens", lengths[i]),
            ("sum_len_k", x),
            ("sum_len_k2", x * x),
            ("sum_seq_log_ratio", seq),
            ("sum_seq_log_ratio2", seq**2),
            ("sum_len_k_x_seq_log_ratio", x * seq),
            ("num_truncated", truncated[i]),
        ):
            row[column] += value
        if not math.isnan(rewards[i]):
            row["sum_reward"] += rewards[i]
            row["sum_reward2"] += rewards[i] ** 2
            row["num_rewarded"] += 1
    assert sums["prompt_id"].tolist() == list(dict.fromkeys(ids))
    for column in mm.PROMPT_SUM_COLUMNS[1:]:
        np.testing.assert_allclose(
            sums[column], [want[p][column] for p in sums["prompt_id"]], rtol=1e-9, atol=1e-12, err_msg=column
        )


def test_sums_do_not_depend_on_how_rollouts_are_ordered_split_or_merged():
    data = rollouts(1, num=60)
    whole = mm.prompt_sums(*data)
    rng = np.random.default_rng(2)
    assert_same_sums(whole, mm.prompt_sums(*take(data, rng.permutation(60))))
    parts = [mm.prompt_sums(*take(data, order)) for order in np.array_split(rng.permutation(60), 7)]
    assert_same_sums(whole, mm.concat_sums(parts))
    assert_same_sums(whole, mm.concat_sums([mm.concat_sums(parts[:3]), mm.concat_sums([]), mm.concat_sums(parts[3:])]))
    assert all(mm.concat_sums(parts)[c].dtype == np.int64 for c in mm.COUNTS)


def test_merging_one_table_changes_no_bit():
    whole = mm.prompt_sums(*rollouts(3))
    again = mm.concat_sums([whole])
    assert all(np.array_equal(whole[c], again[c]) for c in mm.PROMPT_SUM_COLUMNS)


@pytest.mark.parametrize("base, spread", [(50, 40), (9300, 6000), (30000, 3)])
def test_slope_from_sums_equals_polyfit(base, spread):
    rng = np.random.default_rng(4)
    lengths = base + rng.integers(-spread, spread + 1, 60)
    per_token = rng.normal(-1e-3, 1e-2, 60)
    log_mu = np.full(lengths.sum(), -2.0)
    r = np.repeat(per_token, lengths)
    e = mm.estimates(mm.prompt_sums([str(i % 9) for i in range(60)], lengths, log_mu, log_mu + r))
    centred = lengths / 1000 - (lengths / 1000).mean()
    slope, _ = np.polyfit(centred, per_token * lengths, 1)
    assert e["seq_slope_nats_per_1k_tokens"] == pytest.approx(slope, rel=1e-4 if spread == 3 else 1e-8)


def test_what_cannot_be_estimated_is_none():
    equal_lengths = mm.estimates(
        mm.prompt_sums(["a", "a", "b"], [333] * 3, np.full(999, -1.0), np.linspace(-1.1, -0.9, 999))
    )
    assert equal_lengths["seq_slope_nats_per_1k_tokens"] is None and equal_lengths["seq_intercept_nats"] is None
    assert equal_lengths["reward_mean"] is None
    empty = mm.estimates(mm.concat_sums([]))
    assert set(empty.values()) == {None} and set(empty) == set(equal_lengths)
    no_gap = mm.estimates(mm.prompt_sums(["a"], [1], np.array([-1.0]), np.array([-1.0])))
    assert no_gap["k3_nats_per_token"] == 0.0 and no_gap["k3_top_token_share"] is None
    only_empty = mm.estimates(mm.prompt_sums(["a"], [0], np.zeros(0), np.zeros(0)))
    assert (
        only_empty["k3_nats_per_token"] is None
        and only_empty["prob_diff_max"] is None
        and only_empty["response_tokens_mean"] == 0
    )
    assert set(mm.token_statistics(np.zeros(0), np.zeros(0), []).values()) == {None}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_log_probs_are_an_error(bad, side):
    logs = [np.array([-1.0, -2.0]), np.array([-1.0, -2.0])]
    logs[side][1] = bad
    with pytest.raises(ValueError, match="token 1"):
        mm.prompt_sums(["a"], [2], *logs)


def test_overflow_is_infinite_in_its_own_row_only():
    # r = -1000: k3 = 999 is finite, the reverse direction and the multiplicative error are not
    sums = mm.prompt_sums(["bad", "good"], [1, 1], np.array([-1.0, -1.0]), np.array([-1001.0, -1.1]))
    assert sums["sum_k3"][0] == pytest.approx(999.0)
    assert sums["sum_reverse_k3"][0] == math.inf and sums["sum_mult_prob_error"][0] == math.inf
    assert all(np.isfinite(sums[c][1]) for c in mm.PROMPT_SUM_COLUMNS[1:])
    e = mm.estimates(sums)
    assert e["reverse_k3_nats_per_token"] == math.inf and e["k3_nats_per_token"] == pytest.approx(
        (999 + mm.k3(-0.1)) / 2
    )
    up = mm.prompt_sums(["a"], [1], np.array([-1000.0]), np.array([-1.0]))
    assert up["sum_k3"][0] == math.inf and up["max_prob_diff"][0] == pytest.approx(math.exp(-1))


@pytest.mark.parametrize(
    "args",
    [
        (["a"], [2], np.zeros(2), np.zeros(3)),
        (["a"], [3], np.zeros(2), np.zeros(2)),
        (["a", "b"], [2], np.zeros(2), np.zeros(2)),
        (["a"], [2], np.zeros(2), np.zeros(2), [1.0, 0.0]),
        (["a"], [2], np.zeros(2), np.zeros(2), [math.inf]),
        (["a"], [2], np.zeros(2), np.zeros(2), None, [True, False]),
        (["a", "b"], [3, -1], np.zeros(2), np.zeros(2)),
        (["a"], [2], np.zeros((1, 2)), np.zeros((1, 2))),
    ],
)
def test_shapes_that_disagree_are_an_error(args):
    with pytest.raises(ValueError):
        mm.prompt_sums(*args)


def test_token_statistics_by_hand():
    # one sequence per token; weights 1 and 3: (1 + 3)^2 / (2 * (1 + 9)) = 0.8
    stats = mm.token_statistics(np.array([HALF, TENTH]), np.array([HALF, math.log(0.3)]), [1, 1])
    assert stats["effective_sample_size"] == pytest.approx(0.8)
    assert stats["seq_log_ratio_max"] == pytest.approx(math.log(3)) and stats["seq_log_ratio_min"] == 0.0
    assert stats["seq_mult_prob_error_max"] == pytest.approx(3.0)
    assert stats["prob_diff_p999"] == pytest.approx(0.2 * 0.999)
    assert stats["k3_top_0p1pct_share"] == 1.0  # the only token with a gap
    assert stats["prob_pearson"] == pytest.approx(1.0)


def test_top_share_and_quantile_against_sorting():
    _, lengths, log_mu, log_pi, _, _ = rollouts(5, num=400)
    stats, r = mm.token_statistics(log_mu, log_pi, lengths), log_pi - log_mu
    k3 = np.sort(np.expm1(r) - r)[::-1]
    assert stats["k3_top_0p1pct_share"] == pytest.approx(k3[: math.ceil(r.size / 1000)].sum() / k3.sum())
    assert stats["prob_diff_p999"] == pytest.approx(np.quantile(np.abs(np.exp(log_pi) - np.exp(log_mu)), 0.999))


def test_effective_sample_size_survives_huge_weights_and_shows_collapse():
    # two sequences whose weights are e^0 and e^2000
    stats = mm.token_statistics(np.full(2, -2000.0), np.array([-2000.0, 0.0]), [1, 1])
    assert stats["effective_sample_size"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "by, edges",
    [
        ("position", [0, 5, 10, np.inf]),
        ("length", [0, 10, 20, 40]),
        ("probability", [0, 0.1, 0.5, 1.0]),
        ("entropy", [0, 0.5, 1.0]),
    ],
)
def test_bins_partition_the_total(by, edges):
    _, lengths, log_mu, log_pi, _, _ = rollouts(6)
    sums = binned(log_mu, log_pi, lengths, by, edges, np.random.default_rng(0).random(log_mu.size))
    assert sums[:, 0].sum() == log_mu.size
    assert sums[:, 1].sum() == pytest.approx(mm.k3(log_pi - log_mu).sum())


def binned(log_mu, log_pi, lengths, by, edges, entropies=None):
    """Tokens, sum of k3 and sum of |pi - mu| in each bin, (B, 3)."""
    x = token_property(by, log_mu.size, np.asarray(lengths), log_mu, entropies)
    return bin_sums(x, np.asarray(edges, np.float64), log_pi - log_mu, mm.prob_diff(log_mu, log_pi))


def test_bins_by_hand():
    log_mu, log_pi = np.array([HALF, HALF, TENTH]), np.array([HALF, QUARTER, TENTH])
    by_position = binned(log_mu, log_pi, [2, 1], "position", [0, 1, 2, 3])
    assert by_position[:, 0].tolist() == [2, 1, 0]
    assert by_position[:, 1] == pytest.approx([0, math.log(2) - 0.5, 0]) and by_position[:, 2] == pytest.approx([0, 0.25, 0])
    assert binned(log_mu, log_pi, [2, 1], "probability", [0, 0.5, 1])[:, 0].tolist() == [1, 2], "0.5 belongs to the upper bin"


@pytest.mark.parametrize("by", ["width", "entropy"])
def test_an_unknown_property_and_entropies_that_are_not_there_are_refused(by):
    with pytest.raises(ValueError, match=by):
        binned(np.full(4, -1.0), np.full(4, -1.0), [4], by, [0, 1])


def test_full_vocabulary_kl_by_hand_and_at_machine_precision():
    mu, pi = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]), np.array([[0.5, 0.4, 0.1], [0.5, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        kl = full_vocabulary_kl(np.log(mu), np.log(pi))
        assert full_vocabulary_kl(np.log(pi), np.log(mu))[1] == math.inf
    assert kl == pytest.approx([0.7 * math.log(1.4) + 0.2 * math.log(0.5), math.log(2)])
    log_mu = np.log(np.full((1, 4), 0.25))
    shifted = log_mu + 1e-6 * np.array([[1, -1, 1, -1]])
    assert full_vocabulary_kl(log_mu, shifted)[0] == pytest.approx(5e-13, rel=1e-4)
    assert full_vocabulary_kl(log_mu, log_mu)[0] == 0.0


def test_full_vocabulary_kl_refuses_logits():
    with pytest.raises(ValueError, match="logits"):
        full_vocabulary_kl(np.array([[3.0, 1.0]]), np.array([[3.0, 1.0]]))


def test_every_estimate_has_a_row_in_the_table():
    sums = mm.prompt_sums(*rollouts(7))
    names = set(mm.estimates(sums)) | set(mm.token_statistics(*rollouts(7)[2:4], rollouts(7)[1]))
    assert names <= set(mm.ESTIMANDS)
    for name, value in mm.estimates(sums).items():
        lo, hi = mm.ESTIMANDS[name].range
        assert lo <= value <= hi, name
    assert all(row.scale != "log" or row.range[0] >= 0 for row in mm.ESTIMANDS.values())
    assert all(row.scale != "logit" or row.range == (0, 1) for row in mm.ESTIMANDS.values())


def test_a_quantity_has_one_name():
    formulas = [row.formula for row in mm.ESTIMANDS.values()]
    assert len(set(formulas)) == len(formulas)


def test_the_series_of_an_rl_run_are_known():
    series = (
        "reward_mean grad_norm loss_scale step_skipped clip_fraction importance_weight_mean importance_weight_max "
        "effective_sample_size entropy_nats sync_probe_k3 t_sample_s t_score_s t_train_s t_sync_s t_rest_s"
    ).split()
    assert set(series) <= set(mm.ESTIMANDS)
