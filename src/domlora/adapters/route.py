"""Which rows of a batch belong to which domain: grouped once a batch, read by every adapted layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domlora.errors import ConfigError, UnknownDomainError

__all__ = ["DomainRoute", "Segments", "Tile", "Ungrouped", "grouped"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Measured on a tower of 384-256-128-64 with ranks 16, 8 and 4: a CPU core should find in its own cache (2 MB here) what the
# product before has written, and rows that lie as they should are worth moving only where a domain has few. An accelerator
# wants few large products.
_TILE_ROWS, _TILE_DOMAINS, _FEW_ROWS = 512, 64, 64


class Tile(NamedTuple):
    """``size`` domains with about equally many rows, so that one batched product serves them all.

    One domain has its number ``first`` and its ``place`` among the domains of the batch, several have ``names (G,)`` and
    ``places (G,)``. ``rows (G * n,)`` are row numbers of the batch, ``n`` for each domain: one that has fewer repeats its
    last, and ``pads`` tells where. One domain whose rows lie from ``start`` to ``stop`` of the batch has no ``rows``.
    """

    size: int
    first: int
    place: int
    start: int
    stop: int
    rows: Tensor | None
    pads: Tensor | None = None
    names: Tensor | None = None
    places: Tensor | None = None


class Segments:
    """Rows of a batch grouped by domain.

    Args:
        domain: the domain of each row ``(B,)``.
        order: sorts the rows by domain; None if they already are.
        spans: ``(start, stop, domain)`` of each domain that occurs, in that order; rows of no domain (-1) come first and are
            in no span.
    """

    def __init__(self, domain: Tensor, order: Tensor | None, spans: Sequence[tuple[int, int, int]]) -> None:
        self.domain, self.order, self.spans = domain, order, tuple(spans)
        self.num_rows, self.device = len(domain), domain.device

    @cached_property
    def domains(self) -> Tensor:
        """The domains that occur ``(P,)``, ascending."""
        return torch.tensor([domain for *_, domain in self.spans], dtype=torch.int64, device=self.device)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The rows that have a domain, in tiles of domains with about equally many rows."""
        spans = self.spans
        places = sorted(range(len(spans)), key=lambda place: spans[place][0] - spans[place][1])
        counts = [spans[place][1] - spans[place][0] for place in places]
        cpu = self.device.type == "cpu"
        limits = (_TILE_ROWS, _TILE_DOMAINS) if cpu else (2 * self.num_rows, self.num_rows)
        sizes = _sizes(counts, *limits, _FEW_ROWS if cpu and self.order is None else self.num_rows)
        shared = iter(
            self._shared([place for place, size in zip(places, _spread(sizes), strict=True) if size > 1], sizes)
        )
        tiles, first = [], 0
        for size in sizes:
            start, stop, domain = spans[places[first]]
            if size > 1:
                tiles.append(next(shared))
            else:
                rows = None if self.order is None else self.order[start:stop]
                tiles.append(Tile(1, domain, places[first], start, stop, rows))
            first += size
        return tuple(tiles)

    def _shared(self, places: list[int], sizes: Sequence[int]) -> list[Tile]:
        """The tiles of several domains."""
        if not places:
            return []
        widths = [size for size in sizes if size > 1]
        spans = np.array([self.spans[place] for place in places])
        counts = spans[:, 1] - spans[:, 0]
        heights = counts[np.cumsum(widths) - widths]  # the first domain of a tile has most rows
        high = np.repeat(heights, widths)  # for each domain the rows that its tile gives it
        step = np.arange(high.sum()) - np.repeat(np.cumsum(high) - high, high)
        last = np.repeat(counts - 1, high)
        rows = self._tensor(np.repeat(spans[:, 0], high) + np.minimum(step, last))
        if self.order is not None:
            rows = self.order.index_select(0, rows)
        totals = (heights * widths).tolist()
        pads = [np.flatnonzero(fills) for fills in np.split(step > last, np.cumsum(totals)[:-1])]
        names, split_places = (
            torch.split(self._tensor(each), widths) for each in (spans[:, 2].copy(), np.array(places))
        )
        return [
            Tile(width, -1, -1, -1, -1, own, self._tensor(fill) if len(fill) else None, name, place)
            for width, own, fill, name, place in zip(
                widths, torch.split(rows, totals), pads, names, split_places, strict=True
            )
        ]

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _sizes(counts: Sequence[int], max_rows: int, max_domains: int, few: int) -> list[int]:
    """How many domains each tile takes, the one with most rows first; only domains of few rows share one.

    At the most an eighth of a tile's rows fill up.
    """
    sizes: list[int] = []
    height = total = 0
    for count in counts:
        size = sizes[-1] + 1 if sizes else 1
        area = height * size
        fits = size <= max_domains and area <= max_rows and height < few and 8 * (area - total - count) <= area
        if sizes and fits:
            sizes[-1], total = size, total + count
        else:
            sizes.append(1)
            height = total = count
    return sizes


