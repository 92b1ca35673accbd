from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.bank import adapter_parameters, rows_of
from domlora.adapters.root import disabled
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import auc_by_group, wauc
from domlora.evaluation.paired import auc_differences
from domlora.training.each_domain import adapt_each
from domlora.training.stages import Auto, Recipe, adapt, pretrain

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [16, 8], "dropout": 0.0}
STAGE: dict[str, Any] = {"fit": {"batch_size": 128, "max_epochs": 6, "patience": 3, "evaluations_per_epoch": 2}}
LR = {"optimizer": {"adapters": {"lr": 0.02}}}
DOMAINS = 5


@pytest.fixture(scope="module")
def worlds() -> Dataset:
    return World(num_domains=DOMAINS, num_dense=4, hidden_units=8, difference=1.0).dataset(4000, seed=3)[0]


def recipe(min_gain: float = 1.0) -> Recipe:
    table = {"adapter": {"rank": 2}, "pretrain": STAGE, "adapt": {**STAGE, **LR}, "auto": {"min_gain": min_gain}}
    return parse(Config, {"train": table}).train


@pytest.fixture
def base(worlds: Dataset) -> nn.Module:
    return pretrain(worlds, MODEL, recipe())[0]


def aucs(model: nn.Module, data: Dataset) -> np.ndarray[Any, Any]:
    said = predict(model, data.batches("valid", 500))
    return auc_by_group(said.label, said.probability, said.domain, DOMAINS)


def is_zero(model: nn.Module, domain: int) -> bool:
    """Whether a domain's row changes nothing."""
    return not any(tensor.any() for name, tensor in rows_of(model, domain).items() if not name.endswith("lora_A"))


def test_a_run_goes_on_as_what_it_began(worlds: Dataset, base: nn.Module, tmp_path: Path) -> None:
    """Another method, another bar, another dropout or scale: none may take over what a killed run left."""
    begun = deepcopy(base)
    adapt_each(deepcopy(base), worlds, recipe(), checkpoint=tmp_path / "run")
    with pytest.raises(ConfigError, match="the kind it began with"):
        adapt(deepcopy(begun), worlds, recipe(), checkpoint=tmp_path / "run")
    with pytest.raises(ConfigError, match="the min_gain it began with"):
        adapt_each(deepcopy(begun), worlds, recipe(2.0), checkpoint=tmp_path / "run")
    scaled = replace(recipe(), adapter=replace(recipe().adapter, lora_alpha=32.0))
    with pytest.raises(ConfigError, match="the start it began with"):
        adapt_each(deepcopy(begun), worlds, scaled, checkpoint=tmp_path / "run")


class Twice(nn.Module):
    """A layer that stands in two places, under two names."""

    def __init__(self, num_dense: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_dense, num_dense)
        self.second = self.first
        self.head = nn.Linear(num_dense, 1)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002 - how models are called
        return self.head(torch.tanh(self.second(torch.tanh(self.first(dense))))).squeeze(1)


def test_a_layer_in_two_places_keeps_what_it_learned(worlds: Dataset) -> None:
    torch.manual_seed(0)
    model = Twice(len(worlds.schema.numeric))
    options = replace(recipe(0.0), adapter=replace(recipe().adapter, include=("*",)))
    found = adapt_each(model, worlds, options)
    said = predict(model, worlds.batches("valid", 500))
    assert found.best_epoch > 0
    assert wauc(said.label, said.probability, said.domain) == pytest.approx(found.best_value, abs=1e-6)


@pytest.mark.parametrize("min_gain", [0.0, 1.0, 3.0])
def test_a_domain_has_the_base_or_what_is_enough_better(worlds: Dataset, base: nn.Module, min_gain: float) -> None:
    adapt_each(base, worlds, recipe(min_gain))
    said = predict(base, worlds.batches("valid", 500))
    with disabled(base):
        plain = predict(base, worlds.batches("valid", 500))
    gain = auc_differences(said.label, said.probability, plain.probability, said.domain, DOMAINS)
    for domain in range(DOMAINS):
        if is_zero(base, domain):
            assert gain.value[domain] == 0
        else:
            assert gain.value[domain] > min_gain * gain.standard_error[domain]


def test_where_domains_differ_it_is_at_least_as_good_as_stopping_together(worlds: Dataset, base: nn.Module) -> None:
    together = pretrain(worlds, MODEL, recipe())[0]
    one, all_at_once = adapt_each(base, worlds, recipe(0.0)), adapt(together, worlds, recipe())
    assert (aucs(base, worlds) >= aucs(together, worlds)).all()
    assert one.best_value > all_at_once.best_value > all_at_once.history[0]["wauc"]
    values = [entry["wauc"] for entry in one.history]
    assert values == sorted(values)


def test_a_bar_that_nothing_takes_leaves_the_base(worlds: Dataset, base: nn.Module) -> None:
    found = adapt_each(base, worlds, recipe(1e6))
    assert all(is_zero(base, domain) for domain in range(DOMAINS))
    assert found.best_epoch == 0
    assert len(found.history) == 1 + STAGE["fit"]["patience"]


def test_only_adapters_may_move(worlds: Dataset, base: nn.Module) -> None:
    moving = replace(recipe(), adapt=replace(recipe().adapt, moving=("embedding.*",)))
    with pytest.raises(ConfigError, match="stands still"):
        adapt_each(base, worlds, moving)
    assert not list(adapter_parameters(base))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_min_gain_is_checked(value: float) -> None:
    with pytest.raises(ConfigError, match="min_gain"):
        Auto(value)


def test_rows_of_no_known_domain_do_not_count(worlds: Dataset, base: nn.Module) -> None:
    def hidden(split: str) -> Any:
        rows = worlds.read(split)
        return rows._replace(domain=torch.where(torch.arange(rows.num_rows) % 7 == 0, -1, rows.domain))

    splits = {split: hidden(split) for split in ("train", "valid", "test")}
    found = adapt_each(base, Dataset.from_batches(worlds.schema, splits), recipe())
    assert found.best_value > found.history[0]["wauc"]
