"""Corrections of few domains: every row times the banks of all domains of the batch, all but its own masked.

P times the arithmetic that is needed, in a dozen large kernels and without a plan that has to be made on the host: a GPU has
arithmetic to spare, and would wait for the plan. A row that is NaN makes the gradients of all domains NaN, as it makes those
of the base; what other rows are given stays right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from domlora.adapters.kernels import Banks
    from domlora.adapters.route import Segments

__all__ = ["correct_", "correct_backward_", "is_better"]


def is_better(banks: Banks, segments: Segments) -> bool:
    """Whether the domains of the batch are few: all their ``A`` beside each other not much larger than the layer."""
    _, width, rank = banks.a.shape
    return len(segments.names) * rank <= 4 * (width + banks.b.shape[-1])


def correct_(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> Tensor:
    """Add corrections to ``out``; gives ``x A_d`` of each row in its own domain's columns ``(N, P R)``, zero elsewhere."""
    hidden = _hidden(x, banks, segments)
    change = (hidden @ _own(banks.b, segments, x).flatten(0, 1)).mul_(banks.scale).view(len(x), -1, out.shape[-1])
    if banks.bias is not None:
        change += (segments.mine.to(x.dtype) @ _own(banks.bias, segments, x)).unsqueeze(1)
    out += change.view(out.shape).to(out.dtype)
    return hidden


def correct_backward_(
    grad_x: Tensor | None,
    grad_banks: Sequence[Tensor | None],
    grad: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    banks: Banks,
    segments: Segments,
) -> None:
    """As :func:`domlora.adapters.cpu.correct_backward_`."""
    grad_a, grad_b, grad_bias = grad_banks
    grad = grad.to(x.dtype)
    flat, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, out), (N, in)
    if grad_bias is not None:
        rows = grad.reshape(len(x), -1, grad.shape[-1]).sum(1)  # (B, out)
        _put(grad_bias, segments.mine.to(x.dtype).T @ rows, banks, segments)
    if grad_b is not None:
        hidden = _hidden(x, banks, segments) if hidden is None else hidden
        found = (hidden.T @ flat).mul_(banks.scale)  # (P R, out)
        _put(grad_b, found.view(len(segments.names), -1, grad.shape[-1]), banks, segments)
    grad_hidden = _masked((flat @ _own(banks.b, segments, x).flatten(0, 1).T).mul_(banks.scale), len(x), segments)
    if grad_a is not None:
        found = (flat_x.T @ grad_hidden).view(x.shape[-1], len(segments.names), -1)  # (in, P, R)
        _put(grad_a, found.transpose(0, 1), banks, segments)
    if grad_x is not None:
        grad_x += (grad_hidden @ _wide(banks, segments, x).T).view(grad_x.shape).to(grad_x.dtype)


def _hidden(x: Tensor, banks: Banks, segments: Segments) -> Tensor:
    return _masked(x.reshape(-1, x.shape[-1]) @ _wide(banks, segments, x), len(x), segments)


def _wide(banks: Banks, segments: Segments, x: Tensor) -> Tensor:
    """The ``A`` of all domains of the batch beside each other ``(in, P R)``."""
    return _own(banks.a, segments, x).transpose(0, 1).flatten(1)


def _own(bank: Tensor, segments: Segments, x: Tensor) -> Tensor:
    """What a bank holds for the domains of the batch, in the type that is computed in."""
    return bank.index_select(0, segments.domains).to(x.dtype)


def _masked(wide: Tensor, num_rows: int, segments: Segments) -> Tensor:
    """``(N, P R)`` with zeros where a column is not of the row's domain, whatever stood there."""
    others = ~segments.mine
    shape = (num_rows, len(wide) // num_rows, others.shape[1], wide.shape[1] // others.shape[1])
    wide.view(shape).masked_fill_(others[:, None, :, None], 0.0)
    return wide


def _put(target: Tensor, found: Tensor, banks: Banks, segments: Segments) -> None:
    """Gradients of the batch's domains into those of all, or of the same ones."""
    if banks.sparse:
        target.copy_(found)
    else:
        target.index_copy_(0, segments.domains, found.to(target.dtype))
