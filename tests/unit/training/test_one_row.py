from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_, freeze_
from domlora.adapters.bank import adapter_parameters
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.models.build import build_model
from domlora.training.fit import FitOptions
from domlora.training.one_row import Adapters, OneRow, alone
from domlora.training.optimizers import OptimizerOptions, Rule


def model_of(data: Dataset) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("wdl", data.schema, hidden_units=[6], dropout=0.3)
    return attach_(model, 3, rank=2, include=["*"])


def run(model: nn.Module, data: Dataset, pull: float, rule: Rule, **options: object) -> OneRow:
    fit = FitOptions(batch_size=len(data.read("train").label), max_epochs=1)
    return OneRow(Adapters(model), data, fit, OptimizerOptions(adapters=rule), pull, **options)


@pytest.mark.parametrize("name", ["adam", "adamw", "lazy_adam", "rowwise_adagrad"])
def test_a_step_then_a_step_back(data: Dataset, name: str) -> None:
    free, pulled = alone(model_of(data)), alone(model_of(data))
    start = {key: p.detach().clone() for key, p in adapter_parameters(free)}
    for model, pull in ((free, 0.0), (pulled, 8.0)):
        torch.manual_seed(1)
        run(model, data, pull, Rule(name, lr=0.05)).train()
    one, two = dict(adapter_parameters(free)), dict(adapter_parameters(pulled))
    for key, value in start.items():
        torch.testing.assert_close(two[key], value + (one[key] - value) / (1 + 0.05 * 8.0))
        assert key.endswith("lora_A") or not torch.equal(one[key], value)


def test_the_base_is_told_the_domain_and_the_bank_has_one_row(data: Dataset) -> None:
    model, rows = model_of(data), data.read("train")
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.normal_()
    want = model.eval()(rows.ids, rows.dense, torch.full_like(rows.domain, 2))
    row = {name: bank.detach()[2:] for name, bank in adapter_parameters(model)}
    one = alone(copy.deepcopy(model))
    with torch.no_grad():
        for name, bank in adapter_parameters(one):
            bank.copy_(row[name])
    torch.testing.assert_close(one.eval()(rows.ids, rows.dense, rows.domain), want)
    assert {name for name, p in one.named_parameters() if p.requires_grad} == set(row)
    with pytest.raises(ConfigError, match="the model has no adapters"):
        alone(build_model("mlp", data.schema))


def test_dropout_of_the_whole_model_is_alive_in_training_alone(data: Dataset) -> None:
    model, rows = alone(model_of(data)), data.read("train")
    adapters, columns = Adapters(model), (rows.ids, rows.dense, rows.domain)
    assert not any("embedding" in name for name in adapters.state_dict())
    assert torch.equal(adapters.eval()(*columns), adapters(*columns))
    assert not torch.equal(adapters.train()(*columns), adapters(*columns))


def test_one_class_is_judged_by_log_loss(data: Dataset) -> None:
    splits = {split: data.read(split) for split in ("train", "valid")}
    splits["valid"] = splits["valid"]._replace(label=torch.zeros_like(splits["valid"].label))
    clicks = Dataset.from_batches(data.schema, splits)
    found = run(freeze_(model_of(data)), clicks, 1.0, Rule(lr=0.05), by_loss=True).go(start_is_candidate=True)
    losses = [entry["log_loss"] for entry in found.history]
    assert found.best_value == -min(losses)
    assert found.best_epoch == found.history[losses.index(min(losses))]["epoch"]
