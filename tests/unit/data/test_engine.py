from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.data.engine import Engine, open_engine
from domlora.errors import ConfigError, DataError

TEXTS = ["x", "", "ü", "日本", "a|b", "x" * 1000, None]


def written(folder: Path, table: pa.Table, name: str = "raw") -> Path:
    path = folder / f"{name}.parquet"
    pq.write_table(table, path)
    return path


def rows_of(engine: Engine, rows: object) -> list[dict]:
    return [row for batch in engine.batches(rows) for row in batch.to_pylist()]


@pytest.mark.parametrize("name", ["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def test_hashes_are_the_first_60_bits_of_md5(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, pa.table({"text": TEXTS}))
    with open_engine(name) as engine:
        rows = engine.read([path])
        found = rows_of(engine, rows.mutate(number=engine.number(rows.text)))
    for row in found:
        expected = None if row["text"] is None else int(hashlib.md5(row["text"].encode()).hexdigest()[:15], 16)
        assert row["number"] == expected
    assert len(found) == len(TEXTS)


@pytest.mark.parametrize("name", ["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def test_a_number_has_15_digits(name: str) -> None:
    numbers = [0, 1, 255, 2**59 + 10, 2**60 - 1]
    table = pa.table({"number": numbers})
    with open_engine(name) as engine:
        rows = engine.kept(table.to_batches(), table.schema)
        rows = rows.mutate(text=engine.digits(rows.number))
        found = rows_of(engine, rows.mutate(again=engine.integer(rows.text)))
    assert [row["number"] for row in found] == [row["again"] for row in found]
    assert {row["number"]: row["text"] for row in found} == {n: f"{n:015x}" for n in numbers}


@pytest.mark.parametrize("name", ["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def test_what_is_made_here_is_a_table_and_sorted_rows_come_in_order(name: str) -> None:
    schema = pa.schema([("group", pa.int64()), ("place", pa.int64())])
    draw = np.random.default_rng(0)
    pieces = ([draw.integers(1000, size=n), draw.integers(1 << 60, size=n)] for n in (100_000, 0, 250_000))
    with open_engine(name) as engine:
        rows = engine.kept((pa.RecordBatch.from_arrays(list(map(pa.array, p)), schema=schema) for p in pieces), schema)
        found = pa.Table.from_batches(list(engine.batches(rows.order_by("group", "place"))))
    assert found.num_rows == 350_000
    assert found.equals(found.sort_by([("group", "ascending"), ("place", "ascending")]))


@pytest.mark.parametrize("name", ["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def test_what_is_stored_is_computed_once_and_gone_at_the_end(name: str, tmp_path: Path) -> None:
    first, second = (written(tmp_path, pa.table({"n": [n, n + 1]}), f"part {n}") for n in (1, 3))
    with open_engine(name, tmp_path) as engine:
        rows = engine.stored(engine.read([first, second]).mutate(twice=lambda t: t.n * 2))
        first.unlink()
        assert sorted(row["twice"] for row in rows_of(engine, rows)) == [2, 4, 6, 8]
        work = engine.work
        assert any(work.iterdir())
    assert not work.exists()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'duckdb'"), open_engine("duckdbb"):
        pass


def test_what_the_engine_says_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, pa.table({"text": ["x"]}))
    with pytest.raises(DataError, match="cannot be used") as error, open_engine("duckdb", tmp_path) as engine:
        engine.stored(engine.read([path]).mutate(n=lambda t: t.text.cast("int64")))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["raw.parquet"]
