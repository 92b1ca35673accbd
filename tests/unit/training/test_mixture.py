"""Experts alone, then their gate alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions
from domlora.adapters.mixture import expert_parameters, gate_of, mixture_layers
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.models.build import build_model
from domlora.training.fit import FitOptions
from domlora.training.mixture import mix
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.rows import OneDomain
from domlora.training.stages import Mixture, Recipe, Stage, pretrain
from domlora.training.validation import scores_of

MODEL: dict[str, Any] = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.3}
STAGE = Stage(FitOptions(batch_size=64, max_epochs=4, patience=9), OptimizerOptions(*[Rule(lr=0.02)] * 3))
MAD = Stage(STAGE.fit, OptimizerOptions(*[Rule(lr=1.0)] * 3))
NEVER = Stage(replace(STAGE.fit, max_epochs=1), OptimizerOptions(*[Rule(lr=1e-30)] * 3))
ADAPTER, RULES = AdapterOptions(rank=2), Mixture(experts=STAGE, gate=STAGE)


@pytest.fixture
def base(data: Dataset) -> nn.Module:
    model, _ = pretrain(data, MODEL, Recipe(pretrain=STAGE))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def without(data: Dataset, domain: int) -> Dataset:
    """No clicks among the validation rows of one domain."""
    rows = data.read("valid")
    judged = rows._replace(label=torch.where(rows.domain == domain, 0.0, rows.label))
    return Dataset.from_batches(data.schema, {"train": data.read("train"), "valid": judged, "test": data.read("test")})


def test_the_base_stays_and_all_else_moves(base: nn.Module, data: Dataset) -> None:
    before = state(base)
    made, found = mix(base, data, MODEL, ADAPTER, RULES)
    after = state(base)
    for name, tensor in before.items():
        parent, _, leaf = name.rpartition(".")
        assert torch.equal(tensor, after.get(name, after.get(f"{parent}.base.{leaf}"))), name  # type: ignore[arg-type]
    assert made["mixture"]["num_experts"] == 3
    assert all(layer.expert_B[e].any() for layer in mixture_layers(base).values() for e in range(3))
    assert gate_of(base).kernel.weight.any()
    assert found.best_value > found.history[0]["wauc"]


def test_an_expert_is_what_its_domain_makes_of_it_alone(base: nn.Module, data: Dataset) -> None:
    """The second expert does not depend on whether the first was trained."""
    weights, experts = state(base), []
    for rows in (data, without(data, 0)):
        model = build_model(schema=data.schema, **MODEL)
        model.load_state_dict(weights)
        mix(model, rows, MODEL, ADAPTER, replace(RULES, gate=NEVER))
        experts.append([[p.clone() for p in expert_parameters(model, e)] for e in range(3)])
    first, second = experts
    assert all(torch.equal(a, b) for e in (1, 2) for a, b in zip(first[e], second[e], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_an_expert_of_a_domain_without_two_classes_stays_zero(base: nn.Module, data: Dataset) -> None:
    mix(base, without(data, 1), MODEL, ADAPTER, RULES)
    layers = mixture_layers(base).values()
    assert not any(layer.expert_B[1].any() or layer.expert_bias[1].any() for layer in layers)
    assert all(layer.expert_B[e].any() for layer in layers for e in (0, 2))


def test_more_experts_than_domains_begin_again_at_the_first(base: nn.Module, data: Dataset) -> None:
    seen: list[Any] = []
    made, _ = mix(base, data, MODEL, ADAPTER, replace(RULES, num_experts=4), on_progress=seen.append)
    assert made["mixture"]["num_experts"] == 4
    starts = [progress.total_rows for progress in seen if progress.loss != progress.loss]  # the start has no loss
    sizes = [OneDomain(data, domain).num_rows("train") for domain in range(3)]
    assert starts == [*sizes, sizes[0], 900]


def test_fewer_experts_than_domains_are_refused(base: nn.Module, data: Dataset) -> None:
    with pytest.raises(ConfigError, match="num_experts must be at least the domains, 3"):
        mix(base, data, MODEL, ADAPTER, replace(RULES, num_experts=2))


@pytest.mark.parametrize("rules", [replace(RULES, experts=MAD), replace(RULES, experts=MAD, gate=MAD)])
def test_experts_that_help_nobody_leave_the_base(base: nn.Module, data: Dataset, rules: Mixture) -> None:
    """A wrecked expert loses against its zero start."""
    before = scores_of(base, data)
    _, found = mix(base, data, MODEL, ADAPTER, rules)
    assert found.best_value == found.history[0]["wauc"] == before["wauc"]
    assert found.best_epoch == 0
    assert scores_of(base, data) == before


def test_a_mixture_below_its_base_leaves_the_base(base: nn.Module, data: Dataset, monkeypatch: Any) -> None:
    before = scores_of(base, data)

    def spoiled(model: nn.Module, *args: Any) -> list[Any]:
        with torch.no_grad():
            for layer in mixture_layers(model).values():
                for bank in layer.expert_B:
                    bank.normal_(std=50.0)
        return []

    monkeypatch.setattr("domlora.training.mixture._fit_experts", spoiled)
    _, found = mix(base, data, MODEL, ADAPTER, replace(RULES, gate=NEVER))
    assert found.history[1]["wauc"] < before["wauc"]
    assert (found.best_value, found.best_epoch) == (before["wauc"], 0.0)
    assert scores_of(base, data) == before


def test_epochs_count_on(base: nn.Module, data: Dataset) -> None:
    _, found = mix(base, data, MODEL, ADAPTER, RULES)
    epochs = [entry["epoch"] for entry in found.history]
    assert epochs[0] == 0
    passed = epochs[1]
    assert 0 < passed <= 4
    assert epochs[1:] == [passed + number for number in range(5)]
    assert found.best_epoch in epochs


def test_a_bundle_opens_with_experts(base: nn.Module, data: Dataset, tmp_path: Path) -> None:
    made, _ = mix(base, data, MODEL, replace(ADAPTER, lora_alpha=4.0), RULES)
    Bundle(base, made, data.encoder).save(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle").model
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in state(base).items())
    assert next(iter(mixture_layers(opened).values())).scale == 2.0


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"num_expert": 3}, "Did you mean 'num_experts'"),
        ({}, "num_experts must be a whole number of at least 1"),
        ({"num_experts": 2, "gate_dim": 0}, "gate_dim must be"),
        ({"num_experts": 2, "temperature": -1.0}, "temperature must be above 0"),
    ],
)
def test_options_of_a_mixture_are_checked(data: Dataset, mixture: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(schema=data.schema, **MODEL, mixture=mixture)


def test_rules_are_checked() -> None:
    for change in ({"num_experts": 0}, {"gate_dim": 0}):
        with pytest.raises(ConfigError, match="sizes of at least 1"):
            Mixture(**change)
