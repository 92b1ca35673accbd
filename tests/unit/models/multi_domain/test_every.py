"""What holds for the models of this folder that are built from generated weights, clusters and mixtures."""

import copy

import pytest
import torch
from torch import nn

from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}
KEYS = ["sar_net", "m2m", "adaptdhm", "hamur", "m3oe", "apg"]
EVERY = pytest.mark.parametrize("name", KEYS)
READERS = pytest.mark.parametrize("name", [name for name in KEYS if name != "adaptdhm"])


@READERS
def test_it_reads_the_domain(name, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL)).eval()
    ids, dense, _ = rows(8)
    answers = [model(ids, dense, torch.full((8,), domain)) for domain in (-1, 0, 1, 2, 3)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other) for other in answers[:i])


@READERS
def test_domains_start_nearly_alike(name, schema, rows):
    model = build_model(name, schema, **SMALL).eval()
    ids, dense, domain = rows(50)
    answers = model(ids, dense, domain)
    other = model(ids, dense, torch.full_like(domain, -1))
    assert (answers - other).abs().max() < 0.1 * answers.std()


@READERS
def test_an_unknown_domain_is_the_mean_of_equals(name, schema, rows, stir):
    """Where all domains have learned the same, a row of none is answered as they answer."""
    model = stir(build_model(name, schema, **SMALL)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.shape[0:1] == (schema.num_domains,) and parameter.dim() == 2 and "generator" not in key:
                parameter.copy_(parameter[0].expand_as(parameter))
        for key, parameter in model.named_parameters():  # the star layer and the norm: without a domain's own at all
            if key.endswith("domain_weight") and parameter.dim() == 2:
                parameter.fill_(1.0)
            elif key.endswith("domain_bias"):
                parameter.zero_()
    ids, dense, domain = rows(20)
    torch.testing.assert_close(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, -1)))


@EVERY
def test_a_mixed_batch_equals_its_pieces(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL))
    model(*rows(50, 2, seed=1))
    model.eval()
    ids, dense, domain = rows(20, 2)
    mixed = model(ids, dense, domain)
    for d in domain.unique():
        piece = domain == d
        torch.testing.assert_close(model(ids[piece], dense[piece], domain[piece]), mixed[piece])


@EVERY
def test_statistics_stay_in_evaluation(name, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL))
    model(*rows(50, seed=1))
    before = {key: buffer.clone() for key, buffer in model.eval().named_buffers()}
    model(*rows(50, seed=2))
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())


@EVERY
def test_a_copy_after_training_has_rows_of_its_own(name, schema, rows, stir):
    model = stir(build_model(name, schema, **SMALL))
    model(*rows(8)).sum().backward()
    twin = copy.deepcopy(model).eval()
    held = [module.rows for module in twin.modules() if hasattr(module, "rows")]
    assert len({id(each) for each in held}) <= 1
    assert not any(each is model.rows for each in held)
    assert torch.equal(twin(*rows(8)), model.eval()(*rows(8)))


@EVERY
def test_it_exports(name, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL)).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8, 2), dynamic_shapes=({0: size}, {0: size}, {0: size}))
    for num_rows in (8, 3):
        torch.testing.assert_close(program.module()(*rows(num_rows, 2)), model(*rows(num_rows, 2)))


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_to_one_graph(name, training, schema_with_dense, rows, stir):
    model = stir(build_model(name, schema_with_dense, **SMALL)).train(training)
    twin = copy.deepcopy(model)  # statistics move
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (8, 5):
        torch.testing.assert_close(compiled(*rows(num_rows, 2)), model(*rows(num_rows, 2)))


@pytest.mark.parametrize(
    ("name", "shared", "own"),
    [
        ("sar_net", 291_841, 26_691),
        ("m2m", 700_417, 16),
        ("adaptdhm", 558_913, 0),
        ("hamur", 192_481, 256),
        ("m3oe", 566_979, 292_547),
        ("apg", 150_129, 16),
    ],
)
def test_parameters_as_the_pages_count_them(name, shared, own):
    features = tuple(Feature(f"c{i}", num_ids=2) for i in range(3))
    for num_domains in (1, 10):
        schema = Schema(features, tuple(f"d{i}" for i in range(num_domains)))
        model = build_model(name, schema, embedding_dim=128)
        count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("embedding."))
        assert count == shared + num_domains * own


@EVERY
def test_the_work_follows_the_domains_in_the_batch(name, rows, stir, monkeypatch):
    features = tuple(Feature(f"c{i}", num_ids=9) for i in range(3))
    model = stir(build_model(name, Schema(features, tuple(f"d{i}" for i in range(500))), **SMALL)).eval()
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(len(args[0])) or linear(*args))
    model(*rows(20))
    assert max(calls) <= 20
    assert len(calls) < 60
