"""How the vectors of a sequence become one. Padding never counts, and nothing but padding gives zeros."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from domlora.features.schema import Pooling

__all__ = ["Bags", "bags_of", "max_of_bags", "pool", "sum_of_bags"]


class Bags(NamedTuple):
    """Rows of a table in bags that stand one after the other and may be empty.

    Args:
        rows: ``(P,)`` those of the first bag, of the second, ...
        starts: ``(N,)`` where in ``rows`` each bag begins.
        counts: ``(N,)`` how many each bag holds.
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor


def bags_of(rows: Tensor, kept: Tensor, first: Tensor) -> Bags:
    """A bag for each field of each row of a batch, with what is kept of its slots.

    **Shape**: ``rows (B, S)``, ``kept (B, S)`` bool, ``first (F,)`` the first slot of each field; ``B * F`` bags.

    Example:
        >>> rows = torch.tensor([[7, 3, 4], [8, 5, 0]])
        >>> bags_of(rows, rows > 0, first=torch.tensor([0, 1]))
        Bags(rows=tensor([7, 3, 4, 8, 5]), starts=tensor([0, 1, 3, 4]), counts=tensor([1, 2, 1, 1]))
    """
    before = F.pad(kept.flatten().cumsum(0), (1, 0))  # how many are kept to the left of a slot, and at last of the end
    starts = before[:-1].view(kept.shape).index_select(1, first).flatten()
    return Bags(rows.masked_select(kept), starts, torch.diff(starts, append=before[-1:]))


def sum_of_bags(weight: Tensor, bags: Bags, *, sparse: bool = False) -> Tensor:
    """The sum of each bag's rows; the gradient of ``weight`` holds the rows of the bags alone if ``sparse``.

    With its backward pass it takes, on one thread of a CPU, a half to an eighth of what ``F.embedding_bag`` with
    ``padding_idx`` takes (4,096 sequences of up to 50 ids, 16 numbers; ``python benchmarks/sequences.py``): what is left out
    costs nothing, and no gradient is sorted or counted.

    **Shape**: ``weight (rows, E)`` and ``N`` bags to ``(N, E)``.

    Example:
        >>> weight = torch.arange(10.0).view(5, 2)
        >>> sum_of_bags(weight, Bags(torch.tensor([1, 4, 4]), torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])))
        tensor([[ 2.,  3.],
                [16., 18.],
                [ 0.,  0.]])
    """
    out: Tensor = _SumOfBags.apply(weight, *bags, sparse)  # type: ignore[no-untyped-call]
    return out


def max_of_bags(weight: Tensor, bags: Bags, *, sparse: bool = False) -> Tensor:
    """The largest number of each bag's rows, one by one of their ``E``; zeros for an empty bag.

    Of equal largest numbers the first has the gradient.

    **Shape**: ``weight (rows, E)`` and ``N`` bags to ``(N, E)``.

    Example:
        >>> weight = -torch.arange(10.0).view(5, 2)
        >>> max_of_bags(weight, Bags(torch.tensor([4, 1, 2]), torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])))
        tensor([[-8., -9.],
                [-2., -3.],
                [ 0.,  0.]])
    """
    rows = bags.rows
    if sparse:  # torch has no sparse gradient of a maximum, but one of the rows that it is taken of
        weight, rows = F.embedding(rows, weight, sparse=True), torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(rows, weight, bags.starts, mode="max")


def pool(vectors: Tensor, kept: Tensor, pooling: Pooling) -> Tensor:
    """One sequence a row, with its padding in place: what a trace can follow, whose shapes must not depend on values.

    **Shape**: ``vectors (B, L, E)``, ``kept (B, L)`` bool to ``(B, E)``.

    Example:
        >>> vectors = torch.tensor([[[-1.0], [-3.0], [9.0]]])
        >>> kept = torch.tensor([[True, True, False]])
        >>> [pool(vectors, kept, how).item() for how in ("mean", "sum", "max")]
        [-2.0, -4.0, -1.0]
    """
    left_out = ~kept.unsqueeze(-1)
    if pooling == "max":
        largest = vectors.masked_fill(left_out, -torch.inf).max(1).values  # the first one has the gradient, unlike amax
        return largest.masked_fill(left_out.all(1), 0.0)
    total = vectors.masked_fill(left_out, 0.0).sum(1)
    return total if pooling == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1)


class _SumOfBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, rows: Tensor, starts: Tensor, counts: Tensor, sparse: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, counts)
        ctx.shape, ctx.sparse = weight.shape, sparse
        return F.embedding_bag(rows, weight, starts, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        rows, counts = ctx.saved_tensors
        by_row = grad.repeat_interleave(counts, dim=0, output_size=len(rows))  # (N, E) -> (P, E)
        if ctx.sparse:
            whole = torch.sparse_coo_tensor(rows.unsqueeze(0), by_row, ctx.shape, check_invariants=False)
        else:
            whole = by_row.new_zeros(ctx.shape).index_add_(0, rows, by_row)
        return whole, None, None, None, None
