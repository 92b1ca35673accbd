"""Rows as all metrics read them: checked once, then summed by group.

The rules of the values are in ``domlora.evaluation.metrics``; what breaks them is refused here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from domlora.errors import ConfigError, DataError, nearest

__all__ = [
    "Bools",
    "Floats",
    "Ints",
    "Rows",
    "Weight",
    "compact",
    "mean_by_group",
    "one_of",
    "ratio",
    "read_rows",
    "same_length",
    "sum_by",
    "sum_by_group",
]

Weight: TypeAlias = ArrayLike | None
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Rows(NamedTuple):
    """What was checked: labels, scores, weights and groups of ``(B,)``, and how many groups there are."""

    label: Bools
    score: NDArray[np.floating[Any]]
    weight: Floats
    group: Ints
    num_groups: int


def read_rows(
    label: ArrayLike,
    probability: ArrayLike,
    weight: Weight = None,
    group: ArrayLike | None = None,
    num_groups: int | None = None,
    *,
    bounded: bool = False,
) -> Rows:
    """Look at all values once. ``bounded``: scores must be probabilities, not just an order."""
    labels = np.asarray(label)
    if labels.ndim != 1 or labels.size == 0:
        raise DataError("a metric needs at least one row, in arrays of one axis", received=labels.shape)
    _refuse("label must be 0 or 1", (labels != 0) & (labels != 1), labels)
    score = np.asarray(probability)
    same_length(labels, score, "probability")
    score = score if score.dtype == np.float32 else score.astype(np.float64)
    _refuse("probability must not be NaN", np.isnan(score), score)
    if bounded:
        _refuse("probability must be in 0..1 (apply the sigmoid to logits)", (score < 0) | (score > 1), score)
    weights = np.ones(labels.size) if weight is None else np.asarray(weight, dtype=np.float64)
    same_length(labels, weights, "weight")
    _refuse("weight must be finite and not negative", ~(np.isfinite(weights) & (weights >= 0)), weights)
    groups = np.zeros(labels.size, dtype=np.int64) if group is None else _integers("group", group)
    same_length(labels, groups, "group")
    count = int(groups.max()) + 1 if num_groups is None else num_groups
    _refuse(f"group must be in 0..{count - 1}", (groups < 0) | (groups >= count), groups)
    return Rows(labels.astype(np.bool_), score, weights, groups, count)


def _integers(name: str, values: ArrayLike) -> Ints:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} must be integers", received=str(array.dtype), next_step="Number their names first")
    return array.astype(np.int64, copy=False)


def same_length(labels: NDArray[Any], values: NDArray[Any], name: str) -> None:
    """Refuse values that are not one for each label."""
    if values.shape != labels.shape:
        raise DataError(f"{name} must be as long as label, {labels.shape}", received=values.shape)


def _refuse(rule: str, bad: Bools, values: NDArray[Any]) -> None:
    if bad.any():
        rows = np.flatnonzero(bad)
        which = f"Broken by {rows.size} of {bad.size} rows, the first of them {rows[:5].tolist()}"
        raise DataError(rule, received=values[rows[:5]].tolist(), next_step=which)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not known, with the nearest that is."""
    if value not in known:
        raise ConfigError(f"{name} is not known", received=value, next_step=nearest(str(value), known))


def compact(group: ArrayLike) -> tuple[Ints, int]:
    """Any integers as 0..n-1 in their order, each of the n in use."""
    values = _integers("domain and user", group)
    low = int(values.min(initial=0))
    span = int(values.max(initial=0)) - low + 1
    if span > 4 * values.size + 1024:
        known, index = np.unique(values, return_inverse=True)
        return index, known.size
    used: Bools = np.bincount(values - low, minlength=span) > 0  # a table instead of a sort
    return (np.cumsum(used) - 1)[values - low], int(np.count_nonzero(used))


def sum_by(group: Ints, values: NDArray[Any], num_groups: int) -> Floats:
    """Sum of values ``(B,)`` in each group."""
    return np.bincount(group, values, num_groups).astype(np.float64, copy=False)


def sum_by_group(values: Any, rows: Rows) -> Floats:
    """Weighted sum of values, ``(B,)`` or one number, in each group of the rows."""
    return sum_by(rows.group, values * rows.weight, rows.num_groups)


def mean_by_group(values: Any, rows: Rows) -> Floats:
    """Weighted mean of values in each group of the rows, NaN without weight."""
    return ratio(sum_by_group(values, rows), sum_by_group(1.0, rows))


def ratio(top: Any, bottom: Any) -> Floats:
    """Division that answers NaN, without a warning, where the divisor is 0."""
    bottom = np.asarray(bottom, dtype=np.float64)
    quotient: Floats = np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom != 0)
    return quotient
