"""Models whose weights another network makes: of the domain, or of the row.

What a domain adds is a vector of a few numbers. A row of domain -1 uses the mean of all domains' vectors.

M2M and APG make weights once for each domain in the batch. The grouping of the rows lives in one cell that all layers
read, so one eager model must not be called from two threads at once. Under ``torch.compile`` and ``torch.export`` weights
are made for each row: exact, for any batch, but meant for the small batches of serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import ConfigError
from domlora.features.schema import Schema
from domlora.layers.dropout import relu_dropout
from domlora.layers.experts import DomainEmbedding, Experts, linear_of
from domlora.layers.hyper import AdaptiveLinear, HyperAdapter, MetaUnit, VectorRows
from domlora.layers.mlp import MLP
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["APG", "HAMUR", "M2M"]


class M2M(nn.Module):
    """Experts, mixed and refined by layers whose weights are made from the domain's vector.

    With experts ``e_k = tower.k([x, dense])`` and meta units ``meta``, layers ``h -> leaky_relu(h W_d + b_d)`` with ``W_d``
    and ``b_d`` linear in the domain's vector:

    - meta attention: ``r = sum_k softmax_k(v · meta(e_k)) e_k``
    - meta tower: ``t_j = leaky_relu(meta_j(t_{j-1}) + t_{j-1})``, with ``t_0 = r``

    and ``logit = head(t)``. Experts start apart from each other, domains nearly alike, by the spread ``init_std`` of their
    vectors.

    **Args**: as the backbones, where ``hidden_units`` are those of each expert, ``tower.<k>``; ``num_experts``;
    ``vector_dim``, the width of a domain's vector; ``meta_layers`` of each meta unit; ``meta_units`` of the meta tower.

    Source: Zhang et al. 2022, "Leaving No One Behind: A Multi-Scenario Multi-Task Meta Learning Approach for Advertiser
    Modeling": meta unit, meta attention and meta tower. The formulas were checked in a textbook's account of the paper
    and against public implementations, not in the paper itself. Intended differences: one task, whose vector would only
    shift biases that are made anyway, so there is none; the scenario's representation is a vector of the domain, without
    an advertiser's features, so that weights are made once a domain (an MLP on a vector that is free itself adds
    nothing); experts are towers on the embedded features, without a Transformer over sequences, which come pooled here; a
    click's logit, not a Poisson rate; a leaky relu of slope 0.1; dropout and start as in every other model.
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
        num_experts: int = 4,
        vector_dim: int = 16,
        meta_layers: int = 1,
        meta_units: int = 1,
    ) -> None:
        super().__init__()
        width, units = schema.num_fields * embedding_dim + schema.num_dense, hidden_units[-1]
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(schema.num_domains, vector_dim, init_std)
        self.rows = VectorRows(self.domain_embedding)
        self.tower = Experts(MLP(width, hidden_units, dropout) for _ in range(num_experts))
        self.meta_attention = MetaUnit(units, meta_layers, self.rows)
        self.score = head_of(units)
        self.meta_residuals = nn.ModuleList(MetaUnit(units, meta_layers, self.rows) for _ in range(meta_units))
        self.head = head_of(units, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        experts = torch.stack(self.tower(join(self.embedding(ids), dense)), dim=1)  # (B, K, H)
        weights = torch.softmax(self.score(self.meta_attention(experts)), dim=1)  # (B, K, 1)
        t = (weights * experts).sum(1)
        for unit in self.meta_residuals:
            t = F.leaky_relu(unit(t) + t, 0.1)
        return scalar(self.head(t))


class APG(nn.Module):
    """A tower of low rank whose inner matrices are made from the domain's vector.

    ``logit = head(tower([x, dense]))`` with layers ``h = dropout(relu(((h V) S_d + s_d) U + b))``, where ``S_d`` and ``s_d``
    are linear in the domain's vector. Domains start nearly alike, by the spread ``init_std`` of their vectors.

    **Args**: as the backbones; ``vector_dim``, the width of a domain's vector; ``reduction``, how many times narrower than
    the narrower side of a layer its inner matrix is; ``over_parameterized``, whether ``V`` and ``U`` are products of two
    matrices.

    Source: Yan et al. 2022, "APG: Adaptive Parameter Generation Network for Click-Through Rate Prediction", with the
    group-wise condition, the domain, and parameters shared but for the inner matrix; see :class:`AdaptiveLinear`. The
    formulas were checked in a textbook's account of the paper and against public implementations, not in the paper
    itself. Intended differences: no mix-wise or self-wise condition, which make weights for each row; what makes the
    weights is one linear map of a vector that is free itself, no MLP; dropout and start as in every other model.
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
        vector_dim: int = 16,
        reduction: int = 4,
        over_parameterized: bool = False,
    ) -> None:
        super().__init__()
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(schema.num_domains, vector_dim, init_std)
        self.rows = VectorRows(self.domain_embedding)
        layer = partial(AdaptiveLinear, reduction=reduction, over_parameterized=over_parameterized, rows=self.rows)
        self.tower = MLP(width, hidden_units, dropout, linear=cast(Any, layer))
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        return scalar(self.head(self.tower(join(self.embedding(ids), dense))))


class HAMUR(nn.Module):
    """A shared tower with adapters behind its last layers, whose matrices a network makes of each row and its domain.

    ``logit = head(tower([x, dense]))``; behind each of the last ``num_adapters`` layers stands
    ``h <- h + norm_d(sigmoid(h W_i + b) W'_i)``, where ``W_i = U M_iᵀ V`` and ``W'_i = U' M_iᵀ V'`` are built around one
    matrix ``M_i = reshape(relu([x, dense, z_d] P + p) P' + q)`` of row ``i``, ``z_d`` being its domain's vector. A fresh
    model is its tower alone: the norm's scale starts at zero.

    **Args**: as the backbones; ``num_adapters``; ``bottleneck``, an adapter's inner width; ``rank``, the size of ``M_i``;
    ``hyper_units``, the hidden width of the network that makes it.

    Raises:
        ConfigError: more adapters than layers.

    Source: Li et al. 2023, "HAMUR: Hyper Adapter for Multi-Domain Recommendation": domain-specific adapters, a
    domain-shared hyper-network and its low-rank decomposition, on an MLP; see :class:`HyperAdapter`. Checked against the
    authors' code, not the paper's equations. Intended differences: one tower for all domains, theirs has one for each;
    the domain comes in as a vector beside the row; no batch norm in the tower and the hyper-network, whose last layer is
    linear; dropout and start as in every other model.
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
        num_adapters: int = 1,
        bottleneck: int = 32,
        rank: int = 16,
        hyper_units: int = 64,
    ) -> None:
        super().__init__()
        if num_adapters > len(hidden_units):
            received = {"num_adapters": num_adapters, "hidden_units": list(hidden_units)}
            raise ConfigError("HAMUR needs a layer of the tower for each adapter", received=received)
        width, self.rank = schema.num_fields * embedding_dim + schema.num_dense, rank
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(schema.num_domains, embedding_dim, init_std)
        self.hyper = nn.Sequential(
            linear_of(width + embedding_dim, hyper_units), nn.ReLU(), linear_of(hyper_units, rank * rank)
        )
        self.tower = MLP(width, hidden_units, dropout)
        self.adapters = nn.ModuleList(
            HyperAdapter(units, bottleneck, rank, schema.num_domains) for units in hidden_units[-num_adapters:]
        )
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        h = join(self.embedding(ids), dense)
        made = self.hyper(torch.cat([h, self.domain_embedding(domain)], dim=1))
        matrix = made.view(-1, self.rank, self.rank)  # (B, K * K) -> (B, K, K)
        first = len(self.tower) - len(self.adapters)
        for place, layer in enumerate(self.tower):
            h = relu_dropout(layer(h), self.tower.dropout, self.training)
            if place >= first:
                h = self.adapters[place - first](h, matrix, domain)
        return scalar(self.head(h))
