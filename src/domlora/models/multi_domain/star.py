"""One shared tower, multiplied by what each domain learns of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from domlora.features.schema import Schema
from domlora.layers.domain_linear import DomainRows, StarLinear
from domlora.layers.mlp import MLP
from domlora.layers.partitioned_norm import PartitionedNorm
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["STAR"]


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
