"""Our layers against DeepCTR-Torch's and FuxiCTR's, and against five lines of numpy.

``backbones.safetensors`` was made by ``make_backbones.py`` with deepctr-torch 0.3.0, fuxictr 2.3.10 and torch 2.13.0.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

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

RECORD = load_file(Path(__file__).with_name("backbones.safetensors"))
FIELDS = [3, 6]  # either side of the switch from products pair by pair to batched matmuls


def of(case: str, fields: int) -> dict[str, Tensor]:
    prefix = f"{case}/{fields}/"
    found = {key.removeprefix(prefix): value for key, value in RECORD.items() if key.startswith(prefix)}
    assert "y" in found, case
    return found


def inputs(fields: int) -> Tensor:
    return RECORD[f"x/{fields}"]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)


def put(linear: nn.Module, *weights: Tensor, bias: Tensor | None = None) -> None:
    """The weights, under one another, into a Linear."""
    with torch.no_grad():
        linear.weight.copy_(torch.cat(weights))
        if bias is not None:
            linear.bias.copy_(bias)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("peer", ["deepctr", "fuxictr"])
@pytest.mark.parametrize(
    ("case", "function"), [("fm", factorization_machine), ("bi", bi_interaction), ("inner", inner_products)]
)
def test_products(case, function, peer, fields):
    close(function(inputs(fields)), of(f"{case}_{peer}", fields)["y"])


@pytest.mark.parametrize("fields", FIELDS)
def test_products_in_numpy(fields):
    x = inputs(fields).numpy()
    pairs = [(x[:, i] * x[:, j]) for i, j in combinations(range(fields), 2)]
    np.testing.assert_allclose(bi_interaction(inputs(fields)).numpy(), sum(pairs), atol=1e-9)
    np.testing.assert_allclose(factorization_machine(inputs(fields)).numpy()[:, 0], sum(pairs).sum(1), atol=1e-9)
    np.testing.assert_allclose(
        inner_products(inputs(fields)).numpy(), np.stack([p.sum(1) for p in pairs], 1), atol=1e-9
    )


@pytest.mark.parametrize("fields", FIELDS)
def test_cross_net(fields):
    x = inputs(fields).flatten(1)
    ours, theirs = CrossNet(x.shape[1], 3).double(), of("cross_deepctr", fields)
    for i, kernel in enumerate(ours.kernels):
        put(kernel, theirs["kernels"][i].t())
        ours.biases[i].data.copy_(theirs["bias"][i, :, 0])
    close(ours(x), theirs["y"])

    theirs = of("cross_fuxictr", fields)
    for i, kernel in enumerate(ours.kernels):
        put(kernel, theirs[f"cross_net.{i}.weight.weight"])
        ours.biases[i].data.copy_(theirs[f"cross_net.{i}.bias"])
    close(ours(x), theirs["y"])


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("split_half", [True, False])
def test_cin_of_deepctr(split_half, fields):
    ours = CIN(fields, (8, 6, 5), split_half).double()
    theirs = of(f"cin_deepctr_{'split' if split_half else 'whole'}", fields)
    for i, layer in enumerate(ours.layers):
        # their channels run (hidden, field), ours (field, hidden)
        weight = theirs[f"conv1ds.{i}.weight"].squeeze(-1).unflatten(1, (-1, fields)).transpose(1, 2).flatten(1)
        put(layer, weight, bias=theirs[f"conv1ds.{i}.bias"])
    assert ours.out_features == theirs["y"].shape[1]
    close(ours(inputs(fields)), theirs["y"])


@pytest.mark.parametrize("fields", FIELDS)
def test_cin_of_fuxictr(fields):
    # theirs has no relu and no split: compared where nothing is below zero
    ours, theirs = CIN(fields, (8, 6), split_half=False).double(), of("cin_fuxictr", fields)
    for i, layer in enumerate(ours.layers):
        put(layer, theirs[f"cin_layer.layer_{i + 1}.weight"].squeeze(-1), bias=theirs[f"cin_layer.layer_{i + 1}.bias"])
    close(ours(inputs(fields).abs()) @ theirs["fc.weight"].t() + theirs["fc.bias"], theirs["y"])


@pytest.mark.parametrize("fields", FIELDS)
def test_cin_in_numpy(fields):
    ours, x = CIN(fields, (4,)).double(), inputs(fields).numpy()
    weight = ours.layers[0].weight.detach().numpy().reshape(4, fields, fields)
    maps = np.einsum("hmi,bme,bie->bhe", weight, x, x)
    np.testing.assert_allclose(ours(inputs(fields)).detach().numpy(), np.maximum(maps, 0).sum(2), atol=1e-9)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("scaling", [True, False])
def test_attention_of_deepctr(scaling, fields):
    ours = InteractingLayer(4, num_heads=2, head_dim=2, scaling=scaling).double()
    theirs = of(f"attention_deepctr_{'scaled' if scaling else 'plain'}", fields)
    for name, linear in (
        ("W_Query", ours.query),
        ("W_key", ours.key),
        ("W_Value", ours.value),
        ("W_Res", ours.residual),
    ):
        put(linear, theirs[name].t())
    close(ours(inputs(fields)), theirs["y"])


@pytest.mark.parametrize("fields", FIELDS)
def test_attention_of_fuxictr(fields):
    ours, theirs = InteractingLayer(4, num_heads=3, head_dim=5).double(), of("attention_fuxictr", fields)
    for name in ("query", "key", "value", "residual"):
        put(ours.get_submodule(name), theirs[f"{name}.weight"])
    close(ours(inputs(fields)), theirs["y"])


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("peer", ["deepctr", "fuxictr"])
def test_senet(peer, fields):
    ours, theirs = SENet(fields, 3).double(), of(f"senet_{peer}", fields)
    put(ours.squeeze, theirs["excitation.0.weight"])
    put(ours.excite, theirs["excitation.2.weight"])
    assert theirs["y"].abs().max() > 0
    close(ours(inputs(fields).abs()), theirs["y"])


def of_lefts(kind: str, fields: int, matrices: list[Tensor]) -> list[list[Tensor]]:
    """The matrices of each of our Linears: ours holds those of one left feature."""
    if kind == "all":
        return [matrices]
    if kind == "each":
        return [[matrix] for matrix in matrices[: fields - 1]]
    pairs = list(combinations(range(fields), 2))
    return [[m for m, pair in zip(matrices, pairs, strict=True) if pair[0] == i] for i in range(fields - 1)]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", ["all", "each", "interaction"])
@pytest.mark.parametrize("peer", ["deepctr", "fuxictr"])
def test_bilinear(peer, kind, fields):
    ours, theirs = BilinearInteraction(fields, 4, kind).double(), of(f"bilinear_{peer}_{kind}", fields)
    if peer == "fuxictr":  # x W
        matrices = [matrix.t() for matrix in theirs["bilinear_W"].view(-1, 4, 4)]
    else:  # a Linear, so W x
        matrices = [theirs[key] for key in sorted(theirs, key=lambda k: (len(k), k)) if key.startswith("bilinear")]
    for layer, stack in zip(ours.layers, of_lefts(kind, fields, matrices), strict=True):
        put(layer, *stack)
    close(ours(inputs(fields)), theirs["y"])
