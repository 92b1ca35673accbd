"""Weights merged for each domain of a batch: ``x (W + s A_d B_d) + b + c_d``.

One product a domain and no further pass over the activations, which wins in training as soon as a domain has more rows than
the merge costs. :mod:`domlora.adapters.kernels` is the other way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from domlora.adapters.kernels import Banks, sparse_rows
from domlora.adapters.route import Segments

__all__ = ["merged_linear", "merging_pays"]


def merging_pays(segments: Segments, x: Tensor, out_features: int) -> bool:
    """Whether merging the weights of every domain in the batch takes fewer multiplications than correcting every row.

    A merge costs ``in * out * R`` a domain, a correction ``(in + out) * R`` a row.
    """
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    return rows * (width + out_features) > len(segments.spans) * width * out_features


def merged_linear(x: Tensor, weight: Tensor, shared_bias: Tensor | None, banks: Banks, segments: Segments) -> Tensor:
    """``x (W + s A_d B_d) + b + c_d`` for each row's domain.

    **Shape**: as :func:`domlora.adapters.kernels.corrected_linear`.
    """
    result: Tensor = _Merged.apply(x, weight, shared_bias, *banks, segments)  # type: ignore[no-untyped-call]
    return result


class _Merged(torch.autograd.Function):
    """Small products of all domains go together, as one batched product; only those over rows go domain by domain."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight: Tensor,
        shared_bias: Tensor | None,
        bank_a: Tensor,
        bank_b: Tensor,
        bias: Tensor | None,
        scale: float,
        sparse: bool,
        segments: Segments,
    ) -> Tensor:
        rows, spans = _sorted(x, segments)
        present = None if len(spans) == bank_a.shape[0] else segments.domains
        a, b, shifts = (_rows_of(bank, present) for bank in (bank_a, bank_b, bias))  # (P, in, R), (P, R, out), (P, out)
        plain = weight.expand(len(spans), -1, -1)
        # (P, out, in), the layout of the base's weight: no copy here and none of its gradient later
        merged = plain if a is None or b is None or not a.shape[2] else torch.baddbmm(plain, b.mT, a.mT, alpha=scale)
        if shared_bias is not None:
            shifts = shared_bias.expand(len(spans), -1) if shifts is None else shifts + shared_bias
        first = spans[0][0] if spans else rows.shape[0]
        sizes = [first, *(stop - start for start, stop, _ in spans)]  # rows of no domain, then of each domain
        whole = rows.new_empty(*x.shape[:-1], weight.shape[0])
        out = whole.view(-1, weight.shape[0])  # what is returned must be no view: an in-place activation may follow
        pieces, targets = torch.split(rows, sizes), torch.split(out, sizes)
        if first:
            _linear(pieces[0], weight, shared_bias, targets[0])
        shift_of = [None] * len(spans) if shifts is None else shifts.unbind()
        for piece, own, shift, target in zip(pieces[1:], merged.unbind(), shift_of, targets[1:], strict=True):
            _linear(piece, own, shift, target)
        ctx.save_for_backward(rows, weight, a, b, merged)
        ctx.scale, ctx.sparse, ctx.sizes, ctx.segments, ctx.x_shape = scale, sparse, sizes, segments, x.shape
        ctx.num_domains = bank_a.shape[0]
        return whole if segments.order is None else _unsorted(out, whole.shape, segments.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, merged = ctx.saved_tensors
        want_x, want_weight, want_shared, want_a, want_b, want_bias = ctx.needs_input_grad[:6]
        order = ctx.segments.order
        flat = (grad if order is None else grad.index_select(0, order)).reshape(-1, grad.shape[-1])
        inputs, pieces = torch.split(rows, ctx.sizes), torch.split(flat, ctx.sizes)
        grad_x = grad_weight = grad_shared = grad_a = grad_b = grad_bias = None
        if want_x:
            grad_rows = _products(pieces, (weight, *merged.unbind()), torch.empty_like(rows), ctx.sizes)
            grad_x = _unsorted(grad_rows, ctx.x_shape, order)
        if want_weight or want_a or want_b:
            grad_own = torch.empty_like(merged, memory_format=torch.contiguous_format)  # (P, out, in)
            for input_, piece, target in zip(inputs[1:], pieces[1:], grad_own.unbind(), strict=True):
                torch.mm(piece.t(), input_, out=target)
            grad_weight = grad_own.sum(0).addmm_(pieces[0].t(), inputs[0]) if want_weight else None
            grad_a = _spread(torch.bmm(grad_own.mT, b.mT), ctx) if want_a else None
            grad_b = _spread(torch.bmm(a.mT, grad_own.mT), ctx) if want_b else None
        if want_shared or want_bias:
            sums = torch.stack([piece.sum(0) for piece in pieces])  # (1 + P, out)
            grad_shared = sums.sum(0) if want_shared else None
            grad_bias = _spread(sums[1:], ctx, scaled=False) if want_bias else None
        return grad_x, grad_weight, grad_shared, grad_a, grad_b, grad_bias, None, None, None


def _sorted(x: Tensor, segments: Segments) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Rows of ``x`` in domain order without middle axes, ``(B * middle, in)``, and their spans."""
    middle = math.prod(x.shape[1:-1])
    if segments.order is not None:
        x = x.index_select(0, segments.order)
    spans = [(start * middle, stop * middle, domain) for start, stop, domain in segments.spans]
    return x.reshape(-1, x.shape[-1]), spans


def _unsorted(rows: Tensor, shape: torch.Size, order: Tensor | None) -> Tensor:
    """Sorted rows back in the batch's own order and shape."""
    x = rows.view(shape)
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


def _products(pieces: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor, sizes: list[int]) -> Tensor:
    """``piece @ weight`` for each group of rows, into the rows of ``out``."""
    for piece, weight, target in zip(pieces, weights, torch.split(out, sizes), strict=True):
        if len(piece):
            torch.mm(piece, weight, out=target)
    return out


def _rows_of(bank: Tensor | None, present: Tensor | None) -> Tensor | None:
    return bank if bank is None or present is None else bank.index_select(0, present)


def _spread(rows: Tensor, ctx: Any, *, scaled: bool = True) -> Tensor:
    """Gradients of the domains in the batch as a gradient of the whole bank."""
    if scaled and ctx.scale != 1.0:
        rows = rows.mul_(ctx.scale)
    shape = torch.Size((ctx.num_domains, *rows.shape[1:]))
    if ctx.sparse:
        return sparse_rows(rows, ctx.segments, shape)
    if len(rows) == ctx.num_domains:
        return rows
    return rows.new_zeros(shape).index_copy_(0, ctx.segments.domains, rows)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
