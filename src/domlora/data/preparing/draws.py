"""Which items users get that they did not click: numbers in, numbers out, in bounded memory.

Engines order clicks and join what comes out; the drawing is done here, for every engine alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["DRAWN", "KEY", "NUMBER_SHIFT", "Pools", "drawn", "mixed"]

Ints = NDArray[np.int64]
Bits = NDArray[np.uint64]
Wanted = Callable[[Ints, Ints], NDArray[np.float64]]

NUMBER_SHIFT = 32
"""Numbers of users and of items hold the domain above so many bits."""
KEY = ("__user", "__place", "__tie")
"""What tells clicks apart, and orders them."""
DRAWN = pa.schema(
    [
        *((name, pa.int64()) for name in KEY),
        ("__drawn", pa.list_(pa.struct([("__item", pa.int64()), ("__order", pa.int64())]))),
    ]
)
"""For each click that has some: its non-clicks."""
_BELOW = (1 << NUMBER_SHIFT) - 1
_MARGIN = 16  # one draw more for each so many that are wanted
_GROWTH = 4  # times as many draws in each further round
_DRAWS = 1 << 18  # about so many at once
_RANKS, _ORDERS = 1 << 40, 1 << 41  # outputs of a user's generator that are no draws begin here
_ORDER_SHIFT = 4  # orders have 60 bits, as the hashes of rows do
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(key: Bits, number: Ints) -> Bits:
    """The output ``number``, counted from 0, of a SplitMix64 that starts at ``key``: 64 bits.

    Source:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014), with the constants of its Java.

    Example:
        >>> [hex(n) for n in mixed(np.zeros(2, np.uint64), np.arange(2))]
        ['0xe220a8397b1dcdaf', '0x6e789e6aa1b965f4']
    """
    bits: Bits = key + (number.astype(np.uint64) + np.uint64(1)) * _STEP
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


class Pools:
    """The items of each domain, numbered from 0.

    Args:
        sizes: how many there are, by domain.
        popularity: how often each is clicked, domain after domain; without it all are as likely.
    """

    def __init__(self, sizes: Ints, popularity: Ints | None = None) -> None:
        self.sizes, self._popularity = sizes, popularity
        self._starts = np.cumsum(sizes) - sizes
        self._clicks = None if popularity is None else np.concatenate([[0], np.cumsum(popularity)])

    def draw(self, domain: Ints, number: Bits) -> Ints:
        """Items that numbers stand for."""
        if self._clicks is None:
            return (number % self.sizes[domain].astype(np.uint64)).astype(np.int64)
        start = self._starts[domain]
        before = self._clicks[start]
        clicks = self._clicks[start + self.sizes[domain]] - before
        click = before + (number % clicks.astype(np.uint64)).astype(np.int64)
        item: Ints = np.searchsorted(self._clicks, click, side="right") - 1 - start
        return item

    def race(self, domain: Ints, item: Ints, number: Bits) -> NDArray[np.float64] | Bits:
        """What items are ordered by: those that come first are as likely as those drawn first."""
        if self._popularity is None:
            return number
        share = ((number >> np.uint64(_ORDER_SHIFT)).astype(np.float64) + 0.5) / 2**60
        return np.asarray(-np.log(share) / self._popularity[self._starts[domain] + item])


def drawn(batches: Iterable[pa.RecordBatch], pools: Pools, wanted: Wanted) -> Iterator[pa.RecordBatch]:
    """Non-clicks for the clicks of users.

    Args:
        batches: clicks in the order of ``KEY``; with ``__item``, whether it is ``__avoided``, and a number of the user, its
            ``__key``.
        pools: what to draw from.
        wanted: domains, clicks of a user → how many non-clicks it should get.

    Returns:
        Batches of ``DRAWN``. See :func:`domlora.data.preparing.negatives.sampled` for what is in them.
    """
    domains = np.arange(len(pools.sizes))
    most = np.minimum(wanted(domains, np.full_like(domains, 1000)) / 1000, pools.sizes).max()  # for a click
    for clicks in _whole_users(batches, max(1, int(_DRAWS / (1 + most)))):
        if clicks.num_rows:
            users = _Users(clicks, pools, wanted)
            yield users.lists(users.chosen())


def _whole_users(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Tables of about so many rows, none of which ends within a user's."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            user = _ints(part, "__user")
            last = int(np.searchsorted(user, user[-1]))  # who begins here may go on in the next part
            if not held or held[0].column("__user")[0].as_py() != user[-1]:
                yield pa.Table.from_batches([*held, part.slice(0, last)])
                held = []
            held.append(part.slice(last))
    if held:
        yield pa.Table.from_batches(held)


def _ints(rows: pa.RecordBatch | pa.Table, name: str) -> Ints:
    return np.asarray(rows.column(name), np.int64)


class _Users:
    """Some users, each in one domain, numbered from 0; an item of one is a code: the user above, the item below.

    Codes stand user by user. A user's are in the order in which they came.
    """

    def __init__(self, clicks: pa.Table, pools: Pools, wanted: Wanted) -> None:
        self.pools, self.key = pools, [_ints(clicks, name) for name in KEY]
        user = self.key[0]
        self.begins = np.flatnonzero(_starts(user))
        self.clicks = np.diff(self.begins, append=len(user))
        self.domain = user[self.begins] >> NUMBER_SHIFT
        self.items = pools.sizes[self.domain]
        self.seed = _ints(clicks, "__key")[self.begins].astype(np.uint64)
        code = np.repeat(np.arange(len(self.begins)), self.clicks) << NUMBER_SHIFT | _ints(clicks, "__item") & _BELOW
        self.own = np.sort(code[np.asarray(clicks.column("__avoided"))], kind="stable")
        self.own = self.own[_starts(self.own)]  # some may be clicked more than once
        self.own_sizes = self._sizes(self.own)
        asked = wanted(self.domain, self.clicks)
        self.wanted = np.minimum(asked, self.items - self.own_sizes).astype(np.int64)

    def _sizes(self, codes: Ints) -> Ints:
        return np.bincount(codes >> NUMBER_SHIFT, minlength=len(self.begins))

    def chosen(self) -> Ints:
        """What all get: the first distinct items among a user's draws, and then among its ranks, that it did not click."""
        draws = self.wanted + self.wanted // _MARGIN + 1
        ranked = (2 * (self.wanted + self.own_sizes) > self.items) | (draws >= self.items)
        draws[ranked] = 0
        found, todo = [], np.flatnonzero(self.wanted > 0)
        while len(todo):
            parts = _parts(todo, draws[todo] + self.items[todo] * ranked[todo])
            codes = np.concatenate([self._first(self._sequence(part, draws[part], ranked[part])) for part in parts])
            short = self._sizes(codes) < self.wanted
            found.append(codes[~short[codes >> NUMBER_SHIFT]])
            todo = todo[short[todo]]
            ranked[todo] = draws[todo] * _GROWTH >= self.items[todo]
            draws[todo] *= np.where(ranked[todo], 1, _GROWTH)
        return _by_user(*found)

    def _sequence(self, users: Ints, draws: Ints, ranked: NDArray[np.bool_]) -> Ints:
        return _by_user(self._draws(users, draws), self._ranks(users[ranked]))

    def _draws(self, users: Ints, sizes: Ints) -> Ints:
        user, number = np.repeat(users, sizes), _places(sizes)
        return user << NUMBER_SHIFT | self.pools.draw(self.domain[user], mixed(self.seed[user], number))

    def _ranks(self, users: Ints) -> Ints:
        """All items of the domain of each user, in an order of its own."""
        sizes = self.items[users]
        user, item = np.repeat(users, sizes), _places(sizes)
        number = mixed(self.seed[user], item + _RANKS)
        return (user << NUMBER_SHIFT | item)[np.lexsort((self.pools.race(self.domain[user], item, number), user))]

    def _first(self, codes: Ints) -> Ints:
        """As many as are wanted of those that stand for the first time and are not the user's own."""
        both = np.concatenate([self.own, codes])
        order = np.argsort(both, kind="stable")
        new = np.empty(len(both), bool)
        new[order] = _starts(both[order])
        codes = codes[new[len(self.own) :]]
        few: Ints = codes[_places(self._sizes(codes)) < self.wanted[codes >> NUMBER_SHIFT]]
        return few

    def lists(self, codes: Ints) -> pa.RecordBatch:
        """Number ``i`` of a user's codes goes to its click ``i % clicks``."""
        user, rank = codes >> NUMBER_SHIFT, _places(self.wanted)
        wanted, clicks = (np.repeat(counts, self.clicks) for counts in (self.wanted, self.clicks))
        sizes = (wanted - _places(self.clicks) - 1) // clicks + 1
        ends = np.cumsum(sizes)
        place = (ends - sizes)[self.begins[user] + rank % self.clicks[user]] + rank // self.clicks[user]
        item, order = np.empty_like(codes), np.empty_like(codes)
        item[place] = codes & _BELOW | self.domain[user] << NUMBER_SHIFT
        order[place] = (mixed(self.seed[user], rank + _ORDERS) >> np.uint64(_ORDER_SHIFT)).astype(np.int64)
        some = sizes > 0
        offsets = pa.array(np.append(0, ends[some]), pa.int32())
        rows = pa.StructArray.from_arrays([pa.array(item), pa.array(order)], ["__item", "__order"])
        columns = [*(pa.array(part[some]) for part in self.key), pa.ListArray.from_arrays(offsets, rows)]
        return pa.RecordBatch.from_arrays(columns, schema=DRAWN)


def _starts(ordered: Ints) -> NDArray[np.bool_]:
    """Where another value begins."""
    return np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]


def _parts(users: Ints, costs: Ints) -> list[Ints]:
    """Users in groups that cost about as much as the first round of all together does."""
    return np.split(users, 1 + np.flatnonzero(np.diff(np.cumsum(costs) // (2 * _DRAWS))))


def _places(sizes: Ints) -> Ints:
    """0, 1, 2 and so on within each group."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _by_user(*codes: Ints) -> Ints:
    """One after the other, but user by user."""
    together = np.concatenate([*codes, np.empty(0, np.int64)])
    return together[np.argsort(together >> NUMBER_SHIFT, kind="stable")]
