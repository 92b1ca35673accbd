"""Models that read the domain of each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.features.schema import Schema
from domlora.layers.mlp import MLP
from domlora.layers.partitioned_norm import PartitionedNorm
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["STAR", "DomainRows", "StarLinear"]


class STAR(nn.Module):
    """Star topology: partitioned normalisation, then a tower whose weights are shared ⊙ the domain's own.

    ``logit = head(tower(norm([x, dense])))``, ``h = relu(h (W_s ⊙ W_d) + b_s + b_d)`` for a row of domain ``d``. Domain
    weights start at one, domain biases at zero, so that all domains start from the shared tower. Rows of domain -1 use
    ``W_s, b_s`` alone.

    An adapter on ``tower.*`` adds to a StarLinear's output: ``h = relu(h (W_s ⊙ W_d) + h A_d B_d + b_s + b_d)``. Batches may
    mix domains; the cost follows the domains in the batch, and rows sorted by domain save two copies a layer.

    The grouping of the rows lives in one cell that all layers read, so one eager model must not be called from two
    threads at once. Under ``torch.compile`` and ``torch.export`` each row gathers its own weights: exact, for any batch, but
    meant for the small batches of serving.

    **Args**: as the backbones.

    Source: Sheng et al. 2021, "One Model to Serve All: Star Topology Adaptive Recommender", without the auxiliary
    network (off in the MLoRA authors' configs too). Intended differences from their code: ``W_d`` starts at one, not
    glorot uniform, which makes the product start tiny; the domain is read row by row; dropout as in every other model
    (theirs has none: ``dropout=0``); glorot normal and ``init_std`` as in every other model.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int,
        hidden_units: Sequence[int],
        dropout: float,
        init_std: float = 0.01,
        make_table: MakeTable = table_of,
    ) -> None:
        super().__init__()
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.norm = PartitionedNorm(width, schema.num_domains)
        layer = partial(StarLinear, num_domains=schema.num_domains, rows=self.rows)
        self.tower = MLP(width, hidden_units, dropout, linear=layer)
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        x = self.norm(join(self.embedding(ids), dense), domain)
        return scalar(self.head(self.tower(x)))


class DomainRows:
    """The rows of the current batch, grouped by domain once and read by every StarLinear of the model."""

    domain: Tensor
    """(B,) as the model received it."""
    order: Tensor | None = None
    """(B,) rows sorted by domain, and ``inverse`` back; None if they came sorted."""
    inverse: Tensor | None = None
    sizes: Sequence[int] = ()
    """Rows of each group; the first group is that of domain -1 if ``unknown``, the others those of ``present``."""
    present: Tensor
    unknown: bool = False

    def group_(self, domain: Tensor) -> None:
        """Take the rows of a batch."""
        self.domain = domain
        if torch.compiler.is_compiling():
            return  # each row will gather its own weights
        self.order = self.inverse = None
        present, sizes = torch.unique_consecutive(domain, return_counts=True)
        if not all(before < after for before, after in pairwise(present.tolist())):
            self.order = torch.argsort(domain, stable=True)
            self.inverse = torch.argsort(self.order)
            present, sizes = torch.unique_consecutive(domain[self.order], return_counts=True)
        self.unknown = len(present) == 0 or bool(present[0] < 0)
        self.present = present[1:] if self.unknown else present
        self.sizes = sizes.tolist() or [0]


class StarLinear(nn.Linear):
    """A Linear of each domain: ``y = x (W_s ⊙ W_d) + b_s + b_d``, rows in and out in the batch's order.

    ``weight`` and ``bias`` are the shared ones; ``domain_weight (D, out * in)`` and ``domain_bias (D, out)`` hold one row a
    domain. Domain weights start at one, domain biases at zero.

    **Shape**: ``(B, ..., in_features)`` to ``(B, ..., out_features)``.

    Args:
        in_features, out_features: as ``nn.Linear``.
        num_domains: ``D``.
        rows: the grouping of the batch, set by the model before the call.

    Source: Sheng et al. 2021, STAR, the star topology FCN. The domain rows may get sparse gradients, as in
    ``EmbeddingTable``: set ``sparse``.
    """

    def __init__(self, in_features: int, out_features: int, num_domains: int, rows: DomainRows) -> None:
        super().__init__(in_features, out_features)
        self.domain_weight = nn.Parameter(torch.ones(num_domains, out_features * in_features))
        self.domain_bias = nn.Parameter(torch.zeros(num_domains, out_features))
        self.rows = rows
        self.sparse = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._row_by_row(x)
        rows = self.rows
        if rows.order is not None:
            x = x.index_select(0, rows.order)
        weights, biases = self._of_domains(rows.present)
        groups = zip(
            torch.split(x, list(rows.sizes)),
            (self.weight, *weights) if rows.unknown else weights,
            (self.bias, *biases) if rows.unknown else biases,
            strict=True,
        )
        y = torch.cat([F.linear(part, weight, bias) for part, weight, bias in groups])
        return y if rows.inverse is None else y.index_select(0, rows.inverse)

    def plain(self, domain: int) -> nn.Linear:
        """What this layer is for one domain: ``W = W_s ⊙ W_d``, ``b = b_s + b_d``."""
        layer = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight * self.domain_weight[domain].view_as(self.weight))
            layer.bias.copy_(self.bias + self.domain_bias[domain])
        return layer.requires_grad_(self.weight.requires_grad)

    def _of_domains(self, domains: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The weight (out, in) and the bias (out,) of each domain."""
        scale = F.embedding(domains, self.domain_weight, sparse=self.sparse).view(-1, *self.weight.shape)
        shift = F.embedding(domains, self.domain_bias, sparse=self.sparse)
        return (self.weight * scale).unbind(), (self.bias + shift).unbind()

    def _row_by_row(self, x: Tensor) -> Tensor:
        known = (self.rows.domain >= 0).unsqueeze(1)
        own = self.rows.domain.clamp(min=0)
        scale = torch.where(known, self.domain_weight[own], 1.0).view(-1, *self.weight.shape)  # (B, out, in)
        shift = torch.where(known, self.domain_bias[own], 0.0)
        y = torch.einsum("boi,b...i->b...o", self.weight * scale, x)
        return y + (self.bias + shift).view(-1, *[1] * (x.dim() - 2), self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_domains={self.domain_bias.shape[0]}"
