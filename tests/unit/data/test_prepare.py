from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import date
from pathlib import Path

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress

from domlora.data import prepare as module
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.prepare import prepare
from domlora.data.sources import RawTable, open_source
from domlora.errors import ConfigError, DataError, SchemaError


@pytest.fixture(scope="module")
def raw(layouts) -> RawTable:
    return open_source("movielens-100k", layouts["ml-100k"])


@pytest.fixture(scope="module")
def raw_rows(raw) -> list[dict]:
    return list(raw.table.to_pyarrow().to_pylist())


@pytest.fixture(scope="module")
def gender(raw, tmp_path_factory) -> tuple[Path, dict]:
    """The default preparation, and its manifest."""
    folder = tmp_path_factory.mktemp("prepared") / "gender"
    return folder, prepare(raw, folder, domain="gender")


def own(columns: dict, *, key=("k",), domains=("d",), features=("x",), **roles) -> RawTable:
    """A raw table of one's own."""
    table = ibis.duckdb.connect().create_table("t", ibis.memtable(pa.table(columns)))
    return RawTable("own", table, key=key, features=features, domains=domains, **roles)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written_rows(folder: Path, split: str) -> list[dict]:
    """Rows of a split with ids turned back into words."""
    words = json.loads((folder / "vocabularies.json").read_text())
    domains = json.loads((folder / "schema.json").read_text())["domains"]
    rows = []
    for path in sorted((folder / split).iterdir()):
        for row in pq.read_table(path).to_pylist():
            for name in words:
                row[name] = [None, "?", *words[name]][row[name]]
            row["domain"] = domains[row["__domain"]]
            rows.append(row)
    return rows


def expected_order(rows: list[dict], seed: int, key: tuple[str, ...]) -> list[dict]:
    """The documented order, without an engine. The keys of these rows are unique."""
    return sorted(
        rows, key=lambda row: hashlib.md5(f"{seed}:{'|'.join(str(row[k]) for k in key)}:0".encode()).hexdigest()
    )


def cut(rows: list[dict]) -> list[list[dict]]:
    first, second = (math.floor(len(rows) * share + 0.5) for share in (0.6, 0.8))
    return [rows[:first], rows[first:second], rows[second:]]


# --- splits -------------------------------------------------------------------------------------------------------------


def test_the_random_split_is_the_documented_one(raw, raw_rows, tmp_path) -> None:
    prepare(raw, tmp_path / "out", domain="gender", seed=7)
    strata = defaultdict(list)
    for row in expected_order(raw_rows, 7, raw.key):
        strata[row["gender"], row["rating"] == "5"].append(row)
    for number, split in enumerate(SPLITS):
        chosen = [row for rows in strata.values() for row in cut(rows)[number]]
        expected = [(row["gender"], float(row["rating"] == "5")) for row in expected_order(chosen, 7, raw.key)]
        assert [(row["domain"], row["__label"]) for row in written_rows(tmp_path / "out", split)] == expected
        if split == "train":
            items = [(row["user_id"], row["item_id"]) for row in expected_order(chosen, 7, raw.key)]
            assert [(row["user_id"], row["item_id"]) for row in written_rows(tmp_path / "out", split)] == items


def test_the_time_split_cuts_each_domain_by_time(raw, raw_rows, tmp_path) -> None:
    prepare(raw, tmp_path / "out", domain="gender", split="time", features=["user_id", "item_id", "time"])
    for domain in ("F", "M"):
        times = sorted(row["time"] for row in raw_rows if row["gender"] == domain)
        for expected, split in zip(cut(times), SPLITS, strict=True):
            rows = [row for row in written_rows(tmp_path / "out", split) if row["domain"] == domain]
            assert len(rows) == len(expected)
            if split == "train":
                assert sorted(int(row["time"]) for row in rows) == expected


def test_a_time_split_without_times_is_refused(layouts, tmp_path) -> None:
    raw = open_source("movielens-1m", layouts["undated"])
    with pytest.raises(ConfigError, match="no usable times"):
        prepare(raw, tmp_path / "out", domain="gender", split="time")
    assert not (tmp_path / "out").exists()


def test_rows_without_a_time_are_dropped_from_a_time_split_only(tmp_path) -> None:
    raw = own({"k": [1, 2, 3], "x": ["a"] * 3, "d": ["u"] * 3, "rating": [5, 5, 5], "at": [None, 2, 3]}, time="at")
    assert prepare(raw, tmp_path / "a", domain="d", split="time")["dropped"]["time missing"] == 1
    assert "time missing" not in prepare(raw, tmp_path / "b", domain="d")["dropped"]


