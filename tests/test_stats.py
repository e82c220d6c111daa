"""Numbers worked by hand, coverage by simulation, events on series drawn for the purpose."""

import math

import numpy as np
import pytest

from suite.measure import mismatch, stats

T_90_3 = 2.919985580  # Student t, 95th percentile, 2 degrees of freedom


def test_t_interval_by_hand():
    # 1, 2, 3: mean 2, sd 1, half width t * 1/sqrt(3)
    interval = stats.student_t_interval([1, 2, 3])
    assert interval.estimate == pytest.approx(2.0)
    assert (interval.lo, interval.hi) == (
        pytest.approx(2 - T_90_3 / math.sqrt(3)),
        pytest.approx(2 + T_90_3 / math.sqrt(3)),
    )
    assert (interval.method, interval.num) == ("student_t", 3)


def test_log_scale_is_the_interval_of_logs():
    interval = stats.student_t_interval([10.0, 100.0, 1000.0], scale="log")
    assert interval.estimate == pytest.approx(100.0)
    assert interval.hi == pytest.approx(100 * 10 ** (T_90_3 / math.sqrt(3)))
    assert interval.lo * interval.hi == pytest.approx(100.0**2)


def test_logit_scale_makes_zero_and_one_finite_and_gives_the_rate_back():
    interval = stats.student_t_interval([1.0, 0.98, 1.0], scale="logit", num_trials=50)
    assert 0 < interval.lo < 0.98 < interval.estimate < interval.hi <= 1.0
    for rate in (0.0, 0.3, 1.0):
        x = stats.to_scale([rate], "logit", 20)[0]
        assert x == pytest.approx(math.log((20 * rate + 0.5) / (20.5 - 20 * rate)))
        assert stats.from_scale(x, "logit", 20) == pytest.approx(rate)


@pytest.mark.parametrize(
    "values, scale",
    [
        ([1.0], "identity"),
        ([], "identity"),
        ([2.0, 2.0, 2.0], "identity"),
        ([1.0, 0.0], "log"),
        ([1.0, -2.0], "log"),
        ([0.5, 1.0], "logit"),
        ([1.0, math.nan], "identity"),
        ([0.1 + 0.2, 0.3], "identity"),
    ],
)
def test_too_little_data_is_none(values, scale):
    assert stats.student_t_interval(values, scale=scale) is None


def test_unknown_scale_is_an_error():
    with pytest.raises(ValueError, match="identity, log, logit"):
        stats.student_t_interval([1, 2], scale="sqrt")


@pytest.mark.parametrize("n", [3, 5])
def test_t_interval_covers_as_stated(n):
    rng, hits, num = np.random.default_rng(n), 0, 6000
    for row in rng.normal(1.0, 2.0, (num, n)):
        interval = stats.student_t_interval(row)
        hits += interval.lo <= 1.0 <= interval.hi
    assert 0.88 <= hits / num <= 0.92


def test_launches_that_agree_exactly_fall_back_to_the_within_launch_interval():
    within = [
        stats.Interval(0.5, 0.4, 0.6, "prompt_bootstrap", 10),
        stats.Interval(0.5, 0.45, 0.7, "prompt_bootstrap", 10),
    ]
    interval = stats.launch_interval([0.5, 0.5], within)
    assert (interval.lo, interval.hi, interval.method) == (0.4, 0.7, "within_run")
    assert stats.launch_interval([0.5, 0.5], [within[0], None]) is None
    assert stats.launch_interval([0.5], within[:1]) is None
    point = stats.Interval(0.5, 0.5, 0.5, "prompt_bootstrap", 10)
    assert stats.launch_interval([0.5, 0.5], [point, point]) is None
    assert stats.launch_interval([0.5, 0.6], within).method == "student_t"


def test_bootstrap_of_a_mean_matches_its_standard_error():
    rng = np.random.default_rng(1)
    x = rng.normal(5, 1, 400)
    table = {"prompt_id": np.array(["x"] * 400), "total": x, "count": np.ones(400)}
    interval = stats.prompt_bootstrap([table], lambda t: t["total"] / t["count"])
    se = x.std() / 20
    assert interval.estimate == pytest.approx(x.mean())
    assert interval.hi - interval.lo == pytest.approx(2 * 1.645 * se, rel=0.1)
    assert interval == stats.prompt_bootstrap([table], lambda t: t["total"] / t["count"])


