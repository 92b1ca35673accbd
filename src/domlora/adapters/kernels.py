"""The two ways to compute corrections of many domains in one batch, each with its own backward pass.

``add_corrections`` adds ``s (x A_d) B_d + c_d`` to what the base gave: exact for any base, and a fresh adapter adds nothing
but zeros. ``merged_linear`` multiplies a domain's rows by ``W + s A_d B_d``: one product a domain and no further pass over
the activations, which wins as soon as a domain has more rows than the merge costs. Both compute only the domains that
occur in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        segments: Segments,
    ) -> Tensor:
        rows, spans = _grouped(x, segments)
        present = _present(spans, bank_a)
        a, b, shifts = (_rows_of(bank, present) for bank in (bank_a, bank_b, bias))  # (P, in, R), (P, R, out), (P, out)
        plain = weight.expand(len(spans), -1, -1)
        # (P, out, in), the layout of the base's weight: no copy here and none of its gradient later
        merged = plain if a is None or b is None or not a.shape[2] else torch.baddbmm(plain, b.mT, a.mT, alpha=scale)
        if shared_bias is not None:
            shifts = shared_bias.expand(len(spans), -1) if shifts is None else shifts + shared_bias
        first = spans[0][0] if spans else rows.shape[0]
        sizes = [first, *(stop - start for start, stop, _ in spans)]  # rows of no domain, then of each domain
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        pieces, targets = torch.split(rows, sizes), torch.split(out, sizes)
        if first:
            _linear(pieces[0], weight, shared_bias, targets[0])
        shift_of = [None] * len(spans) if shifts is None else shifts.unbind()
        for piece, own, shift, target in zip(pieces[1:], merged.unbind(), shift_of, targets[1:], strict=True):
            _linear(piece, own, shift, target)
        ctx.save_for_backward(rows, weight, present, a, b, merged)
        ctx.scale, ctx.sizes, ctx.order, ctx.x_shape = scale, sizes, segments.order, x.shape
        ctx.num_domains = bank_a.shape[0]
        return _ungrouped(out, torch.Size((*x.shape[:-1], weight.shape[0])), segments.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, present, a, b, merged = ctx.saved_tensors
        want_x, want_weight, want_shared, want_a, want_b, want_bias = ctx.needs_input_grad[:6]
        flat = (grad if ctx.order is None else grad.index_select(0, ctx.order)).reshape(-1, grad.shape[-1])
        inputs, pieces = torch.split(rows, ctx.sizes), torch.split(flat, ctx.sizes)
        grad_x = grad_weight = grad_shared = grad_a = grad_b = grad_bias = None
        if want_x:
            grad_rows = _products(pieces, (weight, *merged.unbind()), torch.empty_like(rows), ctx.sizes)
            grad_x = _ungrouped(grad_rows, ctx.x_shape, ctx.order)
        if want_weight or want_a or want_b:
            grad_own = torch.empty_like(merged, memory_format=torch.contiguous_format)  # (P, out, in)
            for input_, piece, target in zip(inputs[1:], pieces[1:], grad_own.unbind(), strict=True):
                torch.mm(piece.t(), input_, out=target)
            grad_weight = grad_own.sum(0).addmm_(pieces[0].t(), inputs[0]) if want_weight else None
            grad_a = _scattered(torch.bmm(grad_own.mT, b.mT), present, ctx) if want_a else None
            grad_b = _scattered(torch.bmm(a.mT, grad_own.mT), present, ctx) if want_b else None
        if want_shared or want_bias:
            sums = torch.stack([piece.sum(0) for piece in pieces])  # (1 + P, out)
            grad_shared = sums.sum(0) if want_shared else None
            grad_bias = _scattered(sums[1:], present, ctx, scaled=False) if want_bias else None
        return grad_x, grad_weight, grad_shared, grad_a, grad_b, grad_bias, None, None


def _products(pieces: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor, sizes: list[int]) -> Tensor:
    """``piece @ weight`` for each group of rows, into the rows of ``out``."""
    for piece, weight, target in zip(pieces, weights, torch.split(out, sizes), strict=True):
        if len(piece):
            torch.mm(piece, weight, out=target)
    return out


def _present(spans: list[Span], bank: Tensor) -> Tensor | None:
    """The domains in the batch, or None if they are all of the bank's."""
    if len(spans) == bank.shape[0]:
        return None
    return torch.tensor([domain for *_, domain in spans], dtype=torch.int64, device=bank.device)


def _rows_of(bank: Tensor | None, present: Tensor | None) -> Tensor | None:
    return bank if bank is None or present is None else bank.index_select(0, present)


def _scattered(rows: Tensor, present: Tensor | None, ctx: Any, *, scaled: bool = True) -> Tensor:
    """Gradients of the domains in the batch as rows of a bank's gradient, zero elsewhere."""
    if scaled and ctx.scale != 1.0:
        rows = rows.mul_(ctx.scale)
    if present is None:
        return rows
    return rows.new_zeros(ctx.num_domains, *rows.shape[1:]).index_copy_(0, present, rows)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
