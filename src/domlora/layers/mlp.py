"""The tower that every click model shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from domlora.layers.dropout import relu_dropout

__all__ = ["MLP"]


class MLP(nn.ModuleList):
    """Layers of Linear, relu and dropout; layer ``i`` is the submodule ``i``, so ``tower.*`` names the Linears.

    ``h_i = dropout(relu(h_{i-1} W_i + b_i))``. Weights start glorot normal, biases at zero.

    **Shape**: ``(B, in_features)`` to ``(B, out_features)``.

    Args:
        in_features: width of the input.
        hidden_units: width of each layer; the last one is ``out_features``.
        dropout: probability to drop a unit after each activation, in [0, 1). The same with and without adapters.
        linear: makes a layer from (in_features, out_features).

    Source: the ``DNN`` layer of DeepCTR. Intended differences from the MLoRA authors' code: their adapted tower drops
    units *before* the activation and on the shared branch only, and under their TensorFlow not at all, while their base
    tower drops 0.5; here both do the same. Their glorot normal is truncated at two standard deviations.

    Example:
        >>> import torch
        >>> tower = MLP(24, [16, 8], dropout=0.5)
        >>> tower(torch.zeros(2, 24)).shape, tower.out_features
        (torch.Size([2, 8]), 8)
    """

    def __init__(
        self,
        in_features: int,
        hidden_units: Sequence[int],
        dropout: float = 0.0,
        linear: Callable[[int, int], nn.Linear] = nn.Linear,
    ) -> None:
        widths = [in_features, *hidden_units]
        layers = [linear(before, after) for before, after in pairwise(widths)]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(layers)
        self.in_features, self.out_features = widths[0], widths[-1]
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = relu_dropout(layer(x), self.dropout, self.training)
        return x

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
