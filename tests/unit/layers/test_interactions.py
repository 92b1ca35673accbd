"""Shapes, starts and gradients; the numbers are in tests/reference/test_backbones.py."""

import pytest
import torch
from torch import nn

from domlora.layers.interactions import (
    CIN,
    BilinearInteraction,
    CrossNet,
    InteractingLayer,
    SENet,
    bi_interaction,
    factorization_machine,
    inner_products,
)

FIELDS = [2, 4, 5]  # either side of the switch from products pair by pair to batched matmuls


def layers(fields: int) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    pairs = fields * (fields - 1) // 2
    return {
        "cin": (CIN(fields, (6, 4)), (7,)),
        "cin whole": (CIN(fields, (6, 4), split_half=False), (10,)),
        "cin one": (CIN(fields, (3,)), (3,)),
        "attention": (InteractingLayer(3, 2, 5), (fields, 10)),
        "senet": (SENet(fields), (fields, 3)),
        "bilinear": (BilinearInteraction(fields, 3), (pairs, 3)),
        "bilinear each": (BilinearInteraction(fields, 3, "each"), (pairs, 3)),
        "bilinear all": (BilinearInteraction(fields, 3, "all"), (pairs, 3)),
    }


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("fields", FIELDS)
def test_shapes(fields, rows):
    x = torch.randn(rows, fields, 3)
    for name, (layer, shape) in layers(fields).items():
        assert layer(x).shape == (rows, *shape), name
    assert bi_interaction(x).shape == (rows, 3)
    assert factorization_machine(x).shape == (rows, 1)
    assert inner_products(x).shape == (rows, fields * (fields - 1) // 2)
    assert CrossNet(3, 2)(x[:, 0]).shape == (rows, 3)


@pytest.mark.parametrize("fields", FIELDS)
def test_gradients_are_those_of_finite_differences(fields):
    torch.manual_seed(1)
    x = torch.randn(2, fields, 3, dtype=torch.float64, requires_grad=True)
    for name, (layer, _) in layers(fields).items():
        assert torch.autograd.gradcheck(layer.double(), (x,)), name
    for function in (bi_interaction, factorization_machine, inner_products):
        assert torch.autograd.gradcheck(function, (x,))


def test_the_two_ways_of_attention_agree():
    torch.manual_seed(0)
    layer = InteractingLayer(3, num_heads=2, head_dim=5)
    for linear in (layer.query, layer.key, layer.value):
        nn.init.normal_(linear.weight)
    x = torch.randn(7, 4, 3)
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    torch.testing.assert_close(layer._attend_few(query, key, value), layer._attend(query, key, value))


def test_the_two_ways_of_inner_products_agree(monkeypatch):
    x = torch.randn(7, 4, 3)
    few = inner_products(x)
    monkeypatch.setattr("domlora.layers.interactions._FEW", 0)
    torch.testing.assert_close(inner_products(x), few)


def test_a_cross_net_starts_near_the_identity_and_crosses():
    net, x = CrossNet(4, 1), torch.randn(3, 4)
    expected = x * (x @ net.kernels[0].weight.t()) + x
    torch.testing.assert_close(net(x), expected)


def test_bilinear_matrices_start_glorot_each():
    torch.manual_seed(0)
    layer = BilinearInteraction(4, 64)
    assert [linear.out_features for linear in layer.layers] == [3 * 64, 2 * 64, 64]
    assert sum(linear.weight.numel() for linear in layer.layers) == 6 * 64 * 64
    for linear in layer.layers:
        assert abs(linear.weight.std().item() / 64**-0.5 - 1) < 0.05


def test_attention_starts_small():
    weight = InteractingLayer(64, 4, 16).query.weight
    assert weight.abs().max() <= 0.1
    assert 0.03 < weight.std().item() < 0.05


def test_senet_has_a_bottleneck_of_one_at_least():
    assert [SENet(fields, 3).squeeze.out_features for fields in (2, 3, 5, 6)] == [1, 1, 1, 2]


def test_cin_is_of_degree_k_plus_one():
    """Doubling the input of two bias-free layers quadruples the first layer's maps and multiplies the second's by 8."""
    net = CIN(3, (4, 5))
    x = torch.rand(2, 3, 2)
    once, twice = net(x), net(2 * x)
    torch.testing.assert_close(twice[:, :2], 4 * once[:, :2])
    torch.testing.assert_close(twice[:, 2:], 8 * once[:, 2:])
    assert once.ne(0).any()
