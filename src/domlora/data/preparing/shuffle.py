"""Rows in any order → shards in an order that a hash draws, in bounded memory.

Rows are dealt out to as many piles as there will be shards, by the first bits of their hash; each pile is then sorted and
written. One after the other, the shards of a split hold all of its rows in the order of their hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from domlora.data.dataset import SPLITS
from domlora.data.engine import HASH_BITS
from domlora.data.shards import shard_schema, write_shard
from domlora.errors import ConfigError
from domlora.features.schema import Schema
from domlora.files import allow_open_files

__all__ = ["ORDER_COLUMN", "SPLIT_COLUMN", "Piles", "by_order", "number_of_piles", "pile_of"]

ORDER_COLUMN, SPLIT_COLUMN = "__order", "__split"
_OTHER_FILES = 40
Shown = Callable[[int], None]


class Piles:
    """One file a shard to be, which grows batch by batch.

    Args:
        schema: of the dataset.
        sizes: rows of each split.
        shard_rows: rows of a shard, about.
        folder: for the piles; each is removed once its shard is written.

    Raises:
        ConfigError: more shards than a process may have open files.
    """

    def __init__(self, schema: Schema, sizes: Mapping[str, int], shard_rows: int, folder: Path) -> None:
        self.schema, self.folder = schema, folder
        self.counts = number_of_piles(sizes, shard_rows)
        self.first = np.cumsum([0, *self.counts])  # the number of each split's first pile
        self._rows = pa.schema([*shard_schema(schema), (ORDER_COLUMN, pa.int64())])
        self._files: dict[int, Any] = {}
        most = allow_open_files() - _OTHER_FILES
        if self.first[-1] > most:
            raise ConfigError(
                f"each shard needs an open file, and this process may have {most}",
                received=f"{self.first[-1]} shards",
                next_step="Raise shard_rows, or ulimit -Hn, or take --engine spark",
            )

    def deal(self, columns: Mapping[str, pa.Array], order: pa.Array, split: pa.Array) -> None:
        """Put encoded rows on their piles."""
        table = pa.RecordBatch.from_arrays(
            [*(columns[f.name] for f in shard_schema(self.schema)), order], schema=self._rows
        )
        pile = pile_of(order, split, self.counts)
        by_pile = np.argsort(pile, kind="stable")
        bounds = np.searchsorted(pile[by_pile], np.arange(self.first[-1] + 1))
        table = table.take(pa.array(by_pile))
        for which in range(int(self.first[-1])):
            start, stop = int(bounds[which]), int(bounds[which + 1])
            if stop > start:
                self._file(which).write_batch(table.slice(start, stop - start))

    def _file(self, which: int) -> Any:
        if which not in self._files:
            self._files[which] = pa.ipc.new_stream(str(self._path(which)), self._rows)
        return self._files[which]

    def _path(self, which: int) -> Path:
        return self.folder / f"pile-{which:05d}.arrows"

    def write(self, out: Path, shown: Shown) -> dict[str, list[str]]:
        """Sort each pile and write its shard; returns the files of each split, relative to ``out``."""
        for file in self._files.values():
            file.close()
        files: dict[str, list[str]] = {}
        for number, split in enumerate(SPLITS):
            (out / split).mkdir()
            files[split] = []
            for which in range(int(self.first[number]), int(self.first[number + 1])):
                for table in self._pile(which):
                    files[split].append(f"{split}/part-{len(files[split]):05d}.parquet")
                    write_shard(table, self.schema, out / files[split][-1])
                    shown(table.num_rows)
        return files

    def _pile(self, which: int) -> Iterator[pa.Table]:
        """A pile in order; rows of one hash, which are equal in their key, by all their columns."""
        path = self._path(which)
        if which not in self._files:
            return
        with pa.ipc.open_stream(str(path)) as reader:
            table = reader.read_all()
        path.unlink()
        yield table.take(by_order(table)).drop([ORDER_COLUMN])


def number_of_piles(sizes: Mapping[str, int], shard_rows: int) -> list[int]:
    """How many piles each split has, from its rows."""
    return [-(-sizes[split] // shard_rows) for split in SPLITS]


def pile_of(order: pa.Array, split: pa.Array, counts: Sequence[int]) -> NDArray[np.int64]:
    """The pile of each row, all splits numbered through."""
    number = split.to_numpy(zero_copy_only=False)
    place = order.to_numpy() >> (HASH_BITS - 20)  # 20 bits of it, so that the product below fits
    first = np.cumsum([0, *counts])
    pile: NDArray[np.int64] = first[number] + ((place * np.asarray(counts)[number]) >> 20)
    return pile


def by_order(table: pa.Table) -> pa.Array:
    """The places of rows in the order of their hashes; of one hash, by all their columns."""
    order = table.column(ORDER_COLUMN)
    if len(pc.unique(order)) == table.num_rows:
        return pc.sort_indices(order)
    columns = [table.column(field.name).combine_chunks() for field in table.schema if field.name != ORDER_COLUMN]
    keys = [order.to_numpy()]
    for column in columns:
        lists = pa.types.is_fixed_size_list(column.type)
        flat = column.flatten().to_numpy().reshape(len(column), -1) if lists else column.to_numpy()[:, None]
        keys += list(flat.T)
    return pa.array(np.lexsort(keys[::-1]))
