from __future__ import annotations

import pytest

from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.data.published import movielens
from domlora.data.sources import open_source
from domlora.errors import DataError


def rows_of(table) -> list[tuple]:
    return sorted(tuple(row.values()) for row in table.to_pyarrow().to_pylist())


def test_movielens_1m(each_engine, layouts, small_rows) -> None:
    ratings, users = small_rows
    raw = open_source(each_engine, "movielens-1m", layouts["ml-1m"])
    rows = raw.table.to_pyarrow().to_pylist()
    of_user = {str(user): (gender, str(age), code) for user, gender, age, _, code in users}
    assert {row["user_id"]: (row["gender"], row["age"], row["zip"]) for row in rows} == of_user
    assert {row["occupation"] for row in rows} == {"0", "1", "2"}
    assert rows_of(raw.table["user_id", "item_id", "rating", "time"]) == sorted(
        (str(user), str(item), str(rating), time) for user, item, rating, time in ratings
    )
    assert raw.inputs.keys() == {"ratings.dat", "users.dat"}
    assert (raw.key, raw.folder, raw.rejected_rows) == (("user_id", "item_id", "time"), layouts["ml-1m"], 0)


def test_movielens_100k_is_the_same_from_both_layouts(each_engine, layouts) -> None:
    text, parquet = (open_source(each_engine, "movielens-100k", layouts[layout]) for layout in ("ml-100k", "parquet"))
    assert text.table.schema() == parquet.table.schema()
    assert rows_of(text.table) == rows_of(parquet.table)
    assert set(text.table.to_pyarrow().column("occupation").to_pylist()) == {"writer", "doctor", "other"}
    assert text.key == parquet.key == ("user_id", "item_id", "time")


def test_a_set_whose_times_are_all_0_has_none(engine, layouts) -> None:
    raw = open_source(engine, "movielens-1m", layouts["undated"])
    assert "time" not in raw.table.columns
    assert raw.key == ("user_id", "item_id")


def test_a_rating_of_an_unlisted_user_keeps_empty_columns(each_engine, tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n2::7::4::9\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n")
    rows = open_source(each_engine, "movielens-1m", tmp_path).table.order_by("user_id").to_pyarrow().to_pylist()
    assert [(row["gender"], row["zip"]) for row in rows] == [("F", "00001"), (None, None)]


def test_latin_1_text_is_read_and_quotes_mean_nothing(engine, tmp_path) -> None:
    (tmp_path / "u.data").write_text("1\t7\t5\t9\n")
    (tmp_path / "u.user").write_bytes('1|25|F|médecin "dit|00001\n'.encode("latin-1"))
    rows = open_source(engine, "movielens-100k", tmp_path).table.to_pyarrow().to_pylist()
    assert rows[0]["occupation"] == 'médecin "dit'


def test_lines_of_both_files_that_cannot_be_read_are_kept_in_one(engine, tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n1::8::5\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n2::M\n3::M\n")
    raw = open_source(engine, "movielens-1m", tmp_path)
    assert raw.table.count().to_pyarrow().as_py() == 1
    assert raw.rejected_rows == 3
    kept = engine.read([raw.rejected]).to_pyarrow().to_pylist()
    assert sorted((row["file"].rpartition("/")[2], row["line"]) for row in kept) == [
        ("ratings.dat", 2),
        ("users.dat", 2),
        ("users.dat", 3),
    ]


def test_a_time_that_is_no_number_is_absent(each_engine, tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n1::8::5::soon\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n")
    table = open_source(each_engine, "movielens-1m", tmp_path).table
    assert rows_of(table["item_id", "time"]) == [("7", 9), ("8", None)]


def test_a_user_listed_twice_is_refused(each_engine, tmp_path) -> None:
    (tmp_path / "ratings.dat").write_text("1::7::5::9\n")
    (tmp_path / "users.dat").write_text("1::F::25::3::00001\n1::M::25::3::00001\n")
    with pytest.raises(DataError, match=r"user_id must be listed once in users\.dat. Received: '2 rows with 1 values'"):
        open_source(each_engine, "movielens-1m", tmp_path)


@pytest.mark.parametrize("name", ["movielens-20m", "movielens-25m"])
def test_large_sets_have_genres(each_engine, tmp_path, name) -> None:
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,4.0,9\n2,9,0.5,8\n"
    )
    films = '2,"Jumanji, or so (1995)",Adventure|Children\n29,"City ""of"" Lost (1995)",(no genres listed)\n'
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + films)
    raw = open_source(each_engine, name, tmp_path)
    assert rows_of(raw.table) == [
        ("1", "2", "3.5", 1112486027, "Adventure|Children", "Adventure"),
        ("1", "29", "4.0", 9, "(no genres listed)", "(no genres listed)"),
        ("2", "9", "0.5", 8, None, None),
    ]
    assert raw.table.columns == ("user_id", "item_id", "rating", "time", "genres", "genre")
    assert raw.key == ("user_id", "item_id", "time")


def test_a_file_of_ratings_without_its_column_is_refused(engine, tmp_path) -> None:
    (tmp_path / "ratings.csv").write_text("user,movieId,rating,timestamp\n1,2,3.5,1112486027\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n2,A,B\n")
    with pytest.raises(DataError, match=r"ratings\.csv has no such column. Received: 'userId'"):
        open_source(engine, "movielens-20m", tmp_path)


def test_the_archives_are_the_published_ones() -> None:
    for archive in (movielens.ML_100K, movielens.ML_1M, movielens.ML_20M, movielens.ML_25M):
        assert archive.url == f"https://files.grouplens.org/datasets/movielens/{archive.folder}.zip"
        assert len(archive.md5) == 32


@pytest.mark.parametrize(
    ("name", "folder", "domains"),
    [
        ("movielens-100k", "ml-100k", {"F", "M"}),
        ("movielens-1m", "undated", {"F", "M"}),
        ("movielens-gen", "ml-1m", {"F", "M"}),
        ("movielens-age", "ml-1m", {"1", "18", "25", "35", "45", "50", "56"}),
        ("movielens-occupation", "ml-1m", {"0", "1", "2"}),
    ],
)
def test_plans_prepare(tmp_path, layouts, small_rows, name, folder, domains) -> None:
    manifest = prepare(load_plan(name), tmp_path / "out", folder=layouts[folder])
    assert manifest["rows"]["kept"] == len(small_rows[0])
    assert set(manifest["splits"]["train"]["domains"]) == domains
    positives = sum(d["positives"] for s in manifest["splits"].values() for d in s["domains"].values())
    assert positives == sum(rating == 5 for _, _, rating, _ in small_rows[0])


@pytest.mark.parametrize("name", ["movielens-20m", "movielens-25m"])
def test_plans_of_large_sets_prepare(tmp_path, name) -> None:
    ratings = [f"{user},{film},{film / 2},{user}\n" for user in range(1, 20) for film in range(1, 11)]
    films = [f"{film},Film,{genre}|Z\n" for film, genre in enumerate("ABABABABAB", start=1)]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(ratings))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + "".join(films))
    manifest = prepare(load_plan(name), tmp_path / "out", folder=tmp_path)
    train = manifest["splits"]["train"]["domains"]
    assert {domain: facts["rows"] for domain, facts in train.items()} == {"A": 57, "B": 57}
    assert sum(d["positives"] for s in manifest["splits"].values() for d in s["domains"].values()) == 19 * 3
