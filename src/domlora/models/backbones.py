"""Nine click models with one signature: ``forward(ids (B, S), dense (B, G), domain (B,)) -> logit (B,)``.

They do not look at ``domain``: to them it is a feature like any other, where the schema has it as one. Each model is
an ``embedding`` table, a ``tower`` with its ``head``, perhaps a first-order term ``linear``, and what makes it special. The
one global bias is in ``linear``, or in ``head`` where there is no ``linear``. Dense columns join the tower's input and the
first-order term; features are crossed as embeddings, so a model of crosses wants two categorical features at least.

**Args** of all: ``schema``; ``embedding_dim`` ``E``; ``hidden_units`` of the tower; ``dropout`` after each of its
activations; ``init_std`` of the embeddings; ``make_table``, what makes them. ``x`` below is ``(B, F, E)``, the embedded
features; a sequence is one of them, pooled.

Structures follow DeepCTR 0.9.0 as the MLoRA authors call it. Intended differences from their code, in all nine: one
``init_std`` for models with and without adapters (theirs: 1e-4 and 1e-2, which hides most of NFM); dropout is alive in both;
logits, not probabilities; L2 is the optimizer's affair; glorot normal is not truncated.
"""

from __future__ import annotations

# ruff: noqa: ARG002 - one signature for all models, and these nine do not read the domain
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from domlora.features.schema import Schema
from domlora.layers.interactions import (
    CIN,
    BilinearInteraction,
    BilinearKind,
    CrossNet,
    InteractingLayer,
    SENet,
    bi_interaction,
    factorization_machine,
    inner_products,
)
from domlora.layers.mlp import MLP as Tower  # noqa: N811 - a model has the name here
from domlora.models.parts import MakeTable, first_order_of, head_of, join, require_pairs, scalar, table_of

__all__ = ["DCN", "MLP", "NFM", "PNN", "WDL", "AutoInt", "DeepFM", "FiBiNET", "XDeepFM"]


