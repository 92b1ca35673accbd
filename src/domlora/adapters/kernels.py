"""Corrections of many domains in one batch, beside what the base gives: ``+ s (x A_d) B_d + c_d``.

Exact for any base, and a fresh adapter adds nothing but zeros. Only the domains that occur in the batch are computed, and
banks get gradients of only those rows if asked for ``sparse`` ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from domlora.adapters import accelerator, cpu
from domlora.adapters.route import Segments

__all__ = ["Banks", "add_corrections", "correct_", "correct_backward_", "corrected_linear"]


_BACKENDS: dict[str, ModuleType] = {"cpu": cpu}


class Banks(NamedTuple):
    """One layer's adapters of all domains.

    ``a (D, in, R)``, ``b (D, R, out)``, ``bias (D, out)`` or None; ``sparse``: gradients are sparse tensors that hold the
    rows of the domains in the batch.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float = 1.0
    sparse: bool = False


def add_corrections(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> Tensor:
    """``out + s (x A_d) B_d + c_d`` for each row's domain; ``out`` is changed in place and must be contiguous.

    **Shape**: ``out (B, ..., out)``, ``x (B, ..., in)``.
    """
    if not torch.is_grad_enabled():
        correct_(out, x, banks, segments)
        return out
    result: Tensor = _Corrections.apply(out, x, None, None, *banks, segments)  # type: ignore[no-untyped-call]
    return result


def corrected_linear(x: Tensor, weight: Tensor, shared_bias: Tensor | None, banks: Banks, segments: Segments) -> Tensor:
    """``x W + b + s (x A_d) B_d + c_d`` for each row's domain, bit for bit what the base gives plus corrections.

    **Shape**: as :func:`add_corrections`; ``weight (out, in)`` and ``shared_bias (out,)`` are those of the base.
    """
    if not torch.is_grad_enabled():
        out = _base(x, weight, shared_bias)
        correct_(out, x, banks, segments)
        return out
    result: Tensor = _Corrections.apply(  # type: ignore[no-untyped-call]
        None, x, weight, shared_bias, *banks, segments
    )
    return result


class _Corrections(torch.autograd.Function):
    """Takes what the base gave (``out``), or the base's parameters, which saves a pass over the input's gradient."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        out: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        shared_bias: Tensor | None,
        bank_a: Tensor,
        bank_b: Tensor,
        bias: Tensor | None,
        scale: float,
        sparse: bool,
        segments: Segments,
    ) -> Tensor:
        if out is None:
            out = _base(x, cast(Tensor, weight), shared_bias)
        else:
            ctx.mark_dirty(out)
        banks = Banks(bank_a, bank_b, bias, scale, sparse)
        hidden = correct_(out, x, banks, segments)
        ctx.save_for_backward(x, weight, bank_a, bank_b, hidden)
        ctx.scale, ctx.sparse, ctx.segments = scale, sparse, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bank_a, bank_b, hidden = ctx.saved_tensors
        _, want_x, want_weight, want_shared, *wanted = ctx.needs_input_grad[:7]
        grad = grad.contiguous()
        flat = grad.view(-1, grad.shape[-1])
        grad_x = grad_weight = grad_shared = None
        if want_x:
            grad_x = x.new_zeros(x.shape) if weight is None else torch.matmul(grad, weight)
        if want_weight:
            grad_weight = flat.t() @ x.reshape(-1, x.shape[-1])
        if want_shared:
            grad_shared = flat.sum(0)
        banks = Banks(bank_a, bank_b, None, ctx.scale, ctx.sparse)
        found = correct_backward_(grad, x, banks, ctx.segments, grad_x, wanted, hidden)
        return None if weight is not None else grad, grad_x, grad_weight, grad_shared, *found, None, None, None


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer gives without adapters, as a tensor that is no view: an in-place activation may follow."""
    out = F.linear(x, weight, bias).contiguous()
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out  # one with middle axes is


def correct_(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> Tensor | None:
    """Add corrections to ``out``; returns what the backward pass may want to know."""
    hidden: Tensor | None = _backend(x).correct_(out, x, banks, segments) if _is_work(x, segments) else None
    return hidden


def correct_backward_(
    grad: Tensor,
    x: Tensor,
    banks: Banks,
    segments: Segments,
    grad_x: Tensor | None,
    wanted: Sequence[bool],
    hidden: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Add to ``grad_x``, and return the gradients of ``A``, ``B`` and the bias as far as they are ``wanted``.

    ``hidden`` is what :func:`correct_` gave, or None to compute it again.
    """
    height = len(segments.names) if banks.sparse else len(banks.a)
    shapes = (banks.a.shape[1:], banks.b.shape[1:], banks.b.shape[2:])
    dtype = torch.promote_types(torch.promote_types(x.dtype, banks.a.dtype), torch.float32)
    found = [
        x.new_zeros((height, *shape), dtype=dtype) if want else None for want, shape in zip(wanted, shapes, strict=True)
    ]
    if _is_work(x, segments):
        _backend(x).correct_backward_(grad_x, found, grad, hidden, x, banks, segments)
    return tuple(None if rows is None else _gradient(rows.to(banks.a.dtype), banks, segments) for rows in found)


def _backend(x: Tensor) -> ModuleType:
    return _BACKENDS.get(x.device.type, accelerator)


def _is_work(x: Tensor, segments: Segments) -> bool:
    """Whether there is anything to compute: not where a middle axis has no length."""
    return x.numel() > 0 and len(segments.names) > 0


def _gradient(rows: Tensor, banks: Banks, segments: Segments) -> Tensor:
    """A gradient of a bank from its rows: of all domains, or of those in the batch."""
    if not banks.sparse:
        return rows
    shape = (len(banks.a), *rows.shape[1:])
    index = segments.domains.unsqueeze(0)
    return torch.sparse_coo_tensor(index, rows, shape, is_coalesced=True, check_invariants=False)
