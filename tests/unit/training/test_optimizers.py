# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, freeze_
from domlora.adapters.bank import adapter_layers
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.layers.embedding import EmbeddingTable
from domlora.training.fit import FitOptions, fit
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule, parameter_groups
from domlora.training.rowwise import LazyAdam, RowWiseAdagrad

LAZY = pytest.mark.parametrize("lazy", ["lazy_adam", "rowwise_adagrad"])
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


RULES = {
    "one rule": OptimizerOptions(adapters=Rule(lr=0.1)),
    "two rules": OptimizerOptions(adapters=Rule("adamw", lr=0.1)),
    "lazy": OptimizerOptions(tables=Rule("lazy_adam", lr=0.1), adapters=Rule("rowwise_adagrad", lr=0.1)),
    "lazy too": OptimizerOptions(tables=Rule("rowwise_adagrad", lr=0.1), adapters=Rule("lazy_adam", 0.1, 0.1)),
}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
@pytest.mark.parametrize("rank", [2, 0])
def test_state_round_trip_ends_with_the_same_bits(
    click: Any, digest: Any, options: OptimizerOptions, rank: int
) -> None:

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


# lazy rules


class Tables(nn.Module):
    """One of each kind of table, and one whose gradient torch cannot make sparse."""

    def __init__(self, num_ids: int = 5) -> None:
        super().__init__()
        self.ours, self.torchs = EmbeddingTable([num_ids], 3), nn.Embedding(num_ids, 3)
        self.bag, self.most = nn.EmbeddingBag(num_ids, 3, mode="sum"), nn.EmbeddingBag(num_ids, 3, mode="max")
        self.head = nn.Linear(3, 1)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        vectors = self.ours(ids).sum(1) + self.torchs(ids).sum(1) + self.bag(ids) + self.most(ids)
        out: Tensor = self.head(vectors).squeeze(1)
        return out


@LAZY
def test_lazy_rules_make_gradients_sparse_and_dense_rules_dense_again(lazy: Any) -> None:
    model = Tables()
    for rule, expected in ((Rule(), False), (Rule(lazy), True), (Rule("adamw"), False)):
        step(model, Optimizer(model, OptimizerOptions(tables=rule)))
        for table in (model.ours, model.torchs, model.bag):
            assert table.sparse == table.weight.grad.is_sparse == expected
        assert not model.most.weight.grad.is_sparse


@LAZY
def test_lazy_rules_of_adapters(click: Any, lazy: Any) -> None:
    model = attach_(click(), 2, include=["tower.*"])
    for rule, expected in ((Rule(lazy), True), (Rule(), False)):
        step(model, Optimizer(model, OptimizerOptions(adapters=rule)))
        assert all(layer.sparse == expected for layer in adapter_layers(model).values())
        assert not model.embedding.sparse


@pytest.mark.parametrize(("lazy", "kind"), [("lazy_adam", LazyAdam), ("rowwise_adagrad", RowWiseAdagrad)])
def test_lazy_steps_are_those_of_their_optimizer(click: Any, lazy: Any, kind: Any) -> None:
    ours, theirs = click().eval(), click().eval()
    rule = Rule(lazy, lr=0.1, weight_decay=0.1)
    optimizer = Optimizer(ours, OptimizerOptions(tables=rule))
    theirs.embedding.sparse = True
    other = kind(theirs.embedding.parameters(), lr=0.1, weight_decay=0.1)
    dense = torch.optim.Adam(parameter_groups(theirs)["dense"], fused=True)
    for _ in range(4):
        step(ours, optimizer)
        theirs.zero_grad()
        theirs(IDS, DENSE, DOMAIN).square().sum().backward()
        other.step()
        dense.step()
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))


@LAZY
def test_rows_outside_the_batch_rest(click: Any, lazy: Any) -> None:
    """With weight decay too; ids 0 and 1, domains 0 and 1 are in the batch."""
    rule = Rule(lazy, lr=0.1, weight_decay=0.5)
    model = attach_(click(), 4, include=["tower.*"])
    moving = {name: p for name, p in model.named_parameters() if name.startswith("embedding") or "lora" in name}
    with torch.no_grad():
        model.get_parameter("tower.0.lora_B").normal_()
    before = {name: p.detach().clone() for name, p in moving.items()}
    optimizer = Optimizer(model, OptimizerOptions(tables=rule, adapters=rule))
    for _ in range(3):
        step(model, optimizer)
    for name, parameter in moving.items():
        moved = (parameter != before[name]).flatten(1).any(1)
        assert moved[:2].all(), name
        assert not moved[2:].any(), name
        assert parameter.grad.is_sparse


@LAZY
def test_lazy_rules_of_dense_layers_are_refused(lazy: Any) -> None:
    with pytest.raises(ConfigError, match=f"cannot be a lazy one. Received: '{lazy}'. Set dense.name to one of 'adam'"):
        OptimizerOptions(dense=Rule(lazy))


def test_a_long_table_under_a_dense_rule_is_warned_of() -> None:
    def caught(rule: Rule, num_ids: int = 1_000_001, *, frozen: bool = False) -> list[str]:
        model = nn.Sequential(EmbeddingTable([num_ids], 1).requires_grad_(not frozen), nn.Linear(1, 1))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            Optimizer(model, OptimizerOptions(tables=rule))
        return [str(warning.message) for warning in seen]

    (message,) = caught(Rule())
    assert "1,000,001 rows" in message
    assert "tables.name" in message
    assert "\n" not in message
    assert len(caught(Rule("adamw"))) == 1
    assert not caught(Rule("lazy_adam"))
    assert not caught(Rule("rowwise_adagrad"))
    assert not caught(Rule(), 1_000_000)
    assert not caught(Rule(), frozen=True)


@pytest.mark.parametrize("rule", ["adam", "adamw", "lazy_adam", "rowwise_adagrad"])
def test_a_frozen_table_costs_nothing(rule: Any) -> None:
    model = Tables()
    frozen = [p.requires_grad_(False) for name, p in model.named_parameters() if "head" not in name]
    before = [p.clone() for p in frozen]
    optimizer = Optimizer(model, OptimizerOptions(tables=Rule(rule, weight_decay=0.5)))
    step(model, optimizer)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert sum(tensor.numel() for tensor in optimizer.state().values()) == 2 * (3 + 1 + 1)  # the head's


@pytest.mark.parametrize("second", [False, True], ids=["base", "adapters"])
@LAZY
def test_killed_and_resumed_is_straight_through(
    click: Any, data: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path, lazy: Any, second: bool
) -> None:
    how = FitOptions(batch_size=128, max_epochs=3, patience=9, schedule="cosine")
    rules = OptimizerOptions(tables=Rule(lazy, 0.05, 0.01), adapters=Rule(lazy, 0.05, 0.01))

    def make() -> nn.Module:
        return freeze_(attach_(click(), 3, include=["tower.*"]), except_=["embedding.*"]) if second else click()

    straight, resumed = make(), make()
    expected = fit(straight, data, how, rules)
    with pytest.raises(killed):
        fit(make(), watched(data, 12), how, rules, checkpoint=tmp_path / "run")
    found = fit(resumed, data, how, rules, checkpoint=tmp_path / "run")
    assert found.history == expected.history
    assert digest(resumed) == digest(straight)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"weight_decay": -1.0}, {"weight_decay": math.nan}],
)
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="lr above 0"):
        Rule(**options)  # type: ignore[arg-type]
