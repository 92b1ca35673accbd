"""Rows sorted into clusters as they come, and layers of each cluster's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.layers.domain_linear import StarLinear, row_by_row
from domlora.layers.whole_batch import whole_sum

__all__ = ["ClusterLinear", "ClusterRouter"]


class ClusterRouter(nn.Module):
    """The cluster of each row: the one whose centre has the most similar direction, ``argmax_k u · c_k``, ``u = x / |x|``.

    In training each batch moves the centres before its rows are sorted: ``num_steps`` times

    - ``r_k = softmax_k(u · c'_k / temperature)`` a row, ``c'_k = normalize(sum over rows of r_k u)``, from ``c' = c``

    and then ``c = normalize(momentum c + (1 - momentum) c')``. In evaluation centres stay, so that a row never depends on
    its batch mates; under ``freeze_`` too, which knows them by the name of their buffer. No gradient passes. Centres start
    in random directions.

    **Shape**: ``(B, width)`` to ``(B,)`` int64; the buffer ``running_mean`` holds the centres, ``(num_clusters, width)``.

    Args:
        width: columns of ``x``.
        num_clusters: how many.
        momentum: share of the old centre in the new one, below 1.
        temperature: of the softmax that shares a row among the centres. High, and centres fall together.
        num_steps: how often a batch is shared anew.

    Example:
        >>> router = ClusterRouter(4, num_clusters=3).eval()
        >>> cluster = router(torch.randn(8, 4))
        >>> cluster.shape, bool((cluster < 3).all())
        (torch.Size([8]), True)
    """

    running_mean: Tensor

    def __init__(
        self, width: int, num_clusters: int, momentum: float = 0.9, temperature: float = 0.05, num_steps: int = 3
    ) -> None:
        super().__init__()
        self.momentum, self.temperature, self.num_steps = momentum, temperature, num_steps
        self.register_buffer("running_mean", F.normalize(torch.randn(num_clusters, width), dim=1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        u = F.normalize(x, dim=1)
        if self.training and len(u):
            self._move_(u)
        return (u @ self.running_mean.t()).argmax(1)

    def _move_(self, u: Tensor) -> None:
        centres = self.running_mean
        for _ in range(self.num_steps):
            shares = torch.softmax(u @ centres.t() / self.temperature, dim=1)  # (B, K)
            centres = F.normalize(whole_sum(shares.t() @ u), dim=1)
        self.running_mean.copy_(F.normalize(self.running_mean.lerp(centres, 1.0 - self.momentum), dim=1))

    def extra_repr(self) -> str:
        clusters, width = self.running_mean.shape
        return f"{width}, num_clusters={clusters}, momentum={self.momentum}, temperature={self.temperature}"


class ClusterLinear(StarLinear):
    """A :class:`StarLinear` whose rows are grouped by cluster: ``y = x (W_s ⊙ W_k) + b_s + b_k``.

    ``domain_weight`` and ``domain_bias`` hold one row a cluster. One domain has rows in several clusters, so that merging
    its adapter leaves a layer with a weight ``W_s ⊙ W_k + A_d B_d`` for each cluster.

    **Shape** and **Args**: as ``StarLinear``, with the number of clusters for that of domains.
    """

    def plain(self, domain: int) -> nn.Linear:  # noqa: ARG002 - the same for every domain
        """What an adapter is merged into: the sum form of this layer, whose shared part is zero."""
        return _SummedLinear(self)


class _SummedLinear(nn.Linear):
    """``y = x (W + W_k) + b + b_k``: a ClusterLinear whose shared part can take what is the same for all clusters.

    ``domain_weight (K, out, in)`` has another shape than the layer it stands for, so that neither takes the other's state.
    """

    def __init__(self, layer: ClusterLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
        self.rows = layer.rows
        self.domain_weight = nn.Parameter(
            layer.weight.detach() * layer.domain_weight.detach().view(-1, *layer.weight.shape)
        )
        self.domain_bias = nn.Parameter(layer.bias.detach() + layer.domain_bias.detach())
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.requires_grad_(layer.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            own = self.rows.domain
            return row_by_row(x, self.weight + self.domain_weight[own], self.bias + self.domain_bias[own])
        present = self.rows.present
        weight, bias = self.weight + self.domain_weight[present], self.bias + self.domain_bias[present]
        return self.rows.linear_of_groups(x, weight, bias)
