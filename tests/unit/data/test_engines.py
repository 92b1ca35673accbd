"""DuckDB and Spark give the same rows, splits, ids and negatives: the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.config import load_plan, parse
from domlora.data.plan import Plan
from domlora.data.prepare import prepare

pytestmark = pytest.mark.spark


def on_both(plan: Plan, raw: Path, folder: Path) -> dict[str, Any]:
    duckdb, spark = (prepare(plan, folder / engine, folder=raw, engine=engine) for engine in ("duckdb", "spark"))
    assert duckdb == spark
    return duckdb


def log(folder: Path, size: int = 3000) -> None:
    """Odd values of every type that both engines know."""
    random = np.random.default_rng(0)
    words = ["a", " a", "é", "e\u0301", "日本", "", None, "3", "3.0", "x'y"]
    numbers = [1.5, -0.0, 0.0, float("nan"), float("inf"), None, 1e-7, 3.0]
    table = pa.table(
        {
            "user": random.integers(60, size=size),
            "item": pa.array([f"item {n}" for n in (80 * random.random(size) ** 2).astype(int)]),
            "scene": pa.array(random.choice(["home", "cart", "feed"], size, p=[0.5, 0.3, 0.2])),
            "word": pa.array([words[n] for n in random.integers(len(words), size=size)]),
            "number": pa.array([numbers[n] for n in random.integers(len(numbers), size=size)], pa.float64()),
            "flag": pa.array([[True, False, None][n] for n in random.integers(3, size=size)]),
            "history": pa.array([[f"item {k}" for k in range(n % 7)] if n % 5 else None for n in range(size)]),
            "at": random.integers(500, size=size),
            "click": pa.array([[0, 1, 1, None][n] for n in random.integers(4, size=size)], pa.int32()),
        }
    )
    pq.write_table(table, folder / "log.parquet")


@pytest.mark.parametrize("split", ["random", "time", "user"])
@pytest.mark.parametrize("negatives", [None, "paper", "uniform", "popularity"])
def test_a_log_of_ones_own(tmp_path: Path, split: str, negatives: str | None) -> None:
    log(tmp_path)
    plan: dict[str, Any] = {
        "source": {"files": ["log.parquet"]},
        "columns": {"domain": "scene", "label": "click", "user": "user", "item": "item", "time": "at"},
        "features": {
            "user": {},
            "item": {"min_count": 2},
            "word": {"hash_buckets": 5},
            "history": {"kind": "sequence", "share": "item", "max_length": 4},
            "number": {"kind": "numeric", "transform": "log1p", "missing": True},
            "steps": {"kind": "bucketed", "columns": ["number"], "buckets": 3},
            "pair": {"columns": ["word", "flag"]},
        },
        "split": {"kind": split},
        "filters": {"unique": ["user", "item", "scene"], "k_core": 2},
        "max_quarantine": 0.5,
    }
    if negatives is not None:
        plan["negatives"] = {"rule": negatives, "exclude": "train" if negatives == "popularity" else "all"}
    rows = on_both(parse(Plan, plan), tmp_path, tmp_path)["rows"]
    assert rows["quarantined"]
    assert rows["dropped"]
    assert bool(rows["sampled"]) == (negatives is not None)


@pytest.mark.parametrize("name", ["movielens-100k", "movielens-1m"])
def test_movielens(name: str, layouts: dict[str, Path], tmp_path: Path) -> None:
    on_both(load_plan(name), layouts["ml-1m" if name == "movielens-1m" else "ml-100k"], tmp_path)
