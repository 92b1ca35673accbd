from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress

from domlora.config import load_plan, merged, parse
from domlora.data import prepare as module
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.plan import Plan
from domlora.data.prepare import prepare
from domlora.errors import ConfigError, DataError, SchemaError

Table = dict[str, Any]
PLAN: Table = {
    "source": {"files": ["log/*.parquet"], "key": ["k"]},
    "columns": {"domain": "d", "label": "click"},
    "features": {"x": {}},
}


def plan_of(changes: Table) -> Plan:
    return parse(Plan, merged(PLAN, changes))


def run(folder: Path, columns: Table, changes: Table | None = None, **options: Any) -> dict[str, Any]:
    """Write a log, prepare it into ``folder / "out"``, return the manifest."""
    (folder / "log").mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table(columns), folder / "log" / "a.parquet")
    return prepare(plan_of(changes or {}), folder / "out", folder=folder, **options)


def log(size: int = 400, seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    return {
        "k": np.arange(size),
        "x": pa.array([f"item {n}" for n in random.integers(30, size=size)]),
        "user": random.integers(20, size=size),
        "d": pa.array(random.choice(["app", "web"], size, p=[0.3, 0.7])),
        "age": random.integers(18, 80, size=size).astype(float),
        "at": random.integers(1000, size=size),
        "click": (random.random(size) < 0.3).astype(np.int8),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written_rows(folder: Path, split: str) -> list[Table]:
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


def cut(rows: list[Any]) -> list[list[Any]]:
    first, second = (math.floor(len(rows) * share + 0.5) for share in (0.6, 0.8))
    return [rows[:first], rows[first:second], rows[second:]]


@pytest.fixture(scope="module")
def movielens(layouts: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    def prepared(out: Path, *settings: str, layout: str = "ml-100k", **options: Any) -> dict[str, Any]:
        return prepare(load_plan("movielens-100k", settings), out, folder=layouts[layout], **options)

    return prepared


@pytest.fixture(scope="module")
def gender(movielens: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The default preparation, and its manifest."""
    folder = tmp_path_factory.mktemp("prepared") / "gender"
    return folder, movielens(folder)


# splits and order


def test_the_random_split_is_the_documented_one(movielens: Any, small_rows: Any, tmp_path: Path) -> None:
    movielens(tmp_path / "out", "split.seed=7")
    ratings, users = small_rows
    gender_of = {user: gender for user, gender, *_ in users}

    def order(row: tuple[int, int, int, int]) -> str:
        user, item, _, time = row
        return hashlib.md5(f"7:{user}|{item}|{time}:0".encode()).hexdigest()

    strata = defaultdict(list)
    for row in sorted(ratings, key=order):
        strata[gender_of[row[0]], row[2] == 5].append(row)
    for number, split in enumerate(SPLITS):
        chosen = sorted((row for rows in strata.values() for row in cut(rows)[number]), key=order)
        found = written_rows(tmp_path / "out", split)
        assert [(row["domain"], row["__label"]) for row in found] == [
            (gender_of[r[0]], float(r[2] == 5)) for r in chosen
        ]
        if split == "train":
            assert [(row["user_id"], row["item_id"]) for row in found] == [(str(r[0]), str(r[1])) for r in chosen]


@pytest.mark.parametrize("kind", [np.int64, str, "decimals", "datetime"])
def test_the_time_split_cuts_each_domain_by_time(kind: Any, tmp_path: Path) -> None:
    rows = log()
    moments = [int(at) for at in rows["at"]]
    start = datetime(2026, 1, 1)
    rows["at"] = {
        np.int64: moments,
        str: [str(at) for at in moments],  # numbers as text are ordered as numbers
        "decimals": [f"{at}.0" for at in moments],  # as pandas writes them beside absent ones
        "datetime": [start + timedelta(seconds=at) for at in moments],
    }[kind]
    changes = {"columns": {"time": "at"}, "split": {"kind": "time"}, "features": {"k": {}}}
    run(tmp_path, rows, changes)
    domains = rows["d"].to_pylist()
    for domain in ("app", "web"):
        times = sorted(at for at, own in zip(moments, domains, strict=True) if own == domain)
        for expected, split in zip(cut(times), SPLITS, strict=True):
            found = [row for row in written_rows(tmp_path / "out", split) if row["domain"] == domain]
            assert len(found) == len(expected)
            if split == "train":
                assert sorted(moments[int(row["k"])] for row in found) == expected


def test_neither_the_order_of_rows_nor_their_files_matter(tmp_path: Path) -> None:
    rows = log(3000)
    expected = run(tmp_path / "a", rows, {"features": {"age": {"kind": "numeric"}, "user": {"kind": "bucketed"}}})
    order = np.random.default_rng(1).permutation(3000)
    mixed = pa.table(rows).take(pa.array(order))
    folder = tmp_path / "b" / "log"
    folder.mkdir(parents=True)
    for number, start in enumerate((0, 100, 1700)):
        pq.write_table(mixed.slice(start, (100, 1600, 1300)[number]), folder / f"{number}.parquet", row_group_size=64)
    changes = {"features": {"age": {"kind": "numeric"}, "user": {"kind": "bucketed"}}}
    found = prepare(plan_of(changes), tmp_path / "b" / "out", folder=tmp_path / "b")
    assert found["files"] == expected["files"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    movielens: Any, gender: Any, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 2)):
        movielens(tmp_path / name, f"split.seed={seed}")
    first, again, other = (files_of(folder) for folder in (gender[0], tmp_path / "a", tmp_path / "b"))
    assert first == again
    assert first["train/part-00000.parquet"] != other["train/part-00000.parquet"]


def test_the_layout_does_not_matter(movielens: Any, gender: Any, tmp_path: Path) -> None:
    assert movielens(tmp_path / "out", layout="parquet")["files"] == gender[1]["files"]


def test_the_split_of_a_row_does_not_hang_on_the_features(movielens: Any, gender: Any, tmp_path: Path) -> None:
    movielens(tmp_path / "out", "features.age={}")
    for split in SPLITS:
        a, b = (written_rows(folder, split) for folder in (gender[0], tmp_path / "out"))
        assert [row["item_id"] for row in a] == [row["item_id"] for row in b]


def test_rows_with_one_key_are_in_an_order_too(tmp_path: Path) -> None:
    size = 60
    columns = {
        "k": ["same"] * size,
        "x": [number % 7 for number in range(size)],
        "d": ["u"] * size,
        "click": [number % 2 for number in range(size)],
        "seen": [[number % 5] * (number % 3) for number in range(size)],
    }
    changes = {"features": {"seen": {"kind": "sequence", "max_length": 2}}, "split": {"fractions": [1.0, 0.0, 0.0]}}
    one = run(tmp_path / "a", columns, changes)
    two = run(tmp_path / "b", {name: column[::-1] for name, column in columns.items()}, changes)
    assert one["files"] == two["files"]
    assert one["rows"]["kept"] == size


def test_without_a_key_equal_rows_are_split_like_others(tmp_path: Path) -> None:
    """Rows of few distinct values: a split by value would put all rows of one value on one side."""
    size = 1000
    columns = {"x": ["a"] * size, "d": ["u"] * size, "click": [1, 0] * (size // 2), "age": [0.5, None] * (size // 2)}
    changes = {"source": {"key": []}, "features": {"age": {"kind": "numeric"}}}
    manifest = run(tmp_path / "a", columns, changes)
    assert [manifest["splits"][split]["rows"] for split in SPLITS] == [600, 200, 200]
    backwards = run(tmp_path / "b", {name: column[::-1] for name, column in columns.items()}, changes)
    assert backwards["files"] == manifest["files"]


def test_many_rows_are_in_order_too(tmp_path: Path) -> None:
    """Enough rows for the engine to work in parallel, which loses any order that is not asked for."""
    number = 130_000
    labels = [int(row * row % 7 < 2) for row in range(number)]
    columns = {"k": range(number), "x": ["a"] * number, "d": ["u"] * number, "click": labels}
    run(tmp_path, columns, {"split": {"fractions": [1.0, 0.0, 0.0]}, "shard_rows": 30_000})
    order = sorted(range(number), key=lambda row: hashlib.md5(f"0:{row}:0".encode()).digest())
    assert Dataset.open(tmp_path / "out").read("train").label.tolist() == [float(labels[row]) for row in order]


# vocabulary, domains, labels


def test_the_vocabulary_is_that_of_the_training_split(movielens: Any, small_rows: Any, tmp_path: Path) -> None:
    movielens(tmp_path / "out", "split.fractions=[0.1, 0.1, 0.8]")
    words = json.loads((tmp_path / "out" / "vocabularies.json").read_text())
    train = written_rows(tmp_path / "out", "train")
    counts = Counter(row["item_id"] for row in train)
    assert words["item_id"] == sorted(counts, key=lambda word: (-counts[word], word))
    assert set(words["user_id"]) < {str(row[0]) for row in small_rows[0]}
    assert any(row["user_id"] == "?" for row in written_rows(tmp_path / "out", "test"))
    assert all(row["user_id"] not in ("?", None) for row in train)


def test_features_are_the_papers_three(movielens: Any, tmp_path: Path) -> None:
    movielens(tmp_path / "out", "columns.domain=occupation")
    schema = Dataset.open(tmp_path / "out").schema
    assert [(feature.name, feature.kind) for feature in schema.features] == [
        ("user_id", "categorical"),
        ("item_id", "categorical"),
        ("occupation", "categorical"),
    ]
    assert schema.domains == ("doctor", "other", "writer")
    assert (schema.domain, schema.label, schema.user) == ("occupation", "label", "user_id")


@pytest.mark.parametrize(
    ("values", "domains"),
    [
        (["10", "9", "-1", " 9 "], ("-1", "9", "10")),
        ([10.0, 9.0, 9.0, 9.0], ("9", "10")),
        (["10", "9", "b", "a"], ("10", "9", "a", "b")),
        ([True, False, True, True], ("0", "1")),
    ],
)
def test_every_domain_with_rows_is_one(tmp_path: Path, values: list[Any], domains: tuple[str, ...]) -> None:
    run(tmp_path, {"k": [1, 2, 3, 4], "x": ["a"] * 4, "d": values, "click": [1] * 4})
    assert Dataset.open(tmp_path / "out").schema.domains == domains


def test_several_columns_name_the_domain(tmp_path: Path) -> None:
    rows = log()
    rows["page"] = pa.array(["front", "article"] * 200)
    manifest = run(tmp_path, rows, {"columns": {"domain": ["d", "page"]}})
    data = Dataset.open(tmp_path / "out")
    assert data.schema.domains == ("app/article", "app/front", "web/article", "web/front")
    assert [feature.name for feature in data.schema.features] == ["x", "d", "page"]
    assert manifest["splits"]["train"]["domains"].keys() == set(data.schema.domains)


@pytest.mark.parametrize(("rule", "positive"), [("== 5", "5"), (">= 4", "45")])
def test_label_rules(movielens: Any, small_rows: Any, tmp_path: Path, rule: str, positive: str) -> None:
    splits = movielens(tmp_path / "out", f"columns.label_rule={rule}")["splits"].values()
    positives = sum(facts["positives"] for split in splits for facts in split["domains"].values())
    assert positives == sum(str(rating) in positive for _, _, rating, _ in small_rows[0])


def test_numbers_are_fitted_on_the_training_split(tmp_path: Path) -> None:
    rows = log(2000)
    rows["age"][::50] = np.nan
    changes = {"features": {"age": {"kind": "numeric", "missing": True}, "at": {"kind": "bucketed", "buckets": 4}}}
    run(tmp_path, rows, changes)
    data = Dataset.open(tmp_path / "out")
    train = data.read("train")
    known = train.dense[:, 1] == 0
    assert 0 < int((~known).sum()) < 60
    ages = train.dense[known, 0].double()
    assert abs(ages.mean()) < 1e-6
    assert ages.std(correction=0) == pytest.approx(1.0, abs=1e-6)
    assert not train.dense[~known, 0].any()
    slot = [feature.name for feature in data.schema.categorical].index("at")
    shares = np.bincount(train.ids[:, slot]) / train.num_rows
    assert shares[:2].sum() == 0
    assert shares[2:] == pytest.approx([0.25] * 4, abs=0.02)


def test_only_some_rows_fit_numbers_where_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from domlora.data.preparing import fitting

    monkeypatch.setattr(fitting, "SAMPLE_ROWS", 500)
    run(tmp_path, log(4000), {"features": {"age": {"kind": "numeric"}}})
    (age,) = Dataset.open(tmp_path / "out").schema.numeric
    assert age.mean == pytest.approx(48.5, abs=4)


def test_words_of_growing_data_keep_their_ids(tmp_path: Path) -> None:
    first = log(300)
    changes = {"features": {"age": {"kind": "numeric"}}}
    run(tmp_path / "a", first, changes)
    later = log(300, seed=5)
    later["x"] = pa.array([f"item {n}" for n in np.random.default_rng(0).integers(25, 45, size=300)])
    later["d"] = pa.array(["tv", "web", "app"] * 100)
    run(tmp_path / "b", later, changes, grow=tmp_path / "a" / "out")
    old, new = (Dataset.open(tmp_path / name / "out").encoder for name in "ab")
    assert new.vocabularies["x"][: len(old.vocabularies["x"])] == old.vocabularies["x"]
    assert set(new.vocabularies["x"]) > set(old.vocabularies["x"])
    assert new.schema.domains == ("app", "web", "tv")
    assert new.schema.numeric == old.schema.numeric


@pytest.mark.parametrize("change", [{"transform": "log1p"}, {"kind": "bucketed"}])
def test_a_growing_number_keeps_its_scale_or_is_refused(tmp_path: Path, change: Table) -> None:
    run(tmp_path / "a", log(300), {"features": {"age": {"kind": "numeric"}}})
    with pytest.raises(SchemaError, match="'age' of a grown folder must keep its kind and transform"):
        run(tmp_path / "b", log(300), {"features": {"age": {"kind": "numeric", **change}}}, grow=tmp_path / "a" / "out")


# every row accounted for


def accounted(manifest: dict[str, Any]) -> bool:
    rows = manifest["rows"]
    out = rows["kept"] + sum(rows["dropped"].values()) + sum(rows["quarantined"].values())
    return rows["in"] + rows["sampled"] == out and rows["kept"] == sum(s["rows"] for s in manifest["splits"].values())


def test_a_blank_weight_or_time_is_quarantined(tmp_path: Path) -> None:
    """As text files have them: every cell is text, and a blank is nothing."""
    columns = log(200)
    columns["w"] = ["", "abc", *["1.5"] * 198]
    columns["when"] = ["2024-01-01", "2024-01-02", " ", "", *[f"2024-02-{1 + n % 28:02d}" for n in range(196)]]
    changes = {"columns": {"weight": "w", "time": "when"}, "split": {"kind": "time"}, "max_quarantine": 0.1}
    manifest = run(tmp_path, columns, changes)
    assert accounted(manifest)
    assert manifest["rows"]["quarantined"] == {
        "time missing": 2,
        "column 'w' must be a number": 1,
        "weight must be a number above 0": 1,
    }


def test_what_an_item_tells_goes_with_the_item_that_is_drawn(tmp_path: Path) -> None:
    columns = log(400)
    columns["click"] = np.ones(400, dtype=np.int8)
    columns["kind"] = pa.array([f"kind {int(str(x).split()[1]) % 3}" for x in columns["x"]])
    changes: Table = {"columns": {"user": "user", "item": "x", "label": ""}, "features": {"kind": {}}, "negatives": {}}
    with pytest.raises(ConfigError, match=r"one value for each item.*'kind'.*item_columns: \[\"kind\"\]"):
        run(tmp_path, columns, changes)
    changes["columns"]["item_columns"] = ["kind"]
    assert run(tmp_path, columns, changes)["rows"]["sampled"] > 0
    pairs = {(row["x"], row["kind"]) for row in written_rows(tmp_path / "out", "train")}
    assert pairs == {(item, f"kind {int(item.split()[1]) % 3}") for item, _ in pairs}


def test_rows_that_cannot_be_used_are_kept_apart(tmp_path: Path) -> None:
    columns = {
        "k": list(range(9)),
        "x": list("abcdefghi"),
        "d": ["u", "u", "u", "u", None, " ", "only a bad row", None, "u"],
        "click": ["1", None, "2", "", "1", "0", "nan", None, "1"],
        "price": ["5", "1", "1", "1", "1", "1", "1", "1", "cheap"],
    }
    changes = {"max_quarantine": 0.9, "features": {"price": {"kind": "numeric"}}}
    manifest = run(tmp_path, columns, changes)
    assert manifest["rows"]["in"] == 9
    assert manifest["rows"]["quarantined"] == {
        "label missing": 3,
        "label must be 0 or 1": 2,
        "domain missing": 2,
        "column 'price' must be a number": 1,
    }
    assert accounted(manifest)
    assert manifest["splits"]["train"]["domains"] == {"u": {"rows": 1, "positives": 1}}
    kept = pq.read_table(tmp_path / "out" / "quarantine" / "rows.parquet").to_pylist()
    assert sorted((row["k"], row["reason"]) for row in kept)[-1] == (8, "column 'price' must be a number")
    assert {row["k"] for row in kept} == set(range(1, 9))


@pytest.mark.parametrize(("bad", "stops"), [(4, False), (5, True)])
def test_too_many_of_them_stop_everything(tmp_path: Path, bad: int, stops: bool) -> None:
    rows = log(400)
    rows["click"] = pa.array([2] * bad + [0, 1] * ((400 - bad) // 2) + [0] * (bad % 2))
    if not stops:
        assert run(tmp_path, rows)["rows"]["quarantined"] == {"label must be 0 or 1": bad}
        return
    with pytest.raises(
        DataError, match=r"at most 1 % .* may be unusable, and 5 of 400 are.*label must be 0 or 1.*'click': 2"
    ):
        run(tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_filters_and_negatives_are_accounted_for(tmp_path: Path) -> None:
    rows = log(3000)
    changes = {
        "columns": {"label": "", "user": "user", "item": "x", "time": "at"},
        "filters": {"unique": ["user", "x", "d"], "k_core": 3, "min_domain_rows": 5},
        "negatives": {"rule": "uniform", "ratio": 2.0},
    }
    manifest = run(tmp_path, rows, changes)
    assert accounted(manifest)
    rows_of = manifest["rows"]
    clicks = rows_of["in"] - sum(rows_of["dropped"].values())
    assert 0 < rows_of["sampled"] <= 2 * clicks
    rate = sum(f["positives"] for s in manifest["splits"].values() for f in s["domains"].values()) / rows_of["kept"]
    assert rate == pytest.approx(clicks / (clicks + rows_of["sampled"]))


@pytest.mark.parametrize("exclude", ["all", "train"])
def test_negatives_are_no_clicks(tmp_path: Path, exclude: str) -> None:
    rows = log(900)
    changes = {
        "columns": {"label": "", "user": "user", "item": "x"},
        "features": {"user": {}},
        "negatives": {"exclude": exclude, "ratio": 1.0},
        "split": {"fractions": [0.5, 0.25, 0.25]},
    }
    run(tmp_path, rows, changes)
    found = [(split, row) for split in SPLITS for row in written_rows(tmp_path / "out", split)]
    words = {"?", None}
    clicks = {
        (row["user"], row["x"], row["domain"])
        for split, row in found
        if row["__label"] == 1 and (exclude == "all" or split == "train")
    }
    drawn = [(row["user"], row["x"], row["domain"]) for _, row in found if row["__label"] == 0]
    assert drawn
    assert not [row for row in drawn if row in clicks and not words & set(row)]


def test_domains_too_small_for_the_filter_are_none(tmp_path: Path) -> None:
    rows = log(400)
    rows["d"] = pa.array(["tiny"] * 3 + ["web"] * 200 + ["app"] * 197)
    manifest = run(tmp_path, rows, {"filters": {"min_domain_rows": 10}})
    data = Dataset.open(tmp_path / "out")
    assert data.schema.domains == ("app", "web")
    assert accounted(manifest)
    assert sorted(np.bincount(data.read("train").domain)) == [118, 120]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unusable, and 1 of 1 are.*label must be 0 or 1"):
        run(tmp_path, {"k": [1], "x": ["a"], "d": ["u"], "click": ["none"]}, {"max_quarantine": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


# files


def test_the_manifest_accounts_for_every_file(small_rows: Any, gender: Any) -> None:
    folder, manifest = gender
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    files = files_of(folder)
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, facts in manifest["files"].items():
        assert facts == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size_bytes": len(files[name])}
    assert manifest["rows"]["in"] == len(small_rows[0])
    assert accounted(manifest)
    assert manifest["encoder_fingerprint"] == Dataset.open(folder).encoder.fingerprint()
    assert manifest["inputs"].keys() == {"u.data", "u.user"}
    assert manifest["plan"]["split"]["fractions"] == [0.6, 0.2, 0.2]
    assert str(folder.parent) not in json.dumps(manifest)


def test_shards_hold_the_same_rows_in_the_same_order(movielens: Any, gender: Any, tmp_path: Path) -> None:
    names = movielens(tmp_path / "many", "shard_rows=50")["splits"]["train"]["files"]
    assert names[:2] == ["train/part-00000.parquet", "train/part-00001.parquet"]
    sizes = [pq.read_metadata(tmp_path / "many" / name).num_rows for name in names]
    assert max(sizes) < 100
    assert written_rows(tmp_path / "many", "train") == written_rows(gender[0], "train")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_nothing_and_spares_the_old(
    gender: Any, movielens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        shutil.copytree(gender[0], tmp_path / "out")
    before = files_of(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_vectors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        movielens(tmp_path / "out", overwrite=overwrite)
    assert files_of(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == overwrite


def test_overwrite(movielens: Any, gender: Any, tmp_path: Path) -> None:
    shutil.copytree(gender[0], tmp_path / "out")
    with pytest.raises(DataError, match="must not exist"):
        movielens(tmp_path / "out", "columns.domain=age")
    movielens(tmp_path / "out", "columns.domain=age", overwrite=True)
    assert Dataset.open(tmp_path / "out").schema.domain == "age"


def test_progress_ends_at_its_end(movielens: Any, tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        movielens(tmp_path / "out", progress=progress)
        assert progress.tasks
        assert all(task.completed <= (task.total or 0) for task in progress.tasks)
        assert progress.tasks[-1].completed == progress.tasks[-1].total


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"domain": "dd"}}, "Did you mean 'd'"),
        ({"columns": {"label": "clikc"}}, "Did you mean 'click'"),
        ({"features": {"itm": {}}}, "no such column"),
        ({"features": {"click": {}}}, "after the click"),
        ({"columns": {"forbidden": ["x"]}}, "after the click"),
        ({"features": {"__x": {"columns": ["x"]}}}, "two underscores"),
        ({"split": {"kind": "time"}}, "a time split needs columns.time"),
        ({"split": {"kind": "user"}}, "a user split needs columns.user"),
        ({"negatives": {}}, "sampling negatives needs columns.user and columns.item"),
        ({"filters": {"k_core": 5}}, "a k-core needs columns.user and columns.item"),
        ({"columns": {"label": ""}}, "a log without labels needs negatives"),
        ({"columns": {"label_rule": "rating=5"}}, "label rule"),
        ({"features": {"y": {"columns": ["x"], "share": "z"}}}, "share"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"columns": {"unknown_domain": "nowhere"}}, "unknown_domain"),
    ],
)
def test_plans_that_are_refused(tmp_path: Path, changes: Table, message: str) -> None:
    with pytest.raises((ConfigError, SchemaError), match=message):
        run(tmp_path, log(50), changes)
    assert [path.name for path in tmp_path.iterdir()] in (["log"], [])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [[1]]}, r"'x' must hold text, numbers or booleans. Received: 'array<int64>'"),
        ({"d": [date(2020, 1, 1)]}, "'d' must hold text"),
        ({"click": [[1]]}, "'click' must hold text"),
        ({"k": [0.5]}, "key column 'k' must be text, integer or boolean"),
    ],
)
def test_columns_that_are_refused(tmp_path: Path, columns: Table, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        run(tmp_path, {"k": [1], "x": ["a"], "d": ["u"], "click": [1]} | columns)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
