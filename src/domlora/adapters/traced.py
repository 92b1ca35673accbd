"""The corrections as operators of torch, which torch.compile and torch.export take as they are instead of tracing them.

A trace knows no values, so it cannot cut a batch by domain; an operator can, when it runs. What lies around it is compiled:
the base's products, and the sum with the activation that follows.
"""

# ruff: noqa: ARG001 - torch asks for these signatures

from __future__ import annotations

import threading

import torch
from torch import Tensor

from domlora.adapters.kernels import Banks, correct_, correct_backward_
from domlora.adapters.route import Segments, grouped

__all__ = ["corrections"]


def corrections(x: Tensor, banks: Banks, domain: Tensor) -> Tensor:
    """``s (x A_d) B_d + c_d`` for each row's domain, zero for rows of no domain.

    **Shape**: ``x (B, ..., in)``, ``domain (B,)`` to ``(B, ..., out)``. Bank gradients are dense.

    Raises:
        UnknownDomainError: when it runs, see :func:`domlora.adapters.route.grouped`.
    """
    result: Tensor = _forward(x, banks.a, banks.b, banks.bias, banks.scale, domain)
    return result


@torch.library.custom_op("domlora::corrections", mutates_args=())
def _forward(x: Tensor, bank_a: Tensor, bank_b: Tensor, bias: Tensor | None, scale: float, domain: Tensor) -> Tensor:
    out = x.new_zeros((*x.shape[:-1], bank_b.shape[2]))
    correct_(out, x, Banks(bank_a, bank_b, bias, scale), _segments(domain, bank_a.shape[0]))
    return out


@torch.library.custom_op("domlora::corrections_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, bank_a: Tensor, bank_b: Tensor, scale: float, domain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments = _segments(domain, bank_a.shape[0])
    grad_x = x.new_zeros(x.shape)
    banks = Banks(bank_a, bank_b, None, scale)
    found = correct_backward_(grad.contiguous(), x, banks, segments, grad_x, (True, True, True), None)
    return grad_x, *(bank for bank in found if bank is not None)  # type: ignore[return-value]


@_forward.register_fake
def _(x: Tensor, bank_a: Tensor, bank_b: Tensor, bias: Tensor | None, scale: float, domain: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], bank_b.shape[2]))


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, bank_a: Tensor, bank_b: Tensor, scale: float, domain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = bank_b.new_empty((bank_b.shape[0], bank_b.shape[2]))
    return x.new_empty(x.shape), torch.empty_like(bank_a), torch.empty_like(bank_b), bias


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bank_a, bank_b, bias, scale, domain = inputs
    ctx.save_for_backward(x, bank_a, bank_b, domain)
    ctx.scale, ctx.has_bias = scale, bias is not None


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    x, bank_a, bank_b, domain = ctx.saved_tensors
    grad_x, grad_a, grad_b, grad_bias = _backward(grad, x, bank_a, bank_b, ctx.scale, domain)
    return grad_x, grad_a, grad_b, grad_bias if ctx.has_bias else None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


class _Last(threading.local):
    """The batch that this thread grouped last: all layers of a model ask for the same one."""

    known: tuple[Tensor, int, Segments] | None = None


_last = _Last()


def _segments(domain: Tensor, num_domains: int) -> Segments:
    if _last.known is not None:
        other, height, segments = _last.known
        if height == num_domains and domain.device == other.device and torch.equal(domain, other):
            return segments
    segments = grouped(domain, num_domains)
    _last.known = domain.clone(), num_domains, segments
    return segments
