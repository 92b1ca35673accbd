# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, freeze_
from domlora.errors import ConfigError
from domlora.layers.embedding import EmbeddingTable
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule, parameter_groups

IDS, DENSE, DOMAIN = torch.tensor([[0], [1], [1]]), torch.randn(3, 4), torch.tensor([0, 1, 1])


def step(model: nn.Module, optimizer: Optimizer, lr_factor: float = 1.0) -> None:
    optimizer.zero_grad()
    model(IDS, DENSE, DOMAIN).square().sum().backward()
    optimizer.step(lr_factor)


def names(model: nn.Module) -> dict[str, list[str]]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {kind: [by_id[id(p)] for p in group] for kind, group in parameter_groups(model).items()}


def test_groups(click: Any) -> None:
    model = attach_(click(), 2, include=["tower.*"])
    assert names(model) == {
        "tables": ["embedding.weight"],
        "dense": ["norm.weight", "norm.bias", "tower.0.base.weight", "tower.0.base.bias", "head.weight", "head.bias"],
        "adapters": ["tower.0.lora_A", "tower.0.lora_B", "tower.0.lora_bias"],
    }


def test_groups_hold_what_moves(click: Any) -> None:
    model = freeze_(attach_(click(), 2, include=["tower.*"]), except_=["embedding.*"])
    assert {kind: len(group) for kind, group in names(model).items()} == {"tables": 1, "dense": 0, "adapters": 3}


@pytest.mark.parametrize("table", [nn.Embedding(5, 3), nn.EmbeddingBag(5, 3), EmbeddingTable([5], 3)])
def test_every_kind_of_table_is_a_table(table: nn.Module) -> None:
    assert {kind: len(group) for kind, group in names(nn.Sequential(table)).items()} == {
        "tables": 1,
        "dense": 0,
        "adapters": 0,
    }


def test_each_kind_follows_its_own_rule(click: Any) -> None:
    """A first Adam step is as long as the learning rate, wherever there is a gradient."""
    model = attach_(click(), 2, include=["tower.*"]).eval()
    with torch.no_grad():
        model.get_parameter("tower.0.lora_B").normal_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = OptimizerOptions(tables=Rule(lr=1e-2), dense=Rule(lr=1e-3), adapters=Rule("adamw", lr=1e-1))
    step(model, Optimizer(model, options))
    for kind, lr in (("tables", 1e-2), ("dense", 1e-3), ("adapters", 1e-1)):
        for name in names(model)[kind]:
            longest = (model.get_parameter(name) - before[name]).abs().max().item()
            assert longest == pytest.approx(lr, rel=0.01), name


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_are_torchs(click: Any, name: Any) -> None:
    ours, theirs = click().eval(), click().eval()
    rule = Rule(name, lr=0.01, weight_decay=0.1)
    optimizer = Optimizer(ours, OptimizerOptions(rule, rule, rule))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    other = kind(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        step(ours, optimizer)
        other.zero_grad()
        theirs(IDS, DENSE, DOMAIN).square().sum().backward()
        other.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, yours, rtol=1e-5, atol=1e-6)


def test_decay_draws_untouched_rows_of_a_table_only_when_asked(click: Any) -> None:
    for name, decay, moves in (("adam", 0.0, False), ("adamw", 0.0, False), ("adam", 0.1, True), ("adamw", 0.1, True)):
        model = click()
        before = model.embedding.weight[4].detach().clone()
        step(model, Optimizer(model, OptimizerOptions(tables=Rule(name, weight_decay=decay))))
        assert (not torch.equal(model.embedding.weight[4], before)) == moves


def test_frozen_parameters_stay(click: Any, digest: Any) -> None:
    model = freeze_(attach_(click(), 2, include=["tower.*"]))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = Optimizer(model, OptimizerOptions(*[Rule(weight_decay=0.1)] * 3))
    for _ in range(3):
        step(model, optimizer)
    assert frozen
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


def test_lr_factor_scales_and_does_not_add_up(click: Any) -> None:
    model = click().eval()
    optimizer = Optimizer(model, OptimizerOptions())
    for factor in (0.5, 0.5):
        before = model.head.weight.detach().clone()
        step(model, optimizer, factor)
        assert (model.head.weight - before).abs().max().item() == pytest.approx(5e-4, rel=0.1)
    before = model.head.weight.detach().clone()
    step(model, optimizer, 0.0)
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("mixed", [False, True], ids=["one rule", "two rules"])
@pytest.mark.parametrize("rank", [2, 0])
def test_state_round_trip_ends_with_the_same_bits(click: Any, digest: Any, mixed: bool, rank: int) -> None:
    options = OptimizerOptions(adapters=Rule("adamw" if mixed else "adam", lr=0.1))

    def make() -> tuple[nn.Module, Optimizer]:
        model = attach_(click(), 2, include=["tower.*"], rank=rank).eval()
        return model, Optimizer(model, options)

    straight, optimizer = make()
    for _ in range(2):
        step(straight, optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    assert all(isinstance(tensor, Tensor) for tensor in saved.values())
    resumed, other = make()
    resumed.load_state_dict(weights)
    other.load_state(saved)
    for model, opt in ((straight, optimizer), (resumed, other)):
        for _ in range(3):
            step(model, opt, 0.3)
    assert digest(straight) == digest(resumed)


def test_parameters_without_a_gradient_have_no_state_and_do_not_move() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
            out: Tensor = self.used(dense)
            return out

    model = Half()
    before = model.idle.weight.detach().clone()
    optimizer = Optimizer(model, OptimizerOptions(dense=Rule("adamw", weight_decay=0.5)))
    step(model, optimizer)
    assert torch.equal(model.idle.weight, before)
    optimizer.load_state(optimizer.state())
    step(model, optimizer)


def test_nothing_that_moves_is_refused(click: Any) -> None:
    with pytest.raises(ConfigError, match="needs a parameter that moves"):
        Optimizer(freeze_(click()), OptimizerOptions())


def test_an_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        Rule("adamww")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"weight_decay": -1.0}, {"weight_decay": math.nan}],
)
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="lr above 0"):
        Rule(**options)  # type: ignore[arg-type]
