"""How a pass over rows is cut into batches: whose rows, in which order, from which batch on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from domlora.errors import ConfigError, DataError
from domlora.features.batch import Batch

__all__ = ["Pass", "chunks_of", "pick", "rows_in_memory"]

Order = NDArray[np.int64]

_CHUNK_ROWS = 1 << 16
_CHUNK_BYTES = 1 << 23
"""Rows picked at once: enough to hide the cost of a call, few enough to stay in the cache."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What is asked of one pass over a split; see :meth:`domlora.data.dataset.Dataset.batches`.

    Raises:
        ConfigError: a number out of range.
    """

    batch_size: int
    seed: int | None = None
    epoch: int = 0
    sort_by_domain: bool = True
    start: int = 0
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        numbers = (("batch_size", self.batch_size, 1), ("seed", self.seed or 0, 0), ("epoch", self.epoch, 0))
        for name, value, least in (*numbers, ("start", self.start, 0)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}", received=value)
        if not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError("shard must be (worker, workers) with 0 <= worker < workers", received=self.shard)

    def rows(self, num_rows: int) -> range:
        """The positions that are this worker's, of so many in the order of the pass: an even share, give or take one.

        Raises:
            DataError: some but fewer rows than workers.
        """
        worker, workers = self.shard
        if 0 < num_rows < workers:
            raise DataError(
                f"{workers} workers need at least a row each", received=num_rows, next_step="Use fewer workers"
            )
        return range(num_rows * worker // workers, num_rows * (worker + 1) // workers)

    def num_batches(self, num_rows: int) -> int:
        """Batches of each worker, equal for all; the last takes one row more where another batch would hold it alone."""
        return -(-(num_rows // self.shard[1]) // self.batch_size)


def rows_in_memory(rows: Batch, asked: Pass) -> Iterator[list[Batch]]:
    """The batches of a pass over rows that are all there, some at a time; with a seed in an order drawn over all of them."""
    mine, left = asked.rows(rows.num_rows), asked.num_batches(rows.num_rows) - asked.start
    first = mine.start + asked.start * asked.batch_size
    if left <= 0:
        return iter(())
    if asked.seed is None:
        return chunks_of(rows.take(slice(first, mine.stop)), None, asked, left)
    order = np.random.default_rng((asked.seed, asked.epoch)).permutation(rows.num_rows)
    return chunks_of(rows, order[first : mine.stop], asked, left)


def chunks_of(rows: Batch, order: Order | None, asked: Pass, num_batches: int) -> Iterator[list[Batch]]:
    """``num_batches`` batches of the rows in the given order (None as they stand), some at a time.

    All have ``batch_size`` rows but the last, which holds what is left.
    """
    total = rows.num_rows if order is None else len(order)
    bounds = [*range(0, num_batches * asked.batch_size, asked.batch_size), total]
    together = _batches_together(rows, asked.batch_size)
    for first in range(0, num_batches, together):
        edges = bounds[first : first + together + 1]
        start, stop = edges[0], edges[-1]
        # picked in one go for many batches: a call a batch costs more than the copy
        chunk_order = None if order is None else order[start:stop]
        if asked.sort_by_domain:
            chunk_order = np.arange(start, stop) if chunk_order is None else chunk_order
            chunk_order = _sorted_inside(
                rows.domain.numpy()[chunk_order], chunk_order, asked.batch_size, len(edges) - 1
            )
        chunk = rows.take(slice(start, stop)) if chunk_order is None else pick(rows, chunk_order)
        yield [chunk.take(slice(a - start, b - start)) for a, b in pairwise(edges)]


def pick(rows: Batch, order: Order) -> Batch:
    """The rows at some positions, copied."""
    positions = torch.from_numpy(order)
    return rows._replace(**{k: v.index_select(0, positions) for k, v in rows._asdict().items() if v is not None})


def _batches_together(rows: Batch, batch_size: int) -> int:
    bytes_of = sum(column[:1].numel() * column.element_size() for column in rows if column is not None)
    return max(min(_CHUNK_ROWS, _CHUNK_BYTES // max(bytes_of, 1)) // batch_size, 1)


def _sorted_inside(domain: NDArray[Any], order: Order, batch_size: int, num_batches: int) -> Order:
    """``order`` with the rows of each batch sorted by their ``domain``, equal ones left in place; all batches at once."""
    if len(domain) == 0 or domain.max() < 2**15:
        domain = domain.astype(np.int16)  # numpy sorts 16 bits by radix, several times faster
    full = (num_batches - 1) * batch_size  # rows before the last batch, whose size may be another
    parts = (slice(0, full), (num_batches - 1, batch_size)), (slice(full, None), (1, -1))
    return np.concatenate(
        [_sort_rows(domain[part].reshape(shape), order[part].reshape(shape)) for part, shape in parts]
    )


def _sort_rows(domain: NDArray[Any], order: Order) -> Order:
    ranks = np.argsort(domain, axis=1, kind="stable")  # (batches, batch_size)
    return np.take_along_axis(order, ranks, axis=1).ravel()
