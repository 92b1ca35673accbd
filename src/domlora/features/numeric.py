"""Numbers as dense columns and as buckets, and what the training rows tell of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from domlora.features.columns import Column, floats_of
from domlora.features.schema import FIRST_ID, PAD_ID, Feature, Transform

__all__ = ["bucket", "fit_boundaries", "fit_numbers", "standardise"]

Floats = NDArray[np.float64]
_LARGEST = float(np.finfo(np.float32).max)


def fit_numbers(values: Floats, transform: Transform = "standard") -> tuple[float, float]:
    """Mean and standard deviation (of the population) of the transformed numbers.

    The sums are exact, so the order of rows cannot change a bit. Absent numbers (NaN), and those that no float32 holds
    once they are transformed, are left out. Numbers that never change get a deviation of 1; without any, the mean is 0.

    Args:
        values: the training rows ``(N,)``.
        transform: of the feature.

    Example:
        >>> fit_numbers(np.array([2.0, 4.0, np.nan]))
        (3.0, 1.0)
    """
    numbers = _transformed(np.asarray(values, dtype=np.float64), transform)
    numbers = numbers[np.abs(numbers) <= _LARGEST]
    if not len(numbers):
        return 0.0, 1.0
    if numbers.min() == numbers.max():  # a rounded mean would leave a deviation of 1e-17
        return float(numbers[0] + 0.0), 1.0
    mean = math.fsum(numbers) / len(numbers)
    variance = math.fsum((numbers - mean) ** 2) / len(numbers)
    return mean, math.sqrt(variance) or 1.0


def fit_boundaries(values: Floats, buckets: int) -> tuple[float, ...]:
    """Boundaries that part the numbers into about equally many a bucket.

    Of the ``N`` finite numbers in ascending order, counted from 0, these are the ones at ``k * N // buckets`` for ``k`` from
    1 to ``buckets - 1``, each once and without the smallest number. So there are fewer where numbers repeat, none where
    all are equal, and every bucket holds a training row. The order of rows does not matter.

    Args:
        values: the training rows ``(N,)``, NaN where absent.
        buckets: how many are wanted, at least 1.

    Example:
        >>> fit_boundaries(np.array([5.0, 1.0, 3.0, 4.0, 2.0, np.nan]), 2)
        (3.0,)
        >>> fit_boundaries(np.array([0.0, 0.0, 0.0, 0.0, 9.0]), 4), fit_boundaries(np.array([7.0, 7.0]), 4)
        ((), ())
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = np.sort(numbers[np.isfinite(numbers)]) + 0.0  # -0.0 becomes 0.0
    if not len(numbers):
        return ()
    chosen = np.unique(numbers[[k * len(numbers) // buckets for k in range(1, buckets)]])
    return tuple(chosen[chosen > numbers[0]].tolist())


def standardise(values: Column, feature: Feature) -> NDArray[np.float32]:
    """``(t(x) - mean) / std`` in float64, rounded to float32; 0 where x is absent or the result is not finite.

    ``t(x)`` is ``x`` or, with the transform ``log1p``, ``sign(x) log(1 + |x|)``.

    Args:
        values: numbers, texts of numbers, or absent values ``(B,)``.
        feature: the numeric feature whose transform, mean and std to use.

    Raises:
        SchemaError: a value that is not a number.

    Example:
        >>> standardise([1.0, None, "5"], Feature("age", "numeric", mean=3.0, std=2.0)).tolist()
        [-1.0, 0.0, 1.0]
        >>> standardise([-1.0, 0.0], Feature("age", "numeric", transform="log1p")).tolist()
        [-0.6931471824645996, 0.0]
    """
    numbers = _transformed(floats_of(values, feature.sources[0]), feature.transform)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((numbers - feature.mean) / feature.std).astype(np.float32)
    scaled[~np.isfinite(scaled)] = 0.0
    return scaled


def bucket(values: Column, feature: Feature) -> NDArray[np.int64]:
    """``FIRST_ID`` + the number of boundaries up to x; ``PAD_ID`` where x is absent or not finite.

    Args:
        values: numbers, texts of numbers, or absent values ``(B,)``.
        feature: the bucketed feature whose boundaries to use.

    Raises:
        SchemaError: a value that is not a number.

    Example:
        >>> bucket([9, 10, "11", None], Feature("age", "bucketed", num_ids=4, boundaries=(10.0,))).tolist()
        [2, 3, 3, 0]
    """
    numbers = floats_of(values, feature.sources[0])
    ids = FIRST_ID + np.searchsorted(np.array(feature.boundaries, dtype=np.float64), numbers, side="right")
    return np.where(np.isfinite(numbers), ids, PAD_ID).astype(np.int64)


def _transformed(numbers: Floats, transform: Transform) -> Floats:
    if transform == "standard":
        return numbers
    transformed: Floats = np.sign(numbers) * np.log1p(np.abs(numbers))
    return transformed
