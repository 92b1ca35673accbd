"""The models of experts and gates against DeepCTR-Torch's, and against formulas in numpy, row after row.

``multi_domain_experts.safetensors`` was made by ``make_multi_domain_experts.py`` with deepctr-torch 0.3.0 and torch 2.13.0.
A task there is a domain here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from domlora.features.schema import Feature, Schema
from domlora.layers.domain_linear import DomainLinear
from domlora.models.build import build_model

RECORD = load_file(Path(__file__).with_name("multi_domain_experts.safetensors"))
DOMAINS = ("a", "b", "c")
NUMBERS = Schema(tuple(Feature(f"x{column}", "numeric") for column in range(5)), DOMAINS)
SCHEMA = Schema(
    (Feature("user", num_ids=7), Feature("item", num_ids=6), Feature("hour", "bucketed", num_ids=4, boundaries=(9.0,))),
    DOMAINS,
)
ROWS = 24
DOMAIN = torch.arange(ROWS) % 4 - 1  # unknown ones too, in no order
OPTIONS: dict[str, Any] = {"embedding_dim": 3, "dropout": 0.5}

Array = NDArray[np.float64]


def of(case: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{case}/"): value for key, value in RECORD.items() if key.startswith(f"{case}/")}


def put(layer: nn.Linear | DomainLinear, *pairs: tuple[Tensor, Tensor | None]) -> None:
    """Weight and bias into a Linear, or those of each domain into a DomainLinear."""
    weight, bias = torch.stack([w for w, _ in pairs]), [w.new_zeros(len(w)) if b is None else b for w, b in pairs]
    layer.weight.data = weight.flatten(1) if isinstance(layer, DomainLinear) else weight[0]
    layer.bias.data = torch.stack(bias) if isinstance(layer, DomainLinear) else bias[0]


def put_dnn(tower: nn.Module, theirs: dict[str, Tensor], *names: str) -> None:
    """DeepCTR's DNN, or one a domain, into a tower."""
    for number, layer in enumerate(tower):  # type: ignore[arg-type]
        put(layer, *((theirs[f"{n}.linears.{number}.weight"], theirs[f"{n}.linears.{number}.bias"]) for n in names))


def put_towers(model: Any, theirs: dict[str, Tensor]) -> None:
    put_dnn(model.domain_mlp, theirs, *(f"tower_dnn.{d}" for d in range(3)))
    put(model.head, *((theirs[f"tower_dnn_final_layer.{d}.weight"], theirs[f"out.{d}.bias"]) for d in range(3)))


def put_shared_bottom(model: Any, theirs: dict[str, Tensor]) -> None:
    put_dnn(model.tower, theirs, "bottom_dnn")


def put_mmoe(model: Any, theirs: dict[str, Tensor]) -> None:
    for number, expert in enumerate(model.tower):
        put_dnn(expert, theirs, f"expert_dnn.{number}")
    put(model.gate, *((theirs[f"gate_dnn_final_layer.{d}.weight"], None) for d in range(3)))


def put_ple(model: Any, theirs: dict[str, Tensor]) -> None:
    put_dnn(model.tower[0][0], theirs, "shared_experts.0.0.0")
    put_dnn(model.own_experts[0][0], theirs, *(f"specific_experts.0.{d}.0" for d in range(3)))
    put(model.own_gates[0], *((theirs[f"specific_gate_dnn_final_layer.0.{d}.weight"], None) for d in range(3)))


@pytest.mark.parametrize(
    ("name", "fill", "options"),
    [
        ("shared_bottom", put_shared_bottom, {}),
        ("mmoe", put_mmoe, {"num_experts": 3}),
        ("ple", put_ple, {"num_experts": 1, "num_own_experts": 1}),
    ],
)
def test_each_domain_answers_as_deepctrs_task(
    name: str, fill: Callable[[Any, dict[str, Tensor]], None], options: dict[str, Any]
) -> None:
    model = build_model(name, NUMBERS, **OPTIONS, hidden_units=(6, 4), domain_units=(3,), **options).double().eval()
    theirs = of(name)
    fill(model, theirs)
    put_towers(model, theirs)
    x = RECORD["x"]
    rows = x.repeat_interleave(3, 0)  # each row once a domain: 0, 1, 2, 0, ...
    y = model(torch.zeros(len(rows), 0, dtype=torch.int64), rows, torch.arange(3).repeat(len(x)))
    torch.testing.assert_close(y.view(-1, 3), theirs["y"], rtol=1e-12, atol=1e-12)


# Row after row in numpy


