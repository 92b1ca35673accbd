"""Towers, experts and gates that read the domain: what several multi-domain models are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from domlora.layers.domain_linear import DomainLinear, DomainRows
from domlora.layers.embedding import EmbeddingTable
from domlora.layers.mlp import MLP
from domlora.layers.rows import all_rows

__all__ = ["DomainEmbedding", "DomainMLP", "Experts", "GateUnit", "domain_linear", "linear_of", "mixture"]


def domain_linear(in_features: int, out_features: int, num_domains: int, rows: DomainRows) -> DomainLinear:
    """A :class:`DomainLinear` whose domains start alike: one glorot normal draw for all, biases at zero.

    Their mean, which rows of domain -1 use, is then a layer from the start; the mean over independent draws is close to
    zero. The domains part as soon as each learns from its own rows.

    Example:
        >>> layer = domain_linear(4, 3, 5, DomainRows())
        >>> bool((layer.weight == layer.weight[0]).all())
        True
    """
    layer = DomainLinear(in_features, out_features, num_domains, rows)
    _start_alike_(layer)
    return layer


class DomainMLP(MLP):
    """A tower of each domain's own: ``h_i = dropout(relu(h_{i-1} W_{i,d} + b_{i,d}))`` for a row of domain ``d``.

    All domains start from one glorot normal draw, biases at zero. Rows of domain -1 use the mean over domains of each
    layer's weights. The cost follows the domains in the batch.

    **Shape**: ``(B, in_features)`` to ``(B, out_features)``.

    Args:
        in_features, hidden_units, dropout: as ``MLP``.
        num_domains: ``D``.
        rows: the grouping of the batch, set by the model before the call.

    Example:
        >>> rows = DomainRows()
        >>> tower = DomainMLP(8, [6, 4], 0.5, num_domains=3, rows=rows)
        >>> rows.group_(torch.tensor([2, 0, -1]))
        >>> tower(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self, in_features: int, hidden_units: Sequence[int], dropout: float, num_domains: int, rows: DomainRows
    ) -> None:
        layer = cast(Any, partial(DomainLinear, num_domains=num_domains, rows=rows))
        super().__init__(in_features, hidden_units, dropout, linear=layer)
        for each in self:
            _start_alike_(cast(DomainLinear, each))


class DomainEmbedding(EmbeddingTable):
    """A vector of each domain: ``y[b] = weight[domain[b]]``, and the mean over domains for a row of domain -1.

    Starts from N(0, init_std²). A row of domain -1 teaches no domain anything.

    **Shape**: ``domain (B,)`` int64 to ``(B, embedding_dim)``.

    Args:
        num_domains: ``D``.
        embedding_dim: width of the vectors.
        init_std: standard deviation at the start.

    Example:
        >>> DomainEmbedding(3, embedding_dim=4)(torch.tensor([2, 0, -1])).shape
        torch.Size([3, 4])
    """

    _starting_rows = staticmethod(all_rows)  # they are few, and their mean is asked for

    def __init__(self, num_domains: int, embedding_dim: int, init_std: float = 0.01) -> None:
        super().__init__([num_domains], embedding_dim, init_std)

    def forward(self, domain: Tensor) -> Tensor:
        known = (domain >= 0).unsqueeze(1)
        own = super().forward(domain.clamp(min=0).unsqueeze(1)).squeeze(1)  # (B, 1, E) -> (B, E)
        return torch.where(known, own, self.weight.detach().mean(0))


class Experts(nn.ModuleList):
    """Modules that read the same input, each for itself.

    **Shape**: ``(B, in_features)`` to one tensor ``(B, out_features)`` an expert.

    Example:
        >>> [y.shape for y in Experts(MLP(8, [6, 4]) for _ in range(2))(torch.ones(3, 8))]
        [torch.Size([3, 4]), torch.Size([3, 4])]
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        return [expert(x) for expert in self]


class GateUnit(nn.Module):
    """Factors between 0 and 2 from what is known beforehand: ``y = 2 sigmoid(relu(x W + b) W' + b')``.

    Weights start glorot normal, biases at zero, so that factors start near one.

    **Shape**: ``(B, in_features)`` to ``(B, out_features)``.

    Args:
        in_features: width of the input.
        hidden_features: width between the two layers.
        out_features: factors.

    Source: Chang et al. 2023, "PEPNet", the gate neural unit (Gate NU) with gamma = 2.

    Example:
        >>> GateUnit(8, 4, 6)(torch.zeros(2, 8)).unique().tolist()
        [1.0]
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.first = linear_of(in_features, hidden_features)
        self.second = linear_of(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(self.second(torch.relu(self.first(x))))


def linear_of(in_features: int, out_features: int) -> nn.Linear:
    """A Linear that starts as those of every tower: glorot normal, biases at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def mixture(scores: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """``y = sum_k softmax(scores)_k e_k``: what a gate makes of its experts.

    **Shape**: ``scores (B, K)`` and ``K`` tensors ``(B, H)`` to ``(B, H)``.

    Example:
        >>> mixture(torch.zeros(1, 2), [torch.tensor([[2.0]]), torch.tensor([[4.0]])])
        tensor([[3.]])
    """
    weights = torch.softmax(scores, dim=1).unsqueeze(1)  # (B, 1, K)
    return torch.bmm(weights, torch.stack(list(experts), dim=1)).squeeze(1)  # (B, 1, K) @ (B, K, H) -> (B, H)


@torch.no_grad()
def _start_alike_(layer: DomainLinear) -> None:
    one = nn.init.xavier_normal_(torch.empty(layer.out_features, layer.in_features))
    layer.weight.copy_(one.flatten().expand_as(layer.weight))
    layer.bias.zero_()
