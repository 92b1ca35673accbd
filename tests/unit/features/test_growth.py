from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from domlora.errors import SchemaError
from domlora.features.encode import Encoder
from domlora.features.growth import check_grown
from domlora.features.schema import Feature, Schema

WORDS = {"item": ["a", "b"], "page": ["p"]}


def encoder(words: dict[str, list[str]] | None = None, changes: dict[str, Any] | None = None, **schema: Any) -> Encoder:
    """An encoder of every kind of feature; ``changes`` replaces fields of features by name."""
    words = WORDS if words is None else words
    sizes = {name: 2 + len(those) for name, those in words.items()}
    features = (
        Feature("item", num_ids=sizes["item"]),
        Feature("page", num_ids=sizes["page"]),
        Feature("seen", "sequence", num_ids=sizes["item"], share="item", max_length=3),
        Feature("agent", num_ids=7, hash_buckets=5),
        Feature("price", "bucketed", num_ids=4, boundaries=(1.0,)),
        Feature("age", "numeric", mean=3.0, std=2.0),
    )
    changed = tuple(replace(f, **(changes or {}).get(f.name, {})) for f in features)
    return Encoder(Schema(changed, **{"domains": ("app", "web"), **schema}), words)


def test_what_may_grow() -> None:
    old = encoder()
    check_grown(old, encoder())
    check_grown(old, encoder({"item": ["a", "b", "c"], "page": ["p", "q"]}))
    check_grown(old, encoder(domains=("app", "web", "tv", "car")))
    check_grown(old, encoder({"item": ["a", "b", "0"], "page": ["p"]}, domains=("app", "web", "a")))
    check_grown(old, encoder(label="bought", user="who", time="when", weight="how much"))


def test_ids_of_old_values_stay() -> None:
    old, new = encoder(), encoder({"item": ["a", "b", "c"], "page": ["p", "q"]}, domains=("app", "web", "tv"))
    check_grown(old, new)
    rows = {"item": ["b", "a", None], "page": ["p"] * 3, "seen": [["a", "b"], [], ["b"]], "agent": ["x", "y", "z"]}
    rows |= {"price": [0.0, 2.0, None], "age": [1.0, 2.0, 3.0], "domain": ["web", "app", "radio"]}
    one, two = old.encode_arrays(rows), new.encode_arrays(rows)
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (encoder({"item": ["b", "a"], "page": ["p"]}), "words of feature 'item'.*'b' in place of 'a'"),
        (encoder({"item": ["a"], "page": ["p"]}), "words of feature 'item'.*1 of 2"),
        (encoder(domains=("web", "app")), "domains.*'web' in place of 'app'"),
        (encoder(domains=("app",)), "domains.*1 of 2"),
        (encoder(domain="page"), "the domain 'domain'"),
        (encoder(unknown_domain="error"), "the unknown_domain 'base'"),
        (encoder(changes={"age": {"mean": 3.5}}), "feature 'age' must be as it was"),
        (encoder(changes={"price": {"boundaries": (2.0,)}}), "feature 'price'"),
        (encoder(changes={"agent": {"num_ids": 8, "hash_buckets": 6}}), "feature 'agent'"),
        (encoder(changes={"seen": {"max_length": 4}}), "feature 'seen'"),
        (encoder(changes={"item": {"columns": ("page",)}}), "feature 'item'"),
        (encoder(changes={"age": {"name": "years"}}), "must have the features"),
    ],
)
def test_what_may_not_change(new: Encoder, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_grown(encoder(), new)
