"""Every model on a schema of all kinds of features: a sequence, one that shares, buckets, numbers that may be absent."""

import copy
import json

import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.errors import ConfigError, SchemaError
from domlora.features.schema import Feature, Schema
from domlora.layers.embedding import MixedEmbedding, PooledTable
from domlora.models.build import MODELS, build_model, stored_options
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

EVERY = pytest.mark.parametrize("name", list(MODELS))
SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}
SCHEMA = Schema(
    (
        Feature("past", "sequence", num_ids=9, share="item", max_length=4, pooling="mean"),
        Feature("item", num_ids=9),
        Feature("age", "bucketed", num_ids=5, boundaries=(18.0, 40.0)),
        Feature("tags", "sequence", num_ids=6, max_length=3, pooling="max"),
        Feature("price", "numeric", missing=True),
        Feature("last", num_ids=9, share="item"),
        Feature("words", "sequence", num_ids=7, max_length=2, pooling="sum"),
    ),
    domains=("a", "b", "c", "d"),
)
VECTORS = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))


def some_rows(num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of all lengths, none of them full of zeros by chance alone; every third price is absent."""
    g = torch.Generator().manual_seed(seed)
    columns = []
    for feature in SCHEMA.categorical:
        ids = torch.randint(
            0 if feature.max_length == 1 else 1, feature.num_ids, (num_rows, feature.max_length), generator=g
        )
        if feature.kind == "sequence":
            lengths = torch.arange(num_rows) % (feature.max_length + 1)
            ids[torch.arange(feature.max_length) >= lengths.unsqueeze(1)] = 0
        columns.append(ids)
    absent = (torch.arange(num_rows) % 3 == 0).float()
    price = torch.randn(num_rows, generator=g) * (1 - absent)
    return torch.cat(columns, 1), torch.stack([price, absent], 1), torch.randint(-1, 3, (num_rows,), generator=g)


@EVERY
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_shapes(name, num_rows):
    model = build_model(name, SCHEMA, **SMALL)
    assert type(model.embedding) is PooledTable
    assert model.embedding.weight.shape == (9 + 5 + 6 + 7, 4)
    ids, dense, domain = some_rows(num_rows)
    assert ids.shape == (num_rows, SCHEMA.num_slots)
    assert model.embedding(ids).shape == (num_rows, SCHEMA.num_fields, 4)
    for mode in (model.train(), model.eval()):
        logit = mode(ids, dense, domain)
        assert logit.shape == (num_rows,)
        assert logit.isfinite().all()


@EVERY
def test_gradients_reach_every_parameter(name, stir):
    model = stir(build_model(name, SCHEMA, **SMALL))
    ids, dense, domain = some_rows(64)
    nn.functional.binary_cross_entropy_with_logits(model(ids, dense, domain), (ids[:, 0] > 4).float()).backward()
    idle = [
        key
        for key, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.eq(0).all()
    ]
    assert idle == []


@EVERY
@pytest.mark.parametrize("rule", ["adam", "lazy_adam"])
def test_it_learns_what_only_a_sequence_says(name, rule):
    """A row clicks if item 3 is anywhere in its past."""
    torch.manual_seed(0)
    model = build_model(name, SCHEMA, embedding_dim=4, hidden_units=(16,), dropout=0.0)
    ids, dense, domain = some_rows(256)
    label = (ids[:, :4] == 3).any(1).float()
    optimizer = Optimizer(model, OptimizerOptions(tables=Rule(rule, lr=0.05), dense=Rule(lr=0.05)))
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids, dense, domain), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@EVERY
def test_the_order_of_a_sequence_and_the_place_of_its_padding_do_not_matter(name, stir):
    model = stir(build_model(name, SCHEMA, **SMALL)).double().eval()
    ids, dense, domain = some_rows(9)
    other = ids.clone()
    other[:, :4], other[:, 6:9] = ids[:, :4].flip(1), ids[:, 6:9].flip(1)
    assert not torch.equal(ids, other)
    before = model(ids, dense.double(), domain)
    torch.testing.assert_close(model(other, dense.double(), domain), before)
    other[0, 0] = 5  # a past that was empty
    assert not torch.allclose(model(other, dense.double(), domain)[0], before[0])


@EVERY
def test_a_trace_gives_the_same_logits(name, stir):
    model = stir(build_model(name, SCHEMA, **SMALL)).eval()
    inputs = some_rows(8)
    batch = {0: torch.export.Dim("batch", min=2, max=4096)}
    program = torch.export.export(model, inputs, dynamic_shapes=(batch, batch, batch), strict=False).module()
    for rows in (inputs, some_rows(5, seed=1)):
        torch.testing.assert_close(program(*rows), model(*rows))


@EVERY
def test_adapters_stand_beside_it(name, stir):
    model = stir(build_model(name, SCHEMA, **SMALL)).double().eval()
    ids, dense, domain = some_rows(12)
    dense = dense.double()
    before = model(ids, dense, domain)
    attach_(model, 4, temperature=2.0, include=["*"])
    assert torch.equal(model(ids, dense, domain), before)
    stir(model)
    alone = [model(ids[i : i + 1], dense[i : i + 1], domain[i : i + 1]) for i in range(12)]
    torch.testing.assert_close(torch.cat(alone), model(ids, dense, domain))


def test_a_lazy_rule_moves_the_rows_of_the_batch_and_no_padding():
    model = build_model("wdl", SCHEMA, **SMALL)
    rule = Rule("lazy_adam", lr=0.1, weight_decay=0.1)
    optimizer = Optimizer(model, OptimizerOptions(tables=rule, dense=Rule(lr=0.1)))
    assert model.embedding.sparse
    assert model.linear.table.sparse
    before = model.embedding.weight.detach().clone()
    # past (2, 3), item 4, age 1, tags (none), last 1, words (5)
    ids = torch.tensor([[2, 3, 0, 0, 4, 1, 0, 0, 0, 1, 5, 0]])
    model(ids, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)).sum().backward()
    optimizer.step()
    moved = (model.embedding.weight != before).any(1).nonzero().flatten().tolist()
    item, age, tags = 0, 9, 14
    assert moved == [item + 1, item + 2, item + 3, item + 4, age + 1, tags + 6 + 5]


def test_lazy_and_exact_rules_take_the_same_first_step():
    models = [build_model("deepfm", SCHEMA, **SMALL) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, rule in zip(models, ("adamw", "lazy_adam"), strict=True):
        optimizer = Optimizer(model, OptimizerOptions(tables=Rule(rule, lr=0.1), dense=Rule(lr=0.1)))
        model(*some_rows(20)).square().sum().backward()
        optimizer.step()
    assert models[1].embedding.weight.grad.is_sparse
    ours, theirs = (model.embedding.weight for model in models)
    torch.testing.assert_close(ours, theirs)


# Given vectors, widths and freezing


def test_a_history_reads_the_given_vectors_of_its_items():
    model = build_model("mlp", SCHEMA, **SMALL, pretrained={"item": VECTORS}, embedding_dims={"tags": 2})
    tables = model.embedding.tables
    assert [tuple(table.weight.shape) for table in tables] == [(12, 4), (6, 2), (9, 5)]
    assert [table.weight.requires_grad for table in tables] == [True, True, False]
    ids, dense, domain = some_rows(6)
    x = model.embedding(ids)
    lift = model.embedding.maps[2].weight.t()
    row = 2  # a past of two
    assert ids[row, :4].ne(0).sum() == 2
    torch.testing.assert_close(x[row, 0], VECTORS[ids[row, :2]].mean(0) @ lift)
    torch.testing.assert_close(x[:, 1], VECTORS[ids[:, 4]] @ lift)
    torch.testing.assert_close(x[:, 4], VECTORS[ids[:, 9]] @ lift)
    model(ids, dense, domain).sum().backward()
    assert tables[2].weight.grad is None


@EVERY
def test_every_model_takes_them_and_is_built_again_without_them(name, stir):
    options = {
        "name": name,
        **SMALL,
        "pretrained": {"item": VECTORS, "tags": VECTORS[:6, :3]},
        "freeze_pretrained": {"tags": False},
        "embedding_dims": {"age": 2},
    }
    model = stir(build_model(schema=SCHEMA, **options)).eval()
    stored = json.loads(json.dumps(stored_options(options)))
    assert stored["pretrained"] == {"item": 5, "tags": 3}
    again = build_model(schema=SCHEMA, **stored).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*some_rows(7)), model(*some_rows(7)))
    for each in (model, again):
        assert isinstance(each.embedding, MixedEmbedding)
        frozen = [table.weight.shape[1] for table in each.embedding.tables if not table.weight.requires_grad]
        assert frozen == [5]


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [(True, [5, 3]), (False, []), ({}, [5, 3]), ({"item": False}, [3]), ({"item": False, "tags": True}, [3])],
)
def test_what_is_frozen(freeze, frozen):
    given = {"item": VECTORS, "tags": VECTORS[:6, :3]}
    model = build_model("mlp", SCHEMA, **SMALL, pretrained=given, freeze_pretrained=freeze)
    tables = model.embedding.tables
    assert [table.weight.shape[1] for table in tables if not table.weight.requires_grad] == frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pretrained": {"past": VECTORS}},
            "feature 'past' shares the vectors of 'item', so pretrained must leave it out. Received: 'past'. "
            "Name 'item' instead",
        ),
        ({"embedding_dims": {"last": 2}}, "shares the vectors of 'item', so embedding_dims must leave it out."),
        ({"embedding_dims": {"price": 2}}, "embedding_dims must name categorical features. Received: 'price'."),
        (
            {"pretrained": {"item": VECTORS}, "freeze_pretrained": {"itme": False}},
            "freeze_pretrained must name features with pretrained vectors. Received: 'itme'. Did you mean 'item'",
        ),
        ({"freeze_pretrained": {"item": True}}, "must name features with pretrained vectors. Received: 'item'."),
        (
            {"pretrained": {"item": VECTORS}, "freeze_pretrained": {"item": 1}},
            "freeze_pretrained must be true or false. Received: 1",
        ),
        ({"freeze_pretrained": None}, "freeze_pretrained must be true or false. Received: None"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        build_model("mlp", SCHEMA, **SMALL, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_sequence_is_one_field():
    """Pairs count features and not slots."""
    one = Schema((Feature("past", "sequence", num_ids=9, max_length=4),), domains=("a",))
    inputs = torch.tensor([[2, 3, 0, 0], [0, 0, 0, 0]]), torch.zeros(2, 0), torch.tensor([0, -1])
    alone = ("mlp", "star", "wdl", "dcn", "shared_bottom", "mmoe", "ple", "pepnet", "adasparse")
    for name in (*alone, "sar_net", "m2m", "adaptdhm", "hamur", "m3oe", "apg"):
        assert build_model(name, one)(*inputs).shape == (2,)
    for name in ("nfm", "autoint", "pnn", "fibinet", "deepfm", "xdeepfm"):
        with pytest.raises(SchemaError, match=r"needs at least 2 of them. Received: \['past'\]"):
            build_model(name, one)


def test_a_copy_and_a_state_know_their_fields():
    model = build_model("deepfm", SCHEMA, **SMALL)
    assert set(model.state_dict()) >= {"embedding.weight", "linear.table.weight"}
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*some_rows(5)), model(*some_rows(5)))
