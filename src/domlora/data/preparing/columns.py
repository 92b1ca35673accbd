"""Columns of a batch of raw rows → encoded columns of a shard, a distinct value at a time.

The numbers come from the encoder, the same object that a server asks; here it is asked once for each distinct value.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from domlora.data.shards import DOMAIN_COLUMN, LABEL_COLUMN, MISSING_SUFFIX, USER_COLUMN, WEIGHT_COLUMN
from domlora.features.columns import Memo, last_of
from domlora.features.encode import Encoder
from domlora.features.numeric import bucket, standardise
from domlora.features.schema import Feature
from domlora.features.text import canonical_text, user_number

__all__ = ["ColumnEncoder", "floats_of"]

_MEMO_VALUES = 1 << 22  # remembered values of a column, at the most


class ColumnEncoder:
    """Raw columns to the columns of a shard.

    Args:
        encoder: what gives values their numbers.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.schema = encoder.schema
        self._numbers = {
            f.name: Memo(encoder.id_of(f), _MEMO_VALUES) for f in self.schema.categorical if f.kind != "bucketed"
        }
        self._user = Memo(lambda value: user_number(canonical_text(value)), _MEMO_VALUES)

    def encode(self, rows: pa.RecordBatch) -> dict[str, pa.Array]:
        """``rows`` holds the raw columns of all features, ``__domain``, ``__label``, user and weight if there are any."""
        columns: dict[str, pa.Array] = {}
        for feature in self.schema.features:
            columns |= self._feature(feature, rows)
        columns[DOMAIN_COLUMN] = rows.column(DOMAIN_COLUMN).cast(pa.int32())
        columns[LABEL_COLUMN] = rows.column(LABEL_COLUMN).cast(pa.float32())
        if self.schema.user is not None:
            columns[USER_COLUMN] = pa.array(_each(rows.column(self.schema.user), self._user))
        if self.schema.weight is not None:
            columns[WEIGHT_COLUMN] = pa.array(floats_of(rows.column(self.schema.weight)).astype(np.float32))
        return columns

    def _feature(self, feature: Feature, rows: pa.RecordBatch) -> dict[str, pa.Array]:
        name, column = feature.name, rows.column(feature.sources[0])
        if feature.kind == "numeric":
            numbers = floats_of(column)
            encoded = {name: pa.array(standardise(numbers, feature))}
            if feature.missing:
                encoded[name + MISSING_SUFFIX] = pa.array(np.isnan(numbers).astype(np.int8))
            return encoded
        if feature.kind == "bucketed":
            return {name: pa.array(bucket(floats_of(column), feature).astype(np.int32))}
        if feature.kind == "sequence":
            ids = _last(column, feature, self._numbers[name]).reshape(-1)
            return {name: pa.FixedSizeListArray.from_arrays(pa.array(ids), feature.max_length)}
        if len(feature.sources) > 1:
            column = pa.StructArray.from_arrays([rows.column(source) for source in feature.sources], feature.sources)
            return {name: pa.array(_each_crossed(column, self._numbers[name]).astype(np.int32))}
        return {name: pa.array(_each(column, self._numbers[name]).astype(np.int32))}


def floats_of(column: pa.Array) -> NDArray[np.float64]:
    """Numbers, or texts of numbers, as float64; absent ones as NaN."""
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())  # Arrow's own way to a float64 may be one bit off
    if not _is_text(column):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    encoded = column.dictionary_encode()
    numbers = np.array([float(text) if text.strip() else np.nan for text in encoded.dictionary.to_pylist()] + [np.nan])
    return numbers[_codes(encoded)]


def _is_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _each(column: pa.Array, numbers: Memo) -> NDArray[np.int64]:
    """The number of each value of a column."""
    encoded = column.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    known = np.fromiter(map(numbers.__getitem__, [*values, None]), np.int64, len(values) + 1)
    return known[_codes(encoded)]


def _codes(encoded: pa.DictionaryArray) -> NDArray[np.int64]:
    """Places in a dictionary to which one for null was appended."""
    codes: NDArray[np.int64] = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
    return codes


def _each_crossed(column: pa.StructArray, numbers: Memo) -> NDArray[np.int64]:
    """The number of each combination: combinations are numbered first, each asked for once."""
    parts = [part.dictionary_encode() for part in column.flatten()]
    code = np.zeros(len(column), np.int64)
    for part in parts:
        code = code * (len(part.dictionary) + 1) + _codes(part)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    values = [tuple(row.values()) for row in column.take(pa.array(first)).to_pylist()]
    return np.fromiter(map(numbers.__getitem__, values), np.int64, len(values))[inverse]


def _last(column: pa.Array, feature: Feature, numbers: Memo) -> NDArray[np.int32]:
    """The last ids of each row ``(B, max_length)``, left-aligned; absent elements do not count."""
    lists = _lists(column, feature)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    ids = _each(lists.flatten(), numbers)
    return last_of(ids, lengths, feature.max_length).astype(np.int32)


def _lists(column: pa.Array, feature: Feature) -> pa.Array:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column
    if feature.separator is not None and _is_text(column):
        return pc.split_pattern(column, feature.separator)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1, dtype=np.int32)), column)
