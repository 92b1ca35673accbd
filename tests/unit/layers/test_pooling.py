"""Bags and padded sequences against one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.layers.pooling import Bags, bags_of, max_of_bags, pool, sum_of_bags

RARE = settings(max_examples=60, deadline=None)
HOW = pytest.mark.parametrize("how", ["mean", "sum", "max"])
OF_BAGS = {"sum": (sum_of_bags, torch.sum), "max": (max_of_bags, lambda x, dim: x.max(dim).values)}


@st.composite
def bags(draw) -> list[list[int]]:
    return draw(st.lists(st.lists(st.integers(0, 6), max_size=5), max_size=6))


def as_bags(rows: list[list[int]]) -> Bags:
    counts = torch.tensor([len(bag) for bag in rows], dtype=torch.int64)
    flat = torch.tensor([row for bag in rows for row in bag], dtype=torch.int64)
    return Bags(flat, counts.cumsum(0) - counts, counts)


def one_by_one(weight, rows, reduce):
    nothing = weight.new_zeros(0, weight.shape[1])
    parts = [reduce(weight[bag], 0).unsqueeze(0) if bag else torch.zeros_like(weight[:1]) for bag in rows]
    return torch.cat([nothing, *parts])


@RARE
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("how", OF_BAGS)
@given(rows=bags(), seed=st.integers(0, 99), equal=st.booleans())
def test_bags_and_their_gradients(how, sparse, rows, seed, equal):
    of_bags, reduce = OF_BAGS[how]
    torch.manual_seed(seed)
    weight = torch.randn(7, 3, dtype=torch.float64)
    weight = (
        torch.full_like(weight, -1.0) if equal else weight
    ).requires_grad_()  # the first of equal ones has the gradient
    found, expected = of_bags(weight, as_bags(rows), sparse=sparse), one_by_one(weight, rows, reduce)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    (ours,) = torch.autograd.grad(found, weight, upstream)
    assert ours.is_sparse == sparse
    if sparse:
        assert ours._indices().flatten().tolist() == [row for bag in rows for row in bag]
    theirs = torch.zeros_like(weight)
    if any(rows):
        (theirs,) = torch.autograd.grad(expected, weight, upstream)
    torch.testing.assert_close(ours.to_dense(), theirs)


@RARE
@given(data=st.data(), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), num_rows=st.integers(0, 4))
def test_what_is_kept_of_each_field_is_its_bag(data, lengths, num_rows):
    shape = (num_rows, sum(lengths))
    mask = data.draw(st.lists(st.booleans(), min_size=num_rows * sum(lengths), max_size=num_rows * sum(lengths)))
    rows, kept = torch.arange(shape[0] * shape[1]).view(shape), torch.tensor(mask, dtype=torch.bool).view(shape)
    ends = torch.tensor(lengths).cumsum(0)
    found = bags_of(rows, kept, ends - torch.tensor(lengths))
    expected = [
        part[its].tolist()
        for row, keep in zip(rows, kept, strict=True)
        for part, its in zip(row.split(lengths), keep.split(lengths), strict=True)
    ]
    spans = zip(found.starts.tolist(), found.counts.tolist(), strict=True)
    assert [found.rows[start : start + count].tolist() for start, count in spans] == expected
    assert len(found.rows) == int(kept.sum())


@HOW
def test_a_padded_sequence_is_pooled_without_its_padding(how):
    vectors = torch.randn(4, 5, 3, dtype=torch.float64)
    kept = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    reduce = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[how]
    expected = [
        reduce(v[k], 0) if k.any() else torch.zeros(3, dtype=v.dtype) for v, k in zip(vectors, kept, strict=True)
    ]
    torch.testing.assert_close(pool(vectors, kept, how), torch.stack(expected))
    spoilt = vectors.masked_fill(~kept.unsqueeze(-1), torch.nan)
    assert torch.equal(pool(spoilt, kept, how), pool(vectors, kept, how))


@HOW
def test_the_gradient_of_padding_is_zero(how):
    vectors = torch.randn(2, 3, 2, requires_grad=True)
    kept = torch.tensor([[True, False, True], [False, False, False]])
    pool(vectors, kept, how).sum().backward()
    assert vectors.grad.isfinite().all()
    assert vectors.grad[~kept].eq(0).all()
    assert vectors.grad[kept].sum().item() == pytest.approx({"mean": 2.0, "sum": 4.0, "max": 2.0}[how])


@pytest.mark.parametrize("of_bags", [sum_of_bags, max_of_bags])
@pytest.mark.parametrize("row", [7, -1])
def test_a_row_that_is_not_there_is_refused(of_bags, row):
    with pytest.raises((IndexError, RuntimeError)):
        of_bags(torch.randn(7, 2), as_bags([[row]]))


@pytest.mark.parametrize("of_bags", [sum_of_bags, max_of_bags])
def test_frozen_rows_need_no_gradient(of_bags):
    assert not of_bags(torch.randn(7, 2), as_bags([[1, 2], []])).requires_grad
