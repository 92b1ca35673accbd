"""How sure a difference between two methods is: means, intervals and p-values over seeds.

Two runs of the same dataset, model and seed start from the same numbers, so their *difference* varies much less from
seed to seed than either of them does. All intervals here are of such paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from domlora.errors import DataError

__all__ = [
    "DASH",
    "LEVEL",
    "MINUS",
    "Interval",
    "Spread",
    "Verdict",
    "gap_closed",
    "holm",
    "interval_text",
    "p_text",
    "p_value",
    "paired",
    "score_text",
    "signed",
    "spread",
    "verdict",
]

MINUS = "\u2212"
DASH = "\u2013"

Verdict = Literal["gain", "loss", "no difference", "one run"]

LEVEL = 0.05
"""How often a test may find what is not there: intervals hold the truth in 1 - LEVEL of all studies."""

_NOTHING = (math.nan, math.nan, math.nan)


class Interval(NamedTuple):
    """A mean over pairs and the ends of its 95 % interval; the ends are NaN with fewer than two pairs."""

    mean: float
    low: float
    high: float
    num_pairs: int


class Spread(NamedTuple):
    """Values over seeds: mean, sample standard deviation (NaN for one value), least, greatest and how many."""

    mean: float
    std: float
    low: float
    high: float
    num_values: int


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation; NaN values are left out and not counted.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, std=1.4142135623730951, low=1.0, high=3.0, num_values=2)
    """
    known = _known(values)
    if not known:
        return Spread(*_NOTHING, math.nan, 0)
    mean = math.fsum(known) / len(known)
    return Spread(mean, _std(known, mean), min(known), max(known), len(known))


def paired(differences: Iterable[float]) -> Interval:
    """Student's interval of a mean of paired differences: ``mean +- t(0.975, n - 1) std / sqrt(n)``.

    It takes the differences for independent draws from one roughly normal distribution. With few seeds it is wide, and
    should be.

    Args:
        differences: method minus base, one value a seed; NaN (a run without this number) is left out and not counted.

    Example:
        >>> mean, low, high, num_pairs = paired([1.0, 2.0, 3.0])
        >>> mean, round(low, 4), round(high, 4), num_pairs
        (2.0, -0.4841, 4.4841, 3)
        >>> paired([0.5])
        Interval(mean=0.5, low=nan, high=nan, num_pairs=1)
    """
    known = _known(differences)
    if not known:
        return Interval(*_NOTHING, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = _student(len(known) - 1) * _std(known, mean) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def verdict(interval: Interval) -> Verdict:
    """The interval in a word: ``gain`` or ``loss`` only where it lies wholly on one side of zero.

    ``no difference`` means that these runs cannot tell the methods apart, not that they are proven equal. ``one run``
    is what fewer than two pairs are called.

    >>> verdict(Interval(0.12, -0.05, 0.29, 5)), verdict(Interval(0.12, 0.01, 0.23, 5))
    ('no difference', 'gain')
    """
    if interval.num_pairs < 2:
        return "one run"
    if interval.low > 0:
        return "gain"
    return "loss" if interval.high < 0 else "no difference"


def p_value(interval: Interval) -> float:
    """Two-sided p-value of Student's paired test: how often no difference at all would look like this one or larger.

    It is the test that the interval comes from: below ``LEVEL`` just where the interval excludes zero. NaN for fewer than
    two pairs; 0 for equal differences that are not zero, which leave no width.

    >>> round(p_value(paired([1.0, 2.0, 3.0])), 4), p_value(paired([0.0, 0.0])), p_value(paired([0.5]))
    (0.0742, 1.0, nan)
    """
    from scipy.special import stdtr

    if interval.num_pairs < 2:
        return math.nan
    degrees, half = interval.num_pairs - 1, (interval.high - interval.low) / 2
    if half == 0:
        return 0.0 if interval.mean else 1.0
    return float(2 * stdtr(degrees, -abs(interval.mean) / half * _student(degrees)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's correction: p-values of several tests, adjusted so that any false finding among them has a chance of ``LEVEL``.

    The i-th smallest of m becomes ``max over j <= i of (m - j + 1) p_j``, at most 1. It holds however the tests depend on
    each other. NaN (no test) stays NaN and does not count.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979), in the form of adjusted p-values.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min((len(known) - rank) * p, 1.0))
        adjusted[place] = largest
    return tuple(adjusted)


def gap_closed(base: Sequence[float], method: Sequence[float], truth: Sequence[float]) -> Interval:
    """Share of the way from the base to the truth that a method goes: ``(method - base) / (truth - base)``, over seeds.

    1 is what the true click probabilities get, 0 the base, below 0 is worse than the base. All NaN if a base is not
    below the truth: leaving out only such seeds would flatter the method.

    Raises:
        DataError: unequal numbers of values.

    Example:
        >>> gap_closed([0.5, 0.5], [0.625, 0.625], [0.75, 0.75])
        Interval(mean=0.5, low=0.5, high=0.5, num_pairs=2)
    """
    sizes = (len(base), len(method), len(truth))
    if len(set(sizes)) > 1:
        raise DataError("base, method and truth need one value a seed", received=sizes)
    runs = list(zip(base, method, truth, strict=True))
    if any(not true > before for before, _, true in runs):
        return Interval(*_NOTHING, len(runs))
    return paired((after - before) / (true - before) for before, after, true in runs)


def signed(value: float, digits: int = 2) -> str:
    """A difference in points with its sign; a sign before zeros tells on which side of zero a rounded value lies.

    >>> signed(0.00123), signed(0.0), signed(-0.00001)
    ('+0.12', '0.00', '\u22120.00')
    """
    if math.isnan(value):
        return DASH
    return f"{100 * value:+.{digits}f}".replace("-", MINUS) if value else f"{0:.{digits}f}"


def score_text(score: Spread) -> str:
    """Mean and standard deviation in points.

    >>> score_text(spread([0.79, 0.80]))
    '79.50 ± 0.71'
    """
    if not score.num_values:
        return DASH
    around = f" ± {100 * score.std:.2f}" if score.num_values > 1 else ""
    return f"{100 * score.mean:.2f}{around}"


def interval_text(interval: Interval) -> str:
    """A difference in points and, of two pairs or more, its interval.

    >>> interval_text(Interval(0.0012, 0.0002, 0.0022, 5))
    '+0.12 [+0.02, +0.22]'
    """
    if interval.num_pairs < 2:
        return signed(interval.mean)
    return f"{signed(interval.mean)} [{signed(interval.low)}, {signed(interval.high)}]"


def p_text(p: float) -> str:
    """A p-value with two digits that count.

    >>> p_text(0.0312), p_text(0.2), p_text(0.00001), p_text(math.nan)
    ('0.031', '0.20', '< 0.001', '–')
    """
    if math.isnan(p):
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _known(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if not math.isnan(value)]


def _std(values: Sequence[float], mean: float) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _student(degrees: int) -> float:
    # scipy comes with the report extra; results can be read and a study run without it.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 1 - LEVEL / 2))
