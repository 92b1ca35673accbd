"""Counts of parameters: all of them, and those of one more domain."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import add_domain_
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.features.schema import Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.studies.parameters import build_on_meta, count_parameters, parameters_per_domain

OPTIONS = {"embedding_dim": 4, "hidden_units": (8,)}


def schema_of(num_domains: int) -> Schema:
    schema = World(num_domains=num_domains).schema
    first = replace(schema.features[0], num_ids=9)
    past = Feature("past", "sequence", num_ids=9, share=first.name, max_length=3)
    return replace(schema, features=(first, replace(first, name="other"), past, *schema.features[1:]))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_all_counted(name: str) -> None:
    schema = World(num_domains=2).schema
    pair = replace(schema, features=(*schema.features, replace(schema.features[0], name="other")))
    model = build_model(name, pair, embedding_dim=4, hidden_units=(8,)).requires_grad_(False)
    counts = count_parameters(model)
    assert counts["params_total"] == sum(p.numel() for p in model.parameters())
    assert 0 < counts["params_tables"] < counts["params_total"]
    assert counts["params_adapters"] == 0
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_one_more_domain(name: str) -> None:
    options = {"name": name, **OPTIONS}
    sizes = [sum(p.numel() for p in build_model(schema=schema_of(n), **options).parameters()) for n in (2, 3, 7)]
    found = [parameters_per_domain(build_model(schema=schema_of(n), **options), options, schema_of(n)) for n in (2, 7)]
    assert found == [sizes[1] - sizes[0]] * 2
    assert sizes[2] == sizes[0] + 5 * sizes[1] - 5 * sizes[0]


@pytest.mark.parametrize("name", ["mlp", "star"])
@pytest.mark.parametrize("rank", [0, 2, None])
def test_one_more_domain_with_adapters(name: str, rank: int | None) -> None:
    options = {"name": name, **OPTIONS}
    adapter = asdict(AdapterOptions(rank=rank))
    alone = parameters_per_domain(build_model(schema=schema_of(2), **options), options, schema_of(2))
    model = attach_(build_model(schema=schema_of(2), **options), 2, **adapter)
    found = parameters_per_domain(model, options, schema_of(2))
    assert alone is not None
    assert found == alone + count_parameters(model)["params_adapters"] // 2


def test_it_is_what_a_new_domain_adds() -> None:
    options = {"name": "mlp", **OPTIONS}
    model = attach_(build_model(schema=schema_of(2), **options), 2, **asdict(AdapterOptions()))
    found = parameters_per_domain(model, options, schema_of(2))
    before = count_parameters(model)["params_total"]
    add_domain_(model)
    assert count_parameters(model)["params_total"] == before + found


def test_a_model_of_another_make_has_no_such_count() -> None:
    options = {"name": "mlp", **OPTIONS}
    model = build_model(schema=schema_of(2), **options)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    assert parameters_per_domain(model, options, schema_of(2)) is None


def test_nothing_is_stored_on_meta() -> None:
    options = {"name": "mlp", "pretrained": {"other": torch.zeros(9, 5)}, **OPTIONS}
    model = build_on_meta(options, schema_of(2))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with pytest.raises(ConfigError, match="hidden_unit"):
        build_on_meta({"name": "mlp", "hidden_unit": [3]}, schema_of(2))
