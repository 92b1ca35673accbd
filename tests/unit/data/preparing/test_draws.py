from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from domlora.data.preparing import draws
from domlora.data.preparing.draws import DRAWN, KEY, NUMBER_SHIFT, Pools, drawn, mixed

Users = list[tuple[int, list[int]]]  # of each the domain, and the items that it clicked


def stream(users: Users, seed: int = 0, sizes: list[int] | None = None) -> list[pa.RecordBatch]:
    """Clicks in order, cut into batches of some sizes."""
    columns: dict[str, list[Any]] = {name: [] for name in (*KEY, "__item", "__avoided", "__key")}
    for number, (domain, items) in enumerate(users):
        key = int(hashlib.md5(f"{seed}:{number}".encode()).hexdigest()[:15], 16)
        for place, item in enumerate(items):
            values = ((domain << NUMBER_SHIFT) + number, place, 0, (domain << NUMBER_SHIFT) + item, True, key)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    batch = pa.RecordBatch.from_pydict(columns)
    bounds = np.cumsum([0, *(sizes or []), len(batch)]).clip(max=len(batch)).tolist()
    return [batch.slice(start, stop - start) for start, stop in pairwise(bounds)]


def asked(ratio: float) -> draws.Wanted:
    return lambda _, clicks: np.floor(clicks * ratio + 0.5)


def found(batches: list[pa.RecordBatch], pools: Pools, ratio: float) -> dict[tuple[int, int], list[dict[str, int]]]:
    """By user and click."""
    made = [row for batch in drawn(batches, pools, asked(ratio)) for row in batch.to_pylist()]
    return {(row["__user"], row["__place"]): row["__drawn"] for row in made}


def test_mixed_is_splitmix64() -> None:
    """The first outputs of the published Java and C for the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert mixed(np.full(5, 1234567, np.uint64), np.arange(5)).tolist() == known


POOLS = {"uniform": Pools(np.array([7, 90])), "popular": Pools(np.array([7, 90]), np.arange(97) ** 2 + 1)}
USERS = st.lists(
    st.integers(0, 1).flatmap(
        lambda domain: st.tuples(st.just(domain), st.lists(st.integers(0, (6, 89)[domain]), min_size=1, max_size=12))
    ),
    min_size=1,
    max_size=12,
).map(lambda users: sorted(users, key=lambda user: user[0]))


@settings(deadline=None)
@given(
    users=USERS,
    rule=st.sampled_from(["uniform", "popular"]),
    ratio=st.floats(0.1, 9),
    sizes=st.lists(st.integers(0, 30), max_size=8),
    together=st.sampled_from([1, 10, 1 << 18]),
)
def test_what_a_user_gets(users: Users, rule: str, ratio: float, sizes: list[int], together: int) -> None:
    """As many as it wants or are left, of its domain, none its own, none twice; shared out in turn; cuts do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "_DRAWS", together)
        cut = found(stream(users, sizes=sizes), POOLS[rule], ratio)
    assert cut == found(stream(users), POOLS[rule], ratio)
    for number, (domain, clicks) in enumerate(users):
        user, pool = (domain << NUMBER_SHIFT) + number, (7, 90)[domain]
        got = [cut.get((user, place), []) for place in range(len(clicks))]
        items = [row["__item"] - (domain << NUMBER_SHIFT) for rows in got for row in rows]
        assert len(items) == len(set(items)) == min(math.floor(len(clicks) * ratio + 0.5), pool - len(set(clicks)))
        assert set(items) <= set(range(pool)) - set(clicks)
        assert [len(rows) for rows in got] == sorted(map(len, got), reverse=True)
        assert max(map(len, got)) - min(map(len, got)) <= 1


def test_what_a_user_gets_hangs_on_nobody_else() -> None:
    users: Users = [(0, [0, 3]), (1, [5]), (1, list(range(40)))]
    together = found(stream(users), POOLS["popular"], 2)
    for number in range(3):
        alone = [batch.filter(np.asarray(batch["__user"]) & 0xFF == number) for batch in stream(users)]
        mine = {key: rows for key, rows in together.items() if key[0] & 0xFF == number}
        assert found(alone, POOLS["popular"], 2) == mine


def test_nobody_wants_anything() -> None:
    assert found(stream([(0, [1, 2]), (1, [3])]), POOLS["uniform"], 0.1) == {}
    assert list(drawn([], POOLS["uniform"], asked(1))) == []
    assert all(batch.schema == DRAWN for batch in drawn(stream([(0, [1])]), POOLS["uniform"], asked(1)))


@pytest.mark.parametrize("size", [4, 9, 30], ids=["ranked", "drawn", "drawn-of-many"])
def test_every_set_of_items_is_as_likely(size: int) -> None:
    """Of two: the chances that chi-square gives each of 60 seeds are spread evenly, which they are for no other sets."""

    def chance(seed: int) -> float:
        sets = Counter[tuple[int, ...]]()
        by_user = defaultdict(list)
        for (user, _), rows in found(stream([(0, [0])] * 8000, seed), Pools(np.array([size])), 2).items():
            by_user[user] += [row["__item"] for row in rows]
        sets.update(tuple(sorted(items)) for items in by_user.values())
        assert len(sets) == math.comb(size - 1, 2)
        return float(chisquare(list(sets.values())).pvalue)

    assert kstest([chance(seed) for seed in range(60)], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("bits", [lambda order: order >> 57, lambda order: order & 7], ids=["first", "last"])
def test_orders_say_nothing_of_items(bits: Callable[[int], int]) -> None:
    """Neither of their own nor of those of the user's other non-clicks; as for hashes of texts."""
    rows = found(stream([(0, [0])] * 20_000), Pools(np.array([50])), 2).values()
    orders = [row["__order"] for each in rows for row in each]
    assert len(set(orders)) == len(orders)
    assert 0 <= min(orders) < 2**47
    assert max(orders) < 2**60
    for one in (0, 1):
        pairs = Counter((bits(each[0]["__order"]), each[one]["__item"] % 7) for each in rows)
        places = Counter(item % 7 for item in range(1, 50))
        wanted = [20_000 / 8 * places[item] / 49 for _, item in sorted(pairs)]
        assert chisquare([pairs[pair] for pair in sorted(pairs)], wanted).pvalue > 1e-3
