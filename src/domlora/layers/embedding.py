"""Tables: ids in, vectors or first-order weights out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import EngineError
from domlora.features.schema import PAD_ID, Pooling
from domlora.layers.pooling import bags_of, max_of_bags, pool, sum_of_bags
from domlora.layers.rows import starting_rows

__all__ = ["EmbeddingTable", "Field", "FirstOrder", "MixedEmbedding", "PooledTable", "table_for"]


class Field(NamedTuple):
    """What gives a model one vector: an id, or a sequence of ids whose vectors are pooled.

    Args:
        num_ids: ids there are.
        owner: the place of the field whose rows this one uses; None for rows of its own.
        pooling: how the vectors of a sequence become one, without those of padding; None for a single id, whose padding
            has a vector like any other id.
        max_length: slots of a sequence.
    """

    num_ids: int
    owner: int | None = None
    pooling: Pooling | None = None
    max_length: int = 1


class EmbeddingTable(nn.Module):
    """One vector for each id of each feature, all features in one table.

    ``y[b, s] = weight[ids[b, s] + offsets[s]]``. Starts from N(0, init_std²), padding and out-of-vocabulary rows too.

    **Shape**: ``ids (B, S)`` int64, each slot counted within its own feature, to ``(B, S, E)``. ``weight`` is
    ``(sum(num_ids), E)``; the rows of slot ``s`` start at ``offsets[s]``. An id is not checked against its own
    feature: the encoder never makes one that is too large.

    Raises:
        EngineError: called while it has some of its rows alone.

    Args:
        num_ids: ids of each feature. May be empty.
        embedding_dim: ``E``.
        init_std: standard deviation at the start; 0 for a table of zeros.
        owners: of each feature the place of the one whose rows it uses, which is its own or that of an owner; None if
            each has its own.
        sparse: give ``weight`` a sparse gradient that holds the rows of the batch alone, for a row-wise optimizer.
            May be changed at any time. Dense gradients cost as much as the table is long.

    Attributes:
        fetch: for a table whose rows are kept elsewhere while it trains, which then has none in ``weight``: gives the
            vectors ``(P, E)`` of rows ``(P,)``, and moves them by their gradient. It is asked once for all rows of a batch.
        stretch: the rows that ``weight`` has, of a table made within :func:`domlora.layers.rows.cut_tables`; else None.

    Example:
        >>> table = EmbeddingTable([5, 3], embedding_dim=4)
        >>> table(torch.tensor([[4, 0], [1, 2]])).shape
        torch.Size([2, 2, 4])
    """

    offsets: Tensor
    _starting_rows = staticmethod(starting_rows)

    def __init__(
        self,
        num_ids: Sequence[int],
        embedding_dim: int,
        init_std: float = 0.01,
        *,
        owners: Sequence[int] | None = None,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.sparse = sparse
        self.fetch: Callable[[Tensor], Tensor] | None = None
        owners = range(len(num_ids)) if owners is None else owners
        sizes = [size if owner == place else 0 for place, (size, owner) in enumerate(zip(num_ids, owners, strict=True))]
        weight, self.stretch = self._starting_rows(sum(sizes), embedding_dim, init_std)
        self.weight = nn.Parameter(weight)
        starts = [0, *accumulate(sizes)]
        offsets = [starts[owner] for owner in owners]
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids + self.offsets
        if self.fetch is not None:
            return self.fetch(rows.flatten()).view(*rows.shape, self.embedding_dim)
        self._check_whole()
        if self.sparse or self.weight.device.type != "cpu":
            return F.embedding(rows, self.weight, sparse=self.sparse)
        # the same numbers; on a CPU the dense backward of index_select takes half the time of F.embedding's, and a
        # seventh for vectors of one number
        return self.weight.index_select(0, rows.flatten()).view(*rows.shape, self.embedding_dim)

    def _check_whole(self) -> None:
        if self.stretch is not None:
            raise EngineError(
                "a table that is cut must be trained by the ranks that have its rows",
                received=f"rows {self.stretch.start} to {self.stretch.stop} of {self.stretch.num_rows}",
                next_step="Set tables.name to 'fused_rowwise_adagrad', or build the model outside of cut_tables",
            )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.embedding_dim}, slots={len(self.offsets)}, sparse={self.sparse}"


class PooledTable(EmbeddingTable):
    """An :class:`EmbeddingTable` some of whose features are sequences.

    ``y[b, f] = weight[ids[b, s] + offsets[s]]`` for a feature of one slot ``s``, and the mean, sum or maximum of these over
    the slots of a sequence where ``ids[b, s]`` is not padding; zeros where all are. Starts as an ``EmbeddingTable``.

    On a CPU, and wherever gradients are sparse, padding is left out before anything is read; a sparse gradient has no rows
    of it. In a trace, and for dense gradients on an accelerator, it is read and masked, which asks nothing back from there.

    **Shape**: ``ids (B, S)`` to ``(B, F, E)``; the slots of a sequence stand side by side.

    Args:
        fields: the features.
        embedding_dim, init_std, sparse: as ``EmbeddingTable``.

    Example:
        >>> table = PooledTable([Field(5), Field(5, owner=0, pooling="mean", max_length=3)], embedding_dim=4)
        >>> table(torch.tensor([[4, 2, 3, 0], [1, 0, 0, 0]])).shape, table.weight.shape
        (torch.Size([2, 2, 4]), torch.Size([5, 4]))
    """

    first: Tensor
    counts_padding: Tensor
    takes_max: Tensor
    takes_mean: Tensor

    def __init__(
        self, fields: Sequence[Field], embedding_dim: int, init_std: float = 0.01, *, sparse: bool = False
    ) -> None:
        super().__init__(
            [field.num_ids for field in fields], embedding_dim, init_std, owners=_owners_of(fields), sparse=sparse
        )
        self.lengths, self.poolings = [f.max_length for f in fields], [f.pooling for f in fields]
        self.has_max, self.has_mean = "max" in self.poolings, "mean" in self.poolings
        slots, num_slots = torch.tensor(self.lengths), sum(self.lengths)
        single, largest, mean = (torch.tensor([p == how for p in self.poolings]) for how in (None, "max", "mean"))
        constants = {
            "offsets": self.offsets.repeat_interleave(slots, output_size=num_slots),  # (S,)
            "first": slots.cumsum(0) - slots,  # (F,)
            "counts_padding": single.repeat_interleave(slots, output_size=num_slots),  # (S,)
            "takes_max": largest.repeat_interleave(slots, output_size=num_slots),  # (S,)
            "takes_mean": mean,  # (F,)
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows, kept = ids + self.offsets, (ids != PAD_ID) | self.counts_padding  # (B, S)
        if self.fetch is not None:
            vectors = self.fetch(rows[kept])
            places = torch.zeros_like(rows).masked_scatter(kept, torch.arange(len(vectors), device=rows.device))
            return self._in_bags(vectors, places, kept, sparse=False)
        self._check_whole()
        if torch.compiler.is_compiling() or not (self.sparse or self.weight.device.type == "cpu"):
            return self._masked(rows, kept)
        return self._in_bags(self.weight, rows, kept, sparse=self.sparse)

    def _in_bags(self, weight: Tensor, rows: Tensor, kept: Tensor, *, sparse: bool) -> Tensor:
        """A field has its ids in one kind of bags and an empty bag, which gives zeros, in the other."""
        shape = (len(rows), len(self.first))
        bags = bags_of(rows, kept & ~self.takes_max if self.has_max else kept, self.first)
        y = sum_of_bags(weight, bags, sparse=sparse).view(*shape, self.embedding_dim)
        if self.has_mean:
            sizes = torch.where(self.takes_mean, bags.counts.view(shape).clamp(min=1), 1)
            y = y / sizes.unsqueeze(-1)
        if self.has_max:
            bags = bags_of(rows, kept & self.takes_max, self.first)
            y = y + max_of_bags(weight, bags, sparse=sparse).view_as(y)
        return y

    def _masked(self, rows: Tensor, kept: Tensor) -> Tensor:
        vectors = F.embedding(rows, self.weight, sparse=self.sparse)  # (B, S, E)
        parts = zip(
            torch.split(vectors, self.lengths, 1), torch.split(kept, self.lengths, 1), self.poolings, strict=True
        )
        return torch.stack([part[:, 0] if how is None else pool(part, its, how) for part, its, how in parts], 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, poolings={self.poolings}"


def table_for(fields: Sequence[Field], embedding_dim: int, init_std: float = 0.01) -> EmbeddingTable:
    """One table for all fields; a :class:`PooledTable` only if one of them is a sequence."""
    if any(field.pooling for field in fields):
        return PooledTable(fields, embedding_dim, init_std)
    return EmbeddingTable([field.num_ids for field in fields], embedding_dim, init_std, owners=_owners_of(fields))


def _owners_of(fields: Sequence[Field]) -> list[int]:
    """The place of each field's owner, its own if the rows are."""
    return [place if field.owner is None else field.owner for place, field in enumerate(fields)]


