"""Rows from all over a log, few enough to look at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.readers import check_parquet, one_format, separator_of
from domlora.data.reading.delimited import delimited_tables, header_of
from domlora.data.reading.dialect import Dialect, likely_separator
from domlora.data.reading.json_lines import json_columns, json_tables
from domlora.data.reading.text_files import Rejects, line_blocks
from domlora.errors import DataError

__all__ = ["Sample", "sample_of"]

_MOST_FILES = 20
_MOST_GROUPS = 10
_MOST_CELLS = 40_000_000


@dataclass
class Sample:
    """Rows from all over a log.

    Args:
        columns: name → values of the sampled rows.
        unusable: columns that hold what no plan can use, each with the reason.
        origin: what the rows are of.
        separator: of text files, if it is not the default.
        note: on lines that cannot be read, if there were any.
    """

    columns: dict[str, pa.Array]
    unusable: dict[str, str]
    origin: str
    separator: str | None = None
    note: str = ""


def sample_of(paths: Sequence[Path], sample_rows: int) -> Sample:
    """The first rows of up to 20 files; of Parquet files those of up to 10 row groups each.

    Raises:
        DataError: a file that cannot be used, or no rows.
    """
    kind = one_format(paths)
    chosen = [paths[place] for place in _spread(len(paths), _MOST_FILES)]
    rows = -(-sample_rows // len(chosen))
    if kind == "parquet":
        check_parquet(paths)
        found, tables = Sample({}, _unusable(chosen[0]), ""), [_from_parquet(path, rows) for path in chosen]
    else:
        with tempfile.TemporaryDirectory(prefix="domlora-") as folder:
            with closing(Rejects(Path(folder) / "rejected.parquet")) as rejects:
                found, tables = (_from_csv if kind == "csv" else _from_json)(chosen, rows, rejects)
            if rejects.count:
                first = pq.read_table(rejects.path).slice(0, 1).to_pylist()[0]
                where = f"{first['line']} of {first['file']}: {first['reason']}"
                found.note = f"{rejects.count:,} lines cannot be read, such as {where}"
    table = pa.concat_tables(tables, promote_options="permissive")
    if not table.num_rows or not table.num_columns:
        raise DataError(f"{paths[0]} must have rows with columns that hold values", next_step="Get the file again")
    found.columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    found.origin = f"{table.num_rows:,} rows of {len(chosen)} file{'s' * (len(chosen) > 1)}"
    return found


def _spread(size: int, most: int) -> list[int]:
    """Up to ``most`` places of ``size``, evenly spread."""
    return sorted(set(np.linspace(0, size - 1, min(size, most)).astype(int).tolist()))


def _unusable(path: Path) -> dict[str, str]:
    found = {}
    for each in pq.read_schema(path):
        is_list = pa.types.is_list(each.type) or pa.types.is_large_list(each.type)
        inner = each.type.value_type if is_list or pa.types.is_fixed_size_list(each.type) else each.type
        if pa.types.is_nested(inner) or pa.types.is_binary(inner) or pa.types.is_fixed_size_binary(inner):
            found[each.name] = f"holds {each.type}; only values and lists of values can be used"
    return found


def _from_parquet(path: Path, rows: int) -> pa.Table:
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name not in _unusable(path)]
    groups = _spread(file.num_row_groups, _MOST_GROUPS) if file.num_row_groups else []
    each = -(-_bounded(rows, len(names)) // max(len(groups), 1))
    tables = [_head((_table(batch) for batch in file.iter_batches(1 << 14, [group], names)), each) for group in groups]
    return pa.concat_tables(tables) if tables else file.schema_arrow.empty_table().select(names)


def _from_csv(paths: Sequence[Path], rows: int, rejects: Rejects) -> tuple[Sample, list[pa.Table]]:
    usual = separator_of(paths[0])
    line = next(line_blocks(paths[0], block_bytes=1 << 12)).splitlines()[0]
    other = None if usual.encode() in line else likely_separator(line, Dialect(usual))
    dialect = Dialect(other or usual)
    header = header_of(paths[0], dialect)
    kept = [name for name in header if name]
    tables = []
    for path in paths:
        blocks = delimited_tables(path, dialect, header_of(path, dialect), kept, rejects)
        tables.append(_head(blocks, _bounded(rows, len(kept))))
    return Sample({}, {}, "", separator=other), tables


def _from_json(paths: Sequence[Path], rows: int, rejects: Rejects) -> tuple[Sample, list[pa.Table]]:
    kinds = json_columns(paths)
    unusable = {name: "holds lists of objects or of lists" for name, kind in kinds.items() if kind == "other"}
    usable = {name: kind for name, kind in kinds.items() if name not in unusable}
    most = _bounded(rows, len(usable))
    return Sample({}, unusable, ""), [_head(json_tables(path, usable, rejects), most) for path in paths]


def _bounded(rows: int, num_columns: int) -> int:
    return max(min(rows, _MOST_CELLS // max(num_columns, 1)), 1)


def _table(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def _head(tables: Iterator[pa.Table], rows: int) -> pa.Table:
    """The first rows of tables of one schema."""
    taken: list[pa.Table] = []
    for table in tables:
        taken.append(table)
        if sum(map(len, taken)) >= rows:
            break
    return pa.concat_tables(taken).slice(0, rows)
