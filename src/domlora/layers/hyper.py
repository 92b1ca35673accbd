"""Layers whose weights another network makes: from a domain's vector, once a domain, or from a row, once a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.layers.domain_linear import DomainRows, row_by_row
from domlora.layers.experts import DomainEmbedding
from domlora.layers.partitioned_norm import PartitionedNorm

__all__ = ["AdaptiveLinear", "GeneratedLinear", "HyperAdapter", "MetaUnit", "VectorRows"]

_SLOPE = 0.1
"""Of the leaky relu in a meta unit."""


class VectorRows(DomainRows):
    """The rows of a batch grouped by domain, with the vector of each group's domain.

    Args:
        embedding: the vectors, a submodule of the model that holds the layers.
    """

    def __init__(self, embedding: DomainEmbedding) -> None:
        self.embedding = embedding

    def vectors(self) -> Tensor:
        """``(N, C)``, one for each group; ``(B, C)``, one for each row, under ``torch.compile`` and ``torch.export``."""
        if torch.compiler.is_compiling():
            return cast(Tensor, self.embedding(self.domain))
        groups = torch.cat([self.present.new_full((int(self.unknown),), -1), self.present])
        return cast(Tensor, self.embedding(groups))


class GeneratedLinear(nn.Linear):
    """A Linear whose weights are made from the domain's vector ``z_d``: ``y = x (W + sum_c z_dc G_c) + b + z_d Q``.

    ``weight`` and ``bias`` are ``W`` and ``b``, what all domains share; ``generator_weight (C, out * in)`` holds the
    ``G_c`` and ``generator_bias (C, out)`` is ``Q``. ``W`` starts glorot normal, ``G_c`` so that a vector of unit variance
    adds as much as ``W`` is, ``b`` and ``Q`` at zero. Domains with small vectors start alike. Rows of domain -1 use the
    mean of all domains' vectors.

    Weights are made once for each domain in the batch; under ``torch.compile`` and ``torch.export`` once for each row.

    **Shape**: ``(B, ..., in_features)`` to ``(B, ..., out_features)``, rows in and out in the batch's order.

    Args:
        in_features, out_features: as ``nn.Linear``.
        rows: the grouping of the batch, set by the model before the call.

    Example:
        >>> rows = VectorRows(DomainEmbedding(5, embedding_dim=2))
        >>> layer = GeneratedLinear(4, 3, rows)
        >>> rows.group_(torch.tensor([2, 0, -1]))
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 3])
    """

    def __init__(self, in_features: int, out_features: int, rows: VectorRows) -> None:
        super().__init__(in_features, out_features)
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.rows, size = rows, rows.embedding.embedding_dim
        std = math.sqrt(2 / (in_features + out_features) / size)
        self.generator_weight = nn.Parameter(torch.randn(size, out_features * in_features) * std)
        self.generator_bias = nn.Parameter(torch.zeros(size, out_features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._generated(self.rows.vectors())
        if torch.compiler.is_compiling():
            return row_by_row(x, weight, bias)
        return self.rows.linear_of_groups(x, weight, bias)

    def plain(self, domain: int) -> nn.Linear:
        """What this layer is for one domain."""
        layer = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            weight, bias = self._generated(self.rows.embedding.weight[domain].unsqueeze(0))
            layer.weight.copy_(weight[0])
            layer.bias.copy_(bias[0])
        return layer.requires_grad_(self.weight.requires_grad)

    def _generated(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, C)`` to weights ``(N, out, in)`` and biases ``(N, out)``."""
        weight = torch.addmm(self.weight.flatten(), vectors, self.generator_weight)
        return weight.view(-1, *self.weight.shape), torch.addmm(self.bias, vectors, self.generator_bias)


class MetaUnit(nn.ModuleList):
    """Layers whose weights come from the domain's vector: ``h_i = leaky_relu(h_{i-1} W_{i,d} + b_{i,d})``, slope 0.1.

    **Shape**: ``(B, ..., features)`` to the same.

    Args:
        features: width of each layer.
        num_layers: how many.
        rows: the grouping of the batch, set by the model before the call.

    Source: Zhang et al. 2022, M2M, the meta unit: ``W = reshape(V_w s + v_w)``, ``b = V_b s + v_b`` of the scenario's
    representation ``s``.
    """

    def __init__(self, features: int, num_layers: int, rows: VectorRows) -> None:
        super().__init__(GeneratedLinear(features, features, rows) for _ in range(num_layers))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self:
            h = F.leaky_relu(layer(h), _SLOPE)
        return h


