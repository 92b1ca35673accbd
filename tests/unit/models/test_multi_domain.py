import copy

import pytest
import torch
from torch import nn

from domlora.models.build import build_model
from domlora.models.multi_domain import DomainRows, StarLinear

DOMAIN = torch.tensor([2, 0, -1, 3, 0, 2, -1])
SMALL = {"embedding_dim": 4, "hidden_units": (12, 6), "dropout": 0.0}


def make_layer(num_domains=5):
    torch.manual_seed(0)
    rows = DomainRows()
    layer = StarLinear(4, 3, num_domains, rows)
    nn.init.normal_(layer.domain_weight, 1.0, 0.5)
    nn.init.normal_(layer.domain_bias)
    return layer, rows


def by_hand(layer, x, domain):
    """Row after row, as the formula says."""
    answers = []
    for row, d in zip(x, domain.tolist(), strict=True):
        weight = layer.weight * layer.domain_weight[d].view(3, 4) if d >= 0 else layer.weight
        bias = layer.bias + layer.domain_bias[d] if d >= 0 else layer.bias
        answers.append(row @ weight.t() + bias)
    return torch.stack(answers)


@pytest.mark.parametrize(
    "domain",
    [
        DOMAIN,
        DOMAIN.sort().values,
        DOMAIN.sort(descending=True).values,
        DOMAIN.clamp(min=0),
        DOMAIN * 0,
        DOMAIN * 0 - 1,
    ],
    ids=["mixed", "sorted", "descending", "all known", "one", "none known"],
)
@pytest.mark.parametrize("middle", [(), (2,), (2, 3)])
def test_each_row_uses_its_own_domain(domain, middle):
    layer, rows = make_layer()
    x = torch.randn(7, *middle, 4)
    rows.group_(domain)
    torch.testing.assert_close(layer(x), by_hand(layer, x, domain))


def test_row_by_row_gives_the_same(monkeypatch):
    layer, rows = make_layer()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for middle in ((), (2,), (2, 3)):
        x = torch.randn(7, *middle, 4)
        rows.group_(DOMAIN)
        torch.testing.assert_close(layer(x), by_hand(layer, x, DOMAIN))


def test_no_rows():
    layer, rows = make_layer()
    rows.group_(DOMAIN[:0])
    assert layer(torch.zeros(0, 4)).shape == (0, 3)


def test_a_domain_beyond_the_last_is_refused():
    layer, rows = make_layer()
    rows.group_(torch.tensor([0, 5]))
    with pytest.raises(IndexError):
        layer(torch.zeros(2, 4))


def test_a_call_outside_the_model_is_refused():
    layer, _ = make_layer()
    with pytest.raises((AttributeError, RuntimeError)):
        layer(torch.zeros(2, 4))


@pytest.mark.parametrize("sparse", [True, False])
def test_only_domains_in_the_batch_get_gradients(sparse):
    layer, rows = make_layer()
    layer.sparse = sparse
    rows.group_(DOMAIN)
    layer(torch.randn(7, 4)).sum().backward()
    for parameter in (layer.domain_weight, layer.domain_bias):
        grad = parameter.grad
        assert grad.is_sparse == sparse
        touched = grad.to_dense().ne(0).any(1)
        assert touched.tolist() == [True, False, True, True, False]
    if sparse:
        assert layer.domain_weight.grad._nnz() == 3


def test_the_work_follows_the_domains_in_the_batch(monkeypatch):
    layer, rows = make_layer(num_domains=1000)
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(len(args[0])) or linear(*args))
    rows.group_(DOMAIN)
    layer(torch.randn(7, 4))
    assert calls == [2, 2, 2, 1]


def test_star_starts_from_the_shared_tower(schema, rows):
    model = build_model("star", schema, **SMALL).eval()
    ids, dense, domain = rows(8)
    torch.testing.assert_close(model(ids, dense, domain), model(ids, dense, torch.full_like(domain, -1)))


def test_star_reads_the_domain(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    ids, dense, _ = rows(8)
    answers = [model(ids, dense, torch.full((8,), domain)) for domain in (-1, 0, 1, 2, 3)]
    for i, answer in enumerate(answers):
        assert not any(torch.allclose(answer, other) for other in answers[:i])


def test_a_mixed_batch_equals_its_pieces(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL))
    model(*rows(50, seed=1))
    model.eval()
    ids, dense, domain = rows(20)
    mixed = model(ids, dense, domain)
    for d in domain.unique():
        piece = domain == d
        torch.testing.assert_close(model(ids[piece], dense[piece], domain[piece]), mixed[piece])


class Corrected(nn.Module):
    """Stands for an adapter: wraps a Linear and adds to each row, in the batch's order."""

    def __init__(self, base, correction):
        super().__init__()
        self.base, self.correction = base, correction

    def forward(self, x):
        return self.base(x) + self.correction


@pytest.mark.parametrize("ordered", [True, False])
def test_an_adapter_around_a_layer_sees_rows_in_the_batchs_order(ordered, schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    ids, dense, domain = rows(8)
    domain = domain.sort().values if ordered else domain
    correction = torch.randn(8, 6)
    seen = {}
    model.tower[1].register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    model.tower.set_submodule("1", Corrected(model.tower[1], correction))
    logit = model(ids, dense, domain)
    hidden = torch.relu(seen["y"] + correction)
    torch.testing.assert_close(logit, model.head(hidden).squeeze(-1))
    one = [model.tower[1].base.weight, model.tower[1].base.domain_weight.view(-1, 6, 12)]
    for i, d in enumerate(domain.tolist()):
        weight = one[0] * one[1][d] if d >= 0 else one[0]
        bias = model.tower[1].base.bias + (model.tower[1].base.domain_bias[d] if d >= 0 else 0)
        torch.testing.assert_close(seen["y"][i], weight @ seen["x"][i] + bias)


def test_a_copy_has_rows_of_its_own(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    twin = copy.deepcopy(model)
    assert twin.rows is not model.rows
    assert all(layer.rows is twin.rows for layer in twin.tower)
    assert torch.equal(twin(*rows(8)), model(*rows(8)))


def test_it_exports(schema, rows, stir):
    model = stir(build_model("star", schema, **SMALL)).eval()
    size = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, rows(8), dynamic_shapes=({0: size}, {0: size}, {0: size}))
    for num_rows in (8, 3):
        torch.testing.assert_close(program.module()(*rows(num_rows)), model(*rows(num_rows)))
