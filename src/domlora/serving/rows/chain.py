"""Which push holds each row of a version. Needs numpy alone.

A version whose table was pushed after an earlier one holds the rows that changed, and says where the others lie in the
table before. So no row is ever looked for in two places, and one that is missing is missing: an older one never stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from domlora.serving.rows.layout import Rows

__all__ = ["Chain", "Level"]

NUMBER_BITS = 44


class Level(NamedTuple):
    """What one push holds.

    Args:
        push: a number of it in this process.
        changed: rows that it holds, in order; None for all.
        starts, shifts: rows from ``starts[i]`` on that are not among them are ``shifts[i]`` further on in the level below.
    """

    push: int
    changed: Rows | None = None
    starts: Rows | None = None
    shifts: Rows | None = None


class Chain:
    """The levels of a table, its own first, the last one whole.

    Example:
        >>> below, above = Level(0), Level(1, np.array([5]), np.array([0, 3]), np.array([0, -1]))
        >>> codes = Chain([above, below]).codes(np.array([2, 4, 5]))
        >>> [(code >> NUMBER_BITS, code & (1 << NUMBER_BITS) - 1) for code in codes.tolist()]
        [(0, 2), (0, 3), (1, 5)]
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        self._levels = levels

    def codes(self, numbers: Rows) -> Rows:
        """Push and number in it of each row, as one integer."""
        codes, places, rest = np.empty_like(numbers), np.arange(len(numbers)), numbers
        for level in self._levels:
            if level.changed is None or level.starts is None or level.shifts is None:
                codes[places] = rest + (level.push << NUMBER_BITS)
                break
            own = _among(rest, level.changed)
            codes[places[own]] = rest[own] + (level.push << NUMBER_BITS)
            places, rest = places[~own], rest[~own]
            rest = rest + level.shifts[np.searchsorted(level.starts, rest, "right") - 1]
        return codes


def _among(numbers: Rows, known: Rows) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(numbers), bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, numbers), len(known) - 1)] == numbers
    return found
