"""A linear layer whose rows come in groups, each with a weight of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    places: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor | None = None,
    sparse: bool = False,
) -> Tensor:
    """``y = x (scale ⊙ W_g) + b_g`` for each group ``g`` of rows, which follow one another.

    On a CPU neither pass copies the weights of the groups: each is read where it lies, and its gradient is written where it
    belongs. On an accelerator, where launches cost more than copies, groups are cut into tiles for one batched product.

    **Shape**: ``(B, ..., in)`` to ``(B, ..., out)``.

    Args:
        weight, bias: ``(N, out * in)`` and ``(N, out)``.
        places: which rows of them each group has; none twice.
        sizes: rows of ``x`` in each group; ``B`` in all.
        scale: ``(out, in)``, what all groups share.
        sparse: gradients of ``weight`` and ``bias`` hold the rows of ``places`` alone; they ascend then.

    Raises:
        IndexError: a place that is not there.

    Example:
        >>> weight, bias = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.zeros(2, 1)
        >>> grouped_linear(torch.ones(3, 2), weight, bias, places=[1, 0], sizes=[2, 1]).squeeze(1).tolist()
        [6.0, 6.0, 2.0]
    """
    if places and not 0 <= min(places) <= max(places) < len(weight):
        raise IndexError(f"groups have places from 0 to {len(weight) - 1}, not {min(places)} to {max(places)}")
    if torch.is_autocast_enabled(x.device.type):  # the weights are too many to be cast in each step
        with torch.autocast(x.device.type, enabled=False):
            return grouped_linear(x.to(weight.dtype), weight, bias, places, sizes, scale, sparse)
    rows = [size * math.prod(x.shape[1:-1]) for size in sizes]
    flat = x.reshape(-1, x.shape[-1])
    way = _in_place if x.device.type == "cpu" else _in_tiles
    return way(flat, weight, bias, scale, places, rows, sparse).view(*x.shape[:-1], bias.shape[1])


def _in_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    places: Sequence[int],
    sizes: Sequence[int],
    sparse: bool,
) -> Tensor:
    """Tiles are as high as the mean group, rounded up to a power of two: less than three times the rows in all."""
    height = 1 << (max(sum(sizes) - 1, 0) // max(len(sizes), 1)).bit_length()
    size = np.asarray(sizes, dtype=np.int64)
    tiles = -(-size // height)
    first = (np.cumsum(tiles) - tiles) * height  # where a group's rows begin among those of the tiles
    row = np.repeat(first - np.cumsum(size) + size, size) + np.arange(size.sum())
    tile = np.repeat(np.asarray(places, dtype=np.int64), tiles)
    rows, own = (torch.from_numpy(each).to(x.device) for each in (row, tile))
    weights = F.embedding(own, weight, sparse=sparse).view(-1, bias.shape[1], x.shape[1])
    biases = F.embedding(own, bias, sparse=sparse)
    if scale is not None:
        weights = weights * scale
    spread = x.new_zeros(len(tile) * height, x.shape[1]).index_copy(0, rows, x)
    y = torch.baddbmm(biases.unsqueeze(1), spread.view(len(tile), height, x.shape[1]), weights.mT)
    return y.flatten(0, 1).index_select(0, rows)


def _in_place(*args: Any) -> Tensor:
    y: Tensor = _Grouped.apply(*args)  # type: ignore[no-untyped-call]
    return y


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        places: Sequence[int],
        sizes: list[int],
        sparse: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.places, ctx.sizes, ctx.sparse = places, sizes, sparse
        y = x.new_empty(len(x), bias.shape[1])
        own = weight.view(-1, bias.shape[1], x.shape[1])
        for place, rows, out in zip(places, torch.split(x, sizes), torch.split(y, sizes), strict=True):
            torch.addmm(bias[place], rows, _times(own[place], scale).t(), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        want_x, want_weight, want_bias, want_scale = ctx.needs_input_grad[:4]
        places = range(len(ctx.places)) if ctx.sparse else ctx.places  # of the gradients
        height = len(places) if ctx.sparse else len(weight)
        grad_x = torch.empty_like(x)
        grad_weight = weight.new_zeros(height, weight.shape[1]) if want_weight else None
        grad_bias = bias.new_zeros(height, bias.shape[1]) if want_bias else None
        grad_scale = torch.zeros_like(scale) if want_scale else None
        own = weight.view(-1, bias.shape[1], x.shape[1])
        groups = zip(ctx.places, places, *(torch.split(rows, ctx.sizes) for rows in (x, grad, grad_x)), strict=True)
        for place, to, inputs, grads, out in groups:
            if want_x:
                torch.mm(grads, _times(own[place], scale), out=out)
            if grad_bias is not None:
                torch.sum(grads, 0, out=grad_bias[to])
            if grad_weight is not None and scale is None:
                torch.mm(grads.t(), inputs, out=grad_weight[to].view_as(own[0]))
            elif want_weight or want_scale:
                product = grads.t() @ inputs
                if grad_weight is not None:
                    torch.mul(product, scale, out=grad_weight[to].view_as(scale))
                if grad_scale is not None:
                    grad_scale.addcmul_(product, own[place])
        rows = [_gradient(ctx, each, like) for each, like in ((grad_weight, weight), (grad_bias, bias))]
        return grad_x if want_x else None, *rows, grad_scale, None, None, None


def _times(own: Tensor, scale: Tensor | None) -> Tensor:
    return own if scale is None else own * scale


def _gradient(ctx: Any, rows: Tensor | None, like: Tensor) -> Tensor | None:
    if rows is None or not ctx.sparse:
        return rows
    index = torch.tensor([ctx.places], device=rows.device)
    return torch.sparse_coo_tensor(index, rows, like.shape, is_coalesced=True, check_invariants=False)