def arrays(model: nn.Module) -> dict[str, Array]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def linear(p: dict[str, Array], name: str, x: Array) -> Array:
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def of_domain(p: dict[str, Array], name: str, x: Array, d: int) -> Array:
    """A layer of each domain's own; the mean for an unknown one."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    w, b = (weight[d], bias[d]) if d >= 0 else (weight.mean(0), bias.mean(0))
    return w.reshape(len(b), len(x)) @ x + b


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum()


def embedded(p: dict[str, Array], ids: Array) -> Array:
    return np.concatenate([p["embedding.weight"][i] for i in ids + np.array([0, 7, 13])])


def domain_vector(p: dict[str, Array], d: int) -> Array:
    table = p["domain_embedding.weight"]
    return table[d] if d >= 0 else table.mean(0)


def gate_unit(p: dict[str, Array], name: str, x: Array) -> Array:
    return 2 * sigmoid(linear(p, f"{name}.second", relu(linear(p, f"{name}.first", x))))


def own_tower(p: dict[str, Array], h: Array, d: int) -> float:
    return of_domain(p, "head", relu(of_domain(p, "domain_mlp.0", h, d)), d).item()


def shared_bottom(p: dict[str, Array], ids: Array, d: int) -> float:
    h = embedded(p, ids)
    for layer in (0, 1):
        h = relu(linear(p, f"tower.{layer}", h))
    return own_tower(p, h, d)


def mmoe(p: dict[str, Array], ids: Array, d: int) -> float:
    x = embedded(p, ids)
    experts = [relu(linear(p, f"tower.{k}.1", relu(linear(p, f"tower.{k}.0", x)))) for k in range(4)]
    weights = softmax(of_domain(p, "gate", x, d))
    return own_tower(p, sum(w * e for w, e in zip(weights, experts, strict=True)), d)


def ple(p: dict[str, Array], ids: Array, d: int) -> float:
    """Two levels of two own and three shared experts."""
    own = shared = embedded(p, ids)
    for level in (0, 1):
        experts = []
        for k in range(2):
            name = f"own_experts.{level}.{k}"
            experts.append(relu(of_domain(p, f"{name}.1", relu(of_domain(p, f"{name}.0", own, d)), d)))
        for k in range(3):
            name = f"tower.{level}.{k}"
            experts.append(relu(linear(p, f"{name}.1", relu(linear(p, f"{name}.0", shared)))))
        own_weights = softmax(of_domain(p, f"own_gates.{level}", own, d))
        if level == 0:
            shared_weights = softmax(linear(p, "shared_gates.0", shared))
            shared = sum(w * e for w, e in zip(shared_weights, experts, strict=True))
        own = sum(w * e for w, e in zip(own_weights, experts, strict=True))
    return own_tower(p, own, d)


def pepnet(p: dict[str, Array], ids: Array, d: int) -> float:
    """Priors are user and item, the first six numbers of x; a bucket is none."""
    x = embedded(p, ids)
    o = gate_unit(p, "embedding_gate", np.concatenate([domain_vector(p, d), x])) * x
    h = o
    for layer in (0, 1):
        factor = gate_unit(p, f"unit_gates.{layer}", np.concatenate([x[:6], o]))
        h = factor * relu(linear(p, f"tower.{layer}", h))
    return linear(p, "head", h).item()


def adasparse(variant: str) -> Callable[[dict[str, Array], Array, int], float]:
    alpha, beta, epsilon = 1.5, 3.0, 0.4

    def logit(p: dict[str, Array], ids: Array, d: int) -> float:
        h = embedded(p, ids)
        for layer in (0, 1):
            units = relu(linear(p, f"tower.{layer}", h))
            v = linear(p, f"pruners.{layer}", np.concatenate([domain_vector(p, d), units]))
            factor = {
                "binarization": 1.0 * (sigmoid(alpha * v) > epsilon),
                "scaling": beta * sigmoid(v),
                "fusion": beta * sigmoid(alpha * v) * (beta * sigmoid(alpha * v) > epsilon),
            }[variant]
            h = units * factor
        return linear(p, "head", h).item()

    return logit


SPARSE = {"alpha": 1.5, "beta": 3.0, "epsilon": 0.4}


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("shared_bottom", shared_bottom, {}),
        ("mmoe", mmoe, {}),
        ("ple", ple, {"num_levels": 2, "num_experts": 3, "num_own_experts": 2}),
        ("pepnet", pepnet, {"gate_units": 5}),
        ("adasparse", adasparse("binarization"), {"variant": "binarization", **SPARSE}),
        ("adasparse", adasparse("scaling"), {"variant": "scaling", **SPARSE}),
        ("adasparse", adasparse("fusion"), {"variant": "fusion", **SPARSE}),
    ],
)
def test_it_is_its_formula_row_after_row(
    name: str, formula: Callable[[dict[str, Array], Array, int], float], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build_model(name, SCHEMA, **OPTIONS, hidden_units=(24, 16), **options).double().eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0)
    ids = torch.stack([torch.randint(0, feature.num_ids, (ROWS,)) for feature in SCHEMA.features], 1)
    y = model(ids, torch.zeros(ROWS, 0, dtype=torch.float64), DOMAIN).detach().numpy()
    parameters = arrays(model)
    expected = [formula(parameters, i, d) for i, d in zip(ids.numpy(), DOMAIN.tolist(), strict=True)]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert np.unique(y.round(9)).size > ROWS // 2  # the rows differ
