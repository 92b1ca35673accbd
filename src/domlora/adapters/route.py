"""Which rows of a batch belong to which domain: grouped once a batch, read by every adapted layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from domlora.errors import ConfigError, UnknownDomainError

__all__ = ["DomainRoute", "Segments", "Ungrouped", "grouped"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Segments:
    """Rows of a batch grouped by domain.

    Args:
        domain: the domain of each row ``(B,)``.
        order: sorts the rows by domain; None if they already are.
        names: the domains that occur ``(P,)``, ascending.
        bounds: where each begins among the sorted rows, and where the last ends ``(P + 1,)``; rows of no domain (-1) come
            before.
    """

    def __init__(
        self, domain: Tensor, order: Tensor | None, names: NDArray[np.int64], bounds: NDArray[np.int64]
    ) -> None:
        self.domain, self.order, self.names, self.bounds = domain, order, names, bounds
        self.num_rows, self.device = len(domain), domain.device
        self.plan: Any = None  # the tiles of an accelerator

    @cached_property
    def domains(self) -> Tensor:
        """The domains that occur as a tensor ``(P,)``."""
        return torch.from_numpy(self.names).to(self.device)

    @cached_property
    def mine(self) -> Tensor:
        """Whether a row is of a domain that occurs ``(B, P)``."""
        return self.domain.unsqueeze(1) == self.domains

    @cached_property
    def sorted_rows(self) -> NDArray[np.int64]:
        """Row numbers of the batch in the order of their domains ``(B,)``."""
        return np.arange(self.num_rows) if self.order is None else self.order.numpy(force=True)


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
    lowest, highest = (int(value) for value in torch.aminmax(domain)) if len(domain) else (-1, -1)
    if lowest < -1 or highest >= num_domains:
        raise UnknownDomainError(
            f"domains must be numbers from 0 to {num_domains - 1}, or -1 for none",
            received=lowest if lowest < -1 else highest,
            next_step="Encode unknown domains as -1 to score them with the base",
        )
    order = None
    if lowest == highest:
        present, counts = np.array([lowest]), np.array([len(domain)])
    else:
        order = _argsort(domain, highest) if bool((domain[1:] < domain[:-1]).any()) else None
        ascending = domain if order is None else domain.index_select(0, order)
        found = torch.unique_consecutive(ascending, return_counts=True)
        present, counts = (values.numpy(force=True).astype(np.int64) for values in found)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    first = int(present[0] < 0)
    return Segments(domain, order, present[first:], bounds[first:])


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
