"""Times that some launches did not live to see, against a dose: a straight line through log time, with right-censoring.
numpy and scipy.

    log T = a + b x + sigma e,  e normal                      (a log-normal accelerated failure time model; Tobit, 1958)
    log L = sum over events  log phi((y - a - b x)/sigma) - log sigma
          + sum over the censored  log (1 - Phi((y - a - b x)/sigma))

In 1/sigma and (a, b)/sigma the log-likelihood is concave (Olsen, Econometrica 46, 1978): one maximum, found by Newton steps. It
exists where events were seen at two values of x, not all on one line; events at one value alone and censored times elsewhere
leave the slope without bound, and there is no fit.

Intervals are profiles of the likelihood: the values of a parameter at which the best fit is worse than the best of all by less
than n log(1 + t^2/(n - 2)) in 2 log L, t the Student quantile with n - 2 degrees of freedom and n the number of events. Without
censoring that is the interval of least squares to the last digit. No bootstrap: of five launches at a dose many a resample has
no event, and no fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize
from scipy import stats as scipy_stats
from scipy.special import log_ndtr

from suite.measure.stats import Interval

MIN_EVENTS = 3
METHOD = "censored_line"


@dataclass(frozen=True)
class CensoredLine:
    """The fit, and what it was made from: log dose x, log time y and whether the event was seen, (n,) each."""

    intercept: float
    slope: float
    sigma: float
    log_likelihood: float
    x: np.ndarray
    y: np.ndarray
    event: np.ndarray

    @property
    def num_events(self) -> int:
        return int(self.event.sum())

    def slope_interval(self, level: float = 0.90) -> Interval:
        """d log T / d log dose."""
        profile = lambda slope: _best(self.y - slope * self.x, np.ones((len(self.x), 1)), self.event)[1]  # noqa: E731
        return self._interval(self.slope, profile, self.sigma / _spread(self.x[self.event]), level)

    def time_at(self, dose: float, level: float = 0.90) -> Interval:
        """The median time at a dose, in the unit of the times."""
        at = math.log(dose)
        centre, columns = self.intercept + self.slope * at, (self.x - at)[:, None]
        scale = self.sigma * (1 + abs(at - self.x[self.event].mean()) / _spread(self.x[self.event]))
        found = self._interval(centre, lambda value: _best(self.y - value, columns, self.event)[1], scale, level)
        return Interval(*(math.exp(min(end, 700.0)) for end in found[:3]), METHOD, found.num)

    def _interval(self, estimate: float, profile, scale: float, level: float) -> Interval:
        n = self.num_events
        worse = n * math.log1p(float(scipy_stats.t.ppf(0.5 + level / 2, n - 2)) ** 2 / (n - 2))

        def excess(value: float) -> float:
            return 2 * (self.log_likelihood - profile(value)) - worse

        ends = [_crossing(excess, estimate, sign * scale / math.sqrt(n)) for sign in (-1, 1)]
        return Interval(estimate, *ends, METHOD, n)


def censored_line(doses: Sequence[float], times: Sequence[float], event: Sequence[bool]) -> CensoredLine | None:
    """The line of log time against log dose; doses and times (n,), positive; event False: not seen by that time.

    None with fewer than three events, with events at one dose alone, or where the events lie exactly on a line, whose scatter
    then says nothing. Raises ValueError for a dose or time that is not positive.
    """
    doses, times, event = np.asarray(doses, np.float64), np.asarray(times, np.float64), np.asarray(event, bool)
    if not doses.shape == times.shape == event.shape or doses.ndim != 1:
        raise ValueError(f"doses {doses.shape}, times {times.shape} and event {event.shape} must be flat arrays of one length")
    if not ((doses > 0).all() and (times > 0).all()):
        raise ValueError("doses and times: found one that is not positive, allowed: positive ones")
    x, y = np.log(doses), np.log(times)
    if event.sum() < MIN_EVENTS or np.unique(doses[event]).size < 2 or _on_a_line(x[event], y[event]):
        return None
    middle = x[event].mean()
    columns = np.stack([np.ones(len(x)), x - middle], axis=1)
    (centre, slope, sigma), log_likelihood = _best(y, columns, event)
    return CensoredLine(centre - slope * middle, slope, sigma, log_likelihood, x, y, event)


def _on_a_line(x: np.ndarray, y: np.ndarray) -> bool:
    residuals = y - np.polynomial.Polynomial.fit(x, y, 1)(x)
    return bool(np.abs(residuals).max() <= 1e-9 * (1 + np.abs(y).max()))


def _spread(x: np.ndarray) -> float:
    return float(x.std())


def _best(y: np.ndarray, columns: np.ndarray, event: np.ndarray) -> tuple[tuple[float, ...], float]:
    """((coefficients (k,), sigma), log-likelihood) at the maximum; columns (n, k). Newton in (coefficients, 1)/sigma."""
    start = np.linalg.lstsq(columns[event], y[event], rcond=None)[0]
    sigma = max(float((y - columns @ start)[event].std()), 1e-3)
    found = np.append(start, 1.0) / sigma
    value, gradient, hessian = _likelihood(found, y, columns, event)
    for _ in range(200):
        step = np.linalg.solve(hessian, gradient)  # the hessian is negative definite
        while (found - step)[-1] <= 0 or (moved := _likelihood(found - step, y, columns, event))[0] < value - 1e-12 * abs(value):
            step = step / 2
            if np.abs(step).max() < 1e-15 * np.abs(found).max():
                break
        gain = gradient @ np.linalg.solve(-hessian, gradient)
        if gain < 1e-18 or (found - step)[-1] <= 0:
            break
        found, (value, gradient, hessian) = found - step, moved
    return (*(found[:-1] / found[-1]), 1 / found[-1]), float(value)


def _likelihood(parameters: np.ndarray, y: np.ndarray, columns: np.ndarray, event: np.ndarray):
    """(log L, gradient, hessian) in (coefficients/sigma, 1/sigma); z = y/sigma - columns (coefficients/sigma)."""
    inverse = parameters[-1]
    design = np.concatenate([-columns, y[:, None]], axis=1)  # dz / d parameters
    z = design @ parameters
    seen, cut = design[event], design[~event]
    value = -0.5 * np.sum(z[event] ** 2) + event.sum() * (math.log(inverse) - 0.5 * math.log(2 * math.pi)) + np.sum(log_ndtr(-z[~event]))
    hazard = np.exp(-0.5 * z[~event] ** 2 - 0.5 * math.log(2 * math.pi) - log_ndtr(-z[~event]))  # phi / (1 - Phi)
    gradient = -seen.T @ z[event] - cut.T @ hazard
    hessian = -seen.T @ seen - (cut * (hazard * (hazard - z[~event]))[:, None]).T @ cut
    gradient[-1] += event.sum() / inverse
    hessian[-1, -1] -= event.sum() / inverse**2
    return value, gradient, hessian


def _crossing(excess, estimate: float, step: float) -> float:
    """Where `excess` leaves the negative on one side of the estimate, in the direction of `step`; infinite if it does not."""
    for _ in range(60):
        if excess(estimate + step) > 0:
            return float(optimize.brentq(excess, estimate, estimate + step, xtol=1e-9, rtol=1e-12))
        step *= 2
    return math.copysign(math.inf, step)
