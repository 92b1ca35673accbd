import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_, merge_
from domlora.errors import ConfigError
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


def test_it_does_not_read_the_domain(schema, rows, stir):
    model = stir(build_model("adaptdhm", schema, **SMALL)).eval()
    ids, dense, domain = rows(20)
    assert torch.equal(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, 2)))
    sizes = [
        len(build_model("adaptdhm", Schema(schema.features, names), **SMALL).state_dict()) for names in ("a", "abc")
    ]
    assert sizes[0] == sizes[1]


def test_clusters_start_from_the_shared_tower(schema, rows):
    model = build_model("adaptdhm", schema, **SMALL).eval()
    before = model(*rows(20))
    model.router.running_mean.copy_(model.router.running_mean.roll(1, 0))
    torch.testing.assert_close(model(*rows(20)), before)


def test_a_row_is_answered_by_its_cluster(schema, rows, stir):
    model = stir(build_model("adaptdhm", schema, **SMALL)).eval()
    ids, dense, domain = rows(60)
    cluster = model.router(model.embedding(ids).flatten(1))
    assert len(cluster.unique()) == 3
    before = model(ids, dense, domain)
    with torch.no_grad():
        model.tower[0].domain_bias[1] += 1.0
    moved = model(ids, dense, domain) != before
    assert not moved[cluster != 1].any()
    assert moved[cluster == 1].any()


def test_rows_that_differ_find_different_clusters():
    """Two kinds of rows whose labels have opposite causes: clusters tell them apart, and the model learns both."""
    torch.manual_seed(0)
    schema = Schema((Feature("kind", num_ids=2), Feature("x", "numeric")), domains=("a",))
    model = build_model(
        "adaptdhm", schema, embedding_dim=4, hidden_units=(8,), dropout=0.0, num_clusters=2, init_std=0.1
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        ids, dense = torch.randint(0, 2, (256, 1)), torch.randn(256, 1)
        label = ((dense[:, 0] > 0) == (ids[:, 0] == 1)).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids, dense, ids[:, 0] * 0), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.tensor([[0], [1]])
    cluster = model.router.eval()(model.embedding(ids).flatten(1))
    assert cluster[0] != cluster[1]
    assert loss < 0.2


def test_one_domain_in_several_clusters_can_be_merged(schema, rows, stir):
    model = stir(
        attach_(stir(build_model("adaptdhm", schema, **SMALL)), schema.num_domains, include=["tower.*"])
    ).eval()
    ids, dense, domain = rows(60)
    assert len(model.router(model.embedding(ids).flatten(1)).unique()) == 3
    expected = model(ids, dense, torch.full_like(domain, 2))
    torch.testing.assert_close(merge_(model, 2)(ids, dense, domain), expected)


def test_options(schema):
    model = build_model("adaptdhm", schema, num_clusters=5, momentum=0.5, temperature=0.2, num_steps=1)
    assert len(model.router.running_mean) == len(model.tower[0].domain_bias) == 5
    assert (model.router.momentum, model.router.temperature, model.router.num_steps) == (0.5, 0.2, 1)
    with pytest.raises(ConfigError, match="momentum must be below 1"):
        build_model("adaptdhm", schema, momentum=1.0)
