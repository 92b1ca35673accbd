"""One shared tower, multiplied by what each cluster of rows learns of its own; rows find their cluster as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from domlora.errors import ConfigError
from domlora.features.schema import Schema
from domlora.layers.clusters import ClusterLinear, ClusterRouter
from domlora.layers.domain_linear import DomainRows
from domlora.layers.mlp import MLP
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["AdaptDHM"]


class AdaptDHM(nn.Module):
    """Rows are sorted into clusters by what their features say; the tower's weights are shared ⊙ the cluster's own.

    ``logit = head(tower([x, dense]))``, ``h = dropout(relu(h (W_s ⊙ W_k) + b_s + b_k))`` for a row of cluster ``k``, the one
    whose centre has the most similar direction to ``x``, the embedded features (to the dense columns, where there are no
    others). Centres move with the batches of training and stay still in evaluation; see :class:`ClusterRouter`. Cluster
    weights start at one, cluster biases at zero, so that all clusters start from the shared tower.

    The model does not read ``domain``: to it the domain is a feature like any other, where the schema has it as one. So
    rows of domain -1 are rows like others, and nothing grows with the number of domains.

    The grouping of the rows lives in one cell that all layers read, so one eager model must not be called from two threads
    at once. Under ``torch.compile`` and ``torch.export`` each row gathers its cluster's weights: exact, for any batch, but
    meant for the small batches of serving.

    **Args**: as the backbones; ``num_clusters``; ``momentum``, share of a centre's old place in its new one, below 1;
    ``temperature`` of the softmax that shares a row among centres while they move; ``num_steps`` of that in a batch.

    Raises:
        ConfigError: a ``momentum`` with which centres never move.

    Source: Li et al. 2022, "AdaptDHM: Adaptive Distribution Hierarchical Model for Multi-Domain CTR Prediction":
    distribution adaptation by routing to moving cluster centres, and a multi-distribution network of shared ⊙ own
    weights. The routing was checked against two public implementations, not against the paper's equations. Intended
    differences from those: similarity is that of directions, with a low temperature, because the softmax over plain
    products of small embeddings is flat and lets all centres fall together; the centres move once a batch, by the
    momentum, after ``num_steps`` of sharing; they are buffers, saved with the model; cluster weights start at one, not
    glorot uniform; the head is shared; dropout and start as in every other model.
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
        num_clusters: int = 3,
        momentum: float = 0.9,
        temperature: float = 0.05,
        num_steps: int = 3,
    ) -> None:
        super().__init__()
        if momentum >= 1:
            raise ConfigError("momentum must be below 1, or centres never move", received=momentum)
        width = schema.num_fields * embedding_dim
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.router = ClusterRouter(width or schema.num_dense, num_clusters, momentum, temperature, num_steps)
        layer = partial(ClusterLinear, num_domains=num_clusters, rows=self.rows)
        self.tower = MLP(width + schema.num_dense, hidden_units, dropout, linear=layer)
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002 - one signature for all
        vectors = self.embedding(ids).flatten(1)  # (B, F, E) -> (B, F * E)
        self.rows.group_(self.router(vectors if vectors.shape[1] else dense))
        return scalar(self.head(self.tower(join(vectors, dense))))
