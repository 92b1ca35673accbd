"""Corrections of many domains in one batch, beside what the base gives: ``+ s (x A_d) B_d + c_d``.

Exact for any base, and a fresh adapter adds nothing but zeros. Only the domains that occur in the batch are computed, and
banks get gradients of only those rows if asked for ``sparse`` ones. :mod:`domlora.adapters.merging` is the other way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from domlora.adapters.route import Segments, Tile

__all__ = ["Banks", "add_corrections", "correct_", "correct_backward_", "corrected_linear", "sparse_rows"]


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
    result: Tensor = _Corrections.apply(out, x, None, None, *banks, segments)  # type: ignore[no-untyped-call]
    return result


def corrected_linear(x: Tensor, weight: Tensor, shared_bias: Tensor | None, banks: Banks, segments: Segments) -> Tensor:
    """``x W + b + s (x A_d) B_d + c_d`` for each row's domain, bit for bit what the base gives plus corrections.

    **Shape**: as :func:`add_corrections`; ``weight (out, in)`` and ``shared_bias (out,)`` are those of the base.
    """
    result: Tensor = _Corrections.apply(  # type: ignore[no-untyped-call]
        None, x, weight, shared_bias, *banks, segments
    )
    return result


class _Corrections(torch.autograd.Function):
    """Tile by tile, so that what one product writes is still in the cache when the next one reads it.

    Takes either what the base gave (``out``) or the base's own parameters, which saves a pass over the input's gradient.
    """

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
            out = F.linear(x, cast(Tensor, weight), shared_bias).contiguous()
            if out._is_view():  # with middle axes; what is returned must be no view: an in-place activation may follow
                out = torch.ops.aten._unsafe_view(out, out.shape)
        else:
            ctx.mark_dirty(out)
        banks = Banks(bank_a, bank_b, bias, scale, sparse)
        inner = correct_(out, x, banks, segments)
        ctx.save_for_backward(x, weight, bank_a, bank_b, *inner)
        ctx.scale, ctx.sparse, ctx.segments = scale, sparse, segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bank_a, bank_b, *inner = ctx.saved_tensors
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
        found = correct_backward_(grad, x, banks, ctx.segments, grad_x, wanted, inner)
        return None if weight is not None else grad, grad_x, grad_weight, grad_shared, *found, None, None, None


def correct_(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> list[Tensor]:
    """Add corrections to ``out``; returns what the backward pass wants to know of each tile, ``x A_d``."""
    inner, scratch = [], _Scratch(x)
    with _one_thread(x.device):
        for tile in _tiles(x, segments):
            piece = scratch.rows("x", x, tile)  # (n, in), or (G, n, in) for G domains of n rows each
            hidden = piece @ scratch.own("a", banks.a, tile)  # (n, R)
            shift = None if banks.bias is None else scratch.own("bias", banks.bias, tile)  # (out,) or (G, out)
            _add_(out, tile, hidden, scratch.own("b", banks.b, tile), shift, banks.scale, scratch)
            inner.append(hidden)
    return inner


def correct_backward_(
    grad: Tensor,
    x: Tensor,
    banks: Banks,
    segments: Segments,
    grad_x: Tensor | None,
    wanted: Sequence[bool],
    inner: Sequence[Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """Add to ``grad_x``, and return the gradients of ``A``, ``B`` and the bias as far as they are ``wanted``.

    ``inner`` is what :func:`correct_` gave, or None to compute it again.
    """
    shapes = (banks.a.shape, banks.b.shape, (banks.b.shape[0], banks.b.shape[2]))
    gradients = [
        _BankGradient(shape, segments, banks.sparse, banks.a) if want else None
        for want, shape in zip(wanted, shapes, strict=True)
    ]
    scratch, tiles = _Scratch(grad), _tiles(x, segments)
    known: Sequence[Tensor | None] = [None] * len(tiles) if inner is None else inner
    with _one_thread(x.device):
        for tile, hidden in zip(tiles, known, strict=True):
            _tile_backward(tile, grad, x, hidden, banks, scratch, gradients, grad_x)
    return tuple(None if gradient is None else gradient.whole() for gradient in gradients)


def _tiles(x: Tensor, segments: Segments) -> tuple[Tile, ...]:
    """What there is to compute: nothing where a middle axis has no length."""
    return segments.tiles if x.numel() else ()


def _tile_backward(
    tile: Tile,
    grad: Tensor,
    x: Tensor,
    hidden: Tensor | None,
    banks: Banks,
    scratch: _Scratch,
    gradients: Sequence[_BankGradient | None],
    grad_x: Tensor | None,
) -> None:
    grad_a, grad_b, grad_bias = gradients
    piece = scratch.rows("grad", grad, tile)  # (n, out), or (G, n, out)
    if tile.pads is not None:
        piece.view(-1, grad[0].numel()).index_fill_(0, tile.pads, 0.0)
    if grad_bias is not None:
        grad_bias.put(tile, piece.sum(-2))
    if grad_b is not None:
        if hidden is None:
            hidden = scratch.rows("x", x, tile) @ scratch.own("a", banks.a, tile)
        grad_b.put(tile, hidden.mT @ piece, banks.scale)
    if grad_a is None and grad_x is None:
        return
    grad_hidden = piece @ scratch.own("b", banks.b, tile).mT  # (n, R)
    if banks.scale != 1.0:
        grad_hidden.mul_(banks.scale)
    if grad_a is not None:
        grad_a.put(tile, scratch.rows("x", x, tile).mT @ grad_hidden)
    if grad_x is not None:
        _add_(grad_x, tile, grad_hidden, scratch.own("a", banks.a, tile).mT, None, 1.0, scratch)


class _BankGradient:
    """The gradient of a bank, put together tile by tile."""

    def __init__(self, shape: Sequence[int], segments: Segments, sparse: bool, bank: Tensor) -> None:
        self.shape, self.segments, self.sparse = shape, segments, sparse
        self.values = bank.new_zeros((len(segments.spans) if sparse else shape[0], *shape[1:]))

    def put(self, tile: Tile, value: Tensor, scale: float = 1.0) -> None:
        """``value`` is the gradient of a tile's domains."""
        if scale != 1.0:
            value = value.mul_(scale)
        if tile.names is None or tile.places is None:
            self.values[tile.place if self.sparse else tile.first].copy_(value)
        else:
            where = tile.places if self.sparse else tile.names
            self.values.index_copy_(0, where, value.to(self.values.dtype))

    def whole(self) -> Tensor:
        """A tensor of the bank's shape."""
        return sparse_rows(self.values, self.segments, self.shape) if self.sparse else self.values


