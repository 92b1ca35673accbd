import pytest
import torch

from domlora.adapters.attach import attach_
from domlora.adapters.bank import adapter_layers
from domlora.errors import ConfigError
from domlora.layers.hyper import GeneratedLinear
from domlora.layers.mlp import MLP
from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


@pytest.mark.parametrize("name", ["m2m", "apg", "hamur"])
def test_a_domain_adds_a_vector(name, schema, rows):
    """What grows with the domains: their vectors, and what HAMUR's norms hold of each."""
    counts = {
        key: parameter.numel()
        for key, parameter in build_model(name, schema, **SMALL).named_parameters()
        if parameter.dim() == 2 and len(parameter) == schema.num_domains and "generator" not in key
    }
    width = 4 if name == "hamur" else 16
    norms = {f"adapters.0.norm.domain_{key}": 4 * 6 for key in ("weight", "bias")} if name == "hamur" else {}
    assert counts == {"domain_embedding.weight": 4 * width, **norms}


def test_m2m_mixes_its_experts(schema, rows, stir):
    model = stir(build_model("m2m", schema, num_experts=3, **SMALL)).eval()
    before = model(*rows(8))
    with torch.no_grad():
        for expert in model.tower[1:]:
            expert.load_state_dict(model.tower[0].state_dict())
    alike = model(*rows(8))
    assert not torch.allclose(before, alike)
    model.meta_attention.requires_grad_(True)
    alike.sum().backward()  # equal experts: how they are weighed does not matter
    assert max(p.grad.abs().max() for p in model.meta_attention.parameters()) < 1e-6


def test_m2m_options(schema):
    model = build_model("m2m", schema, num_experts=2, vector_dim=5, meta_layers=3, meta_units=2, **SMALL)
    assert len(model.tower) == 2
    assert model.domain_embedding.embedding_dim == 5
    assert len(model.meta_attention) == 3
    assert [len(unit) for unit in model.meta_residuals] == [3, 3]
    assert build_model("m2m", schema).score.bias is None  # the softmax would not see it


def test_apg_has_fewer_weights_than_a_plain_tower_over_parameterized_it_has_more(schema):
    sizes = [
        sum(
            p.numel() for p in build_model("apg", schema, embedding_dim=128, over_parameterized=over).tower.parameters()
        )
        for over in (False, True)
    ]
    plain = sum(p.numel() for p in MLP(3 * 128, (256, 128, 64)).parameters())
    generators = sum(
        p.numel()
        for module in build_model("apg", schema, embedding_dim=128).modules()
        if isinstance(module, GeneratedLinear)
        for p in (module.generator_weight, module.generator_bias)
    )
    assert sizes[0] - generators < 0.7 * plain < plain < sizes[1] - generators


def test_apg_ranks(schema):
    ranks = [layer.core.in_features for layer in build_model("apg", schema, embedding_dim=128, reduction=8).tower]
    assert ranks == [256 // 8, 128 // 8, 64 // 8]
    assert [layer.core.in_features for layer in build_model("apg", schema, reduction=1000).tower] == [1, 1, 1]


@pytest.mark.parametrize("over_parameterized", [False, True])
def test_adapters_of_apg_stand_at_every_factor(over_parameterized, schema, rows):
    model = build_model("apg", schema, over_parameterized=over_parameterized, **SMALL)
    ids, dense, domain = rows(8)
    before = model.eval()(ids, dense, domain)
    attach_(model, schema.num_domains, include=["tower.*"])
    assert len(adapter_layers(model)) == 2 * (5 if over_parameterized else 3)
    assert torch.equal(model(ids, dense, domain), before)


@pytest.mark.parametrize("num_adapters", [1, 2])
def test_hamurs_adapters_stand_behind_the_last_layers(num_adapters, schema, rows, stir):
    model = stir(build_model("hamur", schema, num_adapters=num_adapters, **SMALL)).eval()
    assert len(model.adapters) == num_adapters
    seen = []
    model.tower[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*rows(8))
    first = torch.relu(model.tower[0](model.embedding(rows(8)[0]).flatten(1)))
    assert torch.allclose(seen[0], first) == (num_adapters == 1)


def test_a_fresh_hamur_is_its_tower(schema, rows):
    model = build_model("hamur", schema, num_adapters=2, **SMALL).eval()
    plain = model.head(model.tower(model.embedding(rows(8)[0]).flatten(1))).squeeze(-1)
    torch.testing.assert_close(model(*rows(8)), plain)


def test_hamur_reads_the_row_too(schema, rows, stir):
    """Two rows of one domain have two adapters."""
    model = stir(build_model("hamur", schema, **SMALL)).eval()
    made = []
    model.hyper.register_forward_hook(lambda *args: made.append(args[-1]))
    ids, dense, domain = rows(8)
    model(ids, dense, torch.zeros_like(domain))
    assert not torch.allclose(made[0][0], made[0][1])


def test_hamur_refuses_more_adapters_than_layers(schema):
    with pytest.raises(ConfigError, match=r"a layer of the tower for each adapter. Received: .*num_adapters.: 3"):
        build_model("hamur", schema, num_adapters=3, **SMALL)