def test_fractions(raw, tmp_path) -> None:
    splits = prepare(raw, tmp_path / "out", domain="gender", fractions=(0.8, 0.2, 0.0))["splits"]
    assert splits["test"] == {
        "rows": 0,
        "domains": {"F": {"rows": 0, "positives": 0}, "M": {"rows": 0, "positives": 0}},
        "files": [],
    }
    assert splits["train"]["rows"] == pytest.approx(4 * splits["valid"]["rows"], abs=4)


# --- vocabulary, domains, labels ----------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_training_split(raw, raw_rows, tmp_path) -> None:
    prepare(raw, tmp_path / "out", domain="gender", fractions=(0.1, 0.1, 0.8))
    words = json.loads((tmp_path / "out" / "vocabularies.json").read_text())
    train = written_rows(tmp_path / "out", "train")
    counts = Counter(row["item_id"] for row in train)
    assert words["item_id"] == sorted(counts, key=lambda word: (-counts[word], word))
    everywhere = {row["user_id"] for row in raw_rows}
    assert set(words["user_id"]) < everywhere
    unseen = [row for row in written_rows(tmp_path / "out", "test") if row["user_id"] == "?"]
    assert unseen
    assert all(row["user_id"] not in ("?", None) for row in train)


def test_features_are_the_papers_three_by_default(raw, tmp_path) -> None:
    prepare(raw, tmp_path / "out", domain="occupation")
    schema = Dataset.open(tmp_path / "out").schema
    assert [(feature.name, feature.kind) for feature in schema.features] == [
        ("user_id", "categorical"),
        ("item_id", "categorical"),
        ("occupation", "categorical"),
    ]
    assert schema.domains == ("doctor", "other", "writer")
    assert (schema.domain, schema.label, schema.user, schema.time) == ("occupation", "label", "user_id", "time")


def test_domains_that_are_numbers_are_in_order_of_number(raw, tmp_path) -> None:
    manifest = prepare(raw, tmp_path / "out", domain="age")
    assert list(manifest["splits"]["train"]["domains"]) == ["1", "18", "25", "35", "45", "50", "56"]


@pytest.mark.parametrize(
    ("values", "domains"),
    [
        (["10", "9", "-1", " 9 "], ("-1", "9", "10")),
        ([10.0, 9.0, 9.0, 9.0], ("9", "10")),
        (["10", "9", "b", "a"], ("10", "9", "a", "b")),
        ([True, False, True, True], ("0", "1")),
    ],
)
def test_every_domain_with_rows_is_one(tmp_path, values, domains) -> None:
    raw = own({"k": [1, 2, 3, 4], "x": ["a"] * 4, "d": values, "rating": [5] * 4})
    prepare(raw, tmp_path / "out", domain="d")
    assert Dataset.open(tmp_path / "out").schema.domains == domains


def test_numeric_features_are_standardised_over_the_training_split(raw, tmp_path) -> None:
    table = raw.table.mutate(age=raw.table["age"].cast("int64"))
    prepare(replace(raw, table=table), tmp_path / "out", domain="gender", features=["item_id", "age"], numeric=["age"])
    data = Dataset.open(tmp_path / "out")
    train = data.read("train").dense[:, 0].double()
    assert abs(train.mean()) < 1e-6
    assert train.std(correction=0) == pytest.approx(1.0, abs=1e-6)
    assert data.read("test").dense.shape == (data.num_rows("test"), 1)
    (age,) = data.schema.numeric
    ages = {1, 18, 25, 35, 45, 50, 56}
    assert {round(value * age.std + age.mean) for value in train.tolist()} <= ages


def test_a_numeric_feature_that_never_changes_has_std_1(tmp_path) -> None:
    raw = own({"k": [1, 2], "x": [4, 4], "d": ["u", "u"], "rating": [5, 5]})
    prepare(raw, tmp_path / "out", domain="d", numeric=["x"])
    assert Dataset.open(tmp_path / "out").schema.numeric[0].std == 1.0
    assert Dataset.open(tmp_path / "out").read("train").dense.tolist() == [[0.0]]


def test_label_rules(raw, raw_rows, gender, tmp_path) -> None:
    four = prepare(raw, tmp_path / "out", domain="gender", label_rule="rating>=4")
    for manifest, ratings in ((gender[1], "5"), (four, "45")):
        splits = manifest["splits"].values()
        positives = sum(facts["positives"] for split in splits for facts in split["domains"].values())
        assert positives == sum(row["rating"] in ratings for row in raw_rows)


