"""An exponential moving average of the weights that move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from domlora.errors import ConfigError

__all__ = ["Average"]


class Average:
    """``average = m * average + (1 - m) * weights`` after each step, ``m = min(decay, (1 + t) / (10 + t))`` at step t.

    The warm-up of ``m`` keeps the random start from lingering in the average.

    Args:
        model: its parameters that require a gradient are averaged.
        decay: in [0, 1); 0 for no average at all, at no cost.

    **Source**: Polyak and Juditsky 1992; the warm-up is the one of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError("the decay of an average must be in [0, 1)", received=decay)
        self.decay = decay
        self.steps = 0
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self._weights = {name: p.detach() for name, p in moving.items()}
        self._average = {name: p.clone() for name, p in self._weights.items()}

    def update(self) -> None:
        """Take the weights after one more step in."""
        if not self.decay:
            return
        self.steps += 1
        momentum = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1.0 - momentum)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the average inside the ``with`` block and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The average by name, for a checkpoint."""
        return {**self._average, "steps": torch.tensor(self.steps)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        self.steps = int(tensors["steps"])
        for name, average in self._average.items():
            average.copy_(tensors[name])

    def _swap(self) -> None:
        for name, weights in self._weights.items():
            mine = weights.clone()
            weights.copy_(self._average[name])
            self._average[name].copy_(mine)
