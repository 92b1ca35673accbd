"""Corrections on an accelerator, where few large products beat many small ones.

A batch of few domains is multiplied with the banks of all of them, and each row keeps what its own domain gave
(:mod:`domlora.adapters.masked`). Many domains are taken in tiles: as many at once as have about equally many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from domlora.adapters import masked

if TYPE_CHECKING:
    from domlora.adapters.kernels import Banks
    from domlora.adapters.route import Segments

__all__ = ["Tile", "correct_", "correct_backward_", "tiles_of"]


class Tile(NamedTuple):
    """G domains with n rows each, so that one batched product serves them all.

    ``rows (G * n,)`` are row numbers of the batch: a domain that has fewer repeats its last, and ``pads`` tells where.
    ``names (G,)`` are the domains and ``places (G,)`` their places among those of the batch.
    """

    rows: Tensor
    pads: Tensor | None
    names: Tensor
    places: Tensor


def correct_(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> Tensor | None:
    """Add corrections to ``out``; of few domains also what the backward pass wants to know."""
    if masked.is_better(banks, segments):
        return masked.correct_(out, x, banks, segments)
    for tile in tiles_of(segments):
        change = _hidden(x, banks, tile) @ _own(banks.b, tile, x) * banks.scale  # (G, n, out)
        if banks.bias is not None:
            change = change + _own(banks.bias, tile, x).unsqueeze(1)
        _add_(out, change, tile)
    return None


def correct_backward_(
    grad_x: Tensor | None,
    grad_banks: Sequence[Tensor | None],
    grad: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    banks: Banks,
    segments: Segments,
) -> None:
    """As :func:`domlora.adapters.cpu.correct_backward_`; in tiles ``x A_d`` is computed again."""
    if masked.is_better(banks, segments):
        masked.correct_backward_(grad_x, grad_banks, grad, hidden, x, banks, segments)
        return
    grad_a, grad_b, grad_bias = grad_banks
    for tile in tiles_of(segments):
        where = tile.places if banks.sparse else tile.names
        piece = _rows(grad.to(x.dtype), tile)  # (G, n, out)
        if tile.pads is not None:
            piece.view(-1, grad[0].numel()).index_fill_(0, tile.pads, 0.0)
        if grad_bias is not None:
            grad_bias.index_copy_(0, where, piece.sum(1).to(grad_bias.dtype))
        if grad_b is not None:
            found = _hidden(x, banks, tile).mT @ piece * banks.scale
            grad_b.index_copy_(0, where, found.to(grad_b.dtype))
        grad_hidden = piece @ _own(banks.b, tile, x).mT * banks.scale  # (G, n, R)
        if grad_a is not None:
            grad_a.index_copy_(0, where, (_rows(x, tile).mT @ grad_hidden).to(grad_a.dtype))
        if grad_x is not None:
            _add_(grad_x, grad_hidden @ _own(banks.a, tile, x).mT, tile)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """A tile's rows ``(G, n, width)`` of ``x (B, ..., width)``; middle axes count as rows."""
    return x.index_select(0, tile.rows).view(len(tile.names), -1, x.shape[-1])


def _own(bank: Tensor, tile: Tile, x: Tensor) -> Tensor:
    """What a bank holds for the domains of a tile, in the type that is computed in."""
    return bank.index_select(0, tile.names).to(x.dtype)


def _hidden(x: Tensor, banks: Banks, tile: Tile) -> Tensor:
    return _rows(x, tile) @ _own(banks.a, tile, x)  # (G, n, R)


def _add_(out: Tensor, change: Tensor, tile: Tile) -> None:
    change = change.reshape(-1, *out.shape[1:])
    if tile.pads is not None:
        change = change.index_fill(0, tile.pads, 0.0)
    out.index_add_(0, tile.rows, change.to(out.dtype))


def tiles_of(segments: Segments) -> tuple[Tile, ...]:
    """The rows that have a domain, each once; planned once a batch."""
    if segments.plan is None:
        segments.plan = _plan(segments)
    plan: tuple[Tile, ...] = segments.plan
    return plan


def _plan(segments: Segments) -> tuple[Tile, ...]:
    counts = np.diff(segments.bounds)
    by_count = np.argsort(-counts, kind="stable")
    tiles = []
    for first, last in _cuts(counts[by_count].tolist()):
        places = by_count[first:last]
        own = counts[places]
        step = np.arange(own[0])
        rows = segments.sorted_rows[segments.bounds[places][:, None] + np.minimum(step, own[:, None] - 1)]
        pads = np.flatnonzero(step >= own[:, None])
        arrays = (rows.reshape(-1), pads, segments.names[places], places)
        tensors = [torch.from_numpy(array).to(segments.device) for array in arrays]
        tiles.append(Tile(tensors[0], tensors[1] if len(pads) else None, *tensors[2:]))
    return tuple(tiles)


def _cuts(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Where tiles begin and end among domains with ever fewer rows: at the most an eighth of a tile's rows fill up."""
    cuts, first, total = [], 0, 0
    for place, count in enumerate(counts):
        area = counts[first] * (place + 1 - first)
        if 8 * (area - total - count) > area:
            cuts.append((first, place))
            first, total = place, 0
        total += count
    return [*cuts, (first, len(counts))] if counts else []