def test_rows_that_cannot_be_used_are_counted(tmp_path) -> None:
    columns = {
        "k": list(range(8)),
        "x": list("abcdefgh"),
        "d": ["u", "u", "u", "u", None, " ", "only a bad row", None],
        "rating": ["5", None, "five", "", "5", "4", "nan", None],
    }
    manifest = prepare(own(columns), tmp_path / "out", domain="d")
    assert manifest["rows_in"] == 8
    assert manifest["dropped"] == {"rating missing or not a number": 5, "domain missing": 2}
    assert manifest["splits"]["train"]["domains"] == {"u": {"rows": 1, "positives": 1}}


def test_nothing_left_is_an_error(tmp_path) -> None:
    raw = own({"k": [1], "x": ["a"], "d": ["u"], "rating": ["none"]})
    with pytest.raises(DataError, match=r"no row is left.*'rating missing or not a number': 1"):
        prepare(raw, tmp_path / "out", domain="d")
    assert list(tmp_path.iterdir()) == []


def test_a_training_split_without_rows_is_an_error(tmp_path) -> None:
    raw = own({"k": [1], "x": ["a"], "d": ["u"], "rating": [5]})
    with pytest.raises(DataError, match="no row trains"):
        prepare(raw, tmp_path / "out", domain="d", fractions=(0.2, 0.0, 0.8))


# --- the same seed, the same bytes --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(raw, gender, tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 2)):
        prepare(raw, tmp_path / name, domain="gender", seed=seed)
    first, again, other = (files_of(folder) for folder in (gender[0], tmp_path / "a", tmp_path / "b"))
    assert first == again
    assert first["train/part-00000.parquet"] != other["train/part-00000.parquet"]


def test_neither_the_order_of_rows_nor_the_layout_matters(raw, gender, layouts, tmp_path) -> None:
    backwards = replace(raw, table=raw.table.order_by(ibis.desc("time")))
    others = [backwards, open_source("movielens-100k", layouts["parquet"])]
    for number, other in enumerate(others):
        assert prepare(other, tmp_path / str(number), domain="gender")["files"] == gender[1]["files"]


def test_the_split_of_a_row_does_not_hang_on_the_features(raw, gender, tmp_path) -> None:
    prepare(raw, tmp_path / "out", domain="gender", features=["age", "item_id"])
    for split in SPLITS:
        a, b = (written_rows(folder, split) for folder in (gender[0], tmp_path / "out"))
        assert [row["item_id"] for row in a] == [row["item_id"] for row in b]


def test_rows_with_one_key_are_told_apart_by_their_other_columns(tmp_path) -> None:
    columns = {
        "k": ["same"] * 40,
        "x": [number % 7 for number in range(40)],
        "d": ["u"] * 40,
        "rating": [number % 2 * 5 for number in range(40)],
    }
    backwards = {name: column[::-1] for name, column in columns.items()}
    one = prepare(own(columns), tmp_path / "a", domain="d")
    assert one["files"] == prepare(own(backwards), tmp_path / "b", domain="d")["files"]
    assert sum(split["rows"] for split in one["splits"].values()) == 40


# --- files --------------------------------------------------------------------------------------------------------------


def test_the_manifest_accounts_for_every_file_and_row(raw_rows, gender) -> None:
    folder, manifest = gender
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    files = files_of(folder)
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, facts in manifest["files"].items():
        assert facts == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size_bytes": len(files[name])}
    assert manifest["rows_in"] == len(raw_rows) == sum(split["rows"] for split in manifest["splits"].values())
    assert manifest["encoder_fingerprint"] == Dataset.open(folder).encoder.fingerprint()
    assert manifest["inputs"].keys() == {"u.data", "u.user"}
    assert manifest["options"]["fractions"] == [0.6, 0.2, 0.2]
    assert str(folder.parent) not in json.dumps(manifest)


def test_shards(raw, gender, tmp_path) -> None:
    manifest = prepare(raw, tmp_path / "many", domain="gender", shard_rows=50)
    names = manifest["splits"]["train"]["files"]
    assert names[:2] == ["train/part-00000.parquet", "train/part-00001.parquet"]
    sizes = [pq.read_metadata(tmp_path / "many" / name).num_rows for name in names]
    assert sizes[:-1] == [50] * (len(sizes) - 1)
    assert written_rows(tmp_path / "many", "train") == written_rows(gender[0], "train")


