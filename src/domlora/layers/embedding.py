"""Tables: ids in, vectors or first-order weights out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EmbeddingTable", "FirstOrder"]


class EmbeddingTable(nn.Module):
    """One vector for each id of each feature, all features in one table.

    ``y[b, s] = weight[ids[b, s] + offsets[s]]``. Starts from N(0, init_std²), padding and out-of-vocabulary rows too.

    **Shape**: ``ids (B, S)`` int64, each slot counted within its own feature, to ``(B, S, E)``. ``weight`` is
    ``(sum(num_ids), E)``; the rows of slot ``s`` start at ``offsets[s]``. An id is not checked against its own
    feature: the encoder never makes one that is too large.

    Args:
        num_ids: ids of each feature. May be empty.
        embedding_dim: ``E``.
        init_std: standard deviation at the start; 0 for a table of zeros.
        sparse: give ``weight`` a sparse gradient that holds the rows of the batch alone, for a row-wise optimizer.
            May be changed at any time. Dense gradients cost as much as the table is long.

    Example:
        >>> table = EmbeddingTable([5, 3], embedding_dim=4)
        >>> table(torch.tensor([[4, 0], [1, 2]])).shape
        torch.Size([2, 2, 4])
    """

    offsets: Tensor

    def __init__(
        self, num_ids: Sequence[int], embedding_dim: int, init_std: float = 0.01, *, sparse: bool = False
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.sparse = sparse
        self.weight = nn.Parameter(torch.empty(sum(num_ids), embedding_dim).normal_(0.0, init_std))
        starts = [0, *accumulate(num_ids)][:-1]
        self.register_buffer("offsets", torch.tensor(starts, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids + self.offsets
        if self.sparse or self.weight.device.type != "cpu":
            return F.embedding(rows, self.weight, sparse=self.sparse)
        # the same numbers; on a CPU the dense backward of index_select takes half the time of F.embedding's, and a
        # seventh for vectors of one number
        return self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.embedding_dim}, slots={len(self.offsets)}, sparse={self.sparse}"


class FirstOrder(nn.Module):
    """The linear model that most click models add to their deep part.

    ``y = bias + sum_s table[ids_s] + dense · w``. Starts from zero.

    **Shape**: ``ids (B, S)``, ``dense (B, G)`` to ``(B, 1)``.

    Args:
        num_ids: ids of each feature.
        num_dense: ``G``.

    Source: logistic regression; Cheng et al. 2016, "Wide & Deep Learning", section 3.1, without their cross-product
    features, as in DeepCTR.

    Example:
        >>> FirstOrder([5, 3], num_dense=1)(torch.tensor([[4, 0]]), torch.ones(1, 1)).shape
        torch.Size([1, 1])
    """

    def __init__(self, num_ids: Sequence[int], num_dense: int) -> None:
        super().__init__()
        self.table = EmbeddingTable(num_ids, 1, init_std=0.0)
        self.dense = nn.Linear(num_dense, 1, bias=False) if num_dense else None
        if self.dense is not None:
            nn.init.zeros_(self.dense.weight)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        logit: Tensor = self.table(ids).sum(1) + self.bias  # (B, S, 1) -> (B, 1)
        return logit if self.dense is None else logit + self.dense(dense)
