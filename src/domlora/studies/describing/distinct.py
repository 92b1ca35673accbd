"""Distinct values by group: exact as far as memory is meant to go, from a sample of the values beyond that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LIMIT", "Distinct", "distinct", "elsewhere", "holds", "in_common"]

LIMIT = 1 << 24
"""Distinct values over all groups, 8 bytes each, up to which they are counted exactly."""

_WAITING = 1 << 21
"""Values that wait to be sorted in: enough to make a merge worth its cost."""
_GOLDEN, _OFFSET = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)

Values = NDArray[np.int64]


class Distinct:
    """Which values occur in which group, such as users in domains.

    Each group holds a sorted array of its distinct values. When all of them together are more than ``limit``, one in two
    values is kept, chosen by a hash of the value, then one in four, and so on. All groups keep the same values, so shares
    between groups (overlap, new users) stay unbiased; counts are to be multiplied by ``scale``.

    Args:
        num_groups: groups are numbered from 0.
        limit: how many values are kept.

    Example:
        >>> users = Distinct(num_groups=2)
        >>> users.add(np.array([0, 0, 1]), np.array([7, 7, 8]))
        >>> users.of(0).tolist(), users.of(0, 1).tolist(), users.scale
        ([7], [7, 8], 1)
    """

    def __init__(self, num_groups: int, limit: int = LIMIT) -> None:
        self.limit = limit
        self._known: list[Values] = [np.empty(0, np.int64)] * num_groups
        self._waiting: list[tuple[NDArray[np.int64], Values]] = []
        self._num_waiting = 0
        self._halvings = 0

    @property
    def scale(self) -> int:
        """1 if counting is exact, else one in so many values is kept."""
        self._merge()
        return 1 << self._halvings

    def add(self, groups: NDArray[np.int64], values: Values) -> None:
        """Values and the group of each, ``(B,)`` both."""
        chosen = self._keeps(values)
        self._waiting.append((groups[chosen], values[chosen]))
        self._num_waiting += len(self._waiting[-1][1])
        if self._num_waiting >= _WAITING:
            self._merge()

    def weights(self, values: Values) -> Values:
        """How many values each stands for at this time: 1, or where not all are kept 0 or more than 1."""
        return self._keeps(values).astype(np.int64) << self._halvings

    def of(self, *groups: int) -> Values:
        """The distinct values of one group, or of several together; sorted."""
        self._merge()
        return self._known[groups[0]] if len(groups) == 1 else distinct(self._known[group] for group in groups)

    def _keeps(self, values: Values) -> NDArray[np.bool_]:
        if not self._halvings:
            return np.ones(len(values), np.bool_)
        hashed = (values.astype(np.uint64) ^ _OFFSET) * _GOLDEN
        return np.asarray((hashed >> np.uint64(64 - self._halvings)) == 0)

    def _merge(self) -> None:
        """Sort in what waits: by group, then each group's values together with those it has."""
        if not self._waiting:
            return
        groups, values = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        if len(self._known) < 2**15:
            groups = groups.astype(np.int16)  # numpy sorts 16 bits by radix, several times faster
        order = np.argsort(groups, kind="stable")
        ends = np.searchsorted(groups[order], np.arange(len(self._known) + 1))
        values = values[order]
        for group in np.flatnonzero(np.diff(ends)):
            self._known[group] = distinct((self._known[group], values[ends[group] : ends[group + 1]]))
        while sum(map(len, self._known)) > self.limit and self._halvings < 63:
            self._halvings += 1
            self._known = [known[self._keeps(known)] for known in self._known]


def distinct(parts: Iterable[Values]) -> Values:
    """The distinct values of some arrays, sorted.

    >>> distinct([np.array([3, 1]), np.array([1, 2])]).tolist()
    [1, 2, 3]
    """
    values = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))  # far faster than np.unique, which hashes
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return np.asarray(values[first])


def holds(known: Values, values: Values) -> NDArray[np.bool_]:
    """Which values are among known ones, which are sorted.

    >>> holds(np.array([2, 4]), np.array([1, 2, 9])).tolist()
    [False, True, False]
    """
    if not len(known):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.asarray(known[places] == values)


def in_common(sets: Sequence[Values]) -> NDArray[np.int64]:
    """How many values two sets have in common, for each pair of sorted sets: ``(N, N)``.

    >>> in_common([np.array([1, 2, 3]), np.array([3, 4])]).tolist()
    [[3, 1], [1, 2]]
    """
    counts = np.diag([len(values) for values in sets]).astype(np.int64)
    for row, mine in enumerate(sets):
        for column in range(row):
            small, large = sorted((mine, sets[column]), key=len)
            counts[row, column] = counts[column, row] = np.count_nonzero(holds(large, small))
    return counts


def elsewhere(sets: Sequence[Values]) -> list[int]:
    """How many values of each sorted set also occur in another.

    >>> elsewhere([np.array([1, 2, 3]), np.array([3, 4]), np.array([2])])
    [2, 1, 1]
    """
    every = np.sort(np.concatenate([np.empty(0, np.int64), *sets]))
    repeated = distinct([every[1:][every[1:] == every[:-1]]])
    return [int(np.count_nonzero(holds(repeated, values))) for values in sets]
