"""Normalisation with statistics of a row's own domain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from domlora.layers.whole_batch import whole_sum

__all__ = ["PartitionedNorm"]


class PartitionedNorm(nn.Module):
    """Batch normalisation, each domain by its own statistics, scale and shift.

    ``y = γ_s γ_d (x - μ_d) / sqrt(σ_d² + eps) + β_s + β_d`` for a row of domain ``d``. Scales start at one, shifts at zero.

    In training ``μ_d, σ_d²`` are those of the domain's rows in the batch; a domain with a single row, and domain -1,
    take those of the whole batch. In evaluation they are running means, so a row never depends on its batch mates; a
    domain that training never saw, and domain -1, take the pooled running statistics and ``γ_s, β_s`` alone. A frozen
    layer (``weight.requires_grad`` is False) and a batch of one row behave as in evaluation: a frozen base must not
    drift.

    **Shape**: ``x (B, width)``, ``domain (B,)`` int64 to ``(B, width)``. The last row of each ``running_*`` buffer is
    the pooled one.

    Args:
        width: columns of ``x``.
        num_domains: ``D``.
        momentum: share of the old running statistic in the new one. Early on the plain mean over the batches seen so
            far is used, which needs no warm-up.
        eps: added to the variance.

    Source: Sheng et al. 2021, "One Model to Serve All" (STAR), partitioned normalization. Intended differences from the
    MLoRA authors' code: it reads the domain of the batch's first row, starts the running statistics at 0 and 1 without
    correction, and under its TensorFlow normalises with the running statistics in training too.

    Example:
        >>> norm = PartitionedNorm(2, num_domains=3)
        >>> norm(torch.randn(8, 2), torch.tensor([0, 0, 0, 0, 1, 1, 2, -1])).shape
        torch.Size([8, 2])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches: Tensor

    def __init__(self, width: int, num_domains: int, momentum: float = 0.99, eps: float = 1e-3) -> None:
        super().__init__()
        self.momentum, self.eps, self.num_domains = momentum, eps, num_domains
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.domain_weight = nn.Parameter(torch.ones(num_domains, width))
        self.domain_bias = nn.Parameter(torch.zeros(num_domains, width))
        self.register_buffer("running_mean", torch.zeros(num_domains + 1, width))
        self.register_buffer("running_var", torch.ones(num_domains + 1, width))
        self.register_buffer("num_batches", torch.zeros(num_domains + 1, dtype=torch.int64))

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        row = torch.where(domain < 0, self.num_domains, domain)  # (B,): -1 reads the last row, the pooled one
        if self.training and self.weight.requires_grad and x.shape[0] > 1:
            mean, var, full = self._statistics(x, row)
            self._update_(mean.detach(), var.detach(), full)
            return self._normalise(x, mean, var, torch.where(full, self._own_row, self.num_domains)[row], row)
        seen = self.num_batches > 0
        row = torch.where(seen, self._own_row, self.num_domains)[row]
        return self._normalise(x, self.running_mean, self.running_var, row, row)

    @property
    def _own_row(self) -> Tensor:
        return torch.arange(self.num_domains + 1, device=self.weight.device)

    def _statistics(self, x: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance (D + 1, width) of each domain's rows, the last of all rows; who has rows enough."""
        count = whole_sum(x.new_zeros(self.num_domains + 1).index_add(0, row, x.new_ones(x.shape[0])))
        divisor, num_rows = count.clamp(min=1).unsqueeze(1), count.sum()
        zeros = x.new_zeros(self.num_domains + 1, x.shape[1])
        mean = whole_sum(zeros.index_add(0, row, x)) / divisor
        var = whole_sum(zeros.index_add(0, row, (x - mean.index_select(0, row)).square())) / divisor
        share = count / num_rows
        pooled_mean = share @ mean
        pooled_var = share @ (var + (mean - pooled_mean).square())  # within the groups and between them
        count[-1] = num_rows
        return torch.vstack([mean[:-1], pooled_mean]), torch.vstack([var[:-1], pooled_var]), count > 1

    @torch.no_grad()
    def _update_(self, mean: Tensor, var: Tensor, full: Tensor) -> None:
        self.num_batches += full
        step = (1.0 / self.num_batches.clamp(min=1)).clamp(min=1.0 - self.momentum).to(mean) * full
        self.running_mean.lerp_(mean, step.unsqueeze(1))
        self.running_var.lerp_(var, step.unsqueeze(1))

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, source: Tensor, row: Tensor) -> Tensor:
        """Statistics from the rows ``source``, scale and shift from the rows ``row``."""
        weight = torch.cat([self.weight * self.domain_weight, self.weight.unsqueeze(0)])  # (D + 1, width)
        bias = torch.cat([self.bias + self.domain_bias, self.bias.unsqueeze(0)])
        scale = (var + self.eps).rsqrt().index_select(0, source) * weight.index_select(0, row)
        return (x - mean.index_select(0, source)) * scale + bias.index_select(0, row)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, num_domains={self.num_domains}, momentum={self.momentum}, eps={self.eps}"
