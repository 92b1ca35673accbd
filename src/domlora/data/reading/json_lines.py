"""JSON lines → Parquet: values as text, lists as lists of text, parts of objects under ``a.b``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.json import ParseOptions, ReadOptions, read_json

from domlora.data.reading.text_files import (
    Converted,
    Rejects,
    fresh_folder,
    is_utf8,
    line_blocks,
    num_lines,
    refuse_repeated,
    unusable,
    write_rows,
)
from domlora.errors import DataError, SchemaError
from domlora.features.encode import canonical_text

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["TYPES", "holds_key", "json_columns", "json_lines_to_parquet", "json_tables"]

Kind = Literal["text", "list", "other"]
_SAMPLE_BYTES = 1 << 20
TYPES = {"text": pa.string(), "list": pa.list_(pa.string())}
_NATIVE: dict[frozenset[type], pa.DataType] = {
    frozenset(): pa.string(),
    frozenset({str}): pa.string(),
    frozenset({int}): pa.int64(),
    frozenset({bool}): pa.bool_(),
    frozenset({float}): pa.float64(),
    frozenset({int, float}): pa.float64(),
}
_EXACT = 2**53  # from here on a float64 does not hold every integer
_decode = json.JSONDecoder().decode


class _FaultError(ValueError):
    """Why a line cannot be used."""


def json_lines_to_parquet(
    paths: Sequence[Path], folder: Path, *, columns: Sequence[str] | None = None, progress: Progress | None = None
) -> Converted:
    """Text files with a JSON object a line, also in gzip, to Parquet files.

    A value becomes its canonical text (``1.0`` and ``true`` become ``1``; integers keep all digits), a list of such values
    a list of texts, null and an absent key null. Parts of a nested object are columns of their own: ``user.country``.
    Whether a column holds lists is decided by the first lines of each file. A line that is no such object is kept aside
    with its number, and reading goes on.

    Args:
        paths: the files.
        folder: a folder for the results, in a new folder inside it.
        columns: those to keep; by default all of the first lines that hold values or lists of values.
        progress: shows a bar.

    Raises:
        DataError: a file that is no JSON lines, or of which no line can be used; a column that holds lists of objects.
    """
    kinds = json_columns(paths, columns)
    if columns is None:
        kinds = {name: kind for name, kind in kinds.items() if kind != "other"}
    refuse_repeated(paths[0], list(kinds))
    for name, kind in kinds.items():
        if kind == "other":
            raise DataError(
                f"column {name!r} of {paths[0]} must hold values or lists of values",
                next_step="Name a part of the object as 'column.part', or make its parts columns first",
            )
    out = fresh_folder(folder)
    schema = pa.schema([(name, TYPES[kind]) for name, kind in kinds.items()])
    found, rows = [], 0
    with closing(Rejects(out / "rejected.parquet")) as rejects:
        for number, path in enumerate(paths):
            found.append(out / f"part-{number:05d}.parquet")
            rows += write_rows(json_tables(path, kinds, rejects, progress), schema, found[-1])
    if not rows or not kinds:
        raise DataError(f"{paths[0]} must have rows with columns, and has none", next_step="Get the file again")
    return Converted(found, rejects.path if rejects.count else None, rejects.count)


def json_columns(paths: Sequence[Path], columns: Sequence[str] | None = None) -> dict[str, Kind]:
    """Columns of the first lines of all files: ``text``, ``list``, or ``other`` for what no column can hold.

    Args:
        paths: the files.
        columns: those that count; one that no line holds is ``text``.
    """
    kinds: dict[str, Kind] = {} if columns is None else dict.fromkeys(columns, "text")
    for path in paths:
        for row in _first_objects(path):
            found = _flat(row) if columns is None else {name: _part(row, name) for name in columns}
            for name, value in found.items():
                kinds[name] = _wider(kinds.get(name, "text"), value)
    return kinds


def _first_objects(path: Path) -> list[dict[str, Any]]:
    """The objects in the first lines of a file."""
    text = next(line_blocks(path, block_bytes=_SAMPLE_BYTES))
    if text.lstrip()[:1] == b"[":
        raise DataError(
            f"{path} must hold one JSON object a line, and begins with an array", next_step="Unpack it: jq -c '.[]'"
        )
    rows, first = [], None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                rows.append(_object(line))
        except _FaultError as error:
            first = first or (number, str(error))
    if not rows and first:
        raise unusable(path, *first, "Write one JSON object a line, such as jq -c . makes")
    return rows


def holds_key(paths: Sequence[Path], name: str) -> bool:
    """Whether a key, or the last part of ``a.b``, is in any line of the files; a fast search for its text."""
    wanted = json.dumps(name.rpartition(".")[2], ensure_ascii=False).encode()
    return any(wanted in text for path in paths for text in line_blocks(path))


def json_tables(
    path: Path, kinds: Mapping[str, Kind], rejects: Rejects, progress: Progress | None = None
) -> Iterator[pa.Table]:
    """The usable rows of a file, a block at a time.

    Args:
        path: the file.
        kinds: name → ``text`` or ``list``, of all columns wanted.
        rejects: takes the lines that cannot be used.
        progress: shows a bar.
    """
    schema = _native_schema(_first_objects(path), kinds)
    line, rows = 1, 0
    for text in line_blocks(path, progress):
        fast = None if schema is None else _natively(text, schema)
        table, first = (fast, None) if fast is not None else _table(path, text, line, kinds, rejects)
        rows += table.num_rows
        if not rows and first is not None:
            raise unusable(path, *first, "Make its lines objects whose values suit the columns")
        yield table
        line += num_lines(text)


def _table(
    path: Path, text: bytes, line: int, kinds: Mapping[str, Kind], rejects: Rejects
) -> tuple[pa.Table, tuple[int, str] | None]:
    """The usable rows of whole lines, and the first line that is not, with the reason."""
    lines = text.splitlines()
    rows: dict[int, dict[str, Any]] = {}
    faults: dict[int, str] = {}
    for position, raw in enumerate(lines):
        if raw.strip():
            try:
                rows[position] = _object(raw)
            except _FaultError as error:
                faults[position] = str(error)
    try:
        table = _columns(list(rows.values()), kinds)
    except _FaultError:
        faults |= _faults(rows, kinds)
        table = _columns([row for position, row in rows.items() if position not in faults], kinds)
    for position in sorted(faults):
        rejects.add(path, line + position, faults[position], lines[position])
    first = min(faults, default=None)
    return table, None if first is None else (line + first, faults[first])


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = _decode(line.decode())
    except UnicodeDecodeError as error:
        raise _FaultError("bytes that are not UTF-8") from error
    except RecursionError as error:
        raise _FaultError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _FaultError(f"not JSON: {error.msg} at character {error.colno}") from error
    except ValueError as error:  # more digits than Python is willing to read
        raise _FaultError(f"not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise _FaultError("not a JSON object")
    return row


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Parts of nested objects under ``a.b``."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _part(row: Mapping[str, Any], name: str) -> Any:
    """What a name stands for: a key as it is, or a path into nested objects; None if there is none."""
    if name in row:
        return row[name]
    places = [place for place, character in enumerate(name) if character == "."]
    inner = ((row.get(name[:place]), name[place + 1 :]) for place in places)
    found = (_part(value, rest) for value, rest in inner if isinstance(value, dict))
    return next((value for value in found if value is not None), None)


def _wider(kind: Kind, value: Any) -> Kind:
    """What a column must be to hold a value too."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, list | dict) for each in value)):
        return "other"
    return "list" if isinstance(value, list) and kind == "text" else kind


