from __future__ import annotations

import json
from dataclasses import fields, replace

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

EVERY = Schema(
    (
        Feature("item", num_ids=12),
        Feature("pair", columns=("item", "country"), num_ids=9),
        Feature("bins", columns=("item",), num_ids=FIRST_ID + 10, hash_buckets=10),
        Feature("past", "sequence", num_ids=12, share="item", max_length=20, separator="|", pooling="sum"),
        Feature("band", "bucketed", columns=("price",), num_ids=5, boundaries=(0.1, 20.0)),
        Feature("price", "numeric", transform="log1p", mean=0.1, std=2.0, missing=True),
        Feature("age", "numeric"),
        Feature("tags", "sequence", num_ids=50, max_length=5, pooling="max"),
    ),
    domains=("de/app", "us/web"),
    domain="country/page",
    unknown_domain="error",
)
OWN = Feature("own", num_ids=5)


def test_the_first_ids_are_reserved() -> None:
    assert (PAD_ID, OOV_ID, FIRST_ID) == (0, 1, 2)


def test_slots_and_dense_columns_keep_the_order_of_features() -> None:
    assert [f.name for f in SCHEMA.categorical] == ["item", "city"]
    assert [f.name for f in SCHEMA.numeric] == ["age"]
    assert (SCHEMA.num_slots, SCHEMA.num_dense, SCHEMA.num_domains) == (2, 1, 2)


def test_slots_fields_and_dense_columns_of_every_kind() -> None:
    assert EVERY.num_fields == len(EVERY.categorical) == 6
    assert EVERY.num_slots == 1 + 1 + 1 + 20 + 1 + 5
    assert [feature.num_dense for feature in EVERY.features] == [0, 0, 0, 0, 0, 2, 1, 0]
    assert EVERY.num_dense == 3
    assert [f.name for f in EVERY.numeric] == ["price", "age"]


def test_raw_columns_are_named_once() -> None:
    assert EVERY.columns == ("item", "country", "past", "price", "age", "tags")
    assert EVERY.features[1].sources == ("item", "country")
    assert EVERY.features[0].sources == ("item",)


def test_features_with_a_vocabulary_of_their_own() -> None:
    assert [f.name for f in EVERY.features if f.has_vocabulary] == ["item", "pair", "tags"]


@pytest.mark.parametrize("schema", [SCHEMA, EVERY], ids=["few", "every"])
def test_json_round_trip(schema, tmp_path) -> None:
    (tmp_path / "schema.json").write_text(schema.to_json(), encoding="utf-8")
    again = Schema.load(tmp_path / "schema.json")
    assert again == schema
    assert again.fingerprint() == schema.fingerprint()
    assert hash(again) == hash(schema)  # what was a tuple is one again


NEW_KEYS = [field.name for field in fields(Feature) if field.name not in ("name", "kind", "num_ids", "mean", "std")]


def test_a_file_written_before_a_key_existed_gets_the_default() -> None:
    raw = json.loads(SCHEMA.to_json())
    for key in ("weight", "unknown_domain"):
        del raw[key]
    for feature in raw["features"]:
        for key in NEW_KEYS:
            del feature[key]
    assert Schema.from_json(json.dumps(raw)) == replace(SCHEMA, weight=None)


@pytest.mark.parametrize(
    "change",
    [
        {"columns": ("other",)},
        {"max_length": 19},
        {"separator": ","},
        {"pooling": "max"},
        {"share": None, "num_ids": 12},
    ],
)
def test_fingerprint_changes_with_every_option_of_a_feature(change) -> None:
    past = EVERY.features[3]
    other = replace(EVERY, features=(*EVERY.features[:3], replace(past, **change), *EVERY.features[4:]))
    assert other.fingerprint() != EVERY.fingerprint()


@pytest.mark.parametrize("policy", ["base", "error", "web"])
def test_policies_for_unknown_domains(policy) -> None:
    schema = replace(SCHEMA, unknown_domain=policy)
    assert Schema.from_json(schema.to_json()).unknown_domain == policy


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
        (lambda: Feature("x", num_ids=3, pooling="avg"), "'mean'"),  # type: ignore[arg-type]
        (lambda: Feature("x", "numeric", transform="log"), "'log1p'"),  # type: ignore[arg-type]
        (lambda: Feature("x", "sequence"), "needs num_ids of at least 2. Received: 0"),
        (lambda: Feature("x", "bucketed"), "needs num_ids of at least 2. Received: 0"),
        (lambda: Feature("x", "sequence", num_ids=3, max_length=0), "max_length of at least 1.*Received: 0"),
        (lambda: Feature("x", num_ids=3, max_length=2), "1 unless it is a sequence. Received: 2"),
        (lambda: Feature("x", "numeric", columns=("a", "b")), "only a categorical feature crosses columns, 'x'"),
        (lambda: Feature("x", "sequence", columns=("a", "b"), num_ids=3), "only a categorical feature crosses"),
        (lambda: replace(SCHEMA, unknown_domain="wep"), "unknown_domain must be.*Did you mean 'web'"),
    ],
)
def test_what_is_not_a_schema(build, message) -> None:
    with pytest.raises(SchemaError, match=message):
        build()


@pytest.mark.parametrize(
    ("sharer", "owner", "message"),
    [
        (Feature("x", num_ids=5, share="won"), OWN, "Did you mean 'own'"),
        (Feature("x", num_ids=5, share="x"), OWN, "must share with a feature of ids"),
        (Feature("x", "bucketed", num_ids=5, share="own"), OWN, "must share with a feature of ids"),
        (Feature("x", "numeric", share="own"), OWN, "must share with a feature of ids"),
        (
            Feature("x", num_ids=5, share="own"),
            Feature("own", "bucketed", num_ids=5),
            "must share with a feature of ids",
        ),
        (Feature("x", num_ids=5, share="own"), Feature("own", "numeric"), "must share with a feature of ids"),
        (Feature("x", num_ids=4, share="own"), OWN, "numbers of ids must agree"),
        (Feature("x", num_ids=5, hash_buckets=3, share="own"), OWN, "numbers of ids must agree"),
    ],
)
def test_features_that_cannot_share(sharer, owner, message) -> None:
    with pytest.raises(SchemaError, match=message):
        Schema((owner, sharer), ("a",))


def test_features_that_share() -> None:
    hashed = Feature("own", num_ids=5, hash_buckets=3)
    Schema((Feature("x", "sequence", num_ids=5, max_length=3, share="own"), OWN), ("a",))
    Schema((hashed, replace(hashed, name="x", share="own")), ("a",))
    with pytest.raises(SchemaError, match="itself shares with none"):
        Schema((OWN, replace(OWN, name="x", share="own"), replace(OWN, name="y", share="x")), ("a",))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"features": [{"nom": "x"}], "domains": ["a"]}'])
def test_text_that_is_no_schema(text) -> None:
    with pytest.raises(SchemaError):
        Schema.from_json(text)


def test_an_unknown_key_is_refused_with_the_nearest() -> None:
    raw = json.loads(SCHEMA.to_json()) | {"domians": []}
    with pytest.raises(SchemaError, match="Did you mean 'domains'"):
        Schema.from_json(json.dumps(raw))
