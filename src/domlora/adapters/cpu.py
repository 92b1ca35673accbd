"""Corrections on a CPU: tensors for the loops of :mod:`domlora.adapters.compiled`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domlora.adapters import compiled

if TYPE_CHECKING:
    from domlora.adapters.kernels import Banks
    from domlora.adapters.route import Segments

__all__ = ["correct_", "correct_backward_"]

Array = NDArray[Any]

_WORTH = 1 << 21  # multiply-adds of a thread that pay for waking it


def correct_(out: Tensor, x: Tensor, banks: Banks, segments: Segments) -> Tensor:
    """Add corrections to ``out``; returns what the backward pass wants to know, ``x A_d`` of each row."""
    work = _Work(x, banks, segments)
    total = out if out.dtype == work.dtype else out.new_zeros(out.shape, dtype=work.dtype)
    hidden = work.forward(_flat(total))
    if total is not out:
        out.add_(total.to(out.dtype))  # what an operator in a trace gives is in this type too
    return torch.from_numpy(hidden)


def correct_backward_(
    grad_x: Tensor | None,
    grad_banks: Sequence[Tensor | None],
    grad: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    banks: Banks,
    segments: Segments,
) -> None:
    """Add to ``grad_x`` and to the rows ``segments.names`` (the first P where the bank is sparse) of ``grad_banks``.

    ``hidden`` is what :func:`correct_` gave, or None to compute it again.
    """
    work = _Work(x, banks, segments)
    inner = work.forward(work.nothing) if hidden is None else hidden.numpy()
    total = grad_x if grad_x is None or grad_x.dtype == work.dtype else torch.zeros_like(grad_x, dtype=work.dtype)
    wanted = [work.nothing if each is None else _flat(each) for each in (total, *grad_banks)]
    numbers = (_flat(grad.to(work.dtype)), inner, work.x, work.a, work.b, work.scale)
    places = np.arange(len(segments.names)) if banks.sparse else segments.names
    _each(
        partial(compiled.backward, *wanted, *numbers, work.rows, bounds, work.names[part], places[part], work.sizes)
        for part, bounds in work.parts()
    )
    if grad_x is not None and total is not None and total is not grad_x:
        grad_x.add_(total)


class _Work:
    """What the loops take: flat arrays in one type, float32 at least; middle axes count as rows."""

    def __init__(self, x: Tensor, banks: Banks, segments: Segments) -> None:
        given: list[Tensor | None] = [banks.a, banks.b, banks.bias]
        self.names = segments.names
        self.dtype = torch.float32
        if any(tensor is not None and tensor.dtype != self.dtype for tensor in (x, *given)):
            self.dtype = reduce(torch.promote_types, (x.dtype, banks.a.dtype, banks.b.dtype), self.dtype)
        if banks.a.dtype != self.dtype:  # no copy of more than is needed
            self.names = np.arange(len(segments.names))
            given = [None if bank is None else bank.index_select(0, segments.domains).to(self.dtype) for bank in given]
        self.nothing = _NOTHING[self.dtype]
        self.x = _flat(x if x.dtype == self.dtype else x.to(self.dtype))
        self.a, self.b, self.bias = (self.nothing if bank is None else _flat(bank) for bank in given)
        self.scale = self.nothing.dtype.type(banks.scale)
        self.sizes = (x.shape[-1], banks.a.shape[2], banks.b.shape[2])
        middle = x.numel() // (x.shape[0] * x.shape[-1])
        self.rows, self.bounds = segments.sorted_rows, segments.bounds
        if middle > 1:
            self.rows = (self.rows[:, None] * middle + np.arange(middle)).reshape(-1)
            self.bounds = self.bounds * middle

    def forward(self, out: Array) -> Array:
        """Corrections added to ``out``, unless it is empty; ``x A_d`` of each row."""
        hidden = np.empty(len(self.rows) * self.sizes[1], self.nothing.dtype)
        numbers = (self.x, self.a, self.b, self.bias, self.scale)
        _each(
            partial(compiled.forward, out, hidden, *numbers, self.rows, bounds, self.names[part], self.sizes)
            for part, bounds in self.parts()
        )
        return hidden

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Domains for each of torch's threads, with bounds; a domain is never cut, so that no sum depends on them."""
        width_in, rank, width_out = self.sizes
        work = len(self.rows) * rank * (width_in + width_out)
        count = min(torch.get_num_threads(), work // _WORTH, len(self.names)) or 1
        aims = np.linspace(self.bounds[0], self.bounds[-1], count + 1)[1:-1]
        cuts = [0, *np.searchsorted(self.bounds, aims), len(self.names)]
        for first, last in pairwise(cuts):
            if first < last:
                yield slice(first, last), self.bounds[first : last + 1]


def _each(calls: Iterator[Callable[[], None]]) -> None:
    """All of them, the first here and the others beside it: the loops do not hold Python's lock."""
    first, *others = calls
    if not others:
        return first()
    helpers = _helpers(os.getpid())
    waiting = [helpers.submit(call) for call in others]
    try:
        first()
    finally:
        for each in waiting:
            each.result()


@lru_cache(maxsize=1)
def _helpers(process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked process has none of its parent's threads
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="domlora-adapters")


_NOTHING = {dtype: torch.empty(0, dtype=dtype).numpy() for dtype in (torch.float32, torch.float64)}


def _flat(tensor: Tensor) -> Array:
    """A view, unless there are strides."""
    array: Array = tensor.detach().contiguous().numpy().reshape(-1)
    return array