def _spread(sizes: Sequence[int]) -> list[int]:
    """For each domain the size of its tile."""
    return [size for size in sizes for _ in range(size)]


def grouped(domain: Tensor, num_domains: int) -> Segments:
    """Group the rows of a batch by domain.

    **Shape**: ``domain (B,)`` integers in [-1, num_domains); -1 is a row of no domain, which gets no correction.

    Raises:
        ConfigError: not a vector of integers.
        UnknownDomainError: a number outside that range.
    """
    if not isinstance(domain, Tensor) or domain.dim() != 1 or domain.dtype not in _INTEGERS:
        kind = f"{domain.dtype} of shape {tuple(domain.shape)}" if isinstance(domain, Tensor) else domain
        raise ConfigError("the domain of each row must be a vector of integers", received=kind)
    if not len(domain):
        return Segments(domain, None, ())
    lowest, highest = (int(value) for value in torch.aminmax(domain))
    if lowest < -1 or highest >= num_domains:
        raise UnknownDomainError(
            f"domains must be numbers from 0 to {num_domains - 1}, or -1 for none",
            received=lowest if lowest < -1 else highest,
            next_step="Encode unknown domains as -1 to score them with the base",
        )
    if lowest == highest:
        return Segments(domain, None, () if lowest < 0 else ((0, len(domain), lowest),))
    order, ascending = None, domain
    if bool((domain[1:] < domain[:-1]).any()):
        order = _argsort(domain, highest)
        ascending = domain.index_select(0, order)
    present, counts = (values.tolist() for values in torch.unique_consecutive(ascending, return_counts=True))
    spans, start = [], 0
    for name, count in zip(present, counts, strict=True):
        if name >= 0:
            spans.append((start, start + count, name))
        start += count
    return Segments(domain, order, spans)


def _argsort(domain: Tensor, highest: int) -> Tensor:
    if domain.device.type == "cpu" and highest < 1 << 15:
        # numpy sorts 16 bits by radix, in a sixth of torch's time
        return torch.from_numpy(np.argsort(domain.numpy().astype(np.int16), kind="stable"))
    return torch.sort(domain, stable=True).indices


class Ungrouped(NamedTuple):
    """A batch in a trace of torch.compile or torch.export, whose values nobody knows yet."""

    domain: Tensor

    @property
    def num_rows(self) -> int:
        """B."""
        return self.domain.shape[0]


class _Here(threading.local):
    """What one thread knows of the batch it is scoring."""

    def __init__(self) -> None:
        self.segments: Segments | Ungrouped | None = None
        self.held = False  # filled by hand for the length of a with block
        self.enabled = True


class DomainRoute:
    """The cell through which the domain of each row reaches layers that are buried in a model.

    The model's root fills it before the forward pass; every adapted layer reads it. Each thread has its own batch, so that
    threads may score different batches with one model. In a trace of torch.compile the batch is a plain attribute, because
    torch loses what a trace writes into thread-local memory where it breaks: a compiled model whose forward breaks into
    several graphs is for one thread at a time.
    """

    def __init__(self, num_domains: int) -> None:
        if not isinstance(num_domains, int) or num_domains < 1:
            raise ConfigError("adapters need num_domains of at least 1, a whole number", received=num_domains)
        self.num_domains = num_domains
        self.options: Any = None  # what attach_ was told, for whoever stores the model
        self.read: Callable[..., Tensor] | None = None  # what finds the domains among the arguments of a call
        self._traced: Ungrouped | None = None
        self._here = _Here()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the cell, not the batch in it."""
        return {**{name: value for name, value in self.__dict__.items() if name != "_here"}, "_traced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = _Here()

    @property
    def segments(self) -> Segments | Ungrouped | None:
        """This thread's batch."""
        return self._here.segments if self._traced is None else self._traced

    @segments.setter
    def segments(self, segments: Segments | Ungrouped | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = segments if isinstance(segments, Ungrouped) else None
        else:
            self._here.segments = segments

    @property
    def held(self) -> bool:
        """Whether this thread's batch was given by hand, for the length of a ``with`` block."""
        return self._here.held

    @held.setter
    def held(self, held: bool) -> None:
        self._here.held = held

    @property
    def enabled(self) -> bool:
        """Whether adapters count in this thread."""
        return self._here.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._here.enabled = enabled

    def fill(self, domain: Tensor) -> None:
        """Group this thread's rows, see :func:`grouped`."""
        traced = torch.compiler.is_compiling()
        self.segments = Ungrouped(domain) if traced else grouped(domain, self.num_domains)

    def clear(self) -> None:
        """Forget the batch."""
        self.segments = None
