"""Two rankings in one list: who is clicked more, within the same user and the same moment.

Needs far fewer users than a test of two arms, and answers less: which ranking is preferred, not by how many clicks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from domlora.errors import ConfigError, DataError

__all__ = ["Draft", "Preference", "credit", "preference", "team_draft"]


class Draft(NamedTuple):
    """A list to show.

    Args:
        items: in the order in which they are shown.
        teams: 0 or 1, the ranking that put each there.
    """

    items: tuple[Hashable, ...]
    teams: tuple[int, ...]


def team_draft(
    first: Sequence[Hashable], second: Sequence[Hashable], length: int, random: np.random.Generator
) -> Draft:
    """Two rankings take turns, in each round the lot decides who begins; each takes its best item that is not there yet.

    Args:
        first, second: items, the best first.
        length: of the list; shorter if both rankings end before.
        random: the lot. Made of the request's id, the same request gets the same list.

    Raises:
        ConfigError: a length below 1.

    **Source**: Radlinski, Kurup and Joachims 2008.

    Example:
        >>> team_draft(["a", "b", "c"], ["b", "d", "a"], 4, np.random.default_rng(0))
        Draft(items=('b', 'a', 'd', 'c'), teams=(1, 0, 1, 0))
    """
    if length < 1:
        raise ConfigError("an interleaved list needs at least one item", received=length)
    left = (iter(first), iter(second))
    taken: dict[Hashable, int] = {}
    while len(taken) < length:
        begins = int(random.integers(2))
        picked = [_pick(left[team], team, taken) for team in (begins, 1 - begins) if len(taken) < length]
        if not any(picked):
            break
    return Draft(tuple(taken), tuple(taken.values()))


def credit(draft: Draft, clicked: Iterable[int]) -> int:
    """Clicks on the second ranking's items less those on the first one's; each place counts once.

    Args:
        draft: what was shown.
        clicked: places, 0 for the uppermost.

    >>> credit(Draft(("b", "a", "d"), (1, 0, 1)), [0, 2, 2])
    2
    """
    return sum(2 * draft.teams[place] - 1 for place in set(clicked))


@dataclass(frozen=True, slots=True)
class Preference:
    """Which ranking users prefer.

    Args:
        wins, losses, ties: units that clicked more on the second ranking, on the first, and on both alike.
        share: of the second ranking in units that are no ties; 0.5 where there is no difference.
        low, high: its 95 % interval (Clopper and Pearson).
        p_value: of the sign test over units, exact.
        mean: credit a unit, above 0 where the second ranking is preferred.
        mean_low, mean_high: its 95 % interval.
    """

    wins: int
    losses: int
    ties: int
    share: float
    low: float
    high: float
    p_value: float
    mean: float
    mean_low: float
    mean_high: float


def preference(units: Sequence[Hashable], scores: ArrayLike) -> Preference:
    """The sign test over units: all lists of a unit are one observation, since they are not independent.

    Args:
        units: who saw each list.
        scores: see :func:`credit`, one a list.

    Raises:
        DataError: no lists, or not one credit each.

    Example:
        >>> found = preference(["u1", "u1", "u2", "u3"], [1, 1, -1, 0])
        >>> found.wins, found.losses, found.ties, found.p_value
        (1, 1, 1, 1.0)
    """
    values = np.asarray(scores, np.float64)
    if not len(units) or values.shape != (len(units),):
        raise DataError("each list needs its unit and its credit", received=(len(units), values.shape))
    _, number = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    totals = np.bincount(number, values).astype(np.float64)
    wins, losses = int((totals > 0).sum()), int((totals < 0).sum())
    mean, error = float(totals.mean()), _std_error(totals)
    reach = NormalDist().inv_cdf(0.975) * error
    share, low, high, p_value = 0.5, 0.0, 1.0, 1.0
    if wins + losses:
        test = binomtest(wins, wins + losses)
        bounds = test.proportion_ci(0.95, method="exact")
        share, low, high, p_value = wins / (wins + losses), float(bounds.low), float(bounds.high), float(test.pvalue)
    ties = len(totals) - wins - losses
    return Preference(wins, losses, ties, share, low, high, p_value, mean, mean - reach, mean + reach)


def _pick(ranking: Iterable[Hashable], team: int, taken: dict[Hashable, int]) -> bool:
    for item in ranking:
        if item not in taken:
            taken[item] = team
            return True
    return False


def _std_error(totals: NDArray[np.float64]) -> float:
    return float(totals.std(ddof=1)) / math.sqrt(len(totals)) if len(totals) > 1 else math.inf
