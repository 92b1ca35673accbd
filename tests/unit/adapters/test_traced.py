"""Traced by torch.compile and torch.export, an adapted model says what it says when it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import adapter_layers
from domlora.adapters.root import disabled, routed
from domlora.errors import UnknownDomainError

DOMAINS = 5


class Net(nn.Module):
    """A layer without a bias, and a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8, bias=False)
        self.tower = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002 - the adapters read it
        out: Tensor = self.tower(self.query(x)).squeeze(-1)
        return out


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = attach_(Net(), DOMAINS, rank=2, lora_alpha=3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def compiled(model: nn.Module) -> nn.Module:
    """In one graph; aot_eager traces all that inductor does, and needs no compiler of C++."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")  # type: ignore[return-value]


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, 8), torch.randint(-1, DOMAINS, (shape[0],))


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_gives_the_same_numbers_and_gradients(model: nn.Module, training: bool) -> None:
    model.train(training)
    other = copy.deepcopy(model)
    graph = compiled(other)
    for shape in ((32,), (9, 3), (1,), (17,)):
        x, domain = rows(*shape)
        ours, theirs = graph(x, domain), model(x, domain)
        assert (ours - theirs).abs().max() <= 1e-6
        mine = torch.autograd.grad(ours.square().sum(), list(other.parameters()))
        yours = torch.autograd.grad(theirs.square().sum(), list(model.parameters()))
        for left, right in zip(mine, yours, strict=True):
            assert (left - right).abs().max() <= 1e-5 * max(1.0, float(right.abs().max()))


def test_a_fresh_adapter_is_the_base_bit_for_bit() -> None:
    torch.manual_seed(0)
    base = Net().eval()
    x, domain = rows(64)
    assert torch.equal(compiled(attach_(copy.deepcopy(base), DOMAINS))(x, domain), base(x, domain))


def test_blocks_around_a_compiled_model_count(model: nn.Module) -> None:
    model.eval()
    graph = compiled(model)
    x, domain = rows(16)
    other = (domain + 2) % DOMAINS
    graph(x, domain)
    with routed(model, other):
        inside = graph(x, domain)
    assert (inside - model(x, other)).abs().max() <= 1e-6
    with disabled(model):
        assert torch.equal(graph(x, domain), model(x, domain))
    assert (graph(x, domain) - model(x, domain)).abs().max() <= 1e-6


def test_an_unknown_domain_is_refused_when_the_graph_runs(model: nn.Module) -> None:
    graph = compiled(model.eval())
    x, domain = rows(16)
    graph(x, domain)
    with pytest.raises(UnknownDomainError, match="from 0 to 4"):
        graph(x, domain + DOMAINS)


def test_autocast(model: nn.Module) -> None:
    graph = compiled(model.eval())
    x, domain = rows(32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graph(x, domain), model(x, domain))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_sparse_bank_gradients_are_refused(model: nn.Module, fullgraph: bool) -> None:
    for layer in adapter_layers(model).values():
        layer.sparse = True
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(Exception, match="a compiled model has dense bank gradients"):
        graph(*rows(8))
    with torch.no_grad():  # scoring is as ever
        graph(*rows(8))


class Broken(Net):
    """A forward that torch.compile cuts in two, between layers that have an adapter."""

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002 - the adapters read it
        x = self.query(x)
        torch._dynamo.graph_break()
        out: Tensor = self.tower(x).squeeze(-1)
        return out


def test_a_forward_in_several_graphs(model: nn.Module) -> None:
    broken = attach_(Broken(), DOMAINS, rank=2, lora_alpha=3.0)
    broken.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    graph = torch.compile(broken, backend="aot_eager")
    for number in (32, 12, 32):
        x, domain = rows(number)
        expected = model(x, domain)
        assert (graph(x, domain) - expected).abs().max() <= 1e-6
        assert torch.equal(broken(x, domain), expected)  # nothing of the trace is left
        with routed(broken, domain):
            assert (graph(x, domain * 0) - expected).abs().max() <= 1e-6


def test_exported_for_any_number_of_rows(model: nn.Module) -> None:
    model.eval()
    size = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, rows(32), dynamic_shapes=({0: size}, {0: size}))
    for number in (32, 5):
        x, domain = rows(number)
        assert (program.module()(x, domain) - model(x, domain)).abs().max() <= 1e-6


def test_an_empty_batch(model: nn.Module) -> None:
    assert compiled(model.eval())(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)
