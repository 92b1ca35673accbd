from __future__ import annotations

import gzip
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.config import parse
from domlora.data.drafts.facts import facts_of, words_of
from domlora.data.drafts.sample import sample_of
from domlora.data.infer import draft
from domlora.data.plan import FeaturePlan, Plan
from domlora.errors import DataError

ROWS = 3000


def plan_of(text: str) -> Plan:
    return parse(Plan, tomllib.loads(text))


def drafted(folder: Path, **columns: Any) -> Plan:
    """The plan that is drafted for a Parquet file of some columns."""
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return plan_of(draft([folder / "log.parquet"]))


def test_paths_are_relative_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.table({"click": [0, 1] * 20, "item": list(range(40))}), tmp_path / "logs" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert plan_of(draft([Path("logs/*.parquet")], folder=Path("plans"))).source.files == ("../logs/*.parquet",)
    assert plan_of(draft([Path("logs/a.parquet")])).source.files == ("logs/a.parquet",)


@pytest.fixture
def draw() -> random.Random:
    return random.Random(5)


@pytest.fixture
def log(draw) -> dict[str, list[Any]]:
    """A log as they often are."""
    click = [int(draw.random() < 0.2) for _ in range(ROWS)]
    items = [draw.randrange(10_000, 10_200) for _ in range(ROWS)]
    start = 1_700_000_000
    return {
        "event_id": [f"{draw.getrandbits(64):016x}" for _ in range(ROWS)],
        "click": click,
        "scene": [draw.choice(["home", "home", "search", "cart"]) for _ in range(ROWS)],
        "user_id": [draw.randrange(500) for _ in range(ROWS)],
        "item_id": items,
        "ts": [start + second for second in range(ROWS)],
        "os": [draw.choice(["ios", "android", None]) for _ in range(ROWS)],
        "price": [round(draw.lognormvariate(2, 1.5), 2) for _ in range(ROWS)],
        "ctr_7d": [draw.random() if draw.random() < 0.9 else None for _ in range(ROWS)],
        "history": [draw.choices(items, k=draw.randrange(8)) for _ in range(ROWS)],
        "tags": [";".join(draw.sample(["red", "blue", "new", "sale"], draw.randint(1, 3))) for _ in range(ROWS)],
        "dwell_time": [draw.random() for _ in range(ROWS)],
        "seconds_on_page": [draw.randint(1, 90) if each else 0 for each in click],
        "left_at": [start + second + draw.randrange(60) for second in range(ROWS)],
        "version": ["1.2"] * ROWS,
        "review": [" ".join(draw.choices(["good", "bad", "very", "not", "so"], k=9)) for _ in range(ROWS)],
    }