def test_bootstrap_equals_recomputing_each_resample():
    rng = np.random.default_rng(2)
    lengths = rng.integers(5, 60, 30)
    log_mu = np.full(lengths.sum(), -1.0)
    sums = mismatch.prompt_sums(
        [str(i % 10) for i in range(30)], lengths, log_mu, log_mu + rng.normal(0, 0.1, log_mu.size)
    )
    slope = lambda t: mismatch.estimates_of_totals(t)["seq_slope_nats_per_1k_tokens"]  # noqa: E731
    columns = {c: sums[c] for c in mismatch.SUMS}
    interval = stats.prompt_bootstrap([columns], slope, num_resamples=50, seed=3)
    weights = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=50)
    slow = [float(slope({c: np.repeat(sums[c], w).sum() for c in mismatch.SUMS})) for w in weights]
    np.testing.assert_allclose([interval.lo, interval.hi], np.quantile(slow, [0.05, 0.95]), rtol=1e-9)


def test_bootstrap_of_two_arms_resamples_them_together():
    x = np.random.default_rng(4).exponential(1, 50) + 0.1
    ratio = stats.prompt_bootstrap([{"s": 3 * x}, {"s": x}], lambda a, b: a["s"] / b["s"])
    assert ratio.lo == pytest.approx(3.0) and ratio.hi == pytest.approx(3.0)


def test_bootstrap_without_enough_prompts_or_without_a_value_is_none():
    assert stats.prompt_bootstrap([{"s": np.ones(1)}], lambda t: t["s"]) is None
    with np.errstate(divide="ignore"):
        assert stats.prompt_bootstrap([{"s": np.ones(3), "n": np.zeros(3)}], lambda t: t["s"] / t["n"]) is None
    with pytest.raises(ValueError, match="same prompts"):
        stats.prompt_bootstrap([{"s": np.ones(3)}, {"s": np.ones(4)}], lambda a, b: a["s"])


def test_clopper_pearson_by_hand():
    five = stats.clopper_pearson(5, 5)
    assert five.lo == pytest.approx(0.05 ** (1 / 5)) and round(five.lo, 3) == 0.549 and five.hi == 1.0
    none = stats.clopper_pearson(0, 5)
    assert none.lo == 0.0 and none.hi == pytest.approx(1 - 0.05 ** (1 / 5))
    assert stats.clopper_pearson(0, 0) is None
    with pytest.raises(ValueError):
        stats.clopper_pearson(6, 5)


def test_clopper_pearson_tails_are_exact():
    # at the lower end, P(X >= 3 of 8) is 5 %; at the upper end, P(X <= 3) is 5 %
    interval = stats.clopper_pearson(3, 8)
    upper_tail = sum(math.comb(8, k) * interval.lo**k * (1 - interval.lo) ** (8 - k) for k in range(3, 9))
    lower_tail = sum(math.comb(8, k) * interval.hi**k * (1 - interval.hi) ** (8 - k) for k in range(4))
    assert (upper_tail, lower_tail) == (pytest.approx(0.05), pytest.approx(0.05))


def test_collapse_is_found_at_the_first_held_mean():
    values = [0.5, 0.6, 0.7, 0.7, 0.5, 0.5, 0.5, 0.5]
    # window means .55 .65 .70 .60 .50 .50 .50 end at steps 10 20 30 40 50 60 70; peak .70
    assert stats.collapse_time(range(0, 80, 10), values, drop=0.15, window=2, hold=2) == stats.EventTime(50, 70, "drop")
    assert stats.collapse_time(range(0, 80, 10), values, drop=0.05, window=2, hold=2) == stats.EventTime(40, 70, "drop")
    assert stats.collapse_time(range(8), values, drop=0.15, window=2, hold=3).step == 5
    assert stats.collapse_time(range(8), values, drop=0.15, window=2, hold=4) is None, "it ends in a fall"


