"""What is worth knowing of a dataset, as plain data that turns into JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from domlora.features.schema import FeatureKind

__all__ = [
    "Clicks",
    "Coverage",
    "DomainFacts",
    "Facts",
    "FeatureFacts",
    "Overlap",
    "Reach",
    "RowFlow",
    "share",
    "wilson",
]

_Z = 1.959963984540054  # of the normal distribution, at 97.5 %


@dataclass(frozen=True, slots=True)
class Clicks:
    """Rows, those of them that are clicks, and their share with its 95 % interval (None without rows)."""

    rows: int
    clicks: int
    rate: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, rows: int, clicks: int) -> Clicks:
        """Clicks among rows, with Wilson's interval.

        >>> Clicks.of(10, 5)  # doctest: +ELLIPSIS
        Clicks(rows=10, clicks=5, rate=0.5, low=0.2365930905..., high=0.7634069094...)
        """
        low, high = wilson(clicks, rows)
        return cls(rows, clicks, share(clicks, rows), low, high)

    @property
    def one_class(self) -> bool:
        """Whether there are rows, but no AUC of them."""
        return self.rows > 0 and self.clicks in (0, self.rows)


@dataclass(frozen=True, slots=True)
class Reach:
    """Users, or items, of one domain or of all.

    Args:
        distinct: how many there are.
        rows_each: rows that have one, over ``distinct``.
        elsewhere: share of them that also occur in another domain.
        new: share of those in test that no training row has; None for items, whose new values share one id.
        new_here: share of those in test that training rows have, but none of this domain; None for all domains together.
        new_rows: share of the test rows that belong to a new one: cold starts.
    """

    distinct: int
    rows_each: float | None
    elsewhere: float | None
    new: float | None
    new_here: float | None
    new_rows: float | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """One feature in one split: the share of rows without a value, and of values outside the vocabulary.

    None where it cannot be told: a hash has no vocabulary, and a number that may be absent says so only with ``missing``.
    """

    absent: float | None
    unknown: float | None


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """One domain, or all.

    Args:
        share: of all rows.
        splits: clicks of each split.
        features: name → split → coverage.
    """

    name: str
    share: float | None
    total: Clicks
    splits: Mapping[str, Clicks]
    users: Reach | None
    items: Reach | None
    features: Mapping[str, Mapping[str, Coverage]]


@dataclass(frozen=True, slots=True)
class FeatureFacts:
    """One feature over all domains; values are those of the training rows.

    Args:
        columns: raw columns it reads.
        values: of a feature of ids: vocabulary, buckets or hash buckets.
        used: how many of them a training row has.
        coverage: by split.
        top: the most frequent values of the vocabulary, and their share of all values.
        mean_length: of a sequence, over rows that have one.
        mean, std: of a number, as it was before it was standardised (but after ``log1p``).
        shift: how far the mean in test lies from that in training, in standard deviations.
        constant: every training row has the same value, or none.
    """

    name: str
    kind: FeatureKind
    columns: tuple[str, ...]
    coverage: Mapping[str, Coverage]
    constant: bool
    hashed: bool = False
    shares_with: str | None = None
    values: int | None = None
    used: int | None = None
    top: tuple[tuple[str, float], ...] = ()
    mean_length: float | None = None
    transform: str | None = None
    mean: float | None = None
    std: float | None = None
    shift: float | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which share of the users (or items) of a domain also occur in another.

    Args:
        of: ``users`` or ``items``.
        domains: the largest ones by rows.
        shares: a line a domain: the share of its own that the domain of each column has too; 1 on the diagonal.
    """

    of: str
    domains: tuple[str, ...]
    shares: tuple[tuple[float | None, ...], ...]

    @property
    def any(self) -> bool:
        """Whether two domains have anything in common."""
        return any(
            part for row, shares in enumerate(self.shares) for column, part in enumerate(shares) if row != column
        )


@dataclass(frozen=True, slots=True)
class RowFlow:
    """Where the rows went: ``rows_in + sampled = kept + quarantined + dropped``."""

    rows_in: int
    quarantined: Mapping[str, int]
    dropped: Mapping[str, int]
    sampled: int
    kept: int

    def steps(self) -> list[tuple[str, int]]:
        """What happened, in order, with the rows that came or went; what changed nothing is left out."""
        lost = [(f"quarantined: {reason}", -rows) for reason, rows in self.quarantined.items()]
        lost += [(f"dropped: {rule}", -rows) for rule, rows in self.dropped.items()]
        changes = [step for step in [*lost, ("sampled non-clicks", self.sampled)] if step[1]]
        return [("read", self.rows_in), *changes, ("kept", self.kept)]


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. Shares are between 0 and 1; None stands for what cannot be told.

    Args:
        name: of the source, if it is known.
        user_column, item_feature: what users and items were counted by.
        user_scale, item_scale: 1 where they were counted exactly, else one in so many was.
        flow: where the rows went; None for a dataset in memory.
        total: all domains.
        domains: the known ones, largest first.
        unknown: rows of unknown domains, if there are any.
        features: in the order of the schema.
        overlaps: of users and of items, if there are several domains.
        remarks: what to look at, a sentence each.
        made: further facts of how it was prepared, by name.
    """

    name: str
    user_column: str | None
    item_feature: str | None
    user_scale: int
    item_scale: int
    flow: RowFlow | None
    total: DomainFacts
    domains: tuple[DomainFacts, ...]
    unknown: DomainFacts | None
    features: tuple[FeatureFacts, ...]
    overlaps: tuple[Overlap, ...]
    remarks: tuple[str, ...]
    made: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, texts and numbers: ready for JSON."""
        return asdict(self)


def share(part: float, whole: float) -> float | None:
    """``part / whole``; None without a whole.

    >>> share(1, 4), share(0, 0)
    (0.25, None)
    """
    return float(part / whole) if whole else None


def wilson(hits: int, trials: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % score interval of a share; (None, None) without trials.

    Unlike the mean ± 1.96 standard errors, it is sound for few trials and for rare hits.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    >>> [round(end, 4) for end in wilson(0, 10)]
    [0.0, 0.2775]
    """
    if not trials:
        return None, None
    rate, z2 = hits / trials, _Z * _Z
    centre = rate + z2 / (2 * trials)
    spread = _Z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials))
    low, high = ((centre + sign * spread) / (1 + z2 / trials) for sign in (-1, 1))
    return max(low, 0.0) if hits else 0.0, min(high, 1.0) if hits < trials else 1.0