def _faults(rows: Mapping[int, dict[str, Any]], kinds: Mapping[str, Kind]) -> dict[int, str]:
    """Lines with a value that their columns cannot hold."""
    found: dict[int, str] = {}
    for name, kind in kinds.items():
        values = {position: _part(row, name) for position, row in rows.items()}
        try:
            _column(list(values.values()), kind)
        except _FaultError:
            for position, value in values.items():
                try:
                    _column([value], kind)
                except _FaultError as error:
                    found.setdefault(position, f"column {name!r} {error}")
    return found


def _columns(rows: Sequence[dict[str, Any]], kinds: Mapping[str, Kind]) -> pa.Table:
    arrays = []
    for name, kind in kinds.items():
        values = [_part(row, name) for row in rows] if "." in name else [row.get(name) for row in rows]
        arrays.append(_column(values, kind))
    return pa.table(arrays, schema=pa.schema([(name, TYPES[kind]) for name, kind in kinds.items()]))


def _column(values: Sequence[Any], kind: Kind) -> pa.Array:
    if kind == "text":
        return _texts(values)
    lists = [each if isinstance(each, list) or each is None else [each] for each in values]
    sizes = pa.array([0, *(len(each or ()) for each in lists)], pa.int32())
    parts = _texts(list(chain.from_iterable(each or () for each in lists)))
    offsets = pc.cumulative_sum(sizes)
    return pa.ListArray.from_arrays(offsets, parts, mask=pa.array([each is None for each in lists], pa.bool_()))


