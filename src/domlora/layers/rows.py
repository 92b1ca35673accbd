"""How the rows of tables begin: all here, some of them, or none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Stretch", "all_rows", "cut_tables", "empty_tables", "starting_rows", "stretch_of"]

_CHUNK = 1 << 20
"""Numbers that are drawn at once. A multiple of 16: torch draws normal numbers in sixteens."""


class Stretch(NamedTuple):
    """Rows ``start`` to ``stop`` of a table of ``num_rows``."""

    start: int
    stop: int
    num_rows: int


def stretch_of(num_rows: int, part: int, parts: int) -> Stretch:
    """One of some stretches of ``ceil(num_rows / parts)`` rows each; the last ones may have fewer or none.

    >>> [stretch_of(5, part, 4)[:2] for part in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-num_rows // parts)
    return Stretch(min(each * part, num_rows), min(each * (part + 1), num_rows), num_rows)


_Making = Callable[[int, int, float], tuple[Tensor, Stretch | None]]


def all_rows(num_rows: int, width: int, std: float) -> tuple[Tensor, None]:
    """Rows drawn from N(0, std²)."""
    return torch.empty(num_rows, width).normal_(0.0, std), None


_making: ContextVar[_Making] = ContextVar("_making", default=all_rows)


def starting_rows(num_rows: int, width: int, std: float) -> tuple[Tensor, Stretch | None]:
    """As :func:`all_rows`, or as one of the contexts below says; and which rows they are if they are not all of them."""
    return _making.get()(num_rows, width, std)


@contextmanager
def cut_tables(part: int, parts: int) -> Iterator[None]:
    """Let tables that are made here have the rows of one stretch alone.

    Their numbers are those that the whole table would have, and so are all that are drawn after them; it takes the time of
    the whole table and the memory of the stretch.
    """
    with _made_by(partial(_drawn_stretch, part, parts)):
        yield


@contextmanager
def empty_tables() -> Iterator[None]:
    """Let tables that are made here have a shape and no numbers, until they are given some."""
    with _made_by(lambda num_rows, width, _: (torch.empty(num_rows, width, device="meta"), None)):
        yield


@contextmanager
def _made_by(making: _Making) -> Iterator[None]:
    before = _making.set(making)
    try:
        yield
    finally:
        _making.reset(before)


def _drawn_stretch(part: int, parts: int, num_rows: int, width: int, std: float) -> tuple[Tensor, Stretch]:
    mine = stretch_of(num_rows, part, parts)
    first, last = mine.start * width, mine.stop * width
    kept = torch.empty(last - first)
    start, end = 0, num_rows * width
    while start < end:
        stop = min(start + _CHUNK, end)
        stop = end if end - stop < 16 else stop  # torch draws the last sixteen anew where they are not whole
        numbers = torch.empty(stop - start).normal_(0.0, std)
        here, there = max(start, first), min(stop, last)
        if here < there:
            kept[here - first : there - first] = numbers[here - start : there - start]
        start = stop
    return kept.view(-1, width), mine
