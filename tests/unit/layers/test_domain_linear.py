import pytest
import torch
from torch import nn

from domlora.layers.domain_linear import DomainLinear, DomainRows, StarLinear

DOMAIN = torch.tensor([2, 0, -1, 3, 0, 2, -1])


def make_layer(kind=StarLinear, num_domains=5):
    torch.manual_seed(0)
    rows = DomainRows()
    layer = kind(4, 3, num_domains, rows)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return layer, rows


def of_domain(layer, d):
    """Weight and bias, as the formula says."""
    if isinstance(layer, DomainLinear):
        weight, bias = (layer.weight[d], layer.bias[d]) if d >= 0 else (layer.weight.mean(0), layer.bias.mean(0))
        return weight.view(3, 4), bias
    if d < 0:
        return layer.weight, layer.bias
    return layer.weight * layer.domain_weight[d].view(3, 4), layer.bias + layer.domain_bias[d]


def by_hand(layer, x, domain):
    """Row after row."""
    found = [of_domain(layer, d) for d in domain.tolist()]
    return torch.stack([row @ weight.t() + bias for row, (weight, bias) in zip(x, found, strict=True)])


@pytest.fixture(params=[StarLinear, DomainLinear])
def kind(request):
    return request.param


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
def test_each_row_uses_its_own_domain(kind, domain, middle):
    layer, rows = make_layer(kind)
    x = torch.randn(7, *middle, 4)
    rows.group_(domain)
    torch.testing.assert_close(layer(x), by_hand(layer, x, domain))


def test_row_by_row_gives_the_same(kind, monkeypatch):
    layer, rows = make_layer(kind)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for middle in ((), (2,), (2, 3)):
        x = torch.randn(7, *middle, 4)
        rows.group_(DOMAIN)
        torch.testing.assert_close(layer(x), by_hand(layer, x, DOMAIN))


def test_no_rows(kind):
    layer, rows = make_layer(kind)
    rows.group_(DOMAIN[:0])
    assert layer(torch.zeros(0, 4)).shape == (0, 3)


def test_a_domain_beyond_the_last_is_refused(kind):
    layer, rows = make_layer(kind)
    rows.group_(torch.tensor([0, 5]))
    with pytest.raises(IndexError):
        layer(torch.zeros(2, 4))


def test_a_call_outside_the_model_is_refused(kind):
    layer, _ = make_layer(kind)
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


def test_the_work_follows_the_domains_in_the_batch(kind, monkeypatch):
    layer, rows = make_layer(kind, num_domains=1000)
    calls = []
    linear, addmm = nn.functional.linear, torch.addmm
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(len(args[0])) or linear(*args))
    monkeypatch.setattr(torch, "addmm", lambda *args, out: calls.append(len(args[1])) or addmm(*args, out=out))
    rows.group_(DOMAIN)
    layer(torch.randn(7, 4))
    assert calls == [2, 2, 2, 1]


def test_only_domains_in_the_batch_get_gradients_of_their_own():
    layer, rows = make_layer(DomainLinear)
    rows.group_(DOMAIN.clamp(min=0))
    layer(torch.randn(7, 4)).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.ne(0).any(1).tolist() == [True, False, True, True, False]
