from __future__ import annotations

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.data.sources import open_source
from domlora.errors import ConfigError, DataError

TWO = {"categories": ["Video Games", "Arts, Crafts and Sewing"]}
STEMS = ("Video_Games", "Arts_Crafts_and_Sewing")
REVIEWS = {
    "Video_Games": [("A1", "B1", 5.0, 1400000000), ("A1", "B2", 1.0, 1400000001)],
    "Arts_Crafts_and_Sewing": [("A1", "B1", 4.0, 1400000002)],
}


def write_2018(folder, ending="_5.json.gz", reviews=REVIEWS) -> None:
    for stem, rows in reviews.items():
        lines = [
            json.dumps(
                {
                    "overall": stars,
                    "verified": True,
                    "reviewTime": "05 13, 2014",
                    "reviewerID": user,
                    "asin": item,
                    "style": {"Color:": " red"},
                    "reviewText": 'said "so"',
                    "unixReviewTime": time,
                }
            )
            for user, item, stars, time in rows
        ]
        text = "\n".join(lines).encode()
        (folder / f"{stem}{ending}").write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)


def write_2023_tables(folder, ending=".csv", history=False) -> None:
    for stem, reviews in REVIEWS.items():
        lines = ["user_id,parent_asin,rating,timestamp" + ",history" * history]
        lines += [f"{user},{item},{stars},{time}000" + ",B8 B9" * history for user, item, stars, time in reviews]
        text = "\n".join(lines).encode()
        (folder / f"{stem}{ending}").write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)


def write_2023_reviews(folder, ending=".jsonl.gz") -> None:
    for stem, reviews in REVIEWS.items():
        lines = [
            json.dumps(
                {"rating": s, "title": "", "images": [], "asin": "X", "parent_asin": i, "user_id": u, "timestamp": t}
            )
            for u, i, s, t in reviews
        ]
        text = "\n".join(lines).encode()
        (folder / f"{stem}{ending}").write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)


def write_histories(folder, reviews=REVIEWS) -> None:
    for stem, rows in reviews.items():
        users, items, _, _ = zip(*rows, strict=True)
        strings = pa.large_string()
        table = {
            "reviewerID": pa.array(users, strings),
            "asin": pa.array(items, strings),
            "position": range(len(users)),
        }
        pq.write_table(
            pa.table({**table, "position": pa.array(range(len(users)), pa.int64())}), folder / f"{stem}.parquet"
        )


def found(raw) -> list[tuple]:
    rows = raw.table.to_pyarrow().to_pylist()
    return sorted((row["category"], row["user_id"], row["item_id"], row["rating"], row["time"]) for row in rows)


def wanted(factor: int = 1) -> list[tuple]:
    return sorted(
        (category, user, item, str(stars), time * factor)
        for category, stem in zip(TWO["categories"], STEMS, strict=True)
        for user, item, stars, time in REVIEWS[stem]
    )


def as_numbers(rows) -> list[tuple]:
    return [(*row[:3], float(row[3]), row[4]) for row in rows]


@pytest.mark.parametrize(
    ("write", "ending", "factor"),
    [
        (write_2018, "_5.json.gz", 1),
        (write_2018, "_5.json", 1),
        (write_2023_tables, ".csv", 1000),
        (write_2023_tables, ".csv.gz", 1000),
        (write_2023_reviews, ".jsonl.gz", 1),
        (write_2023_reviews, ".jsonl", 1),
    ],
)
def test_every_layout_gives_the_same_columns(engine, tmp_path, write, ending, factor) -> None:
    write(tmp_path, ending)
    raw = open_source(engine, "amazon", tmp_path, TWO)
    assert as_numbers(found(raw)) == as_numbers(wanted(factor))
    assert raw.key == ("user_id", "item_id", "category", "time")
    assert raw.inputs.keys() == {f"{stem}{ending}" for stem in STEMS}
    assert raw.table.schema()["time"].is_integer()


def test_tables_of_2023_may_have_histories(each_engine, tmp_path) -> None:
    write_2023_tables(tmp_path, history=True)
    assert found(open_source(each_engine, "amazon", tmp_path, TWO)) == wanted(1000)


def test_purchase_histories(each_engine, tmp_path) -> None:
    (tmp_path / "amazon-5core").mkdir()
    write_histories(tmp_path / "amazon-5core")
    raw = open_source(each_engine, "amazon", tmp_path, TWO)
    assert sorted(raw.table.columns) == ["category", "item_id", "position", "user_id"]
    assert raw.table.count().to_pyarrow().as_py() == 3
    assert raw.key == ("user_id", "item_id", "category")


