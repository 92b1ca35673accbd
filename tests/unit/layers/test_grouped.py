import pytest
import torch

from domlora.layers import grouped
from domlora.layers.grouped import grouped_linear

PLACES, SIZES = [3, 0, 4], [2, 3, 1]


@pytest.fixture(params=["in place", "in tiles"], autouse=True)
def way(request, monkeypatch):
    """What a CPU does, and here too what an accelerator does."""
    if request.param == "in tiles":
        monkeypatch.setattr(grouped, "_in_place", grouped._in_tiles)
    return request.param


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return drawn(5, 3 * 4)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("middle", [(), (2,), (2, 3)])
def test_gradients_are_those_of_the_formula(weight, scaled, middle):
    scale = drawn(3, 4) if scaled else None
    inputs = (drawn(6, *middle, 4), weight, drawn(5, 3), scale)
    assert torch.autograd.gradcheck(lambda *args: grouped_linear(*args[:3], PLACES, SIZES, args[3]), inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(weight, wanted):
    inputs = (drawn(6, 4), weight, drawn(5, 3), drawn(3, 4))
    every = torch.autograd.grad(of(*inputs), inputs)
    for place, each in enumerate(inputs):
        each.requires_grad_(place == wanted)
    (alone,) = torch.autograd.grad(of(*inputs), inputs[wanted])
    torch.testing.assert_close(alone, every[wanted])


def of(x, weight, bias, scale):
    return grouped_linear(x, weight, bias, PLACES, SIZES, scale).sin().sum()


def test_sparse_gradients_hold_the_rows_of_the_groups(weight, way):
    bias, x = drawn(5, 3), drawn(6, 4)
    dense, sparse = (
        torch.autograd.grad(grouped_linear(x, weight, bias, [0, 2, 3], SIZES, None, kind).sin().sum(), (weight, bias))
        for kind in (False, True)
    )
    for whole, each in zip(dense, sparse, strict=True):
        assert each.is_coalesced() == (way == "in place")  # a group may have several tiles
        rows = each.coalesce()
        assert rows._indices().tolist() == [[0, 2, 3]]
        torch.testing.assert_close(rows.to_dense(), whole)


@pytest.mark.parametrize("place", [5, -1])
def test_a_place_that_is_not_there_is_refused(weight, place):
    with pytest.raises(IndexError):
        grouped_linear(drawn(6, 4), weight, drawn(5, 3), [0, 1, place], SIZES)


def test_no_rows(weight):
    assert grouped_linear(drawn(0, 4), weight, drawn(5, 3), [], []).shape == (0, 3)
    assert grouped_linear(drawn(0, 2, 4), weight, drawn(5, 3), [], []).shape == (0, 2, 3)


def test_under_autocast_it_computes_in_the_type_of_the_weights(weight):
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(drawn(6, 4).bfloat16(), weight, drawn(5, 3), PLACES, SIZES)
    assert y.dtype == weight.dtype


@pytest.mark.parametrize("sizes", [[1, 1, 97], [97, 1, 1], [0, 0, 5], [4, 4, 4], [1, 0, 0], [0, 0, 0]])
def test_groups_of_any_sizes(weight, sizes):
    x, bias = drawn(sum(sizes), 4), drawn(5, 3)
    parts = [
        rows @ weight[place].view(3, 4).T + bias[place] for place, rows in zip(PLACES, x.split(sizes), strict=True)
    ]
    torch.testing.assert_close(grouped_linear(x, weight, bias, PLACES, sizes), torch.cat(parts))
