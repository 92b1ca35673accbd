"""PEPNet and AdaSparse. Numbers: tests/reference."""

import pytest
import torch

from domlora.errors import ConfigError
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}
VARIANTS = ["binarization", "scaling", "fusion"]
BOTH = pytest.mark.parametrize(
    ("name", "options"),
    [("pepnet", {}), ("pepnet", {"priors": []}), *(("adasparse", {"variant": variant}) for variant in VARIANTS)],
)


@BOTH
def test_it_reads_the_domain(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    torch.nn.init.normal_(model.domain_embedding.weight, 0.0, 3.0)
    ids, dense, _ = rows(64)
    answers = [model(ids, dense, torch.full((64,), domain)) for domain in (-1, 0, 1, 2, 3)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other) for other in answers[:i])


@BOTH
def test_a_mixed_batch_equals_its_pieces(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    ids, dense, domain = rows(20)
    mixed = model(ids, dense, domain)
    for d in domain.unique():
        piece = domain == d
        torch.testing.assert_close(model(ids[piece], dense[piece], domain[piece]), mixed[piece])


@BOTH
def test_a_batch_moves_the_vectors_of_its_domains_alone(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options))
    ids, dense, _ = rows(64)
    domain = torch.arange(64) % 3 - 1  # -1, 0 and 1
    lazy = Rule("lazy_adam", lr=0.1, weight_decay=0.1)
    optimizer = Optimizer(model, OptimizerOptions(tables=lazy))
    before = model.domain_embedding.weight.detach().clone()
    model(ids, dense, domain).square().sum().backward()
    assert model.domain_embedding.weight.grad.is_sparse
    optimizer.step()
    assert (model.domain_embedding.weight != before).any(1).tolist() == [True, True, False, False]


@BOTH
def test_an_unknown_domain_uses_the_mean_vector(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    ids, dense, domain = rows(8)
    unknown = model(ids, dense, torch.full_like(domain, -1))
    table = model.domain_embedding.weight
    table.data = table.data.mean(0).expand_as(table)
    torch.testing.assert_close(model(ids, dense, domain.clamp(min=0)), unknown)


@BOTH
def test_it_compiles_and_exports(name, options, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL, **options)).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}, {0: size})).module()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for num_rows in (8, 3):
        torch.testing.assert_close(program(*rows(num_rows)), model(*rows(num_rows)))
        torch.testing.assert_close(compiled(*rows(num_rows)), model(*rows(num_rows)))


EMBEDDING_GATE = 513 * 64 + 65 * 384
UNIT_GATES = 3 * 769 * 64 + 65 * (256 + 128 + 64)
PRUNERS = 385 * 256 + 257 * 128 + 193 * 64


@pytest.mark.parametrize(
    ("name", "gates", "count"), [("pepnet", EMBEDDING_GATE + UNIT_GATES, 234_560), ("adasparse", PRUNERS, 143_808)]
)
def test_parameters_as_the_docs_count_them(name, gates, count):
    """One vector a domain; gates or pruners beside the tower, whatever the number of domains."""
    features = tuple(Feature(f"c{i}", num_ids=2) for i in range(3))
    few, many = (build_model(name, Schema(features, tuple(map(str, range(d)))), embedding_dim=128) for d in (10, 1000))
    assert sum(p.numel() for p in many.parameters()) - sum(p.numel() for p in few.parameters()) == 990 * 128
    parts = ("embedding.", "domain_embedding.", "tower.", "head.")
    assert sum(p.numel() for n, p in few.named_parameters() if not n.startswith(parts)) == gates == count


# PEPNet


def gates_at_one(model):
    for gate in (model.embedding_gate, *model.unit_gates):
        torch.nn.init.zeros_(gate.second.weight)
        torch.nn.init.zeros_(gate.second.bias)
    return model


def test_pepnet_with_gates_at_one_is_the_plain_tower(schema, rows, stir):
    model = gates_at_one(stir(build_model("pepnet", schema, **SMALL))).eval()
    mlp = build_model("mlp", schema, **SMALL).eval()
    assert mlp.load_state_dict(model.state_dict(), strict=False).missing_keys == []
    torch.testing.assert_close(model(*rows(8)), mlp(*rows(8)))


