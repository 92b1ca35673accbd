"""Sums over the rows of a batch, wherever they lie: a layer that looks at batch mates asks here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["set_whole_sum", "whole_sum"]

Sum = Callable[[Tensor], Tensor]


def _here(mine: Tensor) -> Tensor:
    return mine


_sum: Sum = _here


def whole_sum(mine: Tensor) -> Tensor:
    """The sum over the rows of the whole batch, of what the rows of this process add up to.

    One process has all rows, so this is ``mine``; where several share a batch (:mod:`domlora.training.distributed.ranks`) it
    is the sum over all, and gradients flow back to each.

    Example:
        >>> import torch
        >>> whole_sum(torch.ones(2))
        tensor([1., 1.])
    """
    return _sum(mine)


def set_whole_sum(how: Sum | None) -> None:
    """Say how processes add up; None for one process by itself."""
    global _sum
    _sum = how or _here
