"""Low-rank experts that all domains share, and their gate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domlora.adapters.attach import attach_
from domlora.adapters.mixture import (
    Gate,
    MixtureLinear,
    alone,
    attach_mixture_,
    expert_parameters,
    gate_of,
    mixture_layers,
)
from domlora.adapters.root import disabled
from domlora.errors import ConfigError

DOMAINS, EXPERTS = 3, 4


class Net(nn.Module):
    """A layer that sees middle axes, one without a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5, bias=False)])
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002 - the experts' gate reads it
        for layer in self.tower:
            x = torch.relu(layer(x))
        out: Tensor = self.head(x).squeeze(-1)
        return out


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return attach_mixture_(Net().double(), DOMAINS, num_experts=EXPERTS, **{"rank": 2, **options})


def scattered(model: nn.Module) -> nn.Module:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return model


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    x = torch.randn(*shape, 6, generator=random, dtype=torch.float64)
    return x, torch.randint(-1, DOMAINS, (shape[0],), generator=random)


def by_hand(layer: MixtureLinear, x: Tensor, share: Tensor) -> Tensor:
    """The formula, expert by expert; ``share (E,)`` of one row."""
    y = x @ layer.base.weight.T + (0 if layer.base.bias is None else layer.base.bias)
    for e in range(EXPERTS):
        y = y + share[e] * layer.scale * (x @ layer.expert_A[e]) @ layer.expert_B[e]
        if len(layer.expert_bias):
            y = y + share[e] * layer.expert_bias[e]
    return y


def answer(model: Any, x: Tensor, share: Tensor) -> Tensor:
    for layer in model.tower:
        x = torch.relu(by_hand(layer, x, share) if isinstance(layer, MixtureLinear) else layer(x))
    out: Tensor = model.head(x).squeeze(-1)
    return out


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    rank=st.integers(0, 3),
    lora_alpha=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
)
def test_it_is_the_formula(shape: list[int], rank: int, lora_alpha: float | None, bias: bool) -> None:
    if not rank and not bias:
        return
    model: Any = scattered(net(rank=rank, lora_alpha=lora_alpha, bias=bias))
    x, domain = rows(*shape)
    gate = gate_of(model)
    for row, number in enumerate(domain.tolist()):
        share = torch.zeros(EXPERTS, dtype=torch.float64)
        if number >= 0:
            share = torch.softmax(gate.kernel.weight @ gate.embedding[number] + gate.kernel.bias, 0)
        torch.testing.assert_close(model(x, domain)[row], answer(model, x[row], share))


def test_fresh_experts_equal_the_base_bit_for_bit() -> None:
    model = net()
    plain = Net().double()
    torch.manual_seed(0)
    plain = Net().double()
    assert torch.equal(model(*rows(9)), plain(*rows(9)))
    scattered(model)
    assert not torch.equal(model(*rows(9)), plain(*rows(9)))


def test_unknown_domains_get_the_base() -> None:
    model = scattered(net())
    x, domain = rows(20)
    with disabled(model):
        base = model(x, domain)
    unknown = domain < 0
    assert unknown.any()
    assert torch.equal(model(x, domain)[unknown], base[unknown])
    assert not torch.isclose(model(x, domain)[~unknown], base[~unknown]).all()


def test_a_fresh_gate_is_the_mean_of_the_experts() -> None:
    share = Gate(DOMAINS, EXPERTS)(torch.tensor([0, -1, 2]))
    assert share.tolist() == [[0.25] * 4, [0.0] * 4, [0.25] * 4]


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_an_expert_alone(expert: int) -> None:
    model = scattered(net())
    x, domain = rows(7)
    share = torch.zeros(EXPERTS, dtype=torch.float64)
    share[expert] = 1.0
    with alone(model, expert):
        found = model(x, domain)
    for row, number in enumerate(domain.tolist()):
        torch.testing.assert_close(found[row], answer(model, x[row], share * (number >= 0)))
    assert gate_of(model).only is None


def test_alone_only_that_expert_gets_gradients() -> None:
    model = scattered(net())
    with alone(model, 2):
        model(*rows(9)).sum().backward()
    mine = {id(p) for p in expert_parameters(model, 2)}
    assert len(mine) == 2 * 2 + 1  # the second layer has no bias
    experts = {id(p) for e in range(EXPERTS) for p in expert_parameters(model, e)}
    for parameter in model.parameters():
        if id(parameter) in mine:
            assert parameter.grad is not None
        elif id(parameter) in experts or any(parameter is p for p in gate_of(model).parameters()):
            assert parameter.grad is None


def test_one_gate_for_all_layers() -> None:
    model = net()
    gates = {id(layer.gate) for layer in mixture_layers(model).values()}
    assert len(gates) == 1
    assert sum(p is gate_of(model).embedding for p in model.parameters()) == 1
    twin = copy.deepcopy(model)
    assert len({id(layer.gate) for layer in mixture_layers(twin).values()}) == 1
    assert gate_of(twin) is not gate_of(model)
    other = net()
    other.load_state_dict(scattered(model).state_dict())
    assert torch.equal(other(*rows(9)), model(*rows(9)))


def test_temperature_sets_the_rank_and_globs_choose() -> None:
    model = net(rank=None, temperature=4.0, include=("tower.*",), exclude=("tower.1",))
    assert {name: layer.rank for name, layer in mixture_layers(model).items()} == {"tower.0": 2}


def test_compiled_and_exported_it_says_the_same() -> None:
    model = scattered(net()).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}))
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (8, 3, 1):
        expected = model(*rows(num_rows))
        torch.testing.assert_close(program.module()(*rows(num_rows)), expected)
        torch.testing.assert_close(graph(*rows(num_rows)), expected)


def test_a_layer_in_two_places_has_its_experts_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(6, 6)
            self.tower = nn.ModuleList([layer, layer, nn.Linear(6, 5)])

    model: Any = attach_mixture_(Tied(), DOMAINS, num_experts=2)
    assert model.tower[0] is model.tower[1]
    assert len(mixture_layers(model)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_experts": 0}, "sizes of at least 1"),
        ({"gate_dim": 0}, "sizes of at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"rank": 0, "bias": False}, "rank must be at least 1"),
        ({"include": ("towr.*",)}, "a glob must match a linear layer"),
        ({"domain": "scene"}, "no argument of that name"),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_mixture_(Net(), DOMAINS, **{"num_experts": 2, **options})


def test_a_model_gets_experts_or_adapters_once() -> None:
    with pytest.raises(ConfigError, match="already"):
        attach_mixture_(attach_(Net(), DOMAINS), DOMAINS, num_experts=2)
    with pytest.raises(ConfigError, match="already"):
        attach_mixture_(net(), DOMAINS, num_experts=2)
    with pytest.raises(ConfigError, match="by experts already"):
        attach_(net(), DOMAINS)
    with pytest.raises(ConfigError, match="no experts"):
        gate_of(Net())


def test_a_layer_outside_its_model_is_refused() -> None:
    model: Any = net()
    with pytest.raises(ConfigError, match="one domain for each row"):
        model.tower[0](rows(4)[0])
