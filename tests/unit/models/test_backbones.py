"""What holds for every model in MODELS, and what makes each of the nine itself."""

import copy

import pytest
import torch
from torch import nn

from domlora.layers.clusters import ClusterLinear
from domlora.layers.domain_linear import DomainLinear, StarLinear
from domlora.layers.embedding import EmbeddingTable
from domlora.layers.hyper import GeneratedLinear
from domlora.layers.interactions import CIN
from domlora.layers.partitioned_norm import PartitionedNorm
from domlora.models.build import MODELS, build_model

EVERY = pytest.mark.parametrize("name", list(MODELS))
OF_DOMAINS = {name for name, model in MODELS.items() if ".multi_domain." in model.__module__}
NINE = pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_DOMAINS])
SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


@EVERY
@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(name, num_rows, training, schema, schema_with_dense, rows):
    for its_schema in (schema, schema_with_dense):
        model = build_model(name, its_schema, **SMALL).train(training)
        logit = model(*rows(num_rows, its_schema.num_dense))
        assert logit.shape == (num_rows,)
        assert logit.isfinite().all()


@EVERY
def test_every_learned_map_is_a_linear_that_is_called(name, schema_with_dense, rows):
    model = build_model(name, schema_with_dense, **SMALL)
    called = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(*rows(5, 2))
    assert called == {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}

    homes = (nn.Linear, EmbeddingTable, DomainLinear)
    loose = {
        (type(module), key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not (isinstance(module, homes) and key == "weight")
    }
    kinds = (StarLinear, ClusterLinear, PartitionedNorm)
    domain_rows = {(kind, key) for kind in kinds for key in ("domain_weight", "domain_bias")}
    domain_rows |= {(DomainLinear, "bias"), (GeneratedLinear, "generator_weight"), (GeneratedLinear, "generator_bias")}
    assert loose <= (domain_rows if name in OF_DOMAINS else set())


@EVERY
def test_permuting_rows_permutes_logits(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL))
    ids, dense, domain = rows(9, 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for mode in (model.train(), model.eval()):
        moved = copy.deepcopy(mode)(ids[order], dense[order], domain[order])  # cluster centres move with every batch
        torch.testing.assert_close(moved, mode(ids, dense, domain)[order])


@EVERY
def test_a_row_does_not_depend_on_its_batch_mates_in_evaluation(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL)).eval()
    ids, dense, domain = rows(9, 2)
    alone = [model(ids[i : i + 1], dense[i : i + 1], domain[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(torch.cat(alone), model(ids, dense, domain))


@EVERY
def test_gradients_reach_every_parameter(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL))
    ids, dense, domain = rows(64, 2)
    logit = model(ids, dense, domain)
    nn.functional.binary_cross_entropy_with_logits(logit, (ids[:, 0] > 4).float()).backward()
    idle = [
        key
        for key, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.eq(0).all()
    ]
    assert idle == []


@EVERY
def test_one_global_bias(name, schema, rows):
    model = build_model(name, schema, **SMALL).eval()
    assert model.head.out_features == 1
    assert (model.head.bias is None) == hasattr(model, "linear")
    before = model(*rows(4))
    bias = model.linear.bias if hasattr(model, "linear") else model.head.bias
    assert not bias.any()  # one number, or one a domain
    bias.data.fill_(2.0)
    torch.testing.assert_close(model(*rows(4)), before + 2)


@EVERY
def test_dense_columns_and_ids_matter(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL)).eval()
    ids, dense, domain = rows(6, 2)
    before = model(ids, dense, domain)
    assert not torch.allclose(before, model(ids, dense + 1, domain))
    for slot in range(3):
        other = ids.clone()
        other[:, slot] = (other[:, slot] + 1) % 5
        assert not torch.allclose(before, model(other, dense, domain)), slot


@NINE
def test_the_nine_do_not_look_at_the_domain(name, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL)).eval()
    ids, dense, domain = rows(6)
    assert torch.equal(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, 3)))


