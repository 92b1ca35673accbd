"""A test that may be looked at every day: boundaries that spend the chance of a false alarm as information comes in.

Lan and DeMets' spending function of the O'Brien-Fleming kind, two-sided. Early looks ask for overwhelming evidence, so that
at the planned size the boundary is close to that of a single test: with 30 looks and 5 %, 2.14 instead of 1.96. A power of
80 % costs 5 % more data. A normal mixture (mSPRT, confidence sequences), even one tuned to the planned size, asks for 3.04
there and costs 72 % more data. Such a boundary goes on for ever; ours ends at the planned size, and so does an experiment.

Looks are the ends of days of the log, and not the moments when somebody asks. All of them count, seen or not: whoever asks
more often learns nothing more. Information is that of the estimate, 1 / error², so units of very unequal size need no care.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from domlora.abtest.statistics import student
from domlora.errors import ConfigError

__all__ = ["Look", "boundaries", "crosses", "crossing_probability", "drift", "look_at", "planned_information", "spent"]

Floats = NDArray[np.float64]

_NEVER = 8.0  # in standard errors: reached by chance once in 1e15
_LEAST = 1e-10  # of the chance of a false alarm that is worth a boundary
_STEP = 0.005  # of the planned information: a look that adds less is left out
_LOOKS = 30  # that plans count on; more cost next to nothing
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)


class Look(NamedTuple):
    """One look at a lift.

    Args:
        number: from 0, by ``look_s``.
        fraction: of the planned information.
        critical: standard errors that the boundary asks for.
        z: standard errors that were found.
        lift: the estimate.
        low, high: bounds that hold at all looks together.
        crossed: whether the bounds exclude 0.
    """

    number: int
    fraction: float
    critical: float
    z: float
    lift: float
    low: float
    high: float
    crossed: bool


def spent(fraction: ArrayLike, alpha: float) -> Floats:
    """How much of the chance of a false alarm may be spent by a fraction of the information.

    On each side ``2 − 2 Φ(z / √t)`` with ``z = z(1 − α/4)``, which is α/2 at full information.

    **Source**: Lan and DeMets 1983.

    >>> spent([0.25, 0.5, 1.0], 0.05).round(5)
    array([1.00e-05, 3.05e-03, 5.00e-02])
    """
    part = np.clip(np.asarray(fraction, dtype=np.float64), 1e-12, 1.0)
    return np.asarray(4.0 * stats.norm.sf(stats.norm.isf(alpha / 4) / np.sqrt(part)))


def boundaries(fractions: ArrayLike, alpha: float) -> Floats:
    """Critical values, in standard errors, for looks at rising fractions of the information.

    Args:
        fractions: of the planned information; at 1 or above, all that is left is spent.
        alpha: the chance of a false alarm at any of the looks.

    Raises:
        ConfigError: the fractions do not rise.

    **Source**: Armitage, McPherson and Rowe 1969 (the recursion).

    >>> boundaries([0.2, 0.4, 0.6, 0.8, 1.0], 0.05).round(3)
    array([4.877, 3.357, 2.68 , 2.29 , 2.031])
    """
    times = _rising(fractions)
    allowed, walk, used = spent(times, alpha), _Walk(), 0.0
    found = []
    for time, most in zip(times, allowed, strict=True):
        walk.go_to(time)
        critical = walk.critical(most - used)
        used += walk.leave(critical)
        found.append(critical)
    return np.asarray(found)


def crossing_probability(fractions: ArrayLike, critical: ArrayLike, drift: float = 0.0) -> float:
    """The chance that a lift of ``drift`` standard errors at full information leaves the boundary at any look.

    >>> looks = [0.25, 0.5, 0.75, 1.0]
    >>> round(crossing_probability(looks, boundaries(looks, 0.05)), 4), round(crossing_probability(looks, [1.96] * 4), 4)
    (0.05, 0.1262)
    """
    walk, left = _Walk(drift), 0.0
    for time, bound in zip(_rising(fractions), np.asarray(critical, dtype=np.float64), strict=True):
        walk.go_to(time)
        left += walk.leave(float(bound))
    return left


@lru_cache(maxsize=256)
def drift(power: float, alpha: float) -> float:
    """The standard errors that a lift must measure at full information to be found with ``power``.

    A single test needs ``z(1 − α/2) + z(power)``: 2.80 for the usual 80 % and 5 %.

    >>> round(drift(0.8, 0.05), 2)
    2.87
    """
    looks = np.arange(1, _LOOKS + 1) / _LOOKS
    critical = boundaries(looks, alpha)
    single = float(stats.norm.isf(alpha / 2) + stats.norm.ppf(power))
    return float(
        optimize.brentq(
            lambda x: crossing_probability(looks, critical, x) - power, max(single - 0.1, 0.0), single + 1.0
        )
    )


def planned_information(effect: float, power: float, alpha: float) -> float:
    """1 / error² of the logarithm of a lift at which ``effect`` is found with ``power``, looks included.

    >>> round(planned_information(0.015, 0.8, 0.05))
    37163
    """
    return (drift(power, alpha) / float(np.log1p(effect))) ** 2


def look_at(
    lift: ArrayLike, error: ArrayLike, information: float, alpha: float, freedom: ArrayLike = np.inf
) -> tuple[Look, ...]:
    """The looks at a lift, up to the first one at the planned information.

    Args:
        lift: relative, of all that is known by the end of each look; NaN where nothing is.
        error: standard errors of log(1 + lift).
        information: the planned one.
        alpha: the chance of a false alarm at any look.
        freedom: degrees of freedom of the errors, see :func:`domlora.abtest.statistics.student`.
    """
    values, errors = np.asarray(lift, dtype=np.float64), np.asarray(error, dtype=np.float64)
    with np.errstate(all="ignore"):
        fractions = 1.0 / (errors**2 * information)
    chosen = _informative(values, fractions)
    if not chosen:
        return ()
    critical = student(boundaries(fractions[chosen], alpha), np.broadcast_to(freedom, values.shape)[chosen])
    return tuple(
        _look(number, float(fractions[number]), float(bound), float(values[number]), float(errors[number]))
        for number, bound in zip(chosen, critical, strict=True)
    )


def crosses(z: ArrayLike, fractions: ArrayLike, alpha: float) -> bool:
    """Whether any look up to the first one at the plan leaves its boundary.

    Args:
        z: standard errors by look; NaN where nothing is known.
        fractions: of the planned information.
        alpha: the chance of a false alarm at any look.

    >>> crosses([1.0, 2.3, 2.5], [0.3, 0.6, 0.9], 0.01), crosses([1.0, 2.3, 2.5], [0.3, 0.6, 0.9], 0.05)
    (False, True)
    """
    values, parts = np.asarray(z, dtype=np.float64), np.asarray(fractions, dtype=np.float64)
    chosen = _informative(np.where(np.isfinite(values), 0.0, np.nan), parts)
    return bool(chosen) and bool((np.abs(values[chosen]) > boundaries(parts[chosen], alpha)).any())


def _look(number: int, fraction: float, critical: float, lift: float, error: float) -> Look:
    center, width = float(np.log1p(lift)), critical * error
    low, high = float(np.expm1(center - width)), float(np.expm1(center + width))
    return Look(number, fraction, critical, center / error, lift, low, high, not low <= 0.0 <= high)


def _informative(values: Floats, fractions: Floats) -> list[int]:
    """Looks that add information; the first one at the plan is the last."""
    chosen: list[int] = []
    reached = 0.0
    for number, fraction in enumerate(fractions):
        known = np.isfinite(values[number]) and values[number] > -1.0 and np.isfinite(fraction)
        if known and fraction >= reached + _STEP:
            chosen.append(number)
            reached = float(fraction)
            if reached >= 1.0:
                break
    return chosen


def _rising(fractions: ArrayLike) -> Floats:
    times = np.asarray(fractions, dtype=np.float64)
    if times.ndim != 1 or not len(times) or times[0] <= 0 or (np.diff(times) <= 0).any():
        raise ConfigError("fractions of the information must rise from above 0", received=fractions)
    return times


class _Walk:
    """Where a random walk is that has not left the boundary yet: a density on Gauss-Legendre nodes."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.time, self.step = drift, 0.0, 0.0
        self.places, self.weights = np.zeros(1), np.ones(1)  # weights hold the density

    def go_to(self, time: float) -> None:
        self.time, self.step = time, time - self.time

    def critical(self, allowed: float) -> float:
        """The boundary here that is left with this chance."""
        if allowed < _LEAST or self._outside(_NEVER) > allowed:
            return _NEVER
        return float(optimize.brentq(lambda bound: self._outside(bound) - allowed, 0.0, _NEVER, xtol=1e-7))

    def leave(self, critical: float) -> float:
        """The chance of leaving here; what stays inside goes on."""
        gone, bound = self._outside(critical), critical * np.sqrt(self.time)
        places = bound * _NODES
        distance = (places[:, None] - self.places - self.drift * self.step) / np.sqrt(self.step)
        density = np.exp(-0.5 * distance**2) @ self.weights / np.sqrt(2 * np.pi * self.step)
        self.places, self.weights = places, density * bound * _WEIGHTS
        return gone

    def _outside(self, critical: float) -> float:
        bound, center = critical * np.sqrt(self.time), self.places + self.drift * self.step
        scale = np.sqrt(self.step)
        above, below = special.ndtr((center - bound) / scale), special.ndtr((-bound - center) / scale)
        return float((above + below) @ self.weights)
