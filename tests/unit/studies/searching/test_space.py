"""Spaces: what is written is what is read, and an arm tunes what it depends on and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.config import Config, parse
from domlora.errors import ConfigError
from domlora.studies.searching.space import Range, Search, depends_on, dotted, nested, read_space, space_of
from domlora.training.methods import METHODS

KEYS = st.text("abc_", min_size=1, max_size=3)
TABLES = st.recursive(
    st.dictionaries(KEYS, st.integers(), min_size=1),
    lambda inner: st.dictionaries(KEYS, inner | st.integers(), min_size=1),
    max_leaves=8,
)


@given(TABLES)
def test_dotted_and_nested_are_each_other_turned_round(table: dict[str, Any]) -> None:
    assert nested(dotted(table)) == table


def test_a_space_may_be_written_nested_or_dotted() -> None:
    lr = {"low": 1e-4, "high": 1e-2, "log": True}
    written = {"train": {"joint": {"optimizer.dense.lr": lr}}, "model.dropout": [0.0, 0.2]}
    assert read_space(written) == {
        "train.joint.optimizer.dense.lr": Range(1e-4, 1e-2, log=True),
        "model.dropout": (0.0, 0.2),
    }


def test_a_choice_may_be_a_list_or_a_table() -> None:
    choices = [{"name": "adam"}, {"name": "adamw", "weight_decay": 0.1}]
    space = read_space({"train.joint.optimizer.dense": choices, "model.hidden_units": [[8], [16, 8]]})
    assert space == {"train.joint.optimizer.dense": tuple(choices), "model.hidden_units": ([8], [16, 8])}
    for choice in choices:
        parse(Config, nested({"train.joint.optimizer.dense": choice}))


@pytest.mark.parametrize(
    ("numbers", "whole"),
    [((1, 8), True), ((1, 9, 2), True), ((1.0, 8), False), ((1, 8.0), False), ((1, 2, 0.5), False)],
)
def test_whole_ends_give_whole_numbers(numbers: tuple[Any, ...], whole: bool) -> None:
    assert Range(*numbers).is_whole is whole


@pytest.mark.parametrize("method", METHODS)
def test_a_method_depends_on_its_parts(method: str) -> None:
    kind = METHODS[method]
    assert depends_on(method, "model.dropout") is not kind.from_base
    for part in ("pretrain", "joint", "adapt", "adapter"):
        expected = part in kind.parts and not (kind.from_base and part in METHODS["base"].parts)
        assert depends_on(method, f"train.{part}.any.thing") is expected
    assert not depends_on(method, "data.any")
    assert not depends_on(method, "train")


SEARCH = Search(
    space={"model.dropout": [0.0, 0.1], "train.joint.fit.batch_size": [32, 64], "train.adapter.temperature": [4, 16]},
    of={
        "star": {"model.dropout": [0.3, 0.4]},
        "joint": {"train.joint.fit.batch_size": [128, 256]},
        "mine": {"train.joint.fit.patience": [1, 2]},
    },
)


def test_the_nearer_space_wins() -> None:
    assert space_of(SEARCH, "mlp", "base", "base", ()) == {"model.dropout": (0.0, 0.1)}
    assert space_of(SEARCH, "star", "base", "base", ()) == {"model.dropout": (0.3, 0.4)}
    assert space_of(SEARCH, "star", "two_stage", "two_stage", ()) == {"train.adapter.temperature": (4, 16)}
    joint = {
        "model.dropout": (0.0, 0.1),
        "train.joint.fit.batch_size": (128, 256),
        "train.adapter.temperature": (4, 16),
    }
    assert space_of(SEARCH, "mlp", "joint", "joint", ()) == joint
    assert space_of(SEARCH, "mlp", "joint", "mine", ()) == {**joint, "train.joint.fit.patience": (1, 2)}


@pytest.mark.parametrize("fixed", ["train.adapter.temperature", "train.adapter"])
def test_what_an_arm_sets_is_not_tuned(fixed: str) -> None:
    assert "train.adapter.temperature" not in space_of(SEARCH, "mlp", "joint", "mine", [fixed])


def test_an_arm_that_sets_all_has_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match=r"'two_stage' has nothing.*train.adapt"):
        space_of(SEARCH, "mlp", "two_stage", "two_stage", ["train.adapter.temperature"])
