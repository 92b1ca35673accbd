from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from domlora.adapters.bank import adapter_layers
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.evaluation.paired import wauc_difference
from domlora.training.choice import joint_or_base
from domlora.training.stages import Recipe, pretrain
from domlora.training.validation import say, scores_of

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [16, 8], "dropout": 0.0}
STAGE: dict[str, Any] = {
    "fit": {"batch_size": 128, "max_epochs": 6, "patience": 3},
    "optimizer": {"dense": {"lr": 3e-3}},
}


def recipe(min_gain: float = 1.0, **joint: Any) -> Recipe:
    table = {"adapter": {"rank": 2}, "pretrain": STAGE, "joint": {**STAGE, **joint}, "auto": {"min_gain": min_gain}}
    return parse(Config, {"train": table}).train


def world(difference: float) -> Dataset:
    return World(num_domains=5, num_dense=4, hidden_units=8, difference=difference).dataset(6000, seed=3)[0]


def test_where_domains_differ_it_is_joint() -> None:
    data = world(1.5)
    base, first = pretrain(data, MODEL, recipe())
    model, found = joint_or_base(base, data, MODEL, recipe())
    joint, alone = pretrain(data, MODEL, recipe(), method="joint")
    assert adapter_layers(model)
    assert torch.equal(*(torch.cat([p.flatten() for p in one.parameters()]) for one in (model, joint)))
    assert found.history[0]["wauc"] == first.best_value
    assert found.history[1:] == alone.history
    assert found.best_value == scores_of(model, data)["wauc"] > first.best_value


@pytest.mark.parametrize("min_gain", [0.0, 1.0, 100.0])
def test_the_rule(min_gain: float) -> None:
    data = world(0.3)
    base, _ = pretrain(data, MODEL, recipe())
    joint, _ = pretrain(data, MODEL, recipe(), method="joint")
    one, two = say(joint, data), say(base, data)
    gain = wauc_difference(one.label, one.probability, two.probability, one.domain)
    model, _ = joint_or_base(copy.deepcopy(base), data, MODEL, recipe(min_gain))
    assert bool(adapter_layers(model)) == (gain.value > min_gain * gain.standard_error)


def test_a_joint_model_that_is_worse_leaves_the_base_as_it_came() -> None:
    data = world(0.0)
    base, first = pretrain(data, MODEL, recipe())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrecked = {"optimizer": {"adapters": {"lr": 1.0}, "dense": {"lr": 0.3}}}
    model, found = joint_or_base(base, data, MODEL, recipe(**wrecked))
    assert model is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (found.best_value, found.best_epoch, len(found.history)) == (first.best_value, 0.0, 1)
    assert not model.training