class MixedEmbedding(nn.Module):
    """Embeddings of several widths, some of them given, that leave as vectors of one width.

    ``y[b, f] = P_g t_g(ids)[b, f]`` for a field ``f`` of group ``g``. Learned fields of equal width are a group: they share
    one table ``t_g``, an :class:`EmbeddingTable` or :class:`PooledTable`, and one map ``P_g``. Each field with given vectors
    is a group of its own, with those that use its rows, since they come from a space of their own. A group whose width is
    ``E`` has no map; sequences are pooled before it. Learned tables start from N(0, init_std²), maps from N(0, 1 / width),
    which leaves the vectors' scale as it is.

    **Shape**: ``ids (B, S)`` to ``(B, F, E)``. Maps see ``(B, fields of the group, width)``.

    Args:
        fields: what has a vector; those that use another's rows are wherever that one is.
        widths: numbers in a vector of each field; of those that use another's rows, that one's count.
        embedding_dim: ``E``.
        init_std: standard deviation of learned vectors at the start.
        pretrained: vectors ``(num_ids, width)`` by the place of their field, not copied.
        trainable: places of given vectors that are learned on; the others need no gradient and no state of an optimizer.

    Source: Ginart et al. 2019, "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems",
    section 3: blocks of features of one width, each block with a projection to the base width. Intended differences: a
    width may be larger than ``E``; given vectors; sequences.

    Example:
        >>> fields = [Field(9), Field(5), Field(4), Field(5, owner=1, pooling="mean", max_length=2)]
        >>> mixed = MixedEmbedding(fields, widths=[2, 4, 2, 4], embedding_dim=4, pretrained={1: torch.ones(5, 4)})
        >>> mixed(torch.tensor([[8, 4, 3, 2, 3], [0, 0, 0, 2, 0]])).shape
        torch.Size([2, 4, 4])
        >>> [tuple(table.weight.shape) for table in mixed.tables], mixed.tables[1].weight.requires_grad
        ([(13, 2), (5, 4)], False)
    """

    order: Tensor

    def __init__(
        self,
        fields: Sequence[Field],
        widths: Sequence[int],
        embedding_dim: int,
        init_std: float = 0.01,
        *,
        pretrained: Mapping[int, Tensor] | None = None,
        trainable: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        given = pretrained or {}
        owners = _owners_of(fields)
        learned: dict[int, list[int]] = {}
        for place, owner in enumerate(owners):
            if owner not in given:
                learned.setdefault(widths[owner], []).append(place)
        of_given = {place: [p for p, owner in enumerate(owners) if owner == place] for place in sorted(given)}
        groups = [*learned.values(), *of_given.values()]
        tables = [table_for(_group_of(fields, places), width, init_std) for width, places in learned.items()]
        tables += [
            _given_table(_group_of(fields, places), given[place], place in trainable)
            for place, places in of_given.items()
        ]
        self.num_given = len(of_given)  # tables of given vectors, behind the learned ones
        self.tables = nn.ModuleList(tables)
        self.maps = nn.ModuleList(_map_of(table.embedding_dim, embedding_dim) for table in tables)
        slots = _slots_of(fields)
        in_groups = [place for places in groups for place in places]
        self.sizes = [sum(len(slots[place]) for place in places) for places in groups]
        self.places = [in_groups.index(place) for place in range(len(fields))]
        order = torch.tensor([slot for place in in_groups for slot in slots[place]])
        self.register_buffer("order", order, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        parts = torch.split(ids.index_select(1, self.order), self.sizes, dim=1)  # (B, slots of a group) each
        columns = [
            column  # (B, E)
            for table, to_width, part in zip(self.tables, self.maps, parts, strict=True)
            for column in to_width(table(part)).unbind(1)
        ]
        return torch.stack([columns[place] for place in self.places], dim=1)


def _group_of(fields: Sequence[Field], places: Sequence[int]) -> list[Field]:
    """These fields by themselves; owners are counted among them."""
    group = [fields[place] for place in places]
    return [f if f.owner is None else f._replace(owner=places.index(f.owner)) for f in group]


def _given_table(fields: Sequence[Field], vectors: Tensor, trainable: bool) -> EmbeddingTable:
    table = table_for([field._replace(num_ids=0) for field in fields], vectors.shape[1])  # draws no numbers
    table.weight, table.stretch = nn.Parameter(vectors, requires_grad=trainable), None
    return table


def _slots_of(fields: Sequence[Field]) -> list[range]:
    ends = [*accumulate(field.max_length for field in fields)]
    return [range(end - field.max_length, end) for end, field in zip(ends, fields, strict=True)]


def _map_of(width: int, embedding_dim: int) -> nn.Module:
    if width == embedding_dim:
        return nn.Identity()
    linear = nn.Linear(width, embedding_dim, bias=False)
    nn.init.normal_(linear.weight, 0.0, width**-0.5)
    return linear


class FirstOrder(nn.Module):
    """The linear model that most click models add to their deep part.

    ``y = bias + sum_f table[ids_f] + dense · w``; a sequence gives its pooled weights. Starts from zero.

    **Shape**: ``ids (B, S)``, ``dense (B, G)`` to ``(B, 1)``.

    Args:
        fields: what has a weight.
        num_dense: ``G``.

    Source: logistic regression; Cheng et al. 2016, "Wide & Deep Learning", section 3.1, without their cross-product
    features, as in DeepCTR.

    Example:
        >>> FirstOrder([Field(5), Field(3)], num_dense=1)(torch.tensor([[4, 0]]), torch.ones(1, 1)).shape
        torch.Size([1, 1])
    """

    def __init__(self, fields: Sequence[Field], num_dense: int) -> None:
        super().__init__()
        self.table = table_for(fields, 1, init_std=0.0)
        self.dense = nn.Linear(num_dense, 1, bias=False) if num_dense else None
        if self.dense is not None:
            nn.init.zeros_(self.dense.weight)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        logit: Tensor = self.table(ids).sum(1) + self.bias  # (B, F, 1) -> (B, 1)
        return logit if self.dense is None else logit + self.dense(dense)
