"""The two ways to compute corrections of many domains in one batch, each with its own backward pass.

``add_corrections`` adds ``s (x A_d) B_d + c_d`` to what the base gave: exact for any base, and a fresh adapter adds nothing
but zeros. ``merged_linear`` multiplies a domain's rows by ``W + s A_d B_d``: one product a domain and no further pass over
the activations, which wins as soon as a domain has more rows than the merge costs. Both compute only the domains that
occur in the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Segments", "add_corrections", "merged_linear", "merging_pays"]

Span = tuple[int, int, int]


class Segments(NamedTuple):
    """Rows of a batch grouped by domain.

    ``order`` sorts the rows by domain, or is None when they already are; ``spans`` holds ``(start, stop, domain)`` of
    each domain that occurs, in sorted order; rows of no domain (-1) come first and are in no span.
    """

    order: Tensor | None
    spans: tuple[Span, ...]
    num_rows: int


def merging_pays(segments: Segments, x: Tensor, out_features: int) -> bool:
    """Whether merging the weights of every domain in the batch takes fewer multiplications than correcting every row.

    A merge costs ``in * out * R`` a domain, a correction ``(in + out) * R`` a row.
    """
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    return rows * (width + out_features) > len(segments.spans) * width * out_features


def add_corrections(
    out: Tensor, x: Tensor, bank_a: Tensor, bank_b: Tensor, bias: Tensor | None, scale: float, segments: Segments
) -> Tensor:
    """``out + s (x A_d) B_d + c_d`` for each row's domain; ``out`` is changed in place.

    **Shape**: ``out (B, ..., out)``, ``x (B, ..., in)``, ``bank_a (D, in, R)``, ``bank_b (D, R, out)``, ``bias (D, out)``.
    """
    result: Tensor = _Corrections.apply(out, x, bank_a, bank_b, bias, scale, segments)  # type: ignore[no-untyped-call]
    return result


def merged_linear(
    x: Tensor,
    weight: Tensor,
    shared_bias: Tensor | None,
    bank_a: Tensor,
    bank_b: Tensor,
    bias: Tensor | None,
    scale: float,
    segments: Segments,
) -> Tensor:
    """``x (W + s A_d B_d) + b + c_d`` for each row's domain.

    **Shape**: as :func:`add_corrections`; ``weight (out, in)`` and ``shared_bias (out,)`` are those of the base.
    """
    result: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
        x, weight, shared_bias, bank_a, bank_b, bias, scale, segments
    )
    return result


def _grouped(x: Tensor, segments: Segments) -> tuple[Tensor, list[Span]]:
    """Rows of ``x`` in domain order without middle axes, ``(B * middle, in)``, and their spans."""
    middle = math.prod(x.shape[1:-1])
    if segments.order is not None:
        x = x.index_select(0, segments.order)
    spans = [(start * middle, stop * middle, domain) for start, stop, domain in segments.spans]
    return x.reshape(-1, x.shape[-1]), spans


def _ungrouped(rows: Tensor, shape: torch.Size, order: Tensor | None) -> Tensor:
    """Grouped rows back in the batch's own order and shape."""
    x = rows.view(shape)
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)


