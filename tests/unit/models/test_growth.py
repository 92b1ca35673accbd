from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import adapter_parameters, base_state
from domlora.errors import SchemaError
from domlora.features.schema import OOV_ID, Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.models.growth import grown, pieces_of

OLD = Schema(
    (
        Feature("user", num_ids=6),
        Feature("item", num_ids=5),
        Feature("age", kind="numeric"),
        Feature("seen", kind="sequence", num_ids=5, share="item", max_length=3),
        Feature("place", num_ids=4),
    ),
    domains=("app", "web"),
)


def larger(schema: Schema, **more: int) -> Schema:
    """More ids of some features; a feature that shares another's has as many."""
    features = [
        replace(f, num_ids=f.num_ids + more.get(f.share or f.name, 0)) if f.num_ids else f for f in schema.features
    ]
    return replace(schema, features=tuple(features))


def rows(schema: Schema, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(1)
    columns = [
        torch.randint(0, f.num_ids, (count, f.max_length or 1), generator=dice) for f in schema.features if f.num_ids
    ]
    dense = torch.randn(count, schema.num_dense, generator=dice)
    return torch.cat(columns, 1), dense, torch.randint(0, schema.num_domains, (count,), generator=dice)


def trained(options: dict[str, Any], adapters: bool = True) -> nn.Module:
    torch.manual_seed(3)
    model = build_model(schema=OLD, **options)
    if adapters:
        attach_(model, 2, **asdict(AdapterOptions(temperature=4)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.9)
    return model.eval()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_old_ids_are_scored_with_the_same_bits(name: str) -> None:
    options = {"name": name, "hidden_units": [8, 4], "embedding_dim": 4}
    model, new = trained(options), larger(OLD, user=3, item=2)
    ids, dense, domain = rows(OLD)
    before = model(ids, dense, domain)
    after = grown(model, options, OLD, new).eval()
    assert torch.equal(after(ids, dense, domain), before)
    assert torch.equal(model(ids, dense, domain), before), "the old model is not changed"


@pytest.mark.parametrize("name", ["deepfm", "fibinet", "star"])
def test_a_new_id_is_scored_as_an_unknown_one_until_it_learns(name: str) -> None:
    options = {"name": name, "hidden_units": [8, 4], "embedding_dim": 4}
    model, new = trained(options), larger(OLD, user=3)
    ids, dense, domain = rows(OLD)
    unknown, fresh = ids.clone(), ids.clone()
    unknown[:, 0], fresh[:, 0] = OOV_ID, 8
    assert torch.equal(grown(model, options, OLD, new).eval()(fresh, dense, domain), model(unknown, dense, domain))


@pytest.mark.parametrize("adapters", [False, True])
def test_a_new_domain_is_scored_as_the_base_and_the_others_as_before(adapters: bool) -> None:
    options = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4}
    model, new = trained(options, adapters), replace(OLD, domains=("app", "web", "tv"))
    after = grown(model, options, OLD, new).eval()
    ids, dense, domain = rows(OLD)
    assert torch.equal(after(ids, dense, domain), model(ids, dense, domain))
    third, none = torch.full_like(domain, 2), torch.full_like(domain, -1)
    if adapters:
        assert torch.equal(after(ids, dense, third), model(ids, dense, none))
        assert all(len(bank) == 3 for _, bank in adapter_parameters(after))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_another_domain_changes_no_score_or_is_refused(name: str) -> None:
    options, new = (
        {"name": name, "hidden_units": [8, 4], "embedding_dim": 4},
        replace(OLD, domains=("app", "web", "tv")),
    )
    model = trained(options, False)
    if ".multi_domain." in type(model).__module__ and name != "adaptdhm":  # whose weights belong to clusters of domains
        with pytest.raises(SchemaError, match=r"cannot take 1 more domains.*Received.*Train it anew"):
            grown(model, options, OLD, new)
        return
    after = grown(model, options, OLD, new).eval()
    ids, dense, domain = rows(OLD)
    for asked in (domain, torch.full_like(domain, -1)):
        assert torch.equal(after(ids, dense, asked), model(ids, dense, asked))
    assert torch.equal(after(ids, dense, torch.full_like(domain, 2)), model(ids, dense, torch.full_like(domain, -1)))


def test_copies_of_a_model_grow_and_refuse_another_domain() -> None:
    options = {"name": "mlp", "hidden_units": [8, 4], "embedding_dim": 4, "per_domain": True}
    model, (ids, dense, domain) = trained(options, False), rows(OLD)
    after = grown(model, options, OLD, larger(OLD, user=3)).eval()
    assert torch.equal(after(ids, dense, domain), model(ids, dense, domain))
    with pytest.raises(SchemaError, match="cannot take 1 more domains"):
        grown(model, options, OLD, replace(OLD, domains=("app", "web", "tv")))


@pytest.mark.parametrize("given", ["none", "vectors"])
def test_given_vectors_of_new_ids_are_taken_where_there_are_some(given: str) -> None:
    options: dict[str, Any] = {"name": "mlp", "hidden_units": [8], "embedding_dim": 4, "embedding_dims": {"user": 2}}
    model = trained({**options, "pretrained": {"item": 3}})
    new, vectors = larger(OLD, item=2), torch.full((7, 3), 5.0)
    after = grown(model, {**options, "pretrained": {"item": 3 if given == "none" else vectors}}, OLD, new)
    table = next(tensor for tensor in base_state(after).values() if tensor.shape == (7, 3))
    before = next(tensor for tensor in base_state(model).values() if tensor.shape == (5, 3))
    assert torch.equal(table[:5], before)
    assert torch.equal(table[5:], before[OOV_ID].expand(2, 3) if given == "none" else vectors[5:])


def test_rows_move_behind_a_feature_that_grew() -> None:
    options = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4}
    model = trained(options)
    after = grown(model, options, OLD, larger(OLD, user=3))
    for pieces in pieces_of(model, after).values():
        assert [tuple(piece) for piece in pieces] == [(0, 0, 6), (6, 9, 5), (11, 14, 4)]


def test_fewer_ids_are_refused() -> None:
    options = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4}
    with pytest.raises(SchemaError, match=r"no id or domain less.*user"):
        grown(trained(options), options, OLD, larger(OLD, user=-1))


def test_pieces_the_other_way_round() -> None:
    options = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4}
    model = trained(options)
    for pieces in pieces_of(grown(model, options, OLD, larger(OLD, user=3)), model).values():
        assert [tuple(piece) for piece in pieces] == [(0, 0, 6), (9, 6, 5), (14, 11, 4)]
