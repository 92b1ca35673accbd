"""What another policy would have earned, from a log whose choices were random with known probabilities.

A row is one choice: the log chose an item with probability ``logged`` and earned ``reward``; the other policy would have
chosen this item with probability ``target``. Without chance in the log (one ranking for everybody) nothing can be said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from domlora.errors import ConfigError, DataError

__all__ = ["Estimate", "Interval", "direct", "doubly_robust", "effective_rows", "importance_weights", "ips", "snips"]

Array = NDArray[np.float64]
Interval = Literal["log", "normal", "bootstrap"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A policy's mean reward.

    Args:
        value: the estimate.
        low, high: its interval.
        std_error: of the value, with what was told of clusters.
        num_rows: that the log has.
        effective_rows: how many rows of the policy itself would say as much, ``(sum w)^2 / sum w^2``; below some hundred, no
            interval is to be trusted.
    """

    value: float
    low: float
    high: float
    std_error: float
    num_rows: int
    effective_rows: float


def importance_weights(target: ArrayLike, logged: ArrayLike, *, clip: float | None = None) -> Array:
    """``w = target / logged`` of the chosen item, ``(B,)``.

    Args:
        target: probability with which the other policy would have chosen it.
        logged: probability with which the log did, above 0.
        clip: the largest weight; less variance for a bias. With rewards that are not negative, a clipped ``ips`` is too low
            in the mean, never too high.

    Raises:
        DataError: no probabilities.

    Example:
        >>> importance_weights([0.5, 0.1], [0.05, 0.1], clip=5.0).tolist()
        [5.0, 1.0]
    """
    target, logged = np.asarray(target, np.float64), np.asarray(logged, np.float64)
    if target.shape != logged.shape or target.ndim != 1 or not len(target):
        raise DataError("each row needs both probabilities", received=(target.shape, logged.shape))
    if not (np.all((logged > 0) & (logged <= 1)) and np.all((target >= 0) & (target <= 1))):
        raise DataError(
            "probabilities must lie between 0 and 1, those of the log above 0",
            received=(float(logged.min()), float(target.max())),
            next_step="Leave rows out whose choice was not random",
        )
    if clip is not None and not clip > 0:
        raise ConfigError("the largest weight must be above 0", received=clip)
    weight: Array = target / logged
    return weight if clip is None else np.minimum(weight, clip)


def effective_rows(weight: Array) -> float:
    """``(sum w)^2 / sum w^2``.

    >>> effective_rows(np.array([1.0, 1.0, 0.0, 0.0]))
    2.0
    """
    squares = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / squares if squares else 0.0