class _Corrections(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        out: Tensor,
        x: Tensor,
        bank_a: Tensor,
        bank_b: Tensor,
        bias: Tensor | None,
        scale: float,
        segments: Segments,
    ) -> Tensor:
        rows, spans = _grouped(x, segments)
        rank, width = bank_b.shape[1:]
        order = segments.order
        # sorted rows are corrected where they lie: the base made them a moment ago and nobody else holds them
        target = out.view(-1, width) if order is None else out.new_zeros(rows.shape[0], width)
        inner = rows.new_empty(rows.shape[0], rank)  # (B * middle, R)
        for start, stop, domain in spans:
            piece = target[start:stop]
            if rank:
                torch.mm(rows[start:stop], bank_a[domain], out=inner[start:stop])
                piece.addmm_(inner[start:stop], bank_b[domain], alpha=scale)
            if bias is not None:
                piece.add_(bias[domain])
        ctx.save_for_backward(rows, inner, bank_a, bank_b)
        ctx.scale, ctx.spans, ctx.order, ctx.x_shape, ctx.has_bias = scale, spans, order, x.shape, bias is not None
        ctx.mark_dirty(out)
        return out if order is None else out.index_add_(0, order, target.view_as(out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, bank_a, bank_b = ctx.saved_tensors
        _, want_x, want_a, want_b, want_bias = ctx.needs_input_grad[:5]
        flat = (grad if ctx.order is None else grad.index_select(0, ctx.order)).reshape(-1, grad.shape[-1])
        grad_rows = torch.zeros_like(rows) if want_x else None
        grad_a = torch.zeros_like(bank_a) if want_a else None
        grad_b = torch.zeros_like(bank_b) if want_b else None
        grad_bias = flat.new_zeros(bank_b.shape[0], flat.shape[1]) if ctx.has_bias and want_bias else None
        for start, stop, domain in ctx.spans:
            piece = flat[start:stop]
            if grad_bias is not None:
                torch.sum(piece, 0, out=grad_bias[domain])
            if not bank_a.shape[2]:
                continue
            grad_inner = torch.mm(piece, bank_b[domain].t()).mul_(ctx.scale)  # (n, R)
            if grad_b is not None:
                torch.mm(inner[start:stop].t(), piece, out=grad_b[domain]).mul_(ctx.scale)
            if grad_a is not None:
                torch.mm(rows[start:stop].t(), grad_inner, out=grad_a[domain])
            if grad_rows is not None:
                torch.mm(grad_inner, bank_a[domain].t(), out=grad_rows[start:stop])
        grad_x = None if grad_rows is None else _ungrouped(grad_rows, ctx.x_shape, ctx.order)
        return grad, grad_x, grad_a, grad_b, grad_bias, None, None


class _Merged(torch.autograd.Function):
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
        segments: Segments,
    ) -> Tensor:
        rows, spans = _grouped(x, segments)
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        plain = weight.t()  # (in, out)
        first = spans[0][0] if spans else rows.shape[0]
        if first:  # rows of no domain
            _linear(rows[:first], plain, shared_bias, out[:first])
        merged = []
        for start, stop, domain in spans:
            own = torch.addmm(plain, bank_a[domain], bank_b[domain], alpha=scale) if bank_a.shape[2] else plain
            _linear(rows[start:stop], own, _sum(shared_bias, bias, domain), out[start:stop])
            merged.append(own)
        ctx.save_for_backward(rows, weight, bank_a, bank_b, *merged)
        ctx.scale, ctx.spans, ctx.order, ctx.x_shape, ctx.first = scale, spans, segments.order, x.shape, first
        return _ungrouped(out, torch.Size((*x.shape[:-1], weight.shape[0])), segments.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bank_a, bank_b, *merged = ctx.saved_tensors
        want_x, want_weight, want_shared, want_a, want_b, want_bias = ctx.needs_input_grad[:6]
        flat = (grad if ctx.order is None else grad.index_select(0, ctx.order)).reshape(-1, grad.shape[-1])
        first = ctx.first
        grad_rows = torch.empty_like(rows) if want_x else None
        grad_a = torch.zeros_like(bank_a) if want_a else None
        grad_b = torch.zeros_like(bank_b) if want_b else None
        grad_bias = flat.new_zeros(bank_b.shape[0], flat.shape[1]) if want_bias else None
        grad_plain = torch.mm(rows[:first].t(), flat[:first]) if want_weight else None  # (in, out)
        if grad_rows is not None and first:
            torch.mm(flat[:first], weight, out=grad_rows[:first])
        for (start, stop, domain), own in zip(ctx.spans, merged, strict=True):
            piece = flat[start:stop]
            if grad_rows is not None:
                torch.mm(piece, own.t(), out=grad_rows[start:stop])
            if grad_bias is not None:
                torch.sum(piece, 0, out=grad_bias[domain])
            grad_own = torch.mm(rows[start:stop].t(), piece)  # (in, out): all else follows from it
            if grad_plain is not None:
                grad_plain.add_(grad_own)
            if grad_a is not None and bank_a.shape[2]:
                torch.mm(grad_own, bank_b[domain].t(), out=grad_a[domain]).mul_(ctx.scale)
            if grad_b is not None and bank_a.shape[2]:
                torch.mm(bank_a[domain].t(), grad_own, out=grad_b[domain]).mul_(ctx.scale)
        grad_x = None if grad_rows is None else _ungrouped(grad_rows, ctx.x_shape, ctx.order)
        grad_weight = None if grad_plain is None else grad_plain.t()
        grad_shared = flat.sum(0) if want_shared else None
        return grad_x, grad_weight, grad_shared, grad_a, grad_b, grad_bias, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _sum(shared: Tensor | None, bias: Tensor | None, domain: int) -> Tensor | None:
    if bias is None or shared is None:
        return shared if bias is None else bias[domain]
    return shared + bias[domain]
