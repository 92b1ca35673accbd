"""What a sample of rows tells of a column: its type, its distinct values, how many are absent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from domlora.features.encode import canonical_text

__all__ = ["ColumnKind", "Facts", "facts_of", "words_of"]

ColumnKind = Literal["integer", "float", "text", "time", "list", "vector"]
# 007 and integers too long for 64 bits are codes, not numbers
_INTEGER = r"^[+-]?(0|[1-9][0-9]{0,17})(\.0)?$"
_FLOAT = r"^([+-]?((0|[1-9][0-9]{0,17})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?|[+-]?(?i:inf|nan))$"
_DATE = r"^[0-9]{4}[-/][0-9]{2}[-/][0-9]{2}([T ][0-9:.,+Z -]*)?$"
_WORDS = re.compile(r"[A-Z]+(?![^\W\dA-Z_])|[^\W\d_][^\W\dA-Z_]*|[0-9]+")


@dataclass(frozen=True)
class Facts:
    """A column of a sample.

    Args:
        name: of the column.
        kind: what its values are; texts that all read as numbers are numbers.
        values: its distinct values as canonical texts, in the order in which they first appear; of a list, its elements.
        codes: for each row (of a list: for each element) the place of its value in ``values``; -1 where it is absent.
        lengths: of a list, elements of each row; -1 where it is absent.
    """

    name: str
    kind: ColumnKind
    values: Sequence[str]
    codes: NDArray[np.int64]
    lengths: NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.codes if self.lengths is None else self.lengths)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the name, in lower case."""
        return words_of(self.name)

    @property
    def distinct(self) -> int:
        return len(self.values)

    @cached_property
    def absent(self) -> float:
        """Share of rows without a value."""
        return float(np.mean((self.codes if self.lengths is None else self.lengths) < 0)) if self.num_rows else 0.0

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each value."""
        return np.bincount(self.codes[self.codes >= 0], minlength=self.distinct)

    @cached_property
    def value_numbers(self) -> NDArray[np.float64]:
        """The values as numbers; times as what sorts like them."""
        if self.kind == "time":
            return np.argsort(np.argsort(np.array(self.values, dtype=str))).astype(np.float64)
        return np.array([float(value) for value in self.values], np.float64)

    @cached_property
    def numbers(self) -> NDArray[np.float64]:
        """The number of each row, NaN where it is absent."""
        return np.append(self.value_numbers, np.nan)[self.codes]

    @property
    def is_number(self) -> bool:
        return self.kind in ("integer", "float")

    @property
    def is_binary(self) -> bool:
        """Whether it holds 0 and 1 and nothing else."""
        return {value.lower() for value in self.values} in ({"0", "1"}, {"0.0", "1.0"}, {"false", "true"})

    @property
    def has_points(self) -> bool:
        """Whether whole numbers are written as ``12.0``."""
        return self.kind == "integer" and any(value.endswith(".0") for value in self.values[:1000])

    @property
    def most_frequent(self) -> list[int]:
        """Places of values, frequent ones first."""
        return [int(place) for place in np.argsort(-self.sizes, kind="stable")]


def words_of(name: str) -> tuple[str, ...]:
    """The words of a name, in lower case.

    >>> words_of("reviewerID"), words_of("next_read_time"), words_of("tab2")
    (('reviewer', 'id'), ('next', 'read', 'time'), ('tab', '2'))
    """
    return tuple(word.lower() for word in _WORDS.findall(name))


def facts_of(name: str, column: pa.Array) -> Facts:
    """The facts of a column of values or of lists of values."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False).astype(np.int64)
        inner = facts_of(name, pc.list_flatten(column))
        filled = lengths[lengths > 0]
        is_vector = inner.kind == "float" and len(filled) > 0 and filled.min() == filled.max() > 1
        return Facts(name, "vector" if is_vector else "list", inner.values, inner.codes, lengths)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if pa.types.is_null(kind):
        column = column.cast(pa.string())
    encoded = column.dictionary_encode()
    texts = _texts(encoded.dictionary)
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    values = list(dict.fromkeys(text for text in texts if text))
    places = {text: place for place, text in enumerate(values)}
    renumbered = np.array([*(places.get(text, -1) for text in texts), -1], np.int64)
    return Facts(name, _kind(column.type, values), values, renumbered[codes])


def _texts(values: pa.Array) -> list[str]:
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.string())
    return [canonical_text(value) for value in values.to_pylist()]


def _kind(kind: pa.DataType, values: list[str]) -> ColumnKind:
    if pa.types.is_temporal(kind):
        return "time"
    texts = pa.array(values, pa.string())
    kinds: list[tuple[str, ColumnKind]] = [(_INTEGER, "integer"), (_FLOAT, "float"), (_DATE, "time")]
    for pattern, found in kinds:
        if values and pc.all(pc.match_substring_regex(texts, pattern)).as_py():
            return found
    is_float = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return "float" if is_float else "text"
