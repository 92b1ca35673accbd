"""Tables: ids in, vectors or first-order weights out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EmbeddingTable", "FirstOrder", "MixedEmbedding"]


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

    @classmethod
    def from_pretrained(cls, vectors: Tensor, *, freeze: bool = True) -> Self:
        """The table of one feature whose ``vectors (num_ids, E)`` are given; not copied.

        Frozen, they need no gradient and no state of an optimizer.
        """
        table = cls([0], vectors.shape[1])
        table.weight = nn.Parameter(vectors, requires_grad=not freeze)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids + self.offsets
        if self.sparse or self.weight.device.type != "cpu":
            return F.embedding(rows, self.weight, sparse=self.sparse)
        # the same numbers; on a CPU the dense backward of index_select takes half the time of F.embedding's, and a
        # seventh for vectors of one number
        return self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.embedding_dim}, slots={len(self.offsets)}, sparse={self.sparse}"


class MixedEmbedding(nn.Module):
    """Embeddings of several widths, some of them given, that leave as vectors of one width.

    ``y[b, s] = P_g weight_g[ids[b, s]]`` for a slot ``s`` of group ``g``. Learned features of equal width are a group and
    share one :class:`EmbeddingTable` and one map ``P_g``; each feature with given vectors is a group of its own, since they
    come from a space of their own. A group whose width is ``E`` has no map. Learned tables start from N(0, init_std²),
    maps from N(0, 1 / width), which leaves the vectors' scale as it is.

    **Shape**: ``ids (B, S)`` to ``(B, S, E)``. Maps see ``(B, slots of the group, width)``.

    Args:
        num_ids: ids of each slot.
        widths: numbers in a vector of each slot.
        embedding_dim: ``E``.
        init_std: standard deviation of learned vectors at the start.
        pretrained: vectors ``(num_ids[s], widths[s])`` of some slots, not copied.
        freeze: keep those as they are; otherwise they are learned on.

    Source: Ginart et al. 2019, "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems",
    section 3: blocks of features of one width, each block with a projection to the base width. Intended differences: a
    width may be larger than ``E``; given vectors.

    Example:
        >>> mixed = MixedEmbedding([9, 5, 4], widths=[2, 4, 2], embedding_dim=4, pretrained={1: torch.ones(5, 4)})
        >>> mixed(torch.tensor([[8, 4, 3], [0, 0, 0]])).shape
        torch.Size([2, 3, 4])
        >>> [tuple(table.weight.shape) for table in mixed.tables], mixed.tables[1].weight.requires_grad
        ([(13, 2), (5, 4)], False)
    """

    order: Tensor

    def __init__(
        self,
        num_ids: Sequence[int],
        widths: Sequence[int],
        embedding_dim: int,
        init_std: float = 0.01,
        *,
        pretrained: Mapping[int, Tensor] | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        given = pretrained or {}
        learned: dict[int, list[int]] = {}
        for slot, width in enumerate(widths):
            if slot not in given:
                learned.setdefault(width, []).append(slot)
        tables = [EmbeddingTable([num_ids[slot] for slot in group], w, init_std) for w, group in learned.items()]
        tables += [EmbeddingTable.from_pretrained(given[slot], freeze=freeze) for slot in sorted(given)]
        self.tables = nn.ModuleList(tables)
        self.maps = nn.ModuleList(_map_of(table.embedding_dim, embedding_dim) for table in tables)
        order = [*(slot for group in learned.values() for slot in group), *sorted(given)]
        self.sizes = [len(table.offsets) for table in tables]
        self.places = [order.index(slot) for slot in range(len(widths))]
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        parts = torch.split(ids.index_select(1, self.order), self.sizes, dim=1)  # (B, slots of a group) each
        columns = [
            column  # (B, E)
            for table, to_width, part in zip(self.tables, self.maps, parts, strict=True)
            for column in to_width(table(part)).unbind(1)
        ]
        return torch.stack([columns[place] for place in self.places], dim=1)


def _map_of(width: int, embedding_dim: int) -> nn.Module:
    if width == embedding_dim:
        return nn.Identity()
    linear = nn.Linear(width, embedding_dim, bias=False)
    nn.init.normal_(linear.weight, 0.0, width**-0.5)
    return linear


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