def test_gates_do_not_teach_what_they_stop(schema, rows, stir):
    """Without priors the ids' vectors learn through the tower alone, as if the gates' factors were constants."""
    model = stir(build_model("pepnet", schema, **SMALL, priors=[]))
    inputs = rows(16)
    factors = []
    hooks = [
        gate.register_forward_hook(lambda *args: factors.append(args[-1].detach()))
        for gate in (model.embedding_gate, *model.unit_gates)
    ]
    (found,) = torch.autograd.grad(model(*inputs).sum(), [model.embedding.weight])
    for hook in hooks:
        hook.remove()
    h = model.embedding(inputs[0]).flatten(1) * factors[0]
    for layer, factor in zip(model.tower, factors[1:], strict=True):
        h = torch.relu(layer(h)) * factor
    (expected,) = torch.autograd.grad(model.head(h).sum(), [model.embedding.weight])
    torch.testing.assert_close(found, expected)


def test_priors_learn_through_the_gates(schema, rows, stir):
    model = stir(build_model("pepnet", schema, **SMALL, priors=["c1"])).eval()
    inputs = rows(64)
    seen = []
    model.unit_gates[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*inputs)
    assert seen[0].shape == (64, 4 + 12)
    torch.testing.assert_close(seen[0][:, :4], model.embedding(inputs[0])[:, 1])
    (through_gates,) = torch.autograd.grad(seen[0].sum(), [model.embedding.weight])
    rows_of_c1 = torch.zeros(21, dtype=torch.bool)
    rows_of_c1[9:16] = True
    assert torch.equal(through_gates.any(1), rows_of_c1)


def test_priors_are_ids_by_default():
    features = (
        Feature("age", "numeric"),
        Feature("hour", "bucketed", num_ids=5, boundaries=(8.0,)),
        Feature("user", num_ids=9),
        Feature("past", "sequence", num_ids=9, max_length=3),
        Feature("item", num_ids=9),
    )
    schema = Schema(features, ("a", "b"))
    assert build_model("pepnet", schema).places.tolist() == [1, 3]
    assert build_model("pepnet", schema, priors=["item", "past"]).places.tolist() == [2, 3]
    assert build_model("pepnet", schema, priors=()).places.tolist() == []


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        (["c0", "x0"], r"priors must name features of ids. Received: 'x0'. .*Known: 'c0', 'c1', 'c2'"),
        (["cc1"], r"Received: 'cc1'. Did you mean 'c1'"),
        ("c1", r"priors must be a list of names of features. Received: 'c1'"),
    ],
)
def test_priors_that_are_not_there(priors, message, schema_with_dense):
    with pytest.raises(ConfigError, match=message):
        build_model("pepnet", schema_with_dense, priors=priors)


# AdaSparse


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors(variant, schema):
    model = build_model("adasparse", schema, **SMALL, variant=variant, alpha=2.0, beta=3.0, epsilon=0.6)
    v = torch.linspace(-4, 4, 81)
    factor = model._factor(v)
    soft = 3 * torch.sigmoid(v) if variant == "scaling" else torch.sigmoid(2 * v) * (3 if variant == "fusion" else 1)
    on = torch.ones(81) if variant == "scaling" else (soft > 0.6).float()
    assert 0 < on.sum() <= 81
    torch.testing.assert_close(factor, on if variant == "binarization" else soft * on)


def test_a_unit_that_is_off_comes_back_under_binarization_alone(schema):
    for variant, comes_back in (("binarization", True), ("fusion", False)):
        model = build_model("adasparse", schema, **SMALL, variant=variant)
        v = torch.full((1,), -4.0, requires_grad=True)
        factor = model._factor(v)
        factor.sum().backward()
        assert factor.item() == 0
        assert (v.grad.item() > 0) == comes_back


def test_fusion_switches_units_off_by_domain(schema, rows):
    model = build_model("adasparse", schema, **SMALL).eval()
    torch.nn.init.normal_(model.domain_embedding.weight, 0.0, 10.0)
    ids, dense, _ = rows(32)
    off = []
    for d in range(4):
        model.head.register_forward_pre_hook(lambda _, args: off.append(args[0].eq(0).float().mean(0)))
        model(ids, dense, torch.full((32,), d))
        model.head._forward_pre_hooks.clear()
    assert len({tuple(share.tolist()) for share in off}) == 4


@pytest.mark.parametrize(
    "options", [{"variant": "binarization", "epsilon": 1.0}, {"epsilon": 2.0}, {"beta": 0.2}, {"epsilon": 5.0}]
)
def test_a_threshold_that_leaves_nothing_is_refused(options, schema):
    with pytest.raises(ConfigError, match="epsilon must be below the largest factor, or every unit is off"):
        build_model("adasparse", schema, **options)
    build_model("adasparse", schema, **{**options, "variant": "scaling"})