def ips(
    reward: ArrayLike,
    weight: Array,
    *,
    cluster: ArrayLike | None = None,
    interval: Interval = "log",
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Inverse propensity scores, ``mean(w r)``: unbiased, of large variance.

    Args:
        reward: of each row.
        weight: see :func:`importance_weights`.
        cluster: whose row it is, such as the unit; rows of one are not independent. None for all of their own.
        interval: ``log`` is ``value exp(+-z se / value)``, for rewards that are rare and not negative; ``normal`` is
            symmetric; ``bootstrap`` draws clusters 1,000 times.
        confidence: of the interval.
        seed: of the bootstrap.

    **Source**: Horvitz and Thompson 1952; for policies Precup et al. 2000.

    Example:
        >>> ips([1.0, 0.0, 1.0, 0.0], np.array([2.0, 0.0, 0.0, 2.0])).value
        0.5
    """
    reward, weight = _rows(reward, weight)
    return _ratio(weight * reward, np.ones_like(weight), weight, cluster, interval, confidence, seed)


def snips(
    reward: ArrayLike,
    weight: Array,
    *,
    cluster: ArrayLike | None = None,
    interval: Interval = "log",
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Self-normalized ``ips``, ``sum(w r) / sum(w)``: always within the rewards, of less variance, with a bias of order 1/B.

    The arguments are those of :func:`ips`; the standard error is the delta method's.

    **Source**: Swaminathan and Joachims 2015.

    Example:
        >>> round(snips([1.0, 0.0, 1.0], np.array([2.0, 1.0, 0.0])).value, 4)
        0.6667
    """
    reward, weight = _rows(reward, weight)
    return _ratio(weight * reward, weight, weight, cluster, interval, confidence, seed)


def doubly_robust(
    reward: ArrayLike,
    weight: Array,
    predicted: ArrayLike,
    expected: ArrayLike,
    *,
    cluster: ArrayLike | None = None,
    interval: Interval = "normal",
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """``mean(q(x, pi) + w (r - q(x, a)))``: right if the weights or the predictions are, of less variance if both are.

    The other arguments are those of :func:`ips`.

    Args:
        reward, weight: of each row.
        predicted: ``q(x, a)``, the reward a model expects of the chosen item; of a model that has not seen the row.
        expected: ``q(x, pi)``, the mean of it over the other policy's choices.
        cluster, interval, confidence, seed: as above.

    **Source**: Dudik, Langford and Li 2011.

    Example:
        >>> weight = np.array([2.0, 0.0])
        >>> doubly_robust([1.0, 0.0], weight, predicted=[0.5, 0.5], expected=[0.5, 0.5]).value
        1.0
    """
    reward, weight = _rows(reward, weight)
    predicted, expected = _rows(predicted, expected)
    if len(predicted) != len(reward):
        raise DataError("each row needs its predictions", received=(len(reward), len(predicted)))
    terms = expected + weight * (reward - predicted)
    return _ratio(terms, np.ones_like(terms), weight, cluster, interval, confidence, seed)


def direct(expected: ArrayLike, *, cluster: ArrayLike | None = None, confidence: float = 0.95) -> Estimate:
    """``mean(q(x, pi))``, the model's word alone; its interval knows nothing of the model's error.

    Args:
        expected: see :func:`doubly_robust`.
        cluster, confidence: see :func:`ips`.
    """
    expected = np.asarray(expected, np.float64)
    ones = np.ones_like(expected)
    return _ratio(expected, ones, ones, cluster, "normal", confidence, 0)


def _rows(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise DataError("each row needs one value of each", received=(first.shape, second.shape))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("values must be finite")
    return first, second


def _ratio(
    top: Array,
    bottom: Array,
    weight: Array,
    cluster: ArrayLike | None,
    interval: Interval,
    confidence: float,
    seed: int,
) -> Estimate:
    """``sum(top) / sum(bottom)`` over independent clusters of rows."""
    num_rows, effective = len(top), effective_rows(weight)
    if cluster is not None:
        _, number = np.unique(np.asarray(cluster), return_inverse=True)
        top, bottom = (np.bincount(number, each).astype(np.float64) for each in (top, bottom))
    if not bottom.sum() > 0:
        raise DataError("the policies must share choices", next_step="Log with more chance, or compare another policy")
    value = float(top.sum() / bottom.sum())
    count = len(top)
    spread = float(np.square(top - value * bottom).sum()) * count / max(count - 1, 1)
    std_error = math.sqrt(spread) / float(bottom.sum())
    if interval not in _INTERVALS:
        raise ConfigError("unknown interval", received=interval, next_step=f"Known: {', '.join(_INTERVALS)}")
    low, high = _INTERVALS[interval](value, std_error, confidence, top, bottom, seed)
    return Estimate(value, low, high, std_error, num_rows, effective)


def _normal(value: float, error: float, confidence: float, *_: object) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return value - z * error, value + z * error


def _log(value: float, error: float, confidence: float, *rest: object) -> tuple[float, float]:
    if value <= 0:
        return _normal(value, error, confidence, *rest)
    stretch = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * error / value)
    return value / stretch, value * stretch


def _bootstrap(
    value: float, error: float, confidence: float, top: Array, bottom: Array, seed: int
) -> tuple[float, float]:
    del value, error
    random = np.random.default_rng(seed)
    drawn = np.empty(1000)
    for number in range(len(drawn)):
        times = random.multinomial(len(top), np.full(len(top), 1 / len(top)))
        drawn[number] = times @ top / max(float(times @ bottom), np.finfo(np.float64).tiny)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


_INTERVALS: dict[str, Callable[..., tuple[float, float]]] = {"log": _log, "normal": _normal, "bootstrap": _bootstrap}
