"""A model for each domain behind one signature."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from domlora.errors import ConfigError
from domlora.models.build import MODELS, build_model, stored_options
from domlora.models.per_domain import PerDomain

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}
VECTORS = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))  # for c1, of 7 ids


def scattered(model):
    """Every copy another model."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return model.eval()


def made(schema, name="mlp", **options):
    return scattered(build_model(name, schema, **SMALL, per_domain=True, **options))


def expected(model, ids, dense, domain):
    """Row by row, by hand."""
    logits = []
    for row in range(len(ids)):
        one = [column[row : row + 1] for column in (ids, dense, domain)]
        number = int(domain[row])
        if number >= 0 and bool(model.own[number]):
            logits.append(model.copies[number](*one))
        elif model.base is not None:
            logits.append(model.base(*one))
        else:
            logits.append(sum(c(*one) for c, own in zip(model.copies, model.own, strict=True) if own) / model.own.sum())
    return torch.cat(logits) if logits else torch.zeros(0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    domain=st.lists(st.integers(-1, 3), min_size=0, max_size=12),
    own=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    unknown=st.sampled_from(["mean", "base"]),
)
def test_each_row_gets_its_own_copy(schema, rows, domain, own, unknown):
    model = made(schema, unknown_domains=unknown)
    model.own.copy_(torch.tensor(own))
    ids, dense, _ = rows(len(domain))
    found = model(ids, dense, torch.tensor(domain, dtype=torch.int64))
    torch.testing.assert_close(found, expected(model, ids, dense, torch.tensor(domain)))


def test_gradients_reach_the_domains_of_the_batch_alone(schema, rows):
    model = made(schema)
    ids, dense, _ = rows(6)
    model(ids, dense, torch.tensor([2, 0, 2, 0, 0, 2])).sum().backward()
    moved = [any(p.grad is not None for p in each.parameters()) for each in model.copies]
    assert moved == [True, False, True, False]


def test_the_cost_follows_the_rows(schema, rows):
    model, seen = made(schema, unknown_domains="base"), []
    for number, each in enumerate([*model.copies, model.base]):
        each.register_forward_hook(lambda _, args, __, number=number: seen.append((number, len(args[0]))))
    ids, dense, _ = rows(6)
    model(ids, dense, torch.tensor([3, -1, 3, 0, 3, 3]))
    assert sorted(seen) == [(0, 1), (3, 4), (4, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_had_for_each_domain(name, schema, rows):
    torch.manual_seed(3)
    one = build_model(name, schema, **SMALL).eval()
    torch.manual_seed(3)
    model = build_model(name, schema, **SMALL, per_domain=True, unknown_domains="base").eval()
    assert all(type(each) is MODELS[name] for each in [*model.copies, model.base])
    torch.testing.assert_close(model(*rows(20)), one(*rows(20)))  # all copies start alike


@pytest.mark.parametrize("unknown", ["mean", "base"])
@pytest.mark.parametrize("name", ["deepfm", "star"])
def test_it_exports_and_compiles(schema, rows, name, unknown):
    model = made(schema, name, unknown_domains=unknown)
    model.own[1] = False
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}, {0: size}))
    torch._dynamo.reset()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (8, 3, 1):
        torch.testing.assert_close(program.module()(*rows(num_rows)), model(*rows(num_rows)))
        torch.testing.assert_close(graph(*rows(num_rows)), model(*rows(num_rows)))


def test_a_copy_has_weights_of_its_own(schema, rows):
    model = made(schema, unknown_domains="base")
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.copies[0].head.weight)
    assert model.copies[0].head.weight.any()
    assert model.copies[1].head.weight.any()
    torch.testing.assert_close(twin(*rows(8))[rows(8)[2] != 0], model(*rows(8))[rows(8)[2] != 0])


# what is frozen is held once


def with_vectors(schema, vectors=VECTORS, **options):
    return build_model("mlp", schema, **SMALL, pretrained={"c1": vectors}, per_domain=True, **options)


def names_of_vectors(model):
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p.shape == VECTORS.shape]


@pytest.mark.parametrize("unknown", ["mean", "base"])
def test_frozen_vectors_are_held_once(schema, unknown):
    model = with_vectors(schema, unknown_domains=unknown)
    assert len(names_of_vectors(model)) == 4 + (unknown == "base")
    assert sum(p.shape == VECTORS.shape for p in model.parameters()) == 1
    assert sum(tensor.shape == VECTORS.shape for tensor in model.state_dict().values()) == 1
    assert sum(tensor.shape == VECTORS.shape for tensor in nn.Sequential(model).state_dict().values()) == 1


def test_learned_vectors_are_each_domains_own(schema):
    model = with_vectors(schema, freeze_pretrained=False)
    assert sum(p.shape == VECTORS.shape for p in model.parameters()) == 4


@pytest.mark.parametrize("whole", [False, True])
def test_its_state_goes_into_the_like_of_it(schema, rows, whole):
    model = scattered(with_vectors(schema, unknown_domains="base"))
    model.own[2] = False
    options = stored_options({"pretrained": {"c1": VECTORS}})["pretrained"]
    other = with_vectors(schema, options["c1"], unknown_domains="base").eval()
    if whole:  # inside another module
        nn.Sequential(other).load_state_dict(nn.Sequential(model).state_dict())
    else:
        other.load_state_dict(model.state_dict())
    assert torch.equal(other(*rows(20)), model(*rows(20)))
    assert sum(p.shape == VECTORS.shape for p in other.parameters()) == 1


def test_a_state_that_lacks_something_is_refused(schema):
    model = with_vectors(schema)
    state = model.state_dict()
    del state[names_of_vectors(model)[0]]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_domain": 1}, "per_domain must be true or false"),
        ({"unknown_domains": "none"}, "'mean', 'base'"),
        ({"unknown_domains": "base", "per_domain": False}, "goes with per_domain"),
    ],
)
def test_options_are_checked(schema, options, said):
    with pytest.raises(ConfigError, match=said):
        build_model("mlp", schema, **{**SMALL, "per_domain": True, **options})


def test_one_domain():
    model = PerDomain(nn.Linear(1, 1), 1)
    assert "unknown='mean'" in repr(model)
