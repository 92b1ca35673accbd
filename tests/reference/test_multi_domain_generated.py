"""The formulas of six multi-domain models in numpy, row after row, from the model's weights and nothing else of it.

They are written from the papers' formulas as the models' docstrings give them, without grouping, batches or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

Array = NDArray[np.float64]
SCHEMA = Schema(
    (*(Feature(f"c{i}", num_ids=size) for i, size in enumerate((9, 7, 5))), Feature("x", "numeric")),
    domains=("a", "b", "c", "d"),
)
OPTIONS = {"embedding_dim": 4, "hidden_units": (12, 8), "dropout": 0.5}


class Weights:
    """A model's state as numpy arrays, and what is a domain's own for one domain."""

    def __init__(self, model: nn.Module, domain: int = 0) -> None:
        self.state = {key: value.double().numpy() for key, value in model.state_dict().items()}
        self.domain = domain

    def __getitem__(self, key: str) -> Array:
        return self.state[key]

    def own(self, key: str) -> Array:
        """The row of the domain; the mean of all for -1."""
        return self[key][self.domain] if self.domain >= 0 else self[key].mean(0)

    def linear(self, name: str, x: Array) -> Array:
        y = self[f"{name}.weight"] @ x
        return y + self[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def tower(self, name: str, x: Array) -> Array:
        for layer in range(len([key for key in self.state if key.startswith(f"{name}.") and key.endswith(".bias")])):
            x = relu(self.linear(f"{name}.{layer}", x))
        return x

    def own_linear(self, name: str, x: Array) -> Array:
        bias = self.own(f"{name}.bias")
        return self.own(f"{name}.weight").reshape(len(bias), len(x)) @ x + bias

    def own_tower(self, name: str, x: Array, depth: int) -> Array:
        for layer in range(depth):
            x = relu(self.own_linear(f"{name}.{layer}", x))
        return x

    def generated(self, name: str, x: Array) -> Array:
        z = self.own("domain_embedding.weight")
        weight, bias = self[f"{name}.weight"].copy(), self[f"{name}.bias"].copy()
        for c, number in enumerate(z):
            weight += number * self[f"{name}.generator_weight"][c].reshape(weight.shape)
            bias += number * self[f"{name}.generator_bias"][c]
        return weight @ x + bias

    def norm(self, name: str, x: Array) -> Array:
        d = self.domain
        seen = self[f"{name}.num_batches"][d] > 0
        place = d if seen else -1
        y = (x - self[f"{name}.running_mean"][place]) / np.sqrt(self[f"{name}.running_var"][place] + 1e-3)
        scale, shift = self[f"{name}.weight"], self[f"{name}.bias"]
        if d >= 0:
            scale, shift = scale * self[f"{name}.domain_weight"][d], shift + self[f"{name}.domain_bias"][d]
        return scale * y + shift


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def leaky(x: Array) -> Array:
    return np.where(x > 0, x, 0.1 * x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum()


def mixed(scores: Array, experts: Iterable[Array]) -> Array:
    return sum((g * e for g, e in zip(softmax(scores), experts, strict=True)), np.zeros(1))


def sar_net(w: Weights, vectors: Array, dense: Array) -> Array:
    z = w["domain_embedding.weight"]
    z = z[w.domain] if w.domain >= 0 else z.mean(0)
    scores = [w["attention.2.weight"] @ relu(w.linear("attention.0", np.concatenate([x, z, x * z]))) for x in vectors]
    weighed = len(vectors) * softmax(np.concatenate(scores))[:, None] * vectors
    u = np.concatenate([weighed.ravel(), dense])
    scale, shift = np.split(w.own("transform.weight"), 2)
    u = (1 + scale) * u + shift
    experts = [w.own_tower("own_experts.0", u, 1), w.tower("tower.0", u), w.tower("tower.1", u)]
    return w.linear("head", mixed(w.own_linear("gate", u), experts))


def m2m(w: Weights, vectors: Array, dense: Array) -> Array:
    def meta(name: str, h: Array) -> Array:
        for layer in range(2):
            h = leaky(w.generated(f"{name}.{layer}", h))
        return h

    x = np.concatenate([vectors.ravel(), dense])
    experts = [w.tower(f"tower.{k}", x) for k in range(3)]
    scores = [w["score.weight"] @ meta("meta_attention", e) for e in experts]
    t = mixed(np.concatenate(scores), experts)
    for j in range(2):
        t = leaky(meta(f"meta_residuals.{j}", t) + t)
    return w.linear("head", t)


def adaptdhm(w: Weights, vectors: Array, dense: Array) -> Array:
    x = vectors.ravel()
    cluster = int(np.argmax(w["router.running_mean"] @ x))
    h = np.concatenate([x, dense])
    for layer in range(2):
        shared = w[f"tower.{layer}.weight"]
        weight = shared * w[f"tower.{layer}.domain_weight"][cluster].reshape(shared.shape)
        h = relu(weight @ h + w[f"tower.{layer}.bias"] + w[f"tower.{layer}.domain_bias"][cluster])
    return w.linear("head", h)


def hamur(w: Weights, vectors: Array, dense: Array) -> Array:
    h = np.concatenate([vectors.ravel(), dense])
    z = w.own("domain_embedding.weight")
    matrix = w.linear("hyper.2", relu(w.linear("hyper.0", np.concatenate([h, z])))).reshape(3, 3)
    for layer in range(2):
        h = relu(w.linear(f"tower.{layer}", h))
        name = f"adapters.{layer}"
        down = w[f"{name}.down.1.weight"] @ matrix @ w[f"{name}.down.0.weight"]
        up = w[f"{name}.up.1.weight"] @ matrix @ w[f"{name}.up.0.weight"]
        h = h + w.norm(f"{name}.norm", up @ sigmoid(down @ h + w[f"{name}.down.1.bias"]))
    return w.linear("head", h)


def m3oe(w: Weights, vectors: Array, dense: Array) -> Array:
    x, d = np.concatenate([vectors.ravel(), dense]), w.domain
    weight, bias = w["representation.0.weight"].copy(), w["representation.0.bias"].copy()
    if d >= 0:
        weight *= w["representation.0.domain_weight"][d].reshape(weight.shape)
        bias += w["representation.0.domain_bias"][d]
    r = relu(weight @ x + bias) + x
    shared = mixed(w.own_linear("gate", r), [w.tower(f"tower.{k}", r) for k in range(2)])
    own = w.own_tower("own_expert", r, 2)
    w.domain = -1
    mean = w.own_tower("own_expert", r, 2)
    w.domain = d
    share, of_domain, of_task = (sigmoid(w[key]) for key in ("own_share", "domain_weight", "task_weight"))
    fused = shared + of_domain * (share * own + (1 - share) * mean) + of_task * w.tower("tower.2", r)
    return w.own_linear("head", w.own_tower("domain_mlp", fused, 1))


def apg(w: Weights, vectors: Array, dense: Array) -> Array:
    h = np.concatenate([vectors.ravel(), dense])
    for layer in range(2):
        name = f"tower.{layer}"
        h = w.linear(f"{name}.down.1", w.linear(f"{name}.down.0", h))
        h = w.generated(f"{name}.core", h)
        h = relu(w.linear(f"{name}.up.1", w.linear(f"{name}.up.0", h)))
    return w.linear("head", h)


FORMULAS: dict[str, tuple[Callable[[Weights, Array, Array], Array], dict[str, object]]] = {
    "sar_net": (sar_net, {}),
    "m2m": (m2m, {"num_experts": 3, "vector_dim": 5, "meta_layers": 2, "meta_units": 2}),
    "adaptdhm": (adaptdhm, {"num_clusters": 4}),
    "hamur": (hamur, {"num_adapters": 2, "rank": 3, "bottleneck": 5, "hyper_units": 6}),
    "m3oe": (m3oe, {"domain_units": (5,)}),
    "apg": (apg, {"over_parameterized": True, "reduction": 2, "vector_dim": 5}),
}


def rows(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randint(0, f.num_ids, (num_rows,), generator=random) for f in SCHEMA.categorical], 1)
    domain = torch.randint(-1, 3, (num_rows,), generator=random)  # unsorted, some unknown, the last domain never
    return ids, torch.randn(num_rows, 1, generator=random, dtype=torch.float64), domain


@pytest.mark.parametrize("name", FORMULAS)
def test_every_row_is_answered_as_the_formula_says(name: str) -> None:
    formula, options = FORMULAS[name]
    torch.manual_seed(0)
    model = build_model(name, SCHEMA, **OPTIONS, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model(*rows(60))  # moves statistics
    ids, dense, domain = rows(24)
    found = model.eval()(ids, dense, domain).detach().numpy()
    table, starts = model.state_dict()["embedding.weight"].numpy(), [0, 9, 16]
    expected = [
        formula(Weights(model, d), table[np.array(row) + starts], extra)
        for row, extra, d in zip(ids.tolist(), dense.numpy(), domain.tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-9, atol=1e-9)
    assert found.std() > 0.1
