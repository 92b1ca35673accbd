"""Rows that do not fit in memory: row groups in a drawn order, a window of them shuffled at a time.

A pass draws an order of all row groups. Consecutive ones form a window of about a million rows, whose order is drawn in
turn. Both hang on ``(seed, epoch)`` alone, so any batch of any pass can be found without the ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.ahead import ahead
from domlora.data.batching import Pass, chunks_of, pick
from domlora.data.shards import ROW_GROUP_ROWS, fill, row_bytes, uninitialised
from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.features.schema import Schema

__all__ = ["WINDOW_BYTES", "WINDOW_ROWS", "Stream", "damaged"]

WINDOW_ROWS = 1 << 20
WINDOW_BYTES = 1 << 28
"""The most rows and bytes of a window, unless one row group has more. The order of rows hangs on them."""
_CHUNKS_AHEAD = 4


class _Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a row group."""

    file: int
    group: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class _Window(NamedTuple):
    """Row groups that are shuffled together; ``first`` is the position of their first row in the order of the pass."""

    first: int
    pieces: list[_Piece]

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def stop(self) -> int:
        return self.first + self.num_rows


class Stream:
    """The shards of a split, read anew in every pass, in memory that does not grow with them.

    In memory are one window of rows (``WINDOW_BYTES``) and a few batches, which a thread makes ahead of their reader.

    Args:
        files: the shards, in stored order.
        schema: what their columns mean.
        num_rows: how many rows they must hold.
        check: called with a file before its rows are read; raises if it is not the prepared one.
    """

    def __init__(self, files: Sequence[Path], schema: Schema, num_rows: int, check: Callable[[Path], None]) -> None:
        self.files, self.schema, self.num_rows, self.check = files, schema, num_rows, check

    def batches(self, asked: Pass) -> Iterator[Batch]:
        """The batches of a pass.

        Raises:
            DataError: a file is missing or is not the one that was prepared.
        """
        with closing(ahead(self._chunks(asked), _CHUNKS_AHEAD)) as chunks:
            for chunk in chunks:
                yield from chunk

    def read(self) -> Batch:
        """All rows in stored order.

        Raises:
            DataError: a file is missing or is not the one that was prepared.
        """
        whole = uninitialised(self.schema, self.num_rows)
        self._fill(whole, self._groups)
        return whole

    def _chunks(self, asked: Pass) -> Iterator[list[Batch]]:
        """The batches of a pass, some at a time."""
        mine = asked.rows(self.num_rows)
        to_make = asked.num_batches(self.num_rows) - asked.start
        position = mine.start + asked.start * asked.batch_size
        if asked.seed is None:
            mine = range(position, mine.stop)  # what is not shuffled need not be read from where its window begins
        left = uninitialised(self.schema, 0)
        for window in self._windows(asked, mine):
            if to_make > 0 and window.stop > position:
                left, made = yield from self._in_window(
                    window, left, asked, position, to_make, window.stop == mine.stop
                )
                to_make -= made
                position = window.stop

    def _in_window(
        self, window: _Window, left: Batch, asked: Pass, position: int, to_make: int, is_last: bool
    ) -> Generator[list[Batch], None, tuple[Batch, int]]:
        """Batches of the rows ``left`` over by the window before and those of a window from ``position`` on.

        Returns the rows left over, and how many batches it made. In the last window that is all there are ``to_make``;
        before, one is kept back, since a single row of the next window may have to join it.
        """
        rows = uninitialised(self.schema, left.num_rows + window.num_rows)
        _copy(left, rows)
        self._fill(rows.take(slice(left.num_rows, None)), window.pieces)
        order = np.arange(window.num_rows)
        if asked.seed is not None:
            # + 1, because a seed sequence does not see a zero at its end
            order = np.random.default_rng((asked.seed, asked.epoch, window.first + 1)).permutation(window.num_rows)
        order = np.concatenate([np.arange(left.num_rows), order[position - window.first :] + left.num_rows])
        made = to_make if is_last else min(len(order) // asked.batch_size, to_make - 1)
        full = len(order) if is_last else made * asked.batch_size
        yield from chunks_of(rows, order[:full], asked, made)
        return pick(rows, order[full:]), made

    def _windows(self, asked: Pass, mine: range) -> Iterator[_Window]:
        most = self._window_rows(asked)
        window = _Window(mine.start, [])
        for piece in self._pieces(asked, mine):
            if window.pieces and window.num_rows + piece.num_rows > most:
                yield window
                window = _Window(window.stop, [])
            window.pieces.append(piece)
        yield window

    def _window_rows(self, asked: Pass) -> int:
        """The most rows of a window, unless one row group has more."""
        return ROW_GROUP_ROWS if asked.seed is None else min(WINDOW_ROWS, WINDOW_BYTES // row_bytes(self.schema))

    def _pieces(self, asked: Pass, mine: range) -> Iterator[_Piece]:
        """The row groups of a pass in their order, without the rows of other workers."""
        groups = self._groups
        if asked.seed is not None:
            order = np.random.default_rng((asked.seed, asked.epoch)).permutation(len(groups))
            groups = [groups[place] for place in order]
        first = 0
        for group in groups:
            start, stop = max(mine.start - first, 0), min(mine.stop - first, group.num_rows)
            first += group.num_rows
            if start < stop:
                yield group._replace(start=start, stop=stop)

    @cached_property
    def _groups(self) -> list[_Piece]:
        """All row groups, as the ends of the files tell them."""
        groups = []
        for number, path in enumerate(self.files):
            with _opened(path) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            groups += [_Piece(number, group, 0, size) for group, size in enumerate(sizes)]
        found = sum(group.num_rows for group in groups)
        if found != self.num_rows:
            folder = self.files[0].parent if self.files else Path()
            raise damaged(f"the shards must have {self.num_rows} rows, not {found}", folder)
        return groups

    def _fill(self, batch: Batch, pieces: Iterable[_Piece]) -> None:
        first = 0
        for piece in pieces:
            path = self.files[piece.file]
            self.check(path)
            with _opened(path) as file:
                rows = file.read_row_group(piece.group).slice(piece.start, piece.num_rows)
            fill(batch.take(slice(first, first + piece.num_rows)), rows, self.schema)
            first += piece.num_rows


def damaged(rule: str, path: Path) -> DataError:
    """The error of a file that is not as it was prepared."""
    return DataError(rule, received=str(path), next_step="Prepare the dataset again")


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise damaged(f"a shard cannot be read ({error})", path) from error


def _copy(rows: Batch, target: Batch) -> None:
    """Put rows at the beginning of others."""
    for column, start in zip(target, rows, strict=True):
        if column is not None and start is not None:
            column[: len(start)] = start
