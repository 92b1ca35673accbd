"""Shards that Spark's workers encode, sort and write: no row passes through the driver."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from domlora.data.dataset import SPLITS
from domlora.data.preparing.columns import ColumnEncoder
from domlora.data.preparing.shuffle import ORDER_COLUMN, SPLIT_COLUMN, by_order, number_of_piles, pile_of
from domlora.data.shards import shard_schema, write_shard

if TYPE_CHECKING:
    from domlora.features.encode import Encoder

__all__ = ["write_on_workers"]

_PILE = "pile"


def write_on_workers(
    frame: Any, encoder: Encoder, sizes: Mapping[str, int], shard_rows: int, out: Path
) -> dict[str, list[str]]:
    """The bytes that :class:`~domlora.data.preparing.shuffle.Piles` writes, a pile a task; gives the files of each split.

    Args:
        frame: Spark's, with the raw columns of the rows that are kept, their order and split.
        encoder: what gives values their numbers; it travels to the workers.
        sizes: rows of each split.
        shard_rows: rows of a shard, about; a worker holds those of one.
        out: the prepared folder, which workers see at the same path.
    """
    from pyspark.sql.types import IntegerType, StructField, StructType

    counts = number_of_piles(sizes, shard_rows)
    for split in SPLITS:
        (out / split).mkdir()
    names = StructType([*frame.schema.fields, StructField(_PILE, IntegerType())])
    dealt = frame.mapInArrow(partial(_with_pile, counts), names)

    def write(rows: pa.Table) -> pa.Table:  # Spark looks at the types of arguments, which a partial does not show
        return _write(encoder, out, rows)

    done = dealt.groupBy(_PILE).applyInArrow(write, f"{_PILE} integer").collect()
    return _renamed(sorted(row[_PILE] for row in done), counts, out)


def _with_pile(counts: list[int], batches: Any) -> Any:
    for batch in batches:
        pile = pile_of(batch.column(ORDER_COLUMN), batch.column(SPLIT_COLUMN), counts)
        yield batch.append_column(_PILE, pa.array(pile, pa.int32()))


def _write(encoder: Encoder, out: Path, rows: pa.Table) -> pa.Table:
    """One pile, as a file that has the pile's number for its name."""
    columns = ColumnEncoder(encoder)
    fields = pa.schema([*shard_schema(encoder.schema), (ORDER_COLUMN, pa.int64())])
    encoded = pa.Table.from_batches(
        [
            pa.RecordBatch.from_pydict({**columns.encode(batch), ORDER_COLUMN: batch.column(ORDER_COLUMN)}, fields)
            for batch in rows.to_batches()
        ]
    )
    pile = rows.column(_PILE)[0].as_py()
    write_shard(encoded.take(by_order(encoded)).drop([ORDER_COLUMN]), encoder.schema, out / f"{pile}.part")
    return pa.table({_PILE: pa.array([pile], pa.int32())})


def _renamed(piles: list[int], counts: list[int], out: Path) -> dict[str, list[str]]:
    """Files in the order of their piles, without gaps where a pile had no rows."""
    files: dict[str, list[str]] = {split: [] for split in SPLITS}
    for pile, number in zip(piles, np.searchsorted(np.cumsum(counts), piles, "right"), strict=True):
        split = SPLITS[number]
        files[split].append(f"{split}/part-{len(files[split]):05d}.parquet")
        (out / f"{pile}.part").rename(out / files[split][-1])
    return files