@EVERY
def test_it_can_learn(name, schema, rows):
    torch.manual_seed(0)
    model = build_model(name, schema, embedding_dim=4, hidden_units=(16,), dropout=0.0)
    ids, dense, domain = rows(256)
    label = ((ids[:, 0] + ids[:, 1]) % 2).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids, dense, domain), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@EVERY
def test_state_round_trip(name, schema, rows, stir):
    model, other = stir(build_model(name, schema, **SMALL)), build_model(name, schema, **SMALL)
    model(*rows(8))  # running statistics, where there are some
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(*rows(5)), other.eval()(*rows(5)))


# Widths and counts of the official structures, for three features

WIDTHS = {"nfm": 1, "fibinet": 6}  # of the others 3


@EVERY
@pytest.mark.parametrize("dim", [8, 128])
def test_tower_inputs(name, dim, schema):
    model = build_model(name, schema, embedding_dim=dim)
    first = next(module for module in model.tower.modules() if hasattr(module, "in_features"))
    assert first.in_features == (3 * dim + 3 if name == "pnn" else WIDTHS.get(name, 3) * dim)


@pytest.mark.parametrize(
    ("name", "dim", "count"),
    [("mlp", 8, 47_552), ("mlp", 128, 139_712), ("nfm", 128, 74_176), ("fibinet", 128, 238_016)],
)
def test_tower_parameters_as_the_authors_count_them(name, dim, count, schema):
    assert sum(p.numel() for p in build_model(name, schema, embedding_dim=dim).tower.parameters()) == count


def test_heads(schema):
    assert build_model("dcn", schema).head.in_features == 24 + 64
    assert build_model("autoint", schema).head.in_features == 3 * 32 + 64
    assert build_model("xdeepfm", schema).cin_head.in_features == 64 + 128


# Each special part is there and counts


def answer_without(model, part, inputs):
    """The logits with a submodule's output set to zero."""
    hook = model.get_submodule(part).register_forward_hook(lambda *args: torch.zeros_like(args[-1]))
    logit = model(*inputs)
    hook.remove()
    return logit


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("wdl", "linear"),
        ("nfm", "linear"),
        ("autoint", "attention"),
        ("autoint", "attention.0.value"),
        ("dcn", "cross"),
        ("fibinet", "senet"),
        ("fibinet", "plain_products"),
        ("fibinet", "weighed_products"),
        ("deepfm", "linear"),
        ("xdeepfm", "cin"),
    ],
)
def test_special_parts_count(name, part, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL)).eval()
    assert not torch.allclose(answer_without(model, part, rows(8)), model(*rows(8)))


def test_xdeepfm_is_no_deepfm(schema, rows, stir):
    deepfm, xdeepfm = (stir(build_model(name, schema, **SMALL)).eval() for name in ("deepfm", "xdeepfm"))
    assert any(isinstance(module, CIN) for module in xdeepfm.modules())
    assert not any(isinstance(module, CIN) for module in deepfm.modules())
    assert xdeepfm.load_state_dict(deepfm.state_dict(), strict=False).unexpected_keys == []
    x = deepfm.embedding(rows(8)[0])
    second_order = sum((x[:, i] * x[:, j]).sum(-1) for i in range(3) for j in range(i))
    crosses = xdeepfm.cin_head(xdeepfm.cin(x)).squeeze(-1)
    torch.testing.assert_close(xdeepfm(*rows(8)) - crosses, deepfm(*rows(8)) - second_order)


def test_pnn_sees_the_inner_products(schema, rows, stir):
    model = stir(build_model("pnn", schema, **SMALL)).eval()
    seen = []
    model.tower.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*rows(8))
    x = model.embedding(rows(8)[0])
    torch.testing.assert_close(
        seen[0][:, 12:], torch.stack([(x[:, i] * x[:, j]).sum(-1) for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    )
