"""Columns of raw values as arrays of numbers; what is asked of a value is asked once for each distinct one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domlora.errors import SchemaError
from domlora.features.schema import PAD_ID
from domlora.features.text import canonical_text

__all__ = [
    "Column",
    "Memo",
    "Number",
    "crossed_numbers_of",
    "floats_of",
    "last_of",
    "numbers_of",
    "sequences_of",
    "values_of",
]

Column = Sequence[Any] | NDArray[Any]
"""One raw value a row: a list, a tuple, a numpy array, or a column of pandas or pyarrow."""
Number = Callable[[Any], int]
"""Raw value to integer."""

_TEXT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf|nan", re.IGNORECASE)  # that is a number
_PLAIN = {float, int, bool, type(None)}
_FEW_ROWS = 256  # below, a dict is faster than numpy's calls


def values_of(column: Column) -> Sequence[Any]:
    """A column as values of Python's own types.

    >>> values_of(np.array([1, 2], dtype=np.int8))
    [1, 2]
    """
    if isinstance(column, np.ndarray) and column.dtype.kind in "mM":
        return list(column)  # tolist() makes bare integers of nanoseconds
    if isinstance(column, list | tuple):
        return column
    for listing in ("tolist", "to_pylist"):  # of numpy and pandas, of pyarrow
        if hasattr(column, listing):
            listed: list[Any] = getattr(column, listing)()
            return listed
    return list(column)


def numbers_of(column: Column, name: str, number: Number) -> NDArray[np.int64]:
    """``number`` of each value ``(B,)``, computed once for each distinct value.

    Args:
        column: raw values.
        name: of the column, for messages.
        number: what is asked; equal values get equal answers.

    Raises:
        SchemaError: a cell that holds no plain value.

    Example:
        >>> numbers_of(["a", "bb", "a"], "x", len).tolist()
        [1, 2, 1]
    """
    if isinstance(column, np.ndarray) and column.dtype.kind in "iu" and len(column) >= _FEW_ROWS:
        least, most = int(column.min()), int(column.max())
        if most - least < 4 * len(column) and least > -(2**62) and most < 2**62:
            return _numbers_by_place(column.astype(np.int64) - least, least, number)
    values = values_of(column)
    return _asked(values, len(values), number, f"column {name!r}", "one plain value a row")


def crossed_numbers_of(columns: Sequence[Column], names: Sequence[str], number: Number) -> NDArray[np.int64]:
    """As :func:`numbers_of`, of tuples with one value of each column.

    >>> crossed_numbers_of([["a", "b"], [1, 2]], ["x", "y"], lambda values: values[1]).tolist()
    [1, 2]
    """
    rows = zip(*map(values_of, columns), strict=True)
    return _asked(rows, len(columns[0]), number, f"columns {', '.join(map(repr, names))}", "one plain value a row")


def sequences_of(
    column: Column, name: str, number: Number, max_length: int, separator: str | None = None
) -> NDArray[np.int64]:
    """The last ``max_length`` ids of each row ``(B, max_length)``, in their order, from the left; ``PAD_ID`` fills up.

    Args:
        column: lists (or tuples, or numpy arrays) of values, texts, single values, or None.
        name: of the column, for messages.
        number: the id of one element; elements whose id is ``PAD_ID`` are absent and do not count.
        max_length: ids a row.
        separator: splits a cell that is text; without one, text is a single element.

    Raises:
        SchemaError: an element that is no plain value.

    Example:
        >>> sequences_of([[1, None, 3, 4], None, "5|6"], "x", lambda v: int(v or 0), 2, "|").tolist()
        [[3, 4], [0, 0], [5, 6]]
    """
    cells = [_elements(cell, separator) for cell in values_of(column)]
    lengths = np.fromiter(map(len, cells), np.int64, len(cells))
    elements, size = chain.from_iterable(cells), int(lengths.sum())
    ids = _asked(elements, size, number, f"column {name!r}", "plain values in its lists")
    return last_of(ids, lengths, max_length)


def last_of(ids: NDArray[np.int64], lengths: NDArray[np.integer[Any]], max_length: int) -> NDArray[np.int64]:
    """The last ``max_length`` ids of each row ``(B, max_length)``, from the left, of ids one row after the other.

    Args:
        ids: of all rows; those that are ``PAD_ID`` do not count.
        lengths: how many ids each row has ``(B,)``.
        max_length: ids a row.

    Example:
        >>> last_of(np.array([5, 0, 7, 8, 9]), np.array([4, 0, 1]), 2).tolist()
        [[7, 8], [0, 0], [9, 0]]
    """
    row = np.repeat(np.arange(len(lengths)), lengths)
    row, ids = row[ids != PAD_ID], ids[ids != PAD_ID]
    counts = np.bincount(row, minlength=len(lengths))
    place = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the row
    place -= np.maximum(counts - max_length, 0)[row]
    last = place >= 0
    found = np.full((len(lengths), max_length), PAD_ID, dtype=np.int64)
    found[row[last], place[last]] = ids[last]
    return found


def floats_of(column: Column, name: str) -> NDArray[np.float64]:
    """A column of numbers, or of texts of numbers, as float64 ``(B,)``; absent values as NaN.

    A text is a number as CSV files write it: ``"7"``, ``" -2.5e3 "``, ``"inf"``; not ``"1_000"`` or ``"1,5"``.

    Raises:
        SchemaError: a value that is not a number.

    Example:
        >>> floats_of([1, " 2.5", None, True], "x").tolist()
        [1.0, 2.5, nan, 1.0]
    """
    if isinstance(column, np.ndarray) and column.dtype.kind in "biuf":
        return column.astype(np.float64)
    values = values_of(column)
    if set(map(type, values)) <= _PLAIN:
        try:
            return np.array(values, dtype=np.float64)  # None becomes NaN
        except OverflowError:  # an integer that no float64 holds
            pass
    return np.fromiter((_float(value, name) for value in values), np.float64, len(values))


class Memo(dict[Any, int]):
    """Calls ``number`` once for each distinct value; forgets all when there are ``most`` of them."""

    def __init__(self, number: Number, most: float = math.inf) -> None:
        super().__init__()
        self.number, self.most = number, most

    def __missing__(self, value: Any) -> int:
        if len(self) >= self.most:
            self.clear()
        answer = self[value] = self.number(value)
        return answer


def _asked(values: Iterable[Any], size: int, number: Number, what: str, needs: str) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(Memo(number).__getitem__, values), np.int64, size)
    except SchemaError as error:
        raise SchemaError(f"{what} cannot be encoded: {str(error).removesuffix('.')}") from error
    except TypeError as error:  # a list or an object in a cell has no hash
        raise SchemaError(f"{what} must hold {needs} ({error})") from error


def _numbers_by_place(places: NDArray[np.int64], least: int, number: Number) -> NDArray[np.int64]:
    """Of integers that lie close together: a table is faster than a dict."""
    table = np.bincount(places)
    for place in np.flatnonzero(table).tolist():
        table[place] = number(least + place)
    return table[places]


def _elements(cell: Any, separator: str | None) -> Sequence[Any]:
    if isinstance(cell, list | tuple):
        return cell
    if cell is None:
        return ()
    if isinstance(cell, str):
        return cell.split(separator) if separator else (cell,)
    if isinstance(cell, np.ndarray) and cell.ndim == 1:
        return values_of(cell)
    return (cell,)


def _float(value: Any, name: str) -> float:
    if type(value) is float:
        return value
    try:
        text = canonical_text(value)
    except SchemaError as error:
        raise SchemaError(f"column {name!r} needs numbers: {str(error).removesuffix('.')}") from error
    if not text:
        return float("nan")
    if _TEXT.fullmatch(text) is None:
        raise SchemaError(f"column {name!r} needs numbers", received=value)
    return float(text)
