from __future__ import annotations

import json
from dataclasses import replace

import pytest

from domlora.errors import SchemaError
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema

SCHEMA = Schema(
    (Feature("item", num_ids=12), Feature("age", "numeric", mean=3.0, std=2.0), Feature("city", num_ids=5)),
    domains=("app", "web"),
    domain="site",
    user="person",
    time="at",
    weight="w",
)


def test_the_first_ids_are_reserved() -> None:
    assert (PAD_ID, OOV_ID, FIRST_ID) == (0, 1, 2)


def test_slots_and_dense_columns_keep_the_order_of_features() -> None:
    assert [f.name for f in SCHEMA.categorical] == ["item", "city"]
    assert [f.name for f in SCHEMA.numeric] == ["age"]
    assert (SCHEMA.num_slots, SCHEMA.num_dense, SCHEMA.num_domains) == (2, 1, 2)


def test_json_round_trip(tmp_path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA.to_json(), encoding="utf-8")
    assert Schema.load(tmp_path / "schema.json") == SCHEMA


def test_a_file_written_before_a_key_existed_gets_the_default() -> None:
    raw = json.loads(SCHEMA.to_json())
    del raw["weight"]
    assert Schema.from_json(json.dumps(raw)) == replace(SCHEMA, weight=None)


@pytest.mark.parametrize(
    "change",
    [
        {"domains": ("web", "app")},
        {"domain": "other"},
        {"user": None},
        {"features": SCHEMA.features[::-1]},
        {"features": (replace(SCHEMA.features[0], num_ids=13), *SCHEMA.features[1:])},
    ],
)
def test_fingerprint_changes_with_every_part(change) -> None:
    assert replace(SCHEMA, **change).fingerprint() != SCHEMA.fingerprint()
    assert replace(SCHEMA).fingerprint() == SCHEMA.fingerprint()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schema((), ("a",)), "at least one feature"),
        (lambda: Schema((Feature("x", num_ids=3),), ()), "at least one domain"),
        (lambda: Schema((Feature("x", num_ids=3), Feature("x", num_ids=4)), ("a",)), r"unique.*\['x'\]"),
        (lambda: Schema((Feature("x", num_ids=3),), ("a", "b", "a")), r"unique.*\['a'\]"),
        (lambda: Feature("x", num_ids=1), "at least 2.*Received: 1"),
        (lambda: Feature("x", "numeric", std=0.0), "std above 0"),
        (lambda: Feature("x", "numeric", std=float("nan")), "std above 0"),
        (lambda: Feature("x", "numerical"), "Did you mean 'numeric'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_a_schema(build, message) -> None:
    with pytest.raises(SchemaError, match=message):
        build()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"features": [{"nom": "x"}], "domains": ["a"]}'])
def test_text_that_is_no_schema(text) -> None:
    with pytest.raises(SchemaError):
        Schema.from_json(text)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    raw = json.loads(SCHEMA.to_json()) | {"domians": []}
    with pytest.raises(SchemaError, match="Did you mean 'domains'"):
        Schema.from_json(json.dumps(raw))
