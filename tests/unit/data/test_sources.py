from __future__ import annotations

import pytest

from domlora.data import sources
from domlora.data.sources import SOURCES, LabelRule, open_source
from domlora.errors import ConfigError, DataError


def rows_of(table) -> list[tuple]:
    return sorted(tuple(row.values()) for row in table.to_pyarrow().to_pylist())


@pytest.mark.parametrize(
    ("text", "positives"),
    [
        ("rating==5", [5]),
        ("rating>=4", [4, 5]),
        (" rating  >  3.5 ", [4, 5]),
        ("rating<=2", [1, 2]),
        ("rating<2", [1]),
        ("rating!=3", [1, 2, 4, 5]),
        ("rating>-1", [1, 2, 3, 4, 5]),
    ],
)
def test_label_rules(text, positives) -> None:
    rule = LabelRule.parse(text)
    assert [rating for rating in range(1, 6) if rule(rating)] == positives
    assert LabelRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "rating", "rating=5", "stars==5", "rating==", "rating==5 or 1", "5==rating", "rating==nan"]
)
def test_other_texts_are_no_label_rules(text) -> None:
    with pytest.raises(ConfigError, match="rating OP number"):
        LabelRule.parse(text)


@pytest.mark.parametrize("rating", [None, "", " ", "five", "5x", float("nan"), "inf", "nan"])
def test_a_rating_that_is_no_number_has_no_label(rating) -> None:
    assert LabelRule.parse("rating>=4")(rating) is None


@pytest.mark.parametrize("rating", [5, "5", " 5.0 ", 5.0])
def test_a_rating_may_be_text(rating) -> None:
    assert LabelRule.parse("rating==5")(rating) == 1


def test_movielens_1m(layouts, small_rows) -> None:
    ratings, users = small_rows
    raw = open_source("movielens-1m", layouts["ml-1m"])
    of_user = {user: (gender, str(age), job, code) for user, gender, age, job, code in users}
    found = {row["user_id"]: (row["gender"], row["age"], row["zip"]) for row in raw.table.to_pyarrow().to_pylist()}
    assert found == {str(user): (gender, age, code) for user, (gender, age, _, code) in of_user.items()}
    assert rows_of(raw.table["user_id", "item_id", "rating", "time"]) == sorted(
        (str(user), str(item), str(rating), time) for user, item, rating, time in ratings
    )
    assert set(raw.table.to_pyarrow().column("occupation").to_pylist()) == {"0", "1", "2"}
    assert raw.inputs.keys() == {"ratings.dat", "users.dat"}
    assert raw.time == "time"


def test_movielens_100k_is_the_same_from_both_layouts(layouts) -> None:
    text, parquet = (open_source("movielens-100k", layouts[layout]) for layout in ("ml-100k", "parquet"))
    assert text.table.schema() == parquet.table.schema()
    assert rows_of(text.table) == rows_of(parquet.table)
    assert set(text.table.to_pyarrow().column("occupation").to_pylist()) == {"writer", "doctor", "other"}
    assert (text.time, text.key) == (parquet.time, parquet.key) == ("time", ("user_id", "item_id", "time"))


def test_a_set_whose_times_are_all_0_has_none(layouts) -> None:
    raw = open_source("movielens-1m", layouts["undated"])
    assert raw.time is None
    assert "time" not in raw.table.columns
    assert raw.key == ("user_id", "item_id")


def test_a_rating_of_an_unlisted_user_keeps_empty_columns(tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n2::7::4::9\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n")
    rows = open_source("movielens-1m", tmp_path).table.order_by("user_id").to_pyarrow().to_pylist()
    assert [(row["gender"], row["zip"]) for row in rows] == [("F", "00001"), (None, None)]


def test_latin_1_text_is_read(tmp_path) -> None:
    (tmp_path / "u.data").write_text("1\t7\t5\t9\n")
    (tmp_path / "u.user").write_bytes("1|25|F|médecin|00001\n".encode("latin-1"))
    rows = open_source("movielens-100k", tmp_path).table.to_pyarrow().to_pylist()
    assert rows[0]["occupation"] == "médecin"


def test_a_user_listed_twice_is_refused(tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n1::M::25::3::00001\n")
    with pytest.raises(DataError, match=r"listed once.*users\.dat"):
        open_source("movielens-1m", tmp_path)


def test_an_unknown_source_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'movielens-1m'"):
        open_source("movielens_1m")
    assert sorted(SOURCES) == ["movielens-100k", "movielens-1m"]


def test_the_archives_are_the_published_ones() -> None:
    for archive in (sources.ML_100K, sources.ML_1M):
        assert archive.url == f"https://files.grouplens.org/datasets/movielens/{archive.folder}.zip"
        assert len(archive.md5) == 32
