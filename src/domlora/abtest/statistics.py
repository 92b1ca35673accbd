"""Lifts and their errors from sums over units: nothing here reads a row, and all of it takes many samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Columns",
    "Comparison",
    "Interval",
    "adjusted",
    "compare",
    "interval",
    "moments_of",
    "sample_ratio",
    "student",
    "variation",
]

Floats = NDArray[np.float64]


class Columns(NamedTuple):
    """Which entries of the moments a ratio is made of. Entry 0 is the constant 1: a metric by unit divides by it.

    Args:
        over, under: numerator and denominator of the metric.
        before: the same of the period before the start, or None.
    """

    over: int
    under: int
    before: tuple[int, int] | None = None


class Comparison(NamedTuple):
    """One ratio in two arms.

    Args:
        control, treatment: the metric, adjusted if there is a covariate.
        control_error, treatment_error: standard errors of them.
        reduction: share of the variance that the covariate took away.
        freedom: degrees of freedom of the errors, see :func:`student`.
    """

    control: Floats
    treatment: Floats
    control_error: Floats
    treatment_error: Floats
    reduction: Floats
    freedom: Floats = np.asarray(np.inf)

    @property
    def lift(self) -> Floats:
        """Treatment over control, less 1."""
        return self.treatment / self.control - 1.0

    @property
    def error(self) -> Floats:
        """Standard error of the logarithm of treatment over control."""
        return np.hypot(self.control_error / self.control, self.treatment_error / self.treatment)

    @property
    def z(self) -> Floats:
        """The logarithm of treatment over control in standard errors."""
        return np.log(self.treatment / self.control) / self.error

    @property
    def p_value(self) -> Floats:
        """Of no lift, two-sided, as if this were the only look."""
        return np.asarray(2.0 * stats.t.sf(np.abs(self.z), self.freedom))


class Interval(NamedTuple):
    """Bounds of a relative lift."""

    low: Floats
    high: Floats


def moments_of(values: ArrayLike) -> Floats:
    """Sums over units of all products of two columns, the constant 1 before the first one.

    **Shape**: values (..., units, K), moments (..., K + 1, K + 1): the number of units in the corner, sums in the first row.

    >>> moments_of([[2.0, 10.0], [1.0, 4.0]])[0]
    array([ 2.,  3., 14.])
    """
    table = np.asarray(values, dtype=np.float64)
    whole = np.concatenate([np.ones((*table.shape[:-1], 1)), table], -1)
    return np.asarray(np.swapaxes(whole, -1, -2) @ whole)


def compare(control: Floats, treatment: Floats, columns: Columns) -> Comparison:
    """A ratio of sums in two arms, with errors that hold when units differ in size and their rows resemble each other.

    The variance of ``R = Σx / Σy`` over n units is that of ``e = x − R y``, which sums to 0: ``Σe² / (Σy)²``, the delta
    method clustered by unit. Large units pull R towards themselves, so that their e is too small; the jackknife divides each
    e by ``1 − h``, h being the unit's share of Σy. Here all units have the h of a typical row's unit, ``Σh² = 1 / m``,
    which gives a factor ``(n − 1) / n / (1 − 1 / m)²``: ``n / (n − 1)``, as usual, for units of equal size.

    With a covariate (CUPED) the ratio ``P`` of the period before, less its mean over both arms, is taken away ``θ`` times,
    ``θ`` being the slope of ``R`` on ``P`` over both arms.

    Errors have the degrees of freedom of Welch and Satterthwaite. An arm has ``n / (1 + Γ) − 1``, Γ being the squared
    variation of what units add to the variance, which is ``y²`` where their rows are alike; with y of a gamma distribution
    and the squared variation ``c``, ``1 + Γ = (1 + 2 c) (1 + 3 c) / (1 + c)``. It is ``n − 1`` for units of equal size.

    **Shape**: moments (..., K + 1, K + 1), results (...).

    Args:
        control, treatment: as :func:`moments_of` makes them; sums over days, domains or arms are sums of these.
        columns: what is divided by what.

    **Source**: Deng, Knoblich and Lu 2018 (ratios); Deng, Xu, Kohavi and Walker 2013 (CUPED); Bell and McCaffrey 2002
    (leverage of clusters), with one for all; Carter, Schnepel and Steigerwald 2017 (Γ), with the gamma distribution.

    >>> random = np.random.default_rng(0)
    >>> shown = random.poisson(9.0, (2, 4000)) + 1
    >>> clicks = random.binomial(shown, [[0.10], [0.12]])
    >>> now, new = moments_of(np.stack([shown, clicks], -1))
    >>> found = compare(now, new, Columns(over=2, under=1))
    >>> round(float(found.lift), 3), round(float(found.error), 3)
    (0.184, 0.02)
    """
    with np.errstate(all="ignore"):
        (one, var_one), (two, var_two) = _ratio(control, columns), _ratio(treatment, columns)
        if columns.before is None:
            found = Comparison(one, two, np.sqrt(var_one), np.sqrt(var_two), np.zeros_like(one))
        else:
            found = _adjust(control, treatment, columns, columns.before)
        return found._replace(freedom=_freedom(found, control, treatment, columns))


def interval(found: Comparison, critical: ArrayLike) -> Interval:
    """The relative lift give or take ``critical`` standard errors, on the logarithm, where it is closest to normal.

    >>> one = Comparison(*map(np.asarray, (0.10, 0.11, 0.001, 0.001, 0.0)))
    >>> [round(float(bound), 3) for bound in interval(one, 1.96)]
    [0.071, 0.13]
    """
    with np.errstate(all="ignore"):
        ratio, width = found.treatment / found.control, np.exp(np.asarray(critical) * found.error)
        return Interval(ratio / width - 1.0, ratio * width - 1.0)


def student(critical: ArrayLike, freedom: ArrayLike) -> Floats:
    """Critical values for errors that are estimated: those of Student's t which chance exceeds as often.

    **Source**: Pocock 1977; Jennison and Turnbull 2000 (the significance-level approach to group sequential tests).

    >>> student([1.96, 5.0], 100).round(3), student(1.96, np.inf).round(3)
    (array([1.984, 5.344]), np.float64(1.96))
    """
    values, known = np.asarray(critical, dtype=np.float64), np.asarray(freedom, dtype=np.float64)
    with np.errstate(all="ignore"):
        return np.asarray(np.where(np.isinf(known), values, stats.t.isf(stats.norm.sf(values), known)))[()]


def variation(control: Floats, treatment: Floats, columns: Columns) -> Floats:
    """The larger coefficient of variation of a ratio's two sums, in the smaller arm, if both arms were alike.

    Below 0.1 (and with 30 units or more), a ratio is close enough to normal for errors like those of :func:`compare`.
    It is that of both arms together, so that an arm whose clicks fail to come does not stay unjudged for it.

    **Source**: Cochran 1977, Sampling Techniques, page 153.

    >>> few = moments_of([[1.0]] * 50 + [[0.0]] * 450)
    >>> round(float(variation(few, few, Columns(over=1, under=0))), 3)
    0.134
    """
    whole, fewer = control + treatment, np.minimum(control[..., 0, 0], treatment[..., 0, 0])
    with np.errstate(all="ignore"):
        units = whole[..., 0, 0]
        of = [units * whole[..., each, each] / whole[..., 0, each] ** 2 for each in (columns.over, columns.under)]
        return np.asarray(np.sqrt(np.maximum(np.maximum(*of) - 1.0, 0.0) / fewer))


def sample_ratio(units: Sequence[int], weights: Sequence[float]) -> float:
    """How likely a split is at least as far from its weights as this one: Pearson's chi-square.

    >>> round(sample_ratio([5000, 5050], [1, 1]), 3), sample_ratio([50_000, 51_500], [1, 1]) < 1e-5
    (0.618, True)
    """
    total, share = sum(units), np.asarray(weights, dtype=np.float64)
    return float(stats.chisquare(units, total * share / share.sum()).pvalue) if total else 1.0


def adjusted(p_values: ArrayLike) -> Floats:
    """Benjamini and Hochberg's p-values: taking those below 0.05, at most 5 % of what is taken is false, on average.

    >>> adjusted([0.01, 0.04, 0.5, np.nan]).round(3)
    array([0.03, 0.06, 0.5 ,  nan])
    """
    values = np.asarray(p_values, dtype=np.float64)
    known = ~np.isnan(values)
    result = np.full(values.shape, np.nan)
    if known.any():
        result[known] = stats.false_discovery_control(values[known], method="bh")
    return result


def _ratio(moments: Floats, columns: Columns) -> tuple[Floats, Floats]:
    """A ratio and the variance of it."""
    over, under = moments[..., 0, columns.over], moments[..., 0, columns.under]
    ratio = over / under
    squares = _product(moments, columns, columns, ratio, ratio)
    return ratio, _scale(moments, columns, columns) * squares / under**2


def _freedom(found: Comparison, control: Floats, treatment: Floats, columns: Columns) -> Floats:
    one, two = (found.control_error / found.control) ** 2, (found.treatment_error / found.treatment) ** 2
    few, other = (np.maximum(_clusters(arm, columns.under) - 1.0, 1.0) for arm in (control, treatment))
    return np.asarray((one + two) ** 2 / (one**2 / few + two**2 / other))


def _product(moments: Floats, one: Columns, two: Columns, first: Floats, second: Floats) -> Floats:
    """Σ (x₁ − R₁ y₁)(x₂ − R₂ y₂)."""
    return np.asarray(
        moments[..., one.over, two.over]
        - second * moments[..., one.over, two.under]
        - first * moments[..., one.under, two.over]
        + first * second * moments[..., one.under, two.under]
    )


def _scale(moments: Floats, one: Columns, two: Columns) -> Floats:
    units = moments[..., 0, 0]
    leverage = [1.0 - 1.0 / _equal_units(moments, each.under) for each in (one, two)]
    return np.asarray(np.where(units > 1, (units - 1) / units / (leverage[0] * leverage[1]), np.nan))


def _equal_units(moments: Floats, under: int) -> Floats:
    """How many units of equal size have such shares of all rows."""
    return np.asarray(moments[..., 0, under] ** 2 / moments[..., under, under])


def _clusters(moments: Floats, under: int) -> Floats:
    """How many units of equal size tell as much of a variance."""
    units = moments[..., 0, 0]
    spread = units / _equal_units(moments, under) - 1.0
    return np.asarray(units * (1.0 + spread) / ((1.0 + 2.0 * spread) * (1.0 + 3.0 * spread)))


def _adjust(control: Floats, treatment: Floats, columns: Columns, before: tuple[int, int]) -> Comparison:
    earlier = Columns(*before)
    whole = control + treatment
    slope, mean = _slope(whole, columns, earlier), whole[..., 0, before[0]] / whole[..., 0, before[1]]
    values: list[Any] = []
    raw, kept = np.zeros_like(slope), np.zeros_like(slope)
    for arm in (control, treatment):
        (ratio, variance), (past, past_variance) = _ratio(arm, columns), _ratio(arm, earlier)
        shared = _covariance(arm, columns, earlier)
        usable = np.isfinite(slope * past)
        less = np.where(usable, slope**2 * past_variance - 2 * slope * shared, 0.0)
        values += [ratio - np.where(usable, slope * (past - mean), 0.0), np.sqrt(np.maximum(variance + less, 0.0))]
        raw, kept = raw + variance, kept + variance + less
    return Comparison(values[0], values[2], values[1], values[3], np.asarray(1.0 - kept / raw))


def _covariance(moments: Floats, one: Columns, two: Columns) -> Floats:
    """Of two ratios."""
    sums = moments[..., 0, :]
    first, second = sums[..., one.over] / sums[..., one.under], sums[..., two.over] / sums[..., two.under]
    products = _product(moments, one, two, first, second)
    return np.asarray(_scale(moments, one, two) * products / (sums[..., one.under] * sums[..., two.under]))


def _slope(moments: Floats, columns: Columns, earlier: Columns) -> Floats:
    variance = _ratio(moments, earlier)[1]
    return np.asarray(np.where(variance > 0, _covariance(moments, columns, earlier) / variance, 0.0))
