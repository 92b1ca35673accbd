from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.engine import Engine, open_engine
from domlora.data.plan import Split
from domlora.data.preparing.split import with_split
from domlora.errors import ConfigError, DataError

Row = dict[str, Any]


@pytest.fixture(scope="module", params=["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with open_engine(request.param) as opened:
        yield opened


def log(size: int = 500, seed: int = 0, domains: int = 3) -> list[Row]:
    random = np.random.default_rng(seed)
    return [
        {
            "__order": int(hashlib.md5(f"{seed}:{number}".encode()).hexdigest()[:15], 16),
            "__domain": int(random.integers(domains)),
            "__label": int(random.random() < 0.3),
            "__user_text": str(random.integers(40)),
            "at": int(random.integers(20)),
            "part": str(random.choice(["a", "b", "c", "other"])),
        }
        for number in range(size)
    ]


def split(engine: Engine, rows: list[Row], how: Split, time: str | None = None) -> tuple[list[Row], int]:
    path = engine.work / f"log-{id(rows)}.parquet"
    kinds = {"__order": pa.int64(), "__domain": pa.int32(), "__label": pa.int32(), "at": pa.int64()}
    names = list(rows[0])
    pq.write_table(pa.table({n: pa.array([r[n] for r in rows], kinds.get(n, pa.string())) for n in names}), path)
    found, left_out = with_split(engine, engine.read([path]), how, time)
    return [row for batch in engine.batches(found) for row in batch.to_pylist()], left_out


def expected(
    rows: list[Row], stratum: tuple[str, ...], order: tuple[str, ...], fractions: tuple[float, ...]
) -> dict[int, int]:
    """Hash → split, without an engine."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in stratum)].append(row)
    found = {}
    for group in groups.values():
        group.sort(key=lambda row: tuple(row[name] for name in order))
        cuts = [math.floor(len(group) * share + 0.5) for share in (fractions[0], fractions[0] + fractions[1])]
        for place, row in enumerate(group):
            found[row["__order"]] = (place >= cuts[0]) + (place >= cuts[1])
    return found


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 99),
    fractions=st.sampled_from([(0.6, 0.2, 0.2), (1.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.34, 0.33, 0.33)]),
    by_time=st.booleans(),
    crowded=st.booleans(),
)
def test_cuts_are_exact(
    engine: Engine, size: int, seed: int, fractions: tuple[float, float, float], by_time: bool, crowded: bool
) -> None:
    rows = log(size, seed)
    for row in rows:
        row["__order"] >>= 10 * crowded  # all in one or two buckets
    stratum = ("__domain",) if by_time else ("__domain", "__label")
    right = expected(rows, stratum, ("at", "__order") if by_time else ("__order",), fractions)
    how = Split("time" if by_time else "random", fractions)
    if 0 not in right.values():
        with pytest.raises(DataError, match="no row trains"):
            split(engine, rows, how, "at")
        return
    found, left_out = split(engine, rows, how, "at")
    assert left_out == 0
    assert {row["__order"]: row["__split"] for row in found} == right
    assert len(found) == size
    assert set(found[0]) == {*rows[0], "__split"}


def test_a_users_rows_stay_together(engine: Engine) -> None:
    found, _ = split(engine, log(4000), Split("user", (0.5, 0.25, 0.25)))
    splits = defaultdict(set)
    for row in found:
        splits[row["__user_text"]].add(row["__split"])
    assert all(len(own) == 1 for own in splits.values())
    sizes = Counter(next(iter(own)) for own in splits.values())
    assert set(sizes) == {0, 1, 2}
    assert 12 <= sizes[0] <= 28  # 20 of 40 users expected
    for user in splits:
        number = int(hashlib.md5(f"0:{user}".encode()).hexdigest()[:15], 16) / 2**60
        assert splits[user] == {(number >= 0.5) + (number >= 0.75)}


def test_a_column_may_say(engine: Engine) -> None:
    rows = log()
    how = Split("column", column="part", values={"train": ("a", "b"), "test": ("c",)})
    found, left_out = split(engine, rows, how)
    assert left_out == sum(row["part"] == "other" for row in rows) > 0
    assert {(row["part"], row["__split"]) for row in found} == {("a", 0), ("b", 0), ("c", 2)}


def test_a_column_of_split_names_needs_no_values(engine: Engine) -> None:
    rows = [{**row, "part": ["train", "valid", "test", "?"][number % 4]} for number, row in enumerate(log(8))]
    found, left_out = split(engine, rows, Split("column", column="part"))
    assert left_out == 2
    assert {(row["part"], row["__split"]) for row in found} == {("train", 0), ("valid", 1), ("test", 2)}


def test_what_cannot_be_is_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        split(engine, log(), Split("column", column="part", values={"trian": ("a",)}))
    with pytest.raises(DataError, match="no row trains"):
        split(engine, log(), Split("column", column="part", values={"test": ("a",)}))
    for fractions in ((0.5, 0.5), (0.9, 0.2, 0.2), (0.0, 0.5, 0.5), (1.5, -0.5, 0.0)):
        with pytest.raises(ConfigError, match="three shares"):
            Split("random", fractions)  # type: ignore[arg-type]