def sparse_rows(values: Tensor, segments: Segments, shape: Sequence[int]) -> Tensor:
    """A sparse gradient of a bank: ``values (P, ...)`` of the domains that occur."""
    index = segments.domains.unsqueeze(0)
    return torch.sparse_coo_tensor(index, values, tuple(shape), is_coalesced=True, check_invariants=False)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """A tile's products are so short that to wake a second thread for each of them costs several times their work."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    # the number belongs to the process: a thread that another one begins meanwhile would keep it
    if threads == 1 or threading.active_count() > 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Scratch:
    """Memory that one tile after the other writes over: fresh memory costs about as much as what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory; what it held under this name is gone."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)

    def own(self, name: str, bank: Tensor, tile: Tile) -> Tensor:
        """What a bank holds for a tile: ``(...)``, or ``(G, ...)``; in the type that is computed in."""
        if tile.names is None:
            own = bank[tile.first]
        elif bank.dtype == self._like.dtype:
            return torch.index_select(bank, 0, tile.names, out=self.take(name, tile.size, *bank.shape[1:]))
        else:
            own = bank.index_select(0, tile.names)
        return own if own.dtype == self._like.dtype else own.to(self._like.dtype)

    def rows(self, name: str, x: Tensor, tile: Tile) -> Tensor:
        """A tile's rows of ``x (B, ..., width)``: ``(n, width)``, or ``(G, n, width)``; middle axes count as rows."""
        if tile.rows is None:
            piece = x[tile.start : tile.stop]
        else:
            piece = torch.index_select(x, 0, tile.rows, out=self.take(name, len(tile.rows), *x.shape[1:]))
        if tile.size > 1:
            return piece.view(tile.size, -1, x.shape[-1])
        return piece if x.dim() == 2 else piece.reshape(-1, x.shape[-1])


def _add_(
    out: Tensor, tile: Tile, hidden: Tensor, b: Tensor, shift: Tensor | None, scale: float, scratch: _Scratch
) -> None:
    """``out + s hidden b + shift`` in a tile's rows; ``hidden (n, R)`` and ``b (R, out)``, or a batch of G such."""
    if shift is not None and hidden.dim() > 2:
        shift = shift.unsqueeze(1)  # (G, 1, out)
    if tile.rows is None:
        target = out[tile.start : tile.stop].view(-1, out.shape[-1])
        target.addmm_(hidden, b, alpha=scale)
        if shift is not None:
            target.add_(shift)
        return
    change = torch.matmul(hidden, b, out=scratch.take("out", *hidden.shape[:-1], out.shape[-1]))
    if scale != 1.0:
        change.mul_(scale)
    if shift is not None:
        change.add_(shift)
    change = change.view(-1, *out.shape[1:])
    if tile.pads is not None:
        change.index_fill_(0, tile.pads, 0.0)
    out.index_add_(0, tile.rows, change)