class MLP(nn.Module):
    """A tower on the concatenated embeddings: ``logit = head(tower([x, dense]))``.

    Source: the plain DNN that the MLoRA paper adapts.
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
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.tower = Tower(schema.num_fields * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        return scalar(self.head(self.tower(join(self.embedding(ids), dense))))


class WDL(nn.Module):
    """Wide and deep: ``logit = linear(row) + head(tower([x, dense]))``.

    Source: Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems", eq. 3; wide part without hand-made
    crosses, and one optimizer for both parts.
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
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.tower = Tower(schema.num_fields * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        deep = self.head(self.tower(join(self.embedding(ids), dense)))
        return scalar(self.linear(ids, dense) + deep)


class NFM(nn.Module):
    """A tower on the pooled products of all pairs: ``logit = linear(row) + head(tower([sum_{i<j} x_i ⊙ x_j, dense]))``.

    Source: He and Chua 2017, "Neural Factorization Machines", eq. 2-7, without batch norm and without dropout on the
    pooled products. With tiny embeddings (the authors' 1e-4) the products carry no gradient.
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
        require_pairs(schema, "nfm")
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.tower = Tower(embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        pooled = bi_interaction(self.embedding(ids))  # (B, F, E) -> (B, E)
        return scalar(self.linear(ids, dense) + self.head(self.tower(join(pooled, dense))))


class AutoInt(nn.Module):
    """Self-attention over features beside a tower: ``logit = linear(row) + head([attention(x), tower([x, dense])])``.

    **Args** of its own: ``num_layers`` of attention, ``num_heads``, ``head_dim``, ``scaling`` of the scores.

    Source: Song et al. 2019, "AutoInt", eq. 5-9, with the joint tower of its section 5.5 (AutoInt+).
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
        num_layers: int = 3,
        num_heads: int = 4,
        head_dim: int = 8,
        scaling: bool = False,
    ) -> None:
        super().__init__()
        require_pairs(schema, "autoint")
        widths = [embedding_dim, *(num_heads * head_dim for _ in range(num_layers))]
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.attention = nn.Sequential(*(InteractingLayer(w, num_heads, head_dim, scaling) for w in widths[:-1]))
        self.tower = Tower(schema.num_fields * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(schema.num_fields * widths[-1] + self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = self.embedding(ids)
        attended = self.attention(x).flatten(1)  # (B, F, H * d) -> (B, F * H * d)
        stacked = torch.cat([attended, self.tower(join(x, dense))], dim=1)
        return scalar(self.linear(ids, dense) + self.head(stacked))


class PNN(nn.Module):
    """Inner products join the tower's input: ``logit = head(tower([x, {x_i · x_j}_{i<j}, dense]))``.

    Source: Qu et al. 2016, "Product-based Neural Networks" (IPNN), each product its own input as in DeepCTR; no outer
    products, no first-order term.
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
        num_pairs = require_pairs(schema, "pnn")
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.tower = Tower(schema.num_fields * embedding_dim + num_pairs + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = self.embedding(ids)
        signals = torch.cat([x.flatten(1), inner_products(x)], dim=1)  # (B, F * E + F (F-1) / 2)
        return scalar(self.head(self.tower(join(signals, dense))))


class DCN(nn.Module):
    """Cross layers beside a tower: ``logit = linear(row) + head([cross([x, dense]), tower([x, dense])])``.

    **Args** of its own: ``cross_layers``.

    Source: Wang et al. 2017, "Deep & Cross Network for Ad Click Predictions", eq. 3-5 (vector kernels); the
    first-order term is DeepCTR's.
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
        cross_layers: int = 2,
    ) -> None:
        super().__init__()
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.cross = CrossNet(width, cross_layers)
        self.tower = Tower(width, hidden_units, dropout)
        self.head = head_of(width + self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = join(self.embedding(ids), dense)
        stacked = torch.cat([self.cross(x), self.tower(x)], dim=1)
        return scalar(self.linear(ids, dense) + self.head(stacked))


class FiBiNET(nn.Module):
    """A tower on bilinear products of plain and of re-weighted features.

    ``logit = linear(row) + head(tower([bilinear_1(senet(x)), bilinear_2(x), dense]))``.

    **Args** of its own: ``reduction`` of the SENet, ``bilinear`` kind (``interaction``, ``each``, ``all``).

    Source: Huang et al. 2019, "FiBiNET", sections 3.3-3.7. The two bilinear layers are apart, as in the paper, DeepCTR
    and FuxiCTR; DeepCTR-Torch calls one twice.
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
        reduction: int = 3,
        bilinear: BilinearKind = "interaction",
    ) -> None:
        super().__init__()
        num_pairs = require_pairs(schema, "fibinet")
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.senet = SENet(schema.num_fields, reduction)
        self.weighed_products = BilinearInteraction(schema.num_fields, embedding_dim, bilinear)
        self.plain_products = BilinearInteraction(schema.num_fields, embedding_dim, bilinear)
        self.tower = Tower(2 * num_pairs * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = self.embedding(ids)
        products = torch.cat([self.weighed_products(self.senet(x)), self.plain_products(x)], dim=1)  # (B, 2 * pairs, E)
        return scalar(self.linear(ids, dense) + self.head(self.tower(join(products, dense))))


class DeepFM(nn.Module):
    """A factorization machine beside a tower: ``logit = linear(row) + sum_{i<j} x_i · x_j + head(tower([x, dense]))``.

    Source: Guo et al. 2017, "DeepFM", eq. 1-4.
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
        require_pairs(schema, "deepfm")
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.tower = Tower(schema.num_fields * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = self.embedding(ids)
        deep = self.head(self.tower(join(x, dense)))
        return scalar(self.linear(ids, dense) + factorization_machine(x) + deep)


class XDeepFM(nn.Module):
    """A compressed interaction network beside a tower: ``logit = linear(row) + cin_head(cin(x)) + head(tower([x, dense]))``.

    **Args** of its own: ``cin_units``, feature maps of each CIN layer; ``split_half`` of them to the output.

    Source: Lian et al. 2018, "xDeepFM", eq. 6-9. The MLoRA authors' released code never builds it: it matches "deepfm"
    in the name first. Their unused version gives the CIN's head a bias of its own, which the global one makes idle.
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
        cin_units: Sequence[int] = (128, 128),
        split_half: bool = True,
    ) -> None:
        super().__init__()
        require_pairs(schema, "xdeepfm")
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.linear = first_order_of(schema)
        self.cin = CIN(schema.num_fields, cin_units, split_half)
        self.cin_head = head_of(self.cin.out_features)
        self.tower = Tower(schema.num_fields * embedding_dim + schema.num_dense, hidden_units, dropout)
        self.head = head_of(self.tower.out_features)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = self.embedding(ids)
        deep = self.head(self.tower(join(x, dense)))
        return scalar(self.linear(ids, dense) + self.cin_head(self.cin(x)) + deep)


# What the models share: five functions, no base class.