def _texts(values: Sequence[Any]) -> pa.Array:
    """Values as text, the same as the encoder sees them."""
    kinds = set(map(type, values)) - {type(None)}
    try:
        if kinds <= {str}:
            return pa.array(values, pa.string())
        if kinds == {int}:
            with suppress(OverflowError, pa.ArrowInvalid):
                return pa.array(values, pa.int64()).cast(pa.string())
        return pa.array([_text(each) for each in values], pa.string())
    except UnicodeEncodeError as error:
        raise _FaultError("holds half of a surrogate pair") from error
    except SchemaError as error:
        raise _FaultError("holds a list or an object where a value is expected") from error


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return canonical_text(value) or None  # NaN is absent


def _native_schema(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind]) -> pa.Schema | None:
    """The types that pyarrow can read columns as, judged by some rows; None if it cannot."""
    fields = []
    for name, kind in kinds.items():
        values = [row.get(name) for row in rows]
        if kind == "list":
            if not all(isinstance(each, list | None) for each in values):
                return None
            values = list(chain.from_iterable(each or () for each in values))
        native = _NATIVE.get(frozenset(map(type, values)) - {type(None)})
        if native is None or "." in name:
            return None
        fields.append((name, pa.list_(native) if kind == "list" else native))
    return pa.schema(fields)


def _natively(text: bytes, schema: pa.Schema) -> pa.Table | None:
    """Whole lines, parsed by pyarrow, several times as fast; None if a line is not as the schema says."""
    lines = text.splitlines()
    # inside a value no } can come before a { with nothing between, so with as many rows as lines each line is an object
    if not all(line[:1] == b"{" and line[-1:] == b"}" for line in lines if line) or not is_utf8(text):
        return None
    parse = ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = read_json(pa.BufferReader(text), ReadOptions(block_size=len(text) + 1), parse)
    except pa.ArrowInvalid:
        return None
    if table.num_rows != sum(map(bool, lines)):
        return None
    columns = [_native_column(column.combine_chunks()) for column in table.select(schema.names).columns]
    return None if any(column is None for column in columns) else pa.table(columns, names=schema.names)


def _native_column(column: pa.Array) -> pa.Array | None:
    """A typed column as text; None where an integer may have lost digits."""
    if pa.types.is_list(column.type):
        parts = _native_column(column.flatten())
        sizes = pc.fill_null(pc.list_value_length(column), 0)
        offsets = pc.cumulative_sum(pa.concat_arrays([pa.array([0], pa.int32()), sizes]))
        return None if parts is None else pa.ListArray.from_arrays(offsets, parts, mask=column.is_null())
    if pa.types.is_floating(column.type):
        largest = pc.max(pc.abs(pc.if_else(pc.is_finite(column), column, 0.0))).as_py()
        return None if largest is not None and largest >= _EXACT else _texts(column.to_pylist())
    return column.cast(pa.int8()).cast(pa.string()) if pa.types.is_boolean(column.type) else column.cast(pa.string())
