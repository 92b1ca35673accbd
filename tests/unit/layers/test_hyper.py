import copy

import numpy as np
import pytest
import torch
from torch import nn

from domlora.layers.experts import DomainEmbedding
from domlora.layers.hyper import AdaptiveLinear, GeneratedLinear, HyperAdapter, MetaUnit, VectorRows

DOMAIN = torch.tensor([2, 0, -1, 3, 0, 2, -1])
ORDERS = {
    "mixed": DOMAIN,
    "sorted": DOMAIN.sort().values,
    "all known": DOMAIN.clamp(min=0),
    "one": DOMAIN * 0,
    "none known": DOMAIN * 0 - 1,
}


def make_rows(num_domains=5, size=3, std=1.0):
    return VectorRows(DomainEmbedding(num_domains, size, std).double())


def stir(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return layer.double()


def numbers(tensor):
    return tensor.detach().numpy()


def vector_of(rows, d):
    table = numbers(rows.embedding.weight)
    return table[d] if d >= 0 else table.mean(0)


def matrix_of(layer, z):
    """Weight (in, out) and bias of one domain, entry after entry as the docstring says."""
    weight = numbers(layer.weight).copy()
    for c, number in enumerate(z):
        weight += number * numbers(layer.generator_weight)[c].reshape(weight.shape)
    return weight.T, numbers(layer.bias) + z @ numbers(layer.generator_bias)


def by_hand(layer, x, domain):
    out = []
    for row, d in zip(numbers(x), domain.tolist(), strict=True):
        weight, bias = matrix_of(layer, vector_of(layer.rows, d))
        out.append(row @ weight + bias)
    return np.stack(out)


@pytest.mark.parametrize("domain", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("middle", [(), (2,)])
@pytest.mark.parametrize("compiled", [False, True])
def test_generated_weights(domain, middle, compiled, monkeypatch):
    layer = stir(GeneratedLinear(4, 6, make_rows()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    x = torch.randn(7, *middle, 4, dtype=torch.float64)
    layer.rows.group_(domain)
    np.testing.assert_allclose(numbers(layer(x)), by_hand(layer, x, domain), rtol=1e-10, atol=1e-10)


def test_weights_are_made_once_a_domain(monkeypatch):
    layer, made = stir(GeneratedLinear(4, 6, make_rows(1000))), []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **out: made.append(len(args[1])) or addmm(*args, **out))
    layer.rows.group_(DOMAIN)
    layer(torch.randn(7, 4, dtype=torch.float64))
    assert made == [4, 4, 2, 2, 2, 1]  # weights of -1, 0, 2 and 3, then biases, then their rows


def test_no_rows():
    layer = GeneratedLinear(4, 6, VectorRows(DomainEmbedding(5, 3)))
    layer.rows.group_(DOMAIN[:0])
    assert layer(torch.zeros(0, 4)).shape == (0, 6)


def test_domains_start_nearly_alike_and_a_vector_of_unit_variance_counts():
    torch.manual_seed(0)
    rows = VectorRows(DomainEmbedding(50, 16))
    layer = GeneratedLinear(64, 64, rows)
    base = layer.weight.std()
    assert (layer.plain(3).weight - layer.weight).std() < 0.02 * base
    nn.init.normal_(rows.embedding.weight)
    spread = torch.stack([(layer.plain(d).weight - layer.weight).std() for d in range(50)]).mean()
    torch.testing.assert_close(spread, base, rtol=0.1, atol=0)


def test_plain_is_one_domain():
    layer = stir(GeneratedLinear(4, 6, make_rows()))
    x = torch.randn(3, 4, dtype=torch.float64)
    layer.rows.group_(torch.full((3,), 2))
    torch.testing.assert_close(layer.plain(2)(x), layer(x))
    assert type(layer.plain(2)) is nn.Linear
    assert not layer.requires_grad_(False).plain(2).weight.requires_grad


def test_gradients_stay_with_the_domains_of_the_batch():
    layer = stir(GeneratedLinear(4, 6, make_rows()))
    layer.rows.group_(DOMAIN)
    layer(torch.randn(7, 4, dtype=torch.float64)).square().sum().backward()
    assert layer.rows.embedding.weight.grad.ne(0).any(1).tolist() == [True, False, True, True, False]
    assert all(p.grad.ne(0).any() for p in layer.parameters())


def test_a_copy_reads_its_own_vectors():
    model = nn.ModuleDict({"vectors": DomainEmbedding(5, 3)})
    model["layer"] = GeneratedLinear(4, 6, VectorRows(model["vectors"]))
    model["layer"].rows.group_(DOMAIN)
    model["layer"](torch.ones(7, 4)).sum().backward()  # a graph is no obstacle
    twin = copy.deepcopy(model)
    assert twin["layer"].rows.embedding is twin["vectors"]
    assert twin["layer"].rows is not model["layer"].rows


def test_a_meta_unit():
    unit = stir(MetaUnit(4, 2, make_rows()))
    h = torch.randn(7, 2, 4, dtype=torch.float64)
    unit[0].rows.group_(DOMAIN)
    expected = h
    for layer in unit:
        y = by_hand(layer, expected, DOMAIN)
        expected = torch.from_numpy(np.where(y > 0, y, 0.1 * y))
    np.testing.assert_allclose(numbers(unit(h)), numbers(expected))


@pytest.mark.parametrize("over_parameterized", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), [(8, 6), (6, 8), (8, 1)])
def test_an_adaptive_layer_is_one_matrix_of_low_rank_a_domain(over_parameterized, wide, narrow):
    rows = make_rows()
    layer = stir(AdaptiveLinear(wide, narrow, reduction=2, over_parameterized=over_parameterized, rows=rows))
    rank = max(min(wide, narrow) // 2, 1)
    assert [(part.in_features, part.out_features) for part in layer.down][-1][1] == rank == layer.core.in_features
    assert len(layer.down) == len(layer.up) == 1 + over_parameterized
    down, up = np.eye(wide), np.eye(rank)
    for part in layer.down:
        down = down @ numbers(part.weight).T
    for part in layer.up:
        up = up @ numbers(part.weight).T
    x = torch.randn(7, wide, dtype=torch.float64)
    rows.group_(DOMAIN)
    expected = []
    for row, d in zip(numbers(x), DOMAIN.tolist(), strict=True):
        core, shift = matrix_of(layer.core, vector_of(rows, d))
        weight = down @ core @ up
        assert np.linalg.matrix_rank(weight) <= rank
        expected.append(row @ weight + shift @ up + numbers(layer.bias))
    np.testing.assert_allclose(numbers(layer(x)), np.stack(expected), rtol=1e-10, atol=1e-10)


def test_only_the_last_factor_has_a_bias():
    layer = AdaptiveLinear(8, 8, reduction=2, over_parameterized=True, rows=VectorRows(DomainEmbedding(5, 3)))
    assert [part.bias is not None for part in (*layer.down, *layer.up)] == [False, False, False, True]
    assert layer.bias.eq(0).all()


def test_a_hyper_adapter_row_by_row():
    adapter = stir(HyperAdapter(6, bottleneck=4, rank=3, num_domains=5)).eval()
    adapter.norm.num_batches.fill_(1)
    adapter.norm.running_mean.normal_()
    adapter.norm.running_var.uniform_(0.5, 2.0)
    h, matrix = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 3, 3, dtype=torch.float64)
    (u, v), (u_up, v_up) = ([numbers(part.weight).T for part in pair] for pair in (adapter.down, adapter.up))
    norm, expected = adapter.norm, []
    for row, m, d in zip(numbers(h), numbers(matrix), DOMAIN.tolist(), strict=True):
        middle = 1 / (1 + np.exp(-(row @ (u @ m.T @ v) + numbers(adapter.down[1].bias))))
        y = (middle @ (u_up @ m.T @ v_up) - numbers(norm.running_mean[d])) / np.sqrt(
            numbers(norm.running_var[d]) + norm.eps
        )
        scale = norm.weight * norm.domain_weight[d] if d >= 0 else norm.weight
        shift = norm.bias + norm.domain_bias[d] if d >= 0 else norm.bias
        expected.append(row + numbers(scale) * y + numbers(shift))
    np.testing.assert_allclose(numbers(adapter(h, matrix, DOMAIN)), np.stack(expected), rtol=1e-9, atol=1e-9)


def test_a_fresh_hyper_adapter_changes_nothing():
    adapter = HyperAdapter(6, bottleneck=4, rank=3, num_domains=5)
    h = torch.randn(7, 6)
    for mode in (adapter.train(), adapter.eval()):
        assert torch.equal(mode(h, torch.randn(7, 3, 3), DOMAIN), h)
