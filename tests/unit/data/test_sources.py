from __future__ import annotations

import dataclasses

import pytest

from domlora.config import load_plan
from domlora.data.sources import SOURCES, open_source, presets
from domlora.errors import ConfigError

OF_THE_PAPER = {"movielens-gen", "movielens-age", "movielens-occupation", "amazon-6", "amazon-13", "taobao-10"}


def test_an_unknown_source_is_refused_with_the_nearest(engine) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'movielens-1m'"):
        open_source(engine, "movielens_1m")


@pytest.mark.parametrize("name", SOURCES)
def test_an_unknown_option_is_refused(engine, tmp_path, name) -> None:
    with pytest.raises(ConfigError, match=f"unknown option of {name}. Received: 'categorys'"):
        open_source(engine, name, tmp_path, {"categorys": ["Books"]})


def test_an_unknown_option_is_refused_with_the_nearest(engine, tmp_path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'themes'"):
        open_source(engine, "taobao-theme", tmp_path, {"theme": 3})


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_says_what_it_needs(engine, tmp_path, name) -> None:
    options = {"categories": ["Books"]} if name == "amazon" else {}
    with pytest.raises(Exception, match=r"needs .*Pass the folder that holds them \(from "):
        open_source(engine, name, tmp_path, options)


def test_every_source_has_a_plan() -> None:
    assert {load_plan(name).source.name for name in presets()} == set(SOURCES)
    assert set(presets()) > OF_THE_PAPER


@pytest.mark.parametrize("name", presets())
def test_plans_can_be_read(name) -> None:
    plan = load_plan(name)
    assert plan.features
    assert plan.columns.user in plan.features
    assert plan.columns.item in plan.features
    read = {column for feature, spec in plan.features.items() for column in spec.columns or (feature,)}
    assert not read & {plan.columns.label, *plan.columns.forbidden}
    assert bool(plan.columns.label) == (plan.negatives is None)


@pytest.mark.parametrize("name", presets())
def test_plans_say_what_they_are_and_on_what_terms(name) -> None:
    lines = presets()[name].read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("# ") for line in lines[:2])
    assert max(map(len, lines)) <= 120


def test_the_papers_categories_are_in_the_order_of_their_numbers() -> None:
    # domains are numbered by name, and each draws its rate of clicks in that order
    for name, count in (("amazon-6", 6), ("amazon-13", 13)):
        categories = load_plan(name).source.options["categories"]
        assert categories == sorted(categories)
        assert len(categories) == count


def test_the_papers_plans() -> None:
    gender = load_plan("movielens-gen")
    assert (gender.columns.domain, gender.columns.label_rule) == ("gender", "== 5")
    assert dataclasses.replace(load_plan("movielens-age"), columns=gender.columns) == gender
    assert load_plan("movielens-occupation").columns.domain == "occupation"
    for themes in (10, 20, 30):
        plan = load_plan(f"taobao-{themes}")
        assert plan.source.options == {"themes": themes}
        assert plan.negatives is not None
        assert plan.negatives.rule == "paper"
        assert {name: (spec.vectors, spec.train_vectors) for name, spec in plan.features.items()} == {
            "user_id": ("user_embedding.csv", False),
            "item_id": ("item_embedding.csv", False),
        }
