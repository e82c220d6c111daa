"""The censored line of log time against log dose: against least squares where nothing is censored, against a slow maximum
elsewhere, and its coverage in simulation."""

import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from suite.measure.censored import censored_line

DOSES = np.repeat([1e-3, 3e-3, 1e-2, 5e-2], 5)


def drawn(seed, slope=-0.7, sigma=0.3, horizon=math.inf):
    """Times of launches at DOSES, 30 at a dose of 1e-2, and whether they came before the horizon."""
    noise = np.random.default_rng(seed).standard_normal(DOSES.size)
    times = 30 * np.exp(slope * np.log(DOSES / 1e-2) + sigma * noise)
    return np.minimum(times, horizon), times < horizon


def test_without_censoring_it_is_least_squares_with_its_own_interval():
    times, event = drawn(0)
    fit, plain = censored_line(DOSES, times, event), scipy_stats.linregress(np.log(DOSES), np.log(times))
    assert fit.slope == pytest.approx(plain.slope, rel=1e-9) and fit.intercept == pytest.approx(plain.intercept, rel=1e-9)
    half = scipy_stats.t.ppf(0.95, DOSES.size - 2) * plain.stderr
    assert fit.slope_interval()[1:3] == pytest.approx((plain.slope - half, plain.slope + half), rel=1e-6)


def test_without_censoring_the_time_at_a_dose_has_the_interval_of_a_mean_of_least_squares():
    times, event = drawn(1)
    x, y = np.log(DOSES), np.log(times)
    plain, at = scipy_stats.linregress(x, y), math.log(2e-4)  # beyond the doses
    residual = math.sqrt(np.sum((y - plain.intercept - plain.slope * x) ** 2) / (x.size - 2))
    half = scipy_stats.t.ppf(0.95, x.size - 2) * residual * math.sqrt(1 / x.size + (at - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    centre = plain.intercept + plain.slope * at
    assert censored_line(DOSES, times, event).time_at(2e-4)[:3] == pytest.approx(np.exp([centre, centre - half, centre + half]), rel=1e-6)


def test_with_censoring_it_is_the_maximum_that_a_slow_search_finds():
    times, event = drawn(2, horizon=60)
    assert 5 < event.sum() < 18
    fit, x, y = censored_line(DOSES, times, event), np.log(DOSES), np.log(times)

    def loss(parameters):
        a, b, log_sigma = parameters
        z = (y - a - b * x) / math.exp(log_sigma)
        return -sum(scipy_stats.norm.logpdf(one) - log_sigma if seen else scipy_stats.norm.logsf(one) for one, seen in zip(z, event, strict=True))

    slow = optimize.minimize(loss, [1.0, -0.1, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20000, "maxfev": 20000})
    assert (fit.intercept, fit.slope, math.log(fit.sigma)) == pytest.approx(slow.x, abs=1e-5)
    assert fit.log_likelihood == pytest.approx(-slow.fun, abs=1e-9)


def test_a_time_that_was_cut_off_counts_as_at_least_that_long():
    """Dropping the censored launches, or taking their horizon for the event, makes the line too flat."""
    slopes = {"censored": [], "dropped": [], "taken": []}
    for seed in range(60):
        times, event = drawn(seed, sigma=0.6, horizon=40)
        slopes["censored"].append(censored_line(DOSES, times, event).slope)
        slopes["dropped"].append(censored_line(DOSES[event], times[event], event[event]).slope)
        slopes["taken"].append(censored_line(DOSES, times, np.ones_like(event)).slope)
    means = {name: np.mean(values) for name, values in slopes.items()}
    assert means["censored"] == pytest.approx(-0.7, abs=0.05)
    assert means["dropped"] > -0.6 and means["taken"] > -0.6


def test_its_ninety_percent_interval_covers_the_slope_in_about_ninety_percent_of_the_cases():
    inside, times_inside = 0, 0
    for seed in range(200):
        times, event = drawn(1000 + seed, horizon=80)
        fit = censored_line(DOSES, times, event)
        low, high = fit.slope_interval()[1:3]
        inside += low <= -0.7 <= high
        low, high = fit.time_at(1e-2)[1:3]
        times_inside += low <= 30 <= high
    assert 170 <= inside <= 193 and 170 <= times_inside <= 193  # 180 +- 2.4 standard deviations, and a little less by small n


def test_units_of_dose_and_time_do_not_matter_and_neither_does_the_order_of_launches():
    times, event = drawn(3, horizon=60)
    fit, order = censored_line(DOSES, times, event), np.random.default_rng(0).permutation(DOSES.size)
    other = censored_line(1e6 * DOSES[order], 60 * times[order], event[order])
    assert other.slope == pytest.approx(fit.slope, rel=1e-8) and other.slope_interval()[1:3] == pytest.approx(fit.slope_interval()[1:3], rel=1e-5)
    assert other.time_at(2e3)[:3] == pytest.approx([60 * end for end in fit.time_at(2e-3)[:3]], rel=1e-5)


def test_too_little_has_no_line():
    one_dose = np.repeat([1e-2, 1e-3], 3)
    assert censored_line(one_dose, [30, 32, 28, 200, 200, 200], [True] * 3 + [False] * 3) is None  # the slope has no bound
    assert censored_line([1e-2, 1e-3], [30, 100], [True, True]) is None
    assert censored_line([1e-2, 1e-3, 1e-4], [10, 100, 1000], [True] * 3) is None  # exactly on a line
    assert censored_line([], [], []) is None


def test_a_dose_or_a_time_that_is_not_positive_is_refused():
    for doses, times in (([0.0, 1, 2], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])):
        with pytest.raises(ValueError, match="not positive"):
            censored_line(doses, times, [True] * 3)
    with pytest.raises(ValueError, match="one length"):
        censored_line([1.0], [1.0, 2.0], [True])