def test_many_rows_are_in_order_too(tmp_path) -> None:
    """Enough rows for the engine to work in parallel, which loses any order that is not asked for."""
    number = 130_000
    ratings = [5 if row * row % 7 < 2 else 1 for row in range(number)]
    raw = own({"k": range(number), "x": ["a"] * number, "d": ["u"] * number, "rating": ratings})
    prepare(raw, tmp_path / "out", domain="d", fractions=(1.0, 0.0, 0.0))
    order = sorted(range(number), key=lambda row: hashlib.md5(f"0:{row}:0".encode()).digest())
    expected = [float(ratings[row] == 5) for row in order]
    assert Dataset.open(tmp_path / "out").read("train").label.tolist() == expected


def test_columns_of_a_shard(gender) -> None:
    schema = pq.read_schema(gender[0] / "train" / "part-00000.parquet")
    assert dict(zip(schema.names, map(str, schema.types), strict=True)) == {
        "user_id": "int32",
        "item_id": "int32",
        "gender": "int32",
        "__domain": "int32",
        "__label": "float",
        "__user": "int64",
    }


def test_an_interrupted_run_leaves_nothing_and_spares_the_old(raw, gender, tmp_path, monkeypatch) -> None:
    shutil.copytree(gender[0], tmp_path / "out")
    before = files_of(tmp_path / "out")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", interrupt)
    for name in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            prepare(raw, tmp_path / name, domain="gender", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite(raw, gender, tmp_path) -> None:
    shutil.copytree(gender[0], tmp_path / "out")
    with pytest.raises(DataError, match="must not exist"):
        prepare(raw, tmp_path / "out", domain="age")
    prepare(raw, tmp_path / "out", domain="age", overwrite=True)
    assert Dataset.open(tmp_path / "out").schema.domain == "age"


def test_damaged_text_is_an_error_of_the_data(tmp_path) -> None:
    (tmp_path / "u.data").write_text("1\t2\t3\t4\nno tabs at all\n")
    (tmp_path / "u.user").write_text("1|25|F|other|00001\n")
    with pytest.raises(DataError, match=r"movielens-100k cannot be read .*Line: 2"):
        prepare("movielens-100k", tmp_path / "out", domain="gender", raw=tmp_path)


def test_a_source_by_name_with_progress(layouts, tmp_path) -> None:
    with Progress(disable=True) as progress:
        prepare("movielens-1m", tmp_path / "out", domain="gender", raw=layouts["ml-1m"], progress=progress)
        (task,) = progress.tasks
        assert task.completed == task.total


# --- options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "gendr"}, "Did you mean 'gender'"),
        ({"domain": "zip"}, "no such domain"),
        ({"split": "tiem"}, "Did you mean 'time'"),
        ({"fractions": (0.6, 0.2, 0.3)}, "sum to 1"),
        ({"fractions": (0.0, 0.5, 0.5)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "sum to 1"),
        ({"fractions": (0.5, 0.5)}, "three shares"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"label_rule": "rating=5"}, "label rule"),
        ({"features": ["item"]}, "Did you mean 'item_id'"),
        ({"features": ["item_id", "rating"]}, "may not be the rating"),
        ({"features": ["item_id"], "numeric": ["age"]}, "must be a feature"),
        ({"features": ["item_id", "age"], "numeric": ["age"]}, "'age' must be a column of numbers"),
    ],
)
def test_options_that_are_refused(raw, tmp_path, options, message) -> None:
    error = SchemaError if "column of numbers" in message else ConfigError
    with pytest.raises(error, match=message):
        prepare(raw, tmp_path / "out", **{"domain": "gender", **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [[1]]}, r"'x' must hold text, numbers or booleans. Received: 'array<int64>'"),
        ({"x": [b"1"]}, "'x' must hold text"),
        ({"d": [date(2020, 1, 1)]}, "'d' must hold text"),
        ({"rating": [[5]]}, "'rating' must hold text"),
        ({"k": [0.5]}, "key column 'k' must be text, integer or boolean"),
    ],
)
def test_columns_that_are_refused(tmp_path, columns, message) -> None:
    raw = own({"k": [1], "x": ["a"], "d": ["u"], "rating": [5]} | columns)
    with pytest.raises(SchemaError, match=message):
        prepare(raw, tmp_path / "out", domain="d")
    assert list(tmp_path.iterdir()) == []
