"""Linear layers with weights for each domain, for batches that mix domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.layers.grouped import grouped_linear

__all__ = ["DomainLinear", "DomainRows", "StarLinear", "row_by_row"]

Unknown = Callable[[], tuple[Tensor, Tensor | None]]


class DomainRows:
    """The rows of the current batch, grouped by domain once and read by every such layer of a model.

    One eager model with such layers must not be called from two threads at once. Under ``torch.compile`` and
    ``torch.export`` each row gathers its own weights: exact, for any batch, but meant for the small batches of serving.
    """

    domain: Tensor
    """(B,) as the model received it."""
    order: Tensor | None = None
    """(B,) rows sorted by domain, and ``inverse`` back; None if they came sorted."""
    inverse: Tensor | None = None
    sizes: Sequence[int] = ()
    """Rows of each group; the first group is that of domain -1 if ``unknown``, the others those of ``present``."""
    present: Tensor
    places: list[int]
    """``present`` as numbers, read from the device once a batch and not once a layer."""
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
        self.places = self.present.tolist()
        self.sizes = sizes.tolist() or [0]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each group."""
        return torch.split(self._sorted(x), list(self.sizes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What was made of each group's rows, in the batch's order."""
        return self._unsorted(torch.cat(list(parts)))

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        unknown: Unknown,
        scale: Tensor | None = None,
        sparse: bool = False,
    ) -> Tensor:
        """``(B, ..., in)`` to ``(B, ..., out)``: :func:`grouped_linear` with the weights of each domain.

        ``unknown`` gives the weight ``(out, in)`` and the bias of rows of domain -1, if there are any.
        """
        places, sizes, x = self.places, self.sizes, self._sorted(x)
        if not self.unknown:
            return self._unsorted(grouped_linear(x, weight, bias, places, sizes, scale, sparse))
        parts = [F.linear(x[: sizes[0]], *unknown())]
        if places:
            parts.append(grouped_linear(x[sizes[0] :], weight, bias, places, sizes[1:], scale, sparse))
        return self.join(parts)

    def linear_of_groups(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same with a weight ``(N, out, in)`` and a bias ``(N, out)`` for each group, that of domain -1 first."""
        places = range(len(self.sizes))
        return self._unsorted(grouped_linear(self._sorted(x), weight.flatten(1), bias, places, self.sizes))

    def _sorted(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(0, self.order)

    def _unsorted(self, y: Tensor) -> Tensor:
        return y if self.inverse is None else y.index_select(0, self.inverse)


class DomainLinear(nn.Module):
    """A Linear of each domain's own: ``y = x W_d + b_d``, rows in and out in the batch's order.

    ``weight (D, out * in)`` and ``bias (D, out)`` hold one row a domain: glorot normal, each domain drawn anew, and zero.
    Rows of domain -1 use the mean over domains.

    **Shape**: ``(B, ..., in_features)`` to ``(B, ..., out_features)``.

    Args:
        in_features, out_features: as ``nn.Linear``.
        num_domains: ``D``.
        rows: the grouping of the batch, set by the model before the call.

    Example:
        >>> rows = DomainRows()
        >>> layer = DomainLinear(4, 3, 5, rows)
        >>> rows.group_(torch.tensor([2, 0, -1]))
        >>> layer(torch.ones(3, 4)).shape
        torch.Size([3, 3])
    """

    def __init__(self, in_features: int, out_features: int, num_domains: int, rows: DomainRows) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rows = in_features, out_features, rows
        std = math.sqrt(2 / (in_features + out_features))
        self.weight = nn.Parameter(torch.randn(num_domains, out_features * in_features) * std)
        self.bias = nn.Parameter(torch.zeros(num_domains, out_features))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            known = (self.rows.domain >= 0).unsqueeze(1)
            own = self.rows.domain.clamp(min=0)
            weight = torch.where(known, self.weight[own], self.weight.mean(0))
            bias = torch.where(known, self.bias[own], self.bias.mean(0))
            return row_by_row(x, self._matrices(weight), bias)
        return self.rows.linear(x, self.weight, self.bias, self._mean)

    def _mean(self) -> tuple[Tensor, Tensor]:
        return self._matrices(self.weight.mean(0)).squeeze(0), self.bias.mean(0)

    def _matrices(self, weight: Tensor) -> Tensor:
        return weight.view(-1, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_domains={len(self.bias)}"


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
        weight, bias = self.domain_weight, self.domain_bias
        return self.rows.linear(x, weight, bias, lambda: (self.weight, None), self.weight, self.sparse) + self.bias

    def plain(self, domain: int) -> nn.Linear:
        """What this layer is for one domain: ``W = W_s ⊙ W_d``, ``b = b_s + b_d``."""
        layer = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight * self.domain_weight[domain].view_as(self.weight))
            layer.bias.copy_(self.bias + self.domain_bias[domain])
        return layer.requires_grad_(self.weight.requires_grad)

    def _row_by_row(self, x: Tensor) -> Tensor:
        known = (self.rows.domain >= 0).unsqueeze(1)
        own = self.rows.domain.clamp(min=0)
        scale = torch.where(known, self.domain_weight[own], 1.0).view(-1, *self.weight.shape)  # (B, out, in)
        shift = torch.where(known, self.domain_bias[own], 0.0)
        return row_by_row(x, self.weight * scale, self.bias + shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_domains={self.domain_bias.shape[0]}"


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x (B, ..., in)`` with a weight ``(B, out, in)`` and a bias ``(B, out)`` of each row's own."""
    y = torch.einsum("boi,b...i->b...o", weight, x)
    return y + bias.view(-1, *[1] * (x.dim() - 2), bias.shape[1])