def test_one_category_is_enough(engine, tmp_path) -> None:
    write_2018(tmp_path)
    raw = open_source(engine, "amazon", tmp_path, {"categories": ["Video_Games"]})
    assert {row[0] for row in found(raw)} == {"Video_Games"}


def test_layouts_are_not_mixed(engine, tmp_path) -> None:
    write_2018(tmp_path)
    (tmp_path / "Video_Games_5.json.gz").rename(tmp_path / "Video_Games_5.json")
    with pytest.raises(DataError, match=r"there is no (Video_Games_5\.json\.gz|Arts_Crafts_and_Sewing_5\.json)\."):
        open_source(engine, "amazon", tmp_path, TWO)


def test_a_line_that_is_no_json_is_kept_aside(engine, tmp_path) -> None:
    write_2018(tmp_path, "_5.json")
    path = tmp_path / "Video_Games_5.json"
    path.write_text(path.read_text() + "\n{'overall': 5.0, 'reviewerID': 'A3'}\n")
    raw = open_source(engine, "amazon", tmp_path, TWO)
    assert (len(found(raw)), raw.rejected_rows) == (3, 1)


@pytest.mark.parametrize("categories", [None, [], "Video Games", ["Video Games", "Video Games"], [3], [""]])
def test_categories_must_be_names(engine, tmp_path, categories) -> None:
    with pytest.raises(ConfigError, match="list of different names"):
        open_source(engine, "amazon", tmp_path, {} if categories is None else {"categories": categories})


def test_missing_files_are_named_with_their_publisher(engine, tmp_path, monkeypatch) -> None:
    with pytest.raises(
        DataError, match=r"same one of the endings .*such as Books_5\.json\.gz. Received: .*McAuley Lab"
    ):
        open_source(engine, "amazon", tmp_path, {"categories": ["Books"]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DOMLORA_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"is not fetched. Put a file for each category.*McAuley Lab.*cache/domlora/amazon"
    ):
        open_source(engine, "amazon", None, {"categories": ["Books"]})


def test_a_parquet_file_of_something_else_is_refused(engine, tmp_path) -> None:
    pq.write_table(pa.table({"reviewer": ["A1"], "asin": ["B1"], "position": [0]}), tmp_path / "Books.parquet")
    with pytest.raises(DataError, match=r"Books\.parquet has no such column.*'reviewerID'.*Did you mean 'reviewer'"):
        open_source(engine, "amazon", tmp_path, {"categories": ["Books"]})
    (tmp_path / "Books.parquet").write_text("nothing")
    with pytest.raises(DataError, match=r"Books\.parquet must be a Parquet file"):
        open_source(engine, "amazon", tmp_path, {"categories": ["Books"]})


@pytest.mark.parametrize("name", ["amazon-6", "amazon-13", "amazon-5core"])
def test_plans_prepare(tmp_path, name) -> None:
    plan, draw = load_plan(name), random.Random(5)
    for category in plan.source.options["categories"]:
        pairs = sorted({(f"A{draw.randrange(8)}", f"B{draw.randrange(60)}") for _ in range(40)})
        reviews = {category.replace(" ", "_"): [(*pair, 5.0, 9) for pair in pairs]}
        (write_histories if name == "amazon-5core" else write_2018)(tmp_path, reviews=reviews)
    manifest = prepare(plan, tmp_path / "out", folder=tmp_path)
    assert list(manifest["splits"]["train"]["domains"]) == plan.source.options["categories"]
    for domain in plan.source.options["categories"]:
        facts = [split["domains"][domain] for split in manifest["splits"].values()]
        rows, clicks = (sum(each[key] for each in facts) for key in ("rows", "positives"))
        assert 1.5 * clicks < rows < 6 * clicks  # 2 to 5 non-clicks a click, rounded down for each user


def test_the_paper_keeps_a_review_with_other_stars(tmp_path) -> None:
    reviews = {"Video_Games": [("A1", "B1", 5.0, 1), ("A1", "B1", 5.0, 2), ("A1", "B1", 4.0, 3), ("A2", "B2", 1.0, 4)]}
    write_2018(tmp_path, reviews=reviews)
    plan = load_plan("amazon-6", ["source.options.categories=['Video Games']"])
    manifest = prepare(plan, tmp_path / "out", folder=tmp_path)
    assert (manifest["rows"]["in"], manifest["rows"]["kept"] - manifest["rows"]["sampled"]) == (4, 3)
