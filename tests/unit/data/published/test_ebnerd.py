from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.data.sources import open_source
from domlora.errors import ConfigError, DataError

TYPES = {
    "impression_id": pa.uint32(),
    "article_id": pa.int32(),
    "impression_time": pa.timestamp("us"),
    "read_time": pa.float32(),
    "scroll_percentage": pa.float32(),
    "device_type": pa.int8(),
    "article_ids_inview": pa.large_list(pa.int32()),
    "article_ids_clicked": pa.large_list(pa.int32()),
    "user_id": pa.uint32(),
    "is_sso_user": pa.bool_(),
    "gender": pa.int8(),
    "postcode": pa.int8(),
    "age": pa.int8(),
    "is_subscriber": pa.bool_(),
    "session_id": pa.uint32(),
    "next_read_time": pa.float32(),
    "next_scroll_percentage": pa.float32(),
}
HISTORY = pa.schema({"user_id": pa.uint32(), "article_id_fixed": pa.large_list(pa.int32())})


def impression(number: int, time: str, device: int, page: int | None, shown: list[int], clicked: list[int]) -> dict:
    row = dict.fromkeys(TYPES)
    return row | {
        "impression_id": number,
        "user_id": 4_000_000_000 + number % 2,
        "session_id": 3,
        "impression_time": datetime.fromisoformat(time),
        "device_type": device,
        "article_id": page,
        "article_ids_inview": shown,
        "article_ids_clicked": clicked,
        "read_time": 13.5,
        "is_subscriber": False,
    }


TRAIN = [
    impression(1, "2023-05-18T07:00:03.900000", 1, None, [10, 11, 12], [11]),
    impression(2, "2023-05-24T07:00:00", 2, 77, [10, 13], [10, 13]),
    impression(3, "2023-05-24T06:59:59", 3, 77, [14], [14]),
]
TEST = [impression(4, "2023-05-25T07:00:15", 0, None, [10], [10])]


def write(folder: Path, published: bool) -> Path:
    for part, rows in (("train", TRAIN), ("validation" if published else "val", TEST)):
        names = ("behaviors", "history")
        paths = [folder / part / f"{n}.parquet" if published else folder / f"{n}_{part}.parquet" for n in names]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(TYPES)), paths[0])
        read = [] if part != "train" else list(range(100, 160))
        histories = [{"user_id": 4_000_000_001, "article_id_fixed": read}, {"user_id": 7, "article_id_fixed": [1]}]
        pq.write_table(pa.Table.from_pylist(histories, HISTORY), paths[1])
    return folder


def found(raw) -> dict[tuple[int, int], dict]:
    return {(row["impression_id"], row["item_id"]): row for row in raw.table.to_pyarrow().to_pylist()}


@pytest.mark.parametrize("published", [True, False])
def test_one_row_a_shown_article(each_engine, tmp_path, published) -> None:
    raw = open_source(each_engine, "ebnerd", write(tmp_path / "raw", published))
    rows = found(raw)
    assert {key: row["clicked"] for key, row in rows.items()} == {
        (1, 10): 0,
        (1, 11): 1,
        (1, 12): 0,
        (2, 10): 1,
        (2, 13): 1,
        (3, 14): 1,
        (4, 10): 1,
    }
    assert {key[0]: (row["device"], row["page"], row["split"]) for key, row in rows.items()} == {
        1: ("desktop", "front", "train"),
        2: ("mobile", "article", "valid"),
        3: ("tablet", "article", "train"),
        4: ("unknown", "front", "test"),
    }
    assert raw.key == ("impression_id", "item_id")
    assert raw.folder == tmp_path / "raw"
    assert ("train/history.parquet" if published else "history_train.parquet") in raw.inputs


