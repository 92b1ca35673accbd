from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.engine import Engine, open_engine
from domlora.data.plan import Filters
from domlora.data.preparing.filters import core, filtered
from domlora.errors import DataError

Row = dict[str, Any]
KINDS = {"__domain": pa.int32(), "time": pa.int64(), "price": pa.float64(), "tags": pa.list_(pa.string())}


@pytest.fixture(scope="module", params=["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def engine(request) -> Iterator[Engine]:
    if request.param == "spark":
        pytest.importorskip("pyspark")
    with open_engine(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def duck() -> Iterator[Engine]:
    with open_engine("duckdb") as opened:
        yield opened


def row(user: str | None, item: str | None, domain: int = 0, time: int | None = 0, **columns: object) -> Row:
    texts = {"__user_text": user or "", "__item_text": item or ""}
    key = hashlib.md5(f"{user}|{item}|{domain}|{time}".encode()).hexdigest()
    more = {"price": 1.0, "tags": ["a"], **columns}
    return {"user": user, "item": item, "time": time, **more, **texts, "__domain": domain, "__hash": key}


def table(engine: Engine, rows: Sequence[Row]) -> Any:
    schema = pa.schema([(name, KINDS.get(name, pa.string())) for name in row("u", "i")])
    path = engine.work / f"rows-{len(list(engine.work.iterdir())):05d}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return engine.read([path])


def read(engine: Engine, rows: Any) -> list[Row]:
    found = [each for batch in engine.batches(rows) for each in batch.to_pylist()]
    return sorted(found, key=lambda each: (each["__hash"], str(each)))


def run(
    engine: Engine, rows: Sequence[Row], filters: Filters, time: str | None = None
) -> tuple[list[Row], dict[str, int]]:
    kept, dropped = filtered(engine, table(engine, rows), filters, time=time)
    return read(engine, kept), dropped


def log(size: int = 300, seed: int = 1, users: int = 30, items: int = 40) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for time in range(size):
        user, item = draw.randrange(users), int(draw.paretovariate(0.6)) % items
        rows.append(row(f"u{user}", f"i{item}", draw.randrange(3), time % 50, price=draw.choice((0.5, 1.0, None))))
    return rows


def in_core(rows: list[Row], k: int) -> list[Row]:
    while True:
        users, items = (Counter(each[name] for each in rows) for name in ("__user_text", "__item_text"))
        users[""] = items[""] = 0
        kept = [each for each in rows if users[each["__user_text"]] >= k and items[each["__item_text"]] >= k]
        if len(kept) == len(rows):
            return kept
        rows = kept


# --- unique -------------------------------------------------------------------------------------------------------------


def first_of_each(rows: list[Row], names: Sequence[str], time: str | None) -> list[Row]:
    kept: dict[tuple[Any, ...], Row] = {}
    far = 10**9
    for each in sorted(rows, key=lambda r: ((far if r["time"] is None else r["time"]) if time else 0, r["__hash"])):
        kept.setdefault(tuple(each[name] for name in names), each)
    return sorted(kept.values(), key=lambda each: (each["__hash"], str(each)))


@pytest.mark.parametrize("time", ["time", None])
@pytest.mark.parametrize("names", [("user", "item"), ("item",), ("user", "__domain", "price")], ids="-".join)
def test_the_first_of_equal_rows_stays(engine, names, time) -> None:
    rows = [*log(), row(None, "i1", time=None), row(None, "i1", time=3), row("u1", None, time=None)]
    rows = list({each["__hash"]: each for each in rows}.values())
    kept, dropped = run(engine, rows, Filters(unique=names), time)
    assert kept == first_of_each(rows, names, time)
    assert dropped == {f"not unique in {', '.join(names)}": len(rows) - len(kept)}
    assert run(engine, list(reversed(rows)), Filters(unique=names), time) == (kept, dropped)


def test_rows_of_one_key_are_told_apart_by_their_other_columns(engine) -> None:
    """One hash and one time: still not by the order of rows."""
    rows = [row("u", "i", price=price) for price in (3.0, 1.0, None, 2.0)]
    for order in (rows, rows[::-1], [rows[1], rows[3], rows[0], rows[2]]):
        kept, _ = run(engine, order, Filters(unique=("user",)), "time")
        assert [each["price"] for each in kept] == [1.0]


def test_lists_are_kept_and_can_be_a_key(duck) -> None:
    rows = [row("a", "x", tags=["p", "q"]), row("b", "y", tags=["p", "q"]), row("c", "z", tags=["q", "p"])]
    kept, dropped = run(duck, rows, Filters(unique=("tags",)))
    assert dropped == {"not unique in tags": 1}
    assert sorted(each["tags"] for each in kept) == [["p", "q"], ["q", "p"]]


# --- core ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 5, 8])
def test_users_and_items_of_the_core_have_k_rows(engine, k) -> None:
    rows = [*log(400), *(row(None, f"i{n}") for n in range(9)), *(row(f"u{n}", None) for n in range(9))]
    kept, dropped = run(engine, rows, Filters(k_core=k))
    assert kept == sorted(in_core(rows, k), key=lambda each: (each["__hash"], str(each)))
    assert dropped == {f"outside the {k}-core": len(rows) - len(kept)}
    assert 0 < len(kept) < len(rows) - 18


ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("tuvwxyz")), min_size=1, max_size=60)


@settings(max_examples=20, deadline=None)
@given(pairs=ROWS, k=st.integers(2, 5))
def test_the_core_of_any_log(duck, pairs, k) -> None:
    rows = [row(user, item, time=time) for time, (user, item) in enumerate(pairs)]
    kept, rounds = core(duck, table(duck, rows), k)
    assert read(duck, kept) == sorted(in_core(rows, k), key=lambda each: (each["__hash"], str(each)))
    assert rounds >= 1


def test_a_chain_is_taken_apart_link_by_link(engine) -> None:
    """Each user shares its two items with the next: the first link gone, all go, one a round at least at one end."""
    chain = [row(f"u{n:02d}", f"i{n + step:02d}") for n in range(8) for step in (0, 1)]
    ring = [row(f"r{n}", f"s{(n + step) % 4}") for n in range(4) for step in (0, 1)]
    kept, rounds = core(engine, table(engine, [*chain, *ring]), 2)
    assert {each["user"] for each in read(engine, kept)} == {"r0", "r1", "r2", "r3"}
    assert rounds >= 4


# --- domains, and all together ------------------------------------------------------------------------------------------


def test_small_domains_go(engine) -> None:
    rows = [row(f"u{n}", "i", domain) for domain, size in enumerate((3, 5, 4)) for n in range(size)]
    kept, dropped = run(engine, rows, Filters(min_domain_rows=4))
    assert Counter(each["__domain"] for each in kept) == {1: 5, 2: 4}
    assert dropped == {"domain below 4 rows": 3}


def test_rules_are_applied_in_order(engine) -> None:
    rows = [row("u", "i", 0, time) for time in range(3)] + [row("v", f"j{n}", 1) for n in range(2)]
    kept, dropped = run(engine, rows, Filters(unique=("user", "item"), min_domain_rows=2), "time")
    assert dropped == {"not unique in user, item": 2, "domain below 2 rows": 1}
    assert {each["user"] for each in kept} == {"v"}
    total = run(engine, log(), Filters(unique=("user", "item"), k_core=3, min_domain_rows=30), "time")
    assert len(total[0]) + sum(total[1].values()) == 300
    assert list(total[1])[:2] == ["not unique in user, item", "outside the 3-core"]


def test_what_drops_nothing_is_not_named(duck) -> None:
    rows = log(50)
    for filters in (Filters(), Filters(k_core=1, min_domain_rows=1), Filters(min_domain_rows=5)):
        kept, dropped = run(duck, rows, filters)
        assert len(kept) == 50
        assert dropped == {}


def test_filters_that_leave_nothing(duck) -> None:
    with pytest.raises(DataError, match=r"leave no row. Received: {'outside the 9-core': 2}"):
        run(duck, [row("u", "i"), row("v", "j")], Filters(k_core=9, min_domain_rows=3))


@pytest.mark.spark
def test_spark_and_duckdb_keep_the_same_rows(duck) -> None:
    pytest.importorskip("pyspark")
    rows, filters = log(900, seed=4), Filters(unique=("user", "item"), k_core=4, min_domain_rows=20)
    with open_engine("spark") as spark:
        assert run(spark, rows, filters, "time") == run(duck, rows, filters, "time")