class AdaptiveLinear(nn.Module):
    """A Linear of low rank ``K`` whose middle comes from the domain's vector: ``y = ((x V) S_d + s_d) U + b``.

    ``V`` is ``down``, ``S_d`` and ``s_d`` are the :class:`GeneratedLinear` ``core``, ``U`` and ``b`` are ``up``. The three
    are applied one after the other, never multiplied. ``over_parameterized`` makes ``V`` and ``U`` products of two wider
    Linears with nothing in between, ``down.0``, ``down.1`` and ``up.0``, ``up.1``: the same functions, more to learn with.
    Each Linear starts glorot normal, biases at zero.

    **Shape**: ``(B, in_features)`` to ``(B, out_features)``.

    Args:
        in_features, out_features: as ``nn.Linear``.
        reduction: ``K = max(min(in_features, out_features) // reduction, 1)``.
        over_parameterized: whether ``V`` and ``U`` are products, through ``min(in_features, out_features)`` units.
        rows: the grouping of the batch, set by the model before the call.

    Source: Yan et al. 2022, APG: low-rank parameterisation ``W_i = U S_i V`` with ``U`` and ``V`` shared, decomposed
    feed-forwarding ``U (S_i (V x))``, and over-parameterisation ``U = U_l U_r``, ``V = V_l V_r``.
    """

    def __init__(
        self, in_features: int, out_features: int, *, reduction: int, over_parameterized: bool, rows: VectorRows
    ) -> None:
        super().__init__()
        wide = min(in_features, out_features)
        rank = max(wide // reduction, 1)
        self.in_features, self.out_features = in_features, out_features
        through = [wide] if over_parameterized else []
        self.down = _chain([in_features, *through, rank], bias=False)
        self.core = GeneratedLinear(rank, rank, rows)
        self.up = _chain([rank, *through, out_features], bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.core(self.down(x))))

    @property
    def weight(self) -> Tensor:
        """The last Linear's, which a tower gives its start as that of any layer."""
        return cast(nn.Linear, self.up[-1]).weight

    @property
    def bias(self) -> Tensor:
        """The last Linear's."""
        return cast(nn.Linear, self.up[-1]).bias


class HyperAdapter(nn.Module):
    """A bottleneck beside a layer, its two matrices made for each row: ``y = h + norm_d(sigmoid(h W_i + b) W'_i)``.

    ``W_i = U M_iᵀ V`` and ``W'_i = U' M_iᵀ V'`` share the small matrix ``M_i (K, K)`` that a network outside makes of row
    ``i``; factors are applied one after the other. ``norm_d`` is the :class:`PartitionedNorm` of the row's domain. ``U``,
    ``V``, ``U'``, ``V'`` start glorot normal, ``b`` at zero, and the norm's shared scale at zero, so that a fresh adapter
    changes nothing.

    **Shape**: ``h (B, features)``, ``matrix (B, K, K)``, ``domain (B,)`` to ``(B, features)``.

    Args:
        features: width of the layer.
        bottleneck: width in the middle.
        rank: ``K``.
        num_domains: ``D``, for the norm.

    Source: Li et al. 2023, HAMUR, the domain-specific adapter cell, and the low-rank decomposition of its parameters.
    Intended differences from the authors' code: ``U``, ``V`` start glorot normal, theirs at one, where all ranks do the
    same; the norm's scale starts at zero, not one; statistics of a row's own domain and running ones in evaluation, where
    theirs take those of the whole batch also in evaluation; no bias before the norm, which takes it out again.
    """

    def __init__(self, features: int, bottleneck: int, rank: int, num_domains: int) -> None:
        super().__init__()
        self.down = _chain([features, rank, bottleneck], bias=True)
        self.up = _chain([bottleneck, rank, features], bias=False)
        self.norm = PartitionedNorm(features, num_domains)
        nn.init.zeros_(self.norm.weight)

    def forward(self, h: Tensor, matrix: Tensor, domain: Tensor) -> Tensor:
        middle = torch.sigmoid(_through(self.down, h, matrix))
        return h + cast(Tensor, self.norm(_through(self.up, middle, matrix), domain))


def _chain(widths: Sequence[int], bias: bool) -> nn.Sequential:
    """Linears one after the other, glorot normal; a bias, zero, in the last at most."""
    linears = [nn.Linear(before, after, bias=False) for before, after in pairwise(widths[:-1])]
    linears.append(nn.Linear(widths[-2], widths[-1], bias=bias))
    for linear in linears:
        nn.init.xavier_normal_(linear.weight)
    if bias:
        nn.init.zeros_(linears[-1].bias)
    return nn.Sequential(*linears)


def _through(pair: nn.Sequential, x: Tensor, matrix: Tensor) -> Tensor:
    """``x U Mᵀ V``, with ``M (B, K, K)`` of each row's own."""
    first, second = pair
    return cast(Tensor, second((matrix * first(x).unsqueeze(1)).sum(2)))  # thousands of tiny matmuls take longer