def test_time_hour_and_weekday(each_engine, tmp_path) -> None:
    rows = found(open_source(each_engine, "ebnerd", write(tmp_path / "raw", True)))
    at = {key[0]: (row["time"], row["hour"], row["weekday"]) for key, row in rows.items()}
    for row in (*TRAIN, *TEST):
        time = row["impression_time"].replace(microsecond=0)
        assert at[row["impression_id"]] == ((time - datetime(1970, 1, 1)).total_seconds(), time.hour, time.weekday())


def test_histories_are_those_of_the_part_and_keep_the_latest(each_engine, tmp_path) -> None:
    write(tmp_path / "raw", True)
    rows = found(open_source(each_engine, "ebnerd", tmp_path / "raw"))
    assert rows[1, 10]["history"] == rows[3, 14]["history"] == list(range(110, 160))
    assert (rows[2, 10]["history"], rows[4, 10]["history"]) == (None, None)
    rows = found(open_source(each_engine, "ebnerd", tmp_path / "raw", {"history": 2}))
    assert rows[1, 10]["history"] == [158, 159]


def test_articles_are_joined_when_they_are_there(each_engine, tmp_path) -> None:
    write(tmp_path / "raw", True)
    assert "premium" not in open_source(each_engine, "ebnerd", tmp_path / "raw").table.columns
    articles = {
        "article_id": pa.array([10, 11], pa.int32()),
        "premium": [True, False],
        "article_type": ["article_default", "live"],
        "category": pa.array([118, 142], pa.int16()),
        "published_time": pa.array([datetime(2023, 5, 18, 3, 30), datetime(2023, 5, 18, 8)], pa.timestamp("us")),
        "total_read_time": [1.0, 2.0],
    }
    pq.write_table(pa.table(articles), tmp_path / "raw" / "articles.parquet")
    raw = open_source(each_engine, "ebnerd", tmp_path / "raw")
    rows = {key: (r["premium"], r["article_type"], r["category"], r["hours_old"]) for key, r in found(raw).items()}
    assert rows[1, 10] == (True, "article_default", 118, 3)
    assert rows[1, 11] == (False, "live", 142, -1)
    assert rows[1, 12] == (None, None, None, None)
    assert "articles.parquet" in raw.inputs
    assert "total_read_time" not in raw.table.columns


def test_no_feature_reads_what_is_known_after_the_click(engine, tmp_path) -> None:
    plan = load_plan("ebnerd")
    after = {"read_time", "scroll_percentage", "next_read_time", "next_scroll_percentage"}
    assert set(plan.columns.forbidden) == after
    assert after < set(open_source(engine, "ebnerd", write(tmp_path / "raw", True)).table.columns)
    assert not after & {column for name, spec in plan.features.items() for column in spec.columns or (name,)}


@pytest.mark.parametrize("history", [0, "9", True])
def test_the_length_of_histories_must_be_a_number(engine, tmp_path, history) -> None:
    with pytest.raises(ConfigError, match="history must be a whole number above 0"):
        open_source(engine, "ebnerd", tmp_path, {"history": history})


def test_other_files_are_refused(engine, tmp_path) -> None:
    write(tmp_path / "raw", True)
    path = tmp_path / "raw" / "train" / "behaviors.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["article_ids_clicked"]), path)
    with pytest.raises(DataError, match=r"behaviors\.parquet has no such column. Received: 'article_ids_clicked'"):
        open_source(engine, "ebnerd", tmp_path / "raw")
    path.unlink()
    with pytest.raises(DataError, match=r"there is no train/behaviors\.parquet.*recsys\.eb\.dk"):
        open_source(engine, "ebnerd", tmp_path / "raw")


def test_the_plan_prepares(tmp_path) -> None:
    manifest = prepare(load_plan("ebnerd"), tmp_path / "out", folder=write(tmp_path / "raw", True))
    names = ["desktop/front", "mobile/article", "tablet/article", "unknown/front"]
    assert list(manifest["splits"]["train"]["domains"]) == names
    assert {split: facts["rows"] for split, facts in manifest["splits"].items()} == {"train": 4, "valid": 2, "test": 1}