def written(log: dict[str, list[Any]], path: Path) -> Path:
    rows = [dict(zip(log, values, strict=True)) for values in zip(*log.values(), strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(log), path)
        return path
    if ".jsonl" in path.name:
        lines = [json.dumps(row) for row in rows]
    else:
        flat = [{k: "|".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        lines = ["\t".join(log), *("\t".join("" if v is None else str(v) for v in row.values()) for row in flat)]
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl", "log.tsv", "log.csv", "log.jsonl.gz", "log.tsv.gz"])
def test_a_usual_log(tmp_path, log, name) -> None:
    """The same guesses from every format, also where tabs separate a .csv."""
    path = written(log, tmp_path / name)
    text = draft([path])
    plan = plan_of(text)
    columns = plan.columns
    assert plan.source.files == (str(path),)
    assert plan.source.separator == ("\t" if name == "log.csv" else None)
    assert (columns.label, columns.domain, columns.user, columns.item) == ("click", "scene", "user_id", "item_id")
    assert (columns.time, columns.weight, columns.label_rule) == ("ts", None, None)
    assert columns.forbidden == ("dwell_time", "seconds_on_page", "left_at")
    assert (plan.split.kind, plan.negatives) == ("time", None)
    separator = None if "tsv" not in name and name != "log.csv" else "|"
    longest = 7
    assert plan.features == {
        "user_id": FeaturePlan(),
        "item_id": FeaturePlan(),
        "os": FeaturePlan(),
        "price": FeaturePlan("numeric", transform="log1p"),
        "ctr_7d": FeaturePlan("numeric", missing=True),
        "history": FeaturePlan("sequence", share="item_id", max_length=longest, separator=separator),
        "tags": FeaturePlan("sequence", max_length=3, separator=";"),
    }
    assert "# version: always '1.2'" in text
    assert "# event_id: another text in each row" in text or "# event_id: names a row" in text
    assert "# review: free text" in text
    assert "0 where click is 0" in text


def test_what_was_found_stands_beside_each_guess(tmp_path, log) -> None:
    text = draft([written(log, tmp_path / "log.parquet")])
    assert f"guessed from {ROWS:,} rows of 1 file." in text
    lines = {line.partition("  # ")[0]: line.partition("  # ")[2] for line in text.splitlines()}
    assert "are 1" in lines['label = "click"']
    assert "home 5" in lines['domain = "scene"']
    assert "different" in lines["[features.item_id]"]
    assert "% absent" in lines["[features.os]"]
    assert lines['    "left_at",'] == "never before ts"
    assert lines['    "dwell_time",'] == "by its name"


def test_ratings_are_labels_by_a_rule(tmp_path, draw) -> None:
    columns = {
        "userId": [draw.randrange(90) for _ in range(ROWS)],
        "movieId": [draw.randrange(400) for _ in range(ROWS)],
        "rating": [draw.randint(1, 10) / 2 for _ in range(ROWS)],
        "genres": [draw.choice(["Drama", "Drama|Comedy", "Comedy|War", "War"]) for _ in range(ROWS)],
        "occupation": [draw.randrange(21) for _ in range(ROWS)],
    }
    plan = drafted(tmp_path, **columns)
    assert (plan.columns.label, plan.columns.label_rule) == ("rating", ">= 4")
    assert (plan.columns.user, plan.columns.item) == ("userId", "movieId")
    assert plan.features["genres"] == FeaturePlan("sequence", max_length=2, separator="|")
    assert plan.features["occupation"].kind == "categorical"


def test_clicks_alone_get_negatives(tmp_path, draw) -> None:
    brands = [draw.randrange(20) for _ in range(300)]
    items = [draw.randrange(300) for _ in range(ROWS)]
    columns = {
        "reviewerID": [f"A{draw.randrange(90)}" for _ in range(ROWS)],
        "asin": [f"B{item:04d}" for item in items],
        "brand": [f"brand {brands[item]}" for item in items],
        "category": [draw.choice(["toys", "games"]) for _ in range(ROWS)],
    }
    plan = drafted(tmp_path, **columns)
    assert (plan.columns.label, plan.columns.domain) == ("", "category")
    assert (plan.columns.user, plan.columns.item, plan.columns.item_columns) == ("reviewerID", "asin", ("brand",))
    assert plan.negatives is not None


def test_pages_of_items_must_become_rows(tmp_path, draw) -> None:
    shown = [draw.sample(range(100), 6) for _ in range(200)]
    pq.write_table(
        pa.table(
            {"page": ["front", "article"] * 100, "items_inview": shown, "items_clicked": [each[:1] for each in shown]}
        ),
        tmp_path / "log.parquet",
    )
    text = draft([tmp_path / "log.parquet"])
    plan = plan_of(text)
    assert "Make a row of each item" in text.replace("\n# ", " ")
    assert plan.columns.forbidden == ("items_clicked",)
    assert plan.negatives is None


def test_candidates_are_named_where_no_name_tells(tmp_path, draw) -> None:
    pq.write_table(
        pa.table({"a": [draw.randrange(2) for _ in range(ROWS)], "b": [draw.choice("xyz") for _ in range(ROWS)]}),
        tmp_path / "log.parquet",
    )
    text = draft([tmp_path / "log.parquet"])
    plan_of(text)
    assert '# label = "a"' in text
    assert '# domain = "b"' in text
    assert '# user = "..."' in text


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("lists", "[1, 2, 3]", "a list written as text"),
        ("link", "https://example.org/1", "addresses of web pages"),
        ("session_id", None, "names a row or a visit"),
        ("nothing", None, "absent in all rows"),
        ("vector", [0.5, 0.25], "a vector"),
        ("born", "1990-01-02", "a time"),
    ],
)
def test_columns_that_are_no_features(tmp_path, name, values, reason) -> None:
    many = [None if name == "nothing" else number % 300 if values is None else values for number in range(900)]
    if isinstance(values, str):
        many = [values if number % 2 else values.replace("1", "2") for number in range(900)]
    if name == "vector":
        many = [[number / 7, 0.5] for number in range(900)]
    log = {"click": [0, 1, 0] * 300, "item": list(range(300)) * 3, "ts": list(range(2 * 10**9, 2 * 10**9 + 900))}
    pq.write_table(pa.table({**log, name: many}), tmp_path / "log.parquet")
    text = draft([tmp_path / "log.parquet"])
    assert name not in plan_of(text).features
    assert f"# {name}: {reason}" in text


def test_nested_columns_are_left_out(tmp_path) -> None:
    for name, more in (("log.parquet", {}), ("log.jsonl", {})):
        rows = [{"click": number % 2, "item": number % 7, "geo": [{"lat": 1}], **more} for number in range(100)]
        if name == "log.parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        text = draft([tmp_path / name])
        assert list(plan_of(text).features) == ["item"]
        assert "# geo: holds" in text


def test_many_values_get_a_hint_to_hash_and_rare_ones_a_least_count(tmp_path, draw) -> None:
    many = [draw.randrange(10**9) for _ in range(60_000)]
    pq.write_table(
        pa.table({"click": [draw.randrange(2) for _ in many], "item_id": many[:59_000] + many[:1000]}),
        tmp_path / "log.parquet",
    )
    text = draft([tmp_path / "log.parquet"])
    assert plan_of(text).features["item_id"] == FeaturePlan(min_count=2)
    assert "hash_buckets = 131072" in text


def test_codes_with_leading_zeros_are_text_and_whole_floats_are_integers(tmp_path) -> None:
    lines = [f"{n % 2}.0,{n % 90:05d},{n % 80}.0,{n % 70}.5" for n in range(900)]
    (tmp_path / "log.csv").write_text("\n".join(["label,zip,item_id,level", *lines]))
    text = draft([tmp_path / "log.csv"])
    plan = plan_of(text)
    assert (plan.columns.label, plan.columns.label_rule) == ("label", "== 1")
    assert {name: feature.kind for name, feature in plan.features.items()} == {
        "zip": "categorical",
        "item_id": "categorical",
        "level": "numeric",
    }
    assert 'written as "12.0"' in text


def test_an_uneven_feature_is_not_taken_for_a_leak(tmp_path, draw) -> None:
    """Rare values that no click happens to have."""
    click = [int(draw.random() < 0.05) for _ in range(ROWS)]
    rare = [int(not each and draw.random() < 0.01) for each in click]
    told = [draw.randint(1, 3) if each else None for each in click]
    plan = drafted(tmp_path, click=click, promo=rare, place=told, shop=[draw.randrange(2000) for _ in range(ROWS)])
    assert plan.columns.forbidden == ("place",)


def test_lines_that_cannot_be_read_are_told(tmp_path) -> None:
    (tmp_path / "log.csv").write_text("click,item\n" + "1,a\n0,b\n" * 50 + "1,a,b\n")
    text = draft([tmp_path / "log.csv"])
    assert f"# 1 lines cannot be read, such as 102 of {tmp_path / 'log.csv'}: 3 fields instead of 2" in text


def test_no_rows(tmp_path) -> None:
    (tmp_path / "log.csv").write_text("click,item\n")
    with pytest.raises(DataError, match="must have rows"):
        draft([tmp_path / "log.csv"])


def test_the_sample_is_from_all_over(tmp_path) -> None:
    for part in range(4):
        numbers = pa.table({"x": list(range(part * 1000, part * 1000 + 1000))})
        pq.write_table(numbers, tmp_path / f"{part}.parquet", row_group_size=100)
    sample = sample_of(sorted(tmp_path.glob("*.parquet")), 400)
    numbers = sample.columns["x"].to_pylist()
    assert numbers == [start + number for start in range(0, 4000, 100) for number in range(10)]


def test_words_of_names() -> None:
    assert words_of("isClicked_v2") == ("is", "clicked", "v", "2")
    assert words_of("größe") == ("größe",)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], "integer"),
        ([1.0, 2.0, float("nan")], "integer"),
        (["1", " 2 ", ""], "integer"),
        (["007", "1"], "text"),
        (["1.5", "nan"], "float"),
        ([0.5, 1e300, float("inf")], "float"),
        (["12345678901234567890", "1"], "text"),
        (["2024-01-02", "2024-01-03 10:00:00"], "time"),
        ([[1], [2, 3]], "list"),
        ([[0.5, 1.5], [2.5, 3]], "vector"),
        ([None, None], "text"),
    ],
)
def test_kinds_of_columns(values, kind) -> None:
    facts = facts_of("x", pa.array(values))
    assert facts.kind == kind
    assert facts.num_rows == len(values)


NAMES = st.text(min_size=1, max_size=6)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_draft_is_a_plan(tmp_path_factory, data) -> None:
    """Whatever names and values: quotes, control characters and line ends must not break the TOML."""
    folded = data.draw(st.dictionaries(NAMES.map(str.casefold), st.integers(0, 5), min_size=1, max_size=4))
    rows = data.draw(st.integers(1, 6))
    kinds = [
        st.booleans(),
        st.integers(-(2**62), 2**62),
        st.floats(),
        st.text(max_size=8),
        st.lists(st.text(max_size=2), max_size=3),
        st.lists(st.floats(), max_size=2),
    ]
    columns = {
        name: data.draw(st.lists(st.one_of(st.none(), kinds[kind]), min_size=rows, max_size=rows))
        for name, kind in folded.items()
    }
    path = tmp_path_factory.mktemp("draft") / "log.parquet"
    pq.write_table(pa.table(columns), path)
    plan = plan_of(draft([path]))
    assert set(plan.features) <= set(columns)


def test_what_names_each_row_is_the_key(log, tmp_path: Path) -> None:
    assert drafted(tmp_path, **log).source.key == ("event_id",)
    log["event_id"][1] = log["event_id"][0]
    assert drafted(tmp_path, **log).source.key == ()
