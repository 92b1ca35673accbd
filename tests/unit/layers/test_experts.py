import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from domlora.layers.domain_linear import DomainRows
from domlora.layers.experts import (
    DomainEmbedding,
    DomainMLP,
    Experts,
    GateUnit,
    domain_linear,
    linear_of,
    mixture,
)
from domlora.layers.mlp import MLP

DOMAIN = torch.tensor([2, 0, -1, 3, 0, 2, -1])


def stirred(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    return module


def test_all_domains_start_alike_and_from_glorot():
    layer = domain_linear(300, 200, 4, DomainRows())
    assert torch.equal(layer.weight, layer.weight[:1].expand(4, -1))
    assert layer.weight[0].std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.05)
    assert not layer.bias.any()
    assert layer.weight.is_contiguous()


def test_at_the_start_an_unknown_domain_answers_as_each_known_one():
    rows = DomainRows()
    tower = DomainMLP(4, [5, 3], 0.0, num_domains=6, rows=rows)
    rows.group_(torch.tensor([-1, 0, 5]))
    y = tower(torch.randn(1, 4).expand(3, 4))
    assert y.any()
    torch.testing.assert_close(y, y[:1].expand(3, -1))


def test_two_towers_start_apart():
    first, second = (DomainMLP(4, [5], 0.0, num_domains=2, rows=DomainRows()) for _ in range(2))
    assert not torch.equal(first[0].weight, second[0].weight)


def test_a_tower_is_one_mlp_a_domain():
    rows = DomainRows()
    tower = stirred(DomainMLP(4, [5, 3], 0.5, num_domains=5, rows=rows)).eval()
    x = torch.randn(7, 4)
    rows.group_(DOMAIN)
    y = tower(x)
    for i, d in enumerate(DOMAIN.tolist()):
        plain = MLP(4, [5, 3], 0.5).eval()
        for ours, layer in zip(plain, tower, strict=True):
            ours.weight.data = (layer.weight[d] if d >= 0 else layer.weight.mean(0)).view_as(ours.weight)
            ours.bias.data = layer.bias[d] if d >= 0 else layer.bias.mean(0)
        torch.testing.assert_close(y[i], plain(x[i : i + 1])[0])
    assert (tower.in_features, tower.out_features) == (4, 3)


def test_a_tower_drops_units_in_training_alone():
    rows = DomainRows()
    tower = stirred(DomainMLP(4, [64], 0.5, num_domains=2, rows=rows))
    rows.group_(torch.zeros(50, dtype=torch.int64))
    x = torch.randn(1, 4).expand(50, 4)
    kept = tower.eval()(x)
    dropped = tower.train()(x)
    alive = kept > 0
    assert 0.4 < dropped[alive].eq(0).float().mean() < 0.6
    torch.testing.assert_close(dropped[alive & (dropped != 0)], 2 * kept[alive & (dropped != 0)])


def test_only_domains_in_the_batch_get_gradients():
    rows = DomainRows()
    tower = stirred(DomainMLP(4, [5, 3], 0.0, num_domains=5, rows=rows))
    rows.group_(DOMAIN.clamp(min=0))
    tower(torch.randn(7, 4)).sum().backward()
    for parameter in tower.parameters():
        assert parameter.grad.ne(0).any(1).tolist() == [True, False, True, True, False]


def test_a_domains_vector():
    table = DomainEmbedding(5, 3)
    assert 0 < table.weight.std() < 0.02
    y = table(DOMAIN)
    for i, d in enumerate(DOMAIN.tolist()):
        torch.testing.assert_close(y[i], table.weight[d] if d >= 0 else table.weight.mean(0))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_row_of_no_domain_teaches_none(sparse):
    table = DomainEmbedding(5, 3)
    table.sparse = sparse
    table(torch.tensor([3, -1, 3, 1])).sum().backward()
    assert table.weight.grad.is_sparse == sparse
    expected = torch.zeros(5, 3)
    expected[1], expected[3] = 1, 2
    torch.testing.assert_close(table.weight.grad.to_dense(), expected)


def test_experts_answer_each_for_itself():
    experts = Experts(MLP(4, [3]) for _ in range(3))
    x = torch.randn(2, 4)
    for y, expert in zip(experts(x), experts, strict=True):
        assert torch.equal(y, expert(x))


def test_a_gate_unit_starts_near_one_and_stays_between_zero_and_two():
    gate = GateUnit(4, 8, 6)
    x = torch.randn(100, 4)
    assert (gate(0.01 * x) - 1).abs().max() < 0.1
    y = stirred(gate)(10 * x)
    assert y.min() >= 0
    assert y.max() <= 2
    inner = torch.relu(10 * x @ gate.first.weight.t() + gate.first.bias)
    torch.testing.assert_close(y, 2 / (1 + torch.exp(-(inner @ gate.second.weight.t() + gate.second.bias))))


def test_a_linear_starts_as_those_of_a_tower():
    linear = linear_of(300, 200)
    assert linear.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.05)
    assert not linear.bias.any()


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_mixture_is_a_weighted_mean(num_rows, num_experts, width, seed):
    random = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(num_rows, num_experts, generator=random, dtype=torch.float64)
    experts = list(torch.randn(num_experts, num_rows, width, generator=random, dtype=torch.float64))
    y = mixture(scores, experts)
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    expected = sum(weights[:, k : k + 1] * expert for k, expert in enumerate(experts))
    torch.testing.assert_close(y, expected)
