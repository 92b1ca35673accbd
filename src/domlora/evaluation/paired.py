"""Two models on the same rows: is one better in a group, and by more than chance?"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from domlora.evaluation.rows import Floats, Ints, compact, read_rows

__all__ = ["Difference", "Differences", "auc_differences", "wauc_difference"]


class Difference(NamedTuple):
    """One figure less another, and the standard error of that."""

    value: float
    standard_error: float


class Differences(NamedTuple):
    """By group: AUC of one model minus that of the other, and its standard error; NaN where a group lacks a class."""

    value: Floats
    standard_error: Floats


def auc_differences(
    label: ArrayLike, probability: ArrayLike, other: ArrayLike, group: ArrayLike, num_groups: int | None = None
) -> Differences:
    """AUC of ``probability`` minus AUC of ``other`` in each group, with the standard error of a paired comparison.

    A row's part in an AUC is the share of the rows of the other class that it is right about, ties counting half. The
    variance of the difference is that of these parts' differences, among positives and among negatives, each over their
    number; NaN where a group has fewer than two rows of a class. Rows are not weighted.

    **Source**: DeLong, DeLong and Clarke-Pearson 1988.

    >>> better = auc_differences([0, 1, 0, 1, 1, 0], [0.1, 0.9, 0.2, 0.8, 0.4, 0.3], [0.1, 0.9, 0.5, 0.4, 0.3, 0.4], [0] * 6)
    >>> better.value.round(3), better.standard_error.round(3)
    (array([0.389]), array([0.283]))
    """
    one = read_rows(label, probability, None, group, num_groups)
    two = read_rows(label, other, None, group, num_groups)
    value, error = np.full(one.num_groups, np.nan), np.full(one.num_groups, np.nan)
    order = np.argsort(one.group, kind="stable")
    ends = np.cumsum(np.bincount(one.group, minlength=one.num_groups))
    for number, rows in enumerate(np.split(order, ends[:-1])):
        positive, negative = rows[one.label[rows]], rows[~one.label[rows]]
        if not (len(positive) and len(negative)):
            continue
        above = _shares(one.score, positive, negative) - _shares(two.score, positive, negative)
        below = _shares(two.score, negative, positive) - _shares(one.score, negative, positive)
        value[number] = above.mean()
        if min(len(positive), len(negative)) > 1:
            error[number] = np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
    return Differences(value, error)


def wauc_difference(label: ArrayLike, probability: ArrayLike, other: ArrayLike, domain: ArrayLike) -> Difference:
    """WAUC of ``probability`` minus WAUC of ``other``, with the standard error of a paired comparison.

    Domains are independent samples: the variance is the sum of theirs, each by the square of its share of the rows. Domains
    of one class are left out, as in :func:`domlora.evaluation.metrics.wauc`; one whose error is unknown counts as without.

    >>> one, other = [0.1, 0.2, 0.9, 0.8, 0.7], [0.2, 0.1, 0.9, 0.8, 0.7]
    >>> found = wauc_difference([0, 1, 0, 1, 1], one, other, domain=[0, 0, 1, 1, 1])
    >>> found.value, found.standard_error
    (0.4, 0.0)
    """
    group, num_groups = compact(domain)
    found = auc_differences(label, probability, other, group, num_groups)
    scored = ~np.isnan(found.value)
    rows = np.bincount(group, minlength=num_groups)[scored]
    share = rows / rows.sum()
    variance = np.nan_to_num(found.standard_error[scored]) ** 2
    return Difference(float(share @ found.value[scored]), float(np.sqrt(share**2 @ variance)))


def _shares(score: NDArray[np.floating[Any]], rows: Ints, others: Ints) -> Floats:
    """Of each row: the share of the others whose score is smaller, ties counting half."""
    ranked = np.sort(score[others])
    places = np.searchsorted(ranked, score[rows], "left") + np.searchsorted(ranked, score[rows], "right")
    return places.astype(np.float64) / (2 * len(others))