def test_a_dip_that_recovers_is_no_collapse():
    values = [0.8, 0.8, 0.2, 0.8, 0.8, 0.8]
    assert stats.collapse_time(range(6), values, drop=0.3, window=1, hold=2).censored
    assert stats.collapse_time(range(6), values, drop=0.3, window=1, hold=1).step == 2


def test_a_slow_start_is_no_collapse_and_a_relative_drop_scales_with_the_peak():
    assert stats.collapse_time(range(6), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], drop=0.05, window=1, hold=1).censored
    half = [0.4, 0.4, 0.19, 0.19]
    assert stats.collapse_time(range(4), half, drop=0.5, window=1, hold=2, relative=True).step == 2
    assert stats.collapse_time(range(4), half, drop=0.5, window=1, hold=2).censored


def test_a_non_finite_value_is_an_event_at_its_step():
    event = stats.collapse_time([0, 5, 10, 15], [0.5, 0.5, math.nan, 0.5], drop=0.1, window=2, hold=2)
    assert (event.step, event.cause) == (10, "non_finite")
    assert stats.collapse_time([3], [math.inf], drop=0.1, window=5, hold=2).step == 3
    earlier = stats.collapse_time(range(5), [0.9, 0.1, 0.1, 0.1, math.nan], drop=0.5, window=1, hold=2)
    assert (earlier.step, earlier.cause) == (1, "drop")


def test_a_series_too_short_to_show_a_collapse_is_none():
    assert stats.collapse_time(range(3), [1, 1, 1], drop=0.1, window=2, hold=2) is None
    assert stats.collapse_time([], [], drop=0.1, window=1, hold=1) is None


def test_first_passage_takes_the_window_mean_and_is_censored_at_the_end():
    values = [0.9, 1.0, 0.9, 0.96, 0.97]
    assert stats.first_passage(range(5), values, 0.95, 1).step == 1  # a single high value
    assert stats.first_passage(range(5), values, 0.96, 2).step == 4
    assert stats.first_passage(range(5), values, 0.99, 2) == stats.EventTime(None, 4, "censored")
    assert stats.first_passage(range(2), [math.inf, 1.0], 0.5, 2).censored
    assert stats.first_passage(range(2), [1, 1], 0.5, 3) is None


def test_series_must_be_in_order():
    with pytest.raises(ValueError, match="increase"):
        stats.first_passage([0, 2, 1], [1, 1, 1], 0.5, 1)
    with pytest.raises(ValueError, match="one length"):
        stats.collapse_time([0, 1], [1, 1, 1], 0.1, 1, 1)


@pytest.mark.parametrize("mean, accept", [(0.0, (-1.5, 1.5)), (1.0, (0.0, None)), (3.0, (-1.0, 1.0))])
def test_power_by_quadrature_equals_simulation(mean, accept):
    rng = np.random.default_rng(5)
    draws = rng.normal(mean, 0.8, (20000, 4))
    half = stats._t_quantile(4, 0.90) * draws.std(axis=1, ddof=1) / 2
    lo, hi = draws.mean(axis=1) - half, draws.mean(axis=1) + half
    a, b = accept[0], math.inf if accept[1] is None else accept[1]
    assert stats.p_inside(mean, 0.8, 4, accept) == pytest.approx(np.mean((lo >= a) & (hi <= b)), abs=0.012)
    assert stats.p_disjoint(mean, 0.8, 4, accept) == pytest.approx(np.mean((hi < a) | (lo > b)), abs=0.012)


def test_power_at_the_edge_is_the_one_sided_error():
    # a true value on the only edge passes falsely with exactly one tail: 5 %
    for n in (2, 3, 5):
        assert stats.p_inside(0.0, 1.0, n, (0.0, None)) == pytest.approx(0.05, abs=0.002)
    assert stats.p_inside(5.0, 1.0, 1, (0.0, None)) == 0.0


def test_power_of_an_event_claim():
    assert stats.p_share_inside(1.0, 5, (0.5, 1.0)) == 1.0
    assert stats.p_share_inside(1.0, 4, (0.5, 1.0)) == 0.0  # 4 of 4 reaches only 0.473
    assert stats.p_share_inside(0.5, 5, (0.5, 1.0)) == pytest.approx(0.5**5)
    assert stats.p_share_disjoint(0.0, 5, (0.5, 1.0)) == 1.0
