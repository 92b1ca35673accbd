"""Tables of several widths and of given vectors, in every model."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_, merge_
from domlora.errors import ConfigError
from domlora.layers.embedding import EmbeddingTable, MixedEmbedding
from domlora.models.build import MODELS, build_model, stored_options
from domlora.models.parts import table_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

EVERY = pytest.mark.parametrize("name", list(MODELS))
SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}
VECTORS = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))  # for c1, of 7 ids
MIXED = {**SMALL, "embedding_dims": {"c0": 2}, "pretrained": {"c1": VECTORS}}


@EVERY
def test_the_simple_case_is_the_fused_table(name, schema):
    """Same names, same bits, whether or not the options are spelled out."""
    states = []
    for options in ({}, {"embedding_dims": {}, "pretrained": {}}, {"embedding_dims": {"c0": 4, "c2": 4}}):
        torch.manual_seed(3)
        model = build_model(name, schema, **SMALL, **options)
        assert type(model.embedding) is EmbeddingTable
        states.append(model.state_dict())
    torch.manual_seed(3)
    assert torch.equal(states[0]["embedding.weight"], torch.empty(21, 4).normal_(0.0, 0.01))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@EVERY
def test_every_model_takes_mixed_tables(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **MIXED)).eval()
    called = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    ids, dense, domain = rows(9, 2)
    logit = model(ids, dense, domain)
    assert logit.shape == (9,)
    assert {"embedding.maps.0", "embedding.maps.2"} <= called
    order = torch.randperm(9)
    torch.testing.assert_close(model(ids[order], dense[order], domain[order]), logit[order])
    assert model.embedding.embedding_dim == 4
    assert [tuple(table.weight.shape) for table in model.embedding.tables] == [(9, 2), (5, 4), (7, 5)]


@EVERY
def test_given_vectors_reach_the_model_and_stay(name, schema, rows):
    torch.manual_seed(0)
    model = build_model(name, schema, **MIXED)
    given = model.embedding.tables[2]
    assert torch.equal(given.weight, VECTORS)
    assert given.weight.data_ptr() != VECTORS.data_ptr()
    optimizer = Optimizer(model, OptimizerOptions(*[Rule("adamw", lr=0.1, weight_decay=0.1)] * 3))
    before = [table.weight.clone() for table in model.embedding.tables]
    model(*rows(9)).sum().backward()
    optimizer.step()
    moved = [not torch.equal(t.weight, old) for t, old in zip(model.embedding.tables, before, strict=True)]
    assert moved == [True, True, False]
    assert given.weight.grad is None


def test_given_vectors_may_learn_on(schema, rows):
    model = build_model("mlp", schema, **MIXED, freeze_pretrained=False)
    optimizer = Optimizer(model, OptimizerOptions(tables=Rule("lazy_adam", lr=0.1)))
    ids, dense, domain = rows(9)
    model(ids, dense, domain).square().sum().backward()
    optimizer.step()
    moved = (model.embedding.tables[2].weight != VECTORS).any(1).nonzero().flatten()
    assert moved.tolist() == ids[:, 1].unique().tolist()


@EVERY
def test_laws_of_adapters_hold(name, schema, rows, stir):
    """A fresh adapter is its base bit for bit; merged is routed; the maps are adapted like any Linear."""
    model = stir(build_model(name, schema, **MIXED).double()).eval()
    ids, dense, domain = rows(20)
    dense = dense.double()
    base = model(ids, dense, domain)
    model = attach_(model, 4, temperature=2.0, include=["*"])
    assert torch.equal(model(ids, dense, domain), base)
    assert {"embedding.maps.0.lora_A", "embedding.maps.2.lora_A"} <= {key for key, _ in model.named_parameters()}
    stir(model)
    for number in (0, 2):
        same = torch.full_like(domain, number)
        routed = model(ids, dense, same)
        assert not torch.allclose(routed, base)
        twin = attach_(stir(build_model(name, schema, **MIXED).double()).eval(), 4, temperature=2.0, include=["*"])
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(merge_(twin, number)(ids, dense, same), routed, rtol=1e-9, atol=1e-9)


@EVERY
def test_a_model_is_built_again_without_the_vectors(name, schema, rows, stir):
    options = {"name": name, **MIXED}
    model = stir(build_model(schema=schema, **options)).eval()
    stored = json.loads(json.dumps(stored_options(options), sort_keys=True))
    assert stored["pretrained"] == {"c1": 5}
    again = build_model(schema=schema, **stored).eval()
    assert again(*rows(5)).isnan().all()  # until the weights have come
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*rows(5)), model(*rows(5)))
    assert stored_options(stored) == stored
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_options_without_vectors_are_stored_as_they_are():
    options = {"name": "mlp", "hidden_units": [8], "embedding_dims": {"c0": 2}}
    assert stored_options(options) == options
    arrays = {"a": np.zeros((4, 3)), "b": torch.zeros(4, 2), "c": 6, "d": [[0.0], [1.0]]}
    assert stored_options({"pretrained": arrays})["pretrained"] == {"a": 3, "b": 2, "c": 6, "d": 1}


def test_groups_depend_on_the_schema_and_not_on_the_order_of_options(schema):
    pairs = [("c2", 3), ("c0", 2)], [("c0", 2), ("c2", 3)]
    models = []
    for pair in pairs:
        torch.manual_seed(0)
        models.append(build_model("mlp", schema, **SMALL, embedding_dims=dict(pair)).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("vectors", [VECTORS, VECTORS.numpy(), VECTORS.double(), VECTORS.tolist()])
def test_arrays_are_vectors_too(vectors, schema):
    table = table_of(schema, 4, 0.01, pretrained={"c1": vectors})
    assert isinstance(table, MixedEmbedding)
    assert torch.equal(table.tables[1].weight, VECTORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dims": {"c22": 2}}, "must name categorical features. Received: 'c22'. Did you mean 'c2'?"),
        ({"embedding_dims": {"x0": 2}}, "embedding_dims must name categorical features. Received: 'x0'."),
        ({"embedding_dims": {"c0": 0}}, "width of feature 'c0' must be a whole number of at least 1. Received: 0"),
        ({"embedding_dims": {"c0": 2.0}}, "width of feature 'c0' must be a whole number of at least 1. Received: 2.0"),
        (
            {"embedding_dims": {"c0": True}},
            "width of feature 'c0' must be a whole number of at least 1. Received: True",
        ),
        (
            {"pretrained": {"c1 ": VECTORS}},
            "pretrained must name categorical features. Received: 'c1 '. Did you mean 'c1'",
        ),
        (
            {"pretrained": {"c0": VECTORS}},
            "feature 'c0' has 9 ids, so its vectors must be (9, width). Received: (7, 5)",
        ),
        (
            {"pretrained": {"c1": VECTORS[0]}},
            "feature 'c1' has 7 ids, so its vectors must be (7, width). Received: (5,)",
        ),
        ({"pretrained": {"c1": VECTORS[:, :0]}}, "its vectors must be (7, width). Received: (7, 0)"),
        ({"pretrained": {"c1": VECTORS / 0}}, "the vectors of feature 'c1' must be finite"),
        ({"pretrained": {"c1": "item.bin"}}, "must be a tensor or an array. Received: 'str'"),
        ({"pretrained": {"c1": 0}}, "width of feature 'c1' must be a whole number of at least 1. Received: 0"),
        ({"pretrained": {"c1": True}}, "width of feature 'c1' must be a whole number of at least 1. Received: True"),
        (
            {"pretrained": {"c1": VECTORS}, "embedding_dims": {"c1": 5}},
            "embedding_dims must leave it out. Received: 'c1'",
        ),
        ({"freeze_pretrained": "no"}, "freeze_pretrained must be true or false. Received: 'no'"),
        ({"make_table": table_of}, "has no such option. Received: 'make_table'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message, schema_with_dense):
    with pytest.raises(ConfigError) as caught:
        build_model("mlp", schema_with_dense, **SMALL, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_makes_its_own_tables(schema, monkeypatch):
    class Constant(nn.Module):
        def __init__(self, schema, *, embedding_dim, hidden_units, dropout):  # noqa: ARG002
            super().__init__()

    monkeypatch.setitem(MODELS, "constant", Constant)
    assert isinstance(build_model("constant", schema), Constant)
    with pytest.raises(ConfigError, match="'constant' has no make_table"):
        build_model("constant", schema, embedding_dims={"c0": 2})


def test_any_maker_of_tables_will_do(schema, rows):
    """What a distributed engine may bring."""

    class Ones(nn.Module):
        def forward(self, ids):
            return torch.ones(*ids.shape, 4)

    model = MODELS["mlp"](schema, **SMALL, make_table=lambda *_: Ones())
    assert model(*rows(5)).shape == (5,)
    assert "embedding.weight" not in model.state_dict()
