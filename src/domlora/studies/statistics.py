"""How sure a difference between two methods is: means and intervals over seeds.

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
    "MINUS",
    "Interval",
    "Spread",
    "Verdict",
    "gap_closed",
    "interval_text",
    "paired",
    "score_text",
    "signed",
    "spread",
    "verdict",
]

MINUS = "\u2212"
DASH = "\u2013"

Verdict = Literal["gain", "loss", "no difference", "one run"]

_CONFIDENCE = 0.95
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


def _known(values: Iterable[float]) -> list[float]:
    return [float(value) for value in values if not math.isnan(value)]


def _std(values: Sequence[float], mean: float) -> float:
    if len(values) < 2:
        return math.nan
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _student(degrees: int) -> float:
    # scipy comes with the report extra; results can be read and a study run without it.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + _CONFIDENCE) / 2))
