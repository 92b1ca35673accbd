"""How far users and items reach: into which domains, and from training into test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from domlora.data.dataset import SPLITS
from domlora.studies.describing.census import TEST, TRAIN, Census
from domlora.studies.describing.distinct import Distinct, Values, distinct, elsewhere, holds, in_common
from domlora.studies.describing.facts import Overlap, Reach, share

__all__ = ["Kind", "overlap", "reaches"]

Kind = Literal["users", "items"]


class _Seen(NamedTuple):
    """Distinct users or items of a domain: in all splits, in training, in test."""

    anywhere: Values
    train: Values
    test: Values


class _Rows(NamedTuple):
    """Rows of a domain that have a user or item: of all splits; of test; of test with a new one."""

    anywhere: int
    test: int
    new: int


def reaches(census: Census, of: Kind) -> list[Reach]:
    """The reach of users or items in each domain, unknown ones included, and in all of them as the last.

    Args:
        census: that has counted them.
    """
    counted, rows = _users(census) if of == "users" else _items(census)
    seen = [_seen(census, counted, domain) for domain in range(len(rows))]
    all_seen = _Seen(*(distinct(parts) for parts in zip(*seen, strict=True)))
    all_rows = _Rows(*(sum(parts) for parts in zip(*rows, strict=True)))
    others = elsewhere([each.anywhere for each in seen])
    in_one = sum(len(each.anywhere) - other for each, other in zip(seen, others, strict=True))

    each_domain = zip(seen, rows, others, strict=True)
    found = [_reach(*domain, all_seen.train, counted.scale) for domain in each_domain]
    total = _reach(all_seen, all_rows, len(all_seen.anywhere) - in_one, all_seen.train, counted.scale)
    found.append(replace(total, new_here=None))
    # new items share one id, so how many of them there are in test is not known
    return found if of == "users" else [replace(reach, new=None) for reach in found]


def overlap(census: Census, of: Kind, domains: Sequence[int]) -> Overlap:
    """Shares of users or items that pairs of domains have in common."""
    counted = _users(census)[0] if of == "users" else _items(census)[0]
    sets = [_seen(census, counted, domain).anywhere for domain in domains]
    shares = [tuple(share(both, len(mine)) for both in row) for mine, row in zip(sets, in_common(sets), strict=True)]
    return Overlap(of, tuple(census.schema.domains[domain] for domain in domains), tuple(shares))


def _reach(seen: _Seen, rows: _Rows, other: int, trained: Values, scale: int) -> Reach:
    """Of one domain; ``trained`` are the values that training rows of any domain have."""
    new, here = ~holds(trained, seen.test), holds(seen.train, seen.test)
    number = len(seen.anywhere) * scale
    return Reach(
        distinct=number,
        rows_each=share(rows.anywhere, number),
        elsewhere=share(other, len(seen.anywhere)),
        new=share(new.sum(), len(new)),
        new_here=share((~new & ~here).sum(), len(new)),
        new_rows=share(rows.new, rows.test),
    )


def _seen(census: Census, counted: Distinct, domain: int) -> _Seen:
    groups = [census.group(split, domain) for split in range(len(SPLITS))]
    return _Seen(counted.of(*groups), counted.of(groups[TRAIN]), counted.of(groups[TEST]))


def _users(census: Census) -> tuple[Distinct, list[_Rows]]:
    assert census.users is not None
    new, old = census.new_user_rows, census.old_user_rows
    return census.users, [
        _Rows(*map(int, each)) for each in zip(census.user_rows.sum(axis=0), new + old, new, strict=True)
    ]


def _items(census: Census) -> tuple[Distinct, list[_Rows]]:
    assert census.items is not None
    assert census.item is not None
    counts, new = census.ids[census.item], census.new_item_rows
    known = (counts.values - counts.unknown).sum(axis=0)
    return census.items, [_Rows(*map(int, each)) for each in zip(known, counts.values[TEST], new, strict=True)]
