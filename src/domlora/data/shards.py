"""The one place that knows what a shard of a prepared dataset looks like: columns, writing, decoding.

A shard is a Parquet file. Each feature of ids is an int32 column, a sequence a list of ``max_length`` of them (0 fills up),
each numeric feature a float32 column that is standardised already, with ``missing`` an int8 column beside it; then domain,
label, and user and weight if the schema has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from domlora.errors import SchemaError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema

__all__ = [
    "DOMAIN_COLUMN",
    "FORMAT",
    "FORMAT_VERSION",
    "LABEL_COLUMN",
    "MISSING_SUFFIX",
    "ROW_GROUP_ROWS",
    "USER_COLUMN",
    "WEIGHT_COLUMN",
    "decode",
    "fill",
    "row_bytes",
    "shard_schema",
    "uninitialised",
    "write_shard",
]

FORMAT, FORMAT_VERSION = "domlora-dataset", 2
DOMAIN_COLUMN, LABEL_COLUMN, USER_COLUMN, WEIGHT_COLUMN = "__domain", "__label", "__user", "__weight"
"""Columns of a shard beside those of the features, which have the features' own names."""
MISSING_SUFFIX = "__missing"
"""Ends the name of the column that says where a number is absent."""
ROW_GROUP_ROWS = 1 << 16
"""Rows that are compressed together and read at once."""

_DICTIONARY_IDS = 1 << 14  # where there are more, a row group repeats too few for a dictionary to save bytes


def shard_schema(schema: Schema) -> pa.Schema:
    """The columns of a shard, in order.

    Raises:
        SchemaError: two features need columns of one name.

    Example:
        >>> shard_schema(Schema((Feature("item", num_ids=9), Feature("age", "numeric", missing=True)), ("app", "web"))).names
        ['item', 'age', 'age__missing', '__domain', '__label']
    """
    columns: list[tuple[str, Any]] = []
    for feature in schema.features:
        columns.append((feature.name, _type(feature)))
        if feature.missing:
            columns.append((feature.name + MISSING_SUFFIX, pa.int8()))
    columns += [(DOMAIN_COLUMN, pa.int32()), (LABEL_COLUMN, pa.float32())]
    if schema.user is not None:
        columns.append((USER_COLUMN, pa.int64()))
    if schema.weight is not None:
        columns.append((WEIGHT_COLUMN, pa.float32()))
    repeated = sorted(name for name, count in Counter(name for name, _ in columns).items() if count > 1)
    if repeated:
        raise SchemaError(
            "columns of a shard must have names of their own", received=repeated, next_step="Rename a feature"
        )
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def write_shard(columns: Mapping[str, Any] | pa.Table, schema: Schema, path: Path) -> None:
    """Write encoded rows as one shard; equal rows give equal bytes.

    Args:
        columns: by name those of :func:`shard_schema`, as arrays of Arrow or numpy, or as a table.
        schema: what they mean.
        path: the file to write.

    Raises:
        SchemaError: a value is absent; ids and numbers have values of their own for that.
    """
    fields = shard_schema(schema)
    table = pa.table([columns[field.name] for field in fields], schema=fields)
    for name, column in zip(table.column_names, table.columns, strict=True):
        _check_present(name, column)
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        use_dictionary=[name for feature in schema.features for name in _repeating(feature)]
        + [DOMAIN_COLUMN, LABEL_COLUMN],
        write_statistics=False,  # rows are shuffled, so the range of a row group is that of all rows
    )


def decode(rows: pa.Table | pa.RecordBatch, schema: Schema) -> Batch:
    """Some rows of a shard as tensors."""
    batch = uninitialised(schema, rows.num_rows)
    fill(batch, rows, schema)
    return batch


def fill(batch: Batch, rows: pa.Table | pa.RecordBatch, schema: Schema) -> None:
    """Decode into tensors that are there, such as a slice of larger ones."""
    ids, dense = batch.ids.numpy(), batch.dense.numpy()
    slot = place = 0
    for feature in schema.features:
        if feature.kind == "sequence":
            ids[:, slot : slot + feature.max_length] = _lists(rows, feature)
        elif feature.kind != "numeric":
            ids[:, slot] = _column(rows, feature.name)
        else:
            dense[:, place] = _column(rows, feature.name)
            if feature.missing:
                dense[:, place + 1] = _column(rows, feature.name + MISSING_SUFFIX)
        slot += 0 if feature.kind == "numeric" else feature.max_length
        place += feature.num_dense
    others = ((batch.user, USER_COLUMN), (batch.weight, WEIGHT_COLUMN))
    for tensor, name in ((batch.domain, DOMAIN_COLUMN), (batch.label, LABEL_COLUMN), *others):
        if tensor is not None:
            tensor.numpy()[:] = _column(rows, name)


def uninitialised(schema: Schema, num_rows: int) -> Batch:
    """Tensors for so many rows, whose content is whatever was in memory."""
    return Batch(
        ids=torch.empty(num_rows, schema.num_slots, dtype=torch.int64),
        dense=torch.empty(num_rows, schema.num_dense),
        domain=torch.empty(num_rows, dtype=torch.int64),
        label=torch.empty(num_rows),
        weight=None if schema.weight is None else torch.empty(num_rows),
        user=None if schema.user is None else torch.empty(num_rows, dtype=torch.int64),
    )


def row_bytes(schema: Schema) -> int:
    """Bytes of a decoded row."""
    one = uninitialised(schema, 1)
    return sum(column.numel() * column.element_size() for column in one if column is not None)


def _type(feature: Feature) -> Any:
    if feature.kind == "numeric":
        return pa.float32()
    return pa.list_(pa.int32(), feature.max_length) if feature.kind == "sequence" else pa.int32()


def _repeating(feature: Feature) -> list[str]:
    """The columns of a feature whose values are few."""
    if feature.kind == "numeric":
        return [feature.name + MISSING_SUFFIX] if feature.missing else []
    if feature.num_ids > _DICTIONARY_IDS:
        return []
    return [f"{feature.name}.list.element" if feature.kind == "sequence" else feature.name]


def _check_present(name: str, column: pa.ChunkedArray) -> None:
    """Arrow itself would write a list that is absent as if it were there."""
    absent = column.null_count
    if pa.types.is_fixed_size_list(column.type):
        absent += sum(chunk.flatten().null_count for chunk in column.chunks)
    if absent:
        raise SchemaError(f"column {name!r} of a shard must have a value in every row", received=f"{absent} nulls")


def _column(rows: pa.Table | pa.RecordBatch, name: str) -> NDArray[Any]:
    return np.asarray(rows.column(name))


def _lists(rows: pa.Table | pa.RecordBatch, feature: Feature) -> NDArray[Any]:
    column = rows.column(feature.name)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [np.asarray(chunk.flatten()).reshape(-1, feature.max_length) for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty((0, feature.max_length), np.int32)
