"""What published sources share: options by name, files as tables of text, all rejected lines in one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.engine import Engine
from domlora.data.raw import RawTable
from domlora.data.readers import Converted, delimited_to_parquet, json_lines_to_parquet
from domlora.errors import ConfigError, DataError, nearest
from domlora.files import sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Reading", "check_listed_once", "options_of"]

_BATCH_ROWS = 1 << 16


def options_of(source: str, options: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """A source's options, those left out at their defaults.

    Args:
        source: its name, for the message.
        options: as in the plan.
        known: every option with its default.

    Raises:
        ConfigError: an option that the source does not have; the message names the nearest.

    Example:
        >>> options_of("kuairand", {"version": "1k"}, version="", logs="standard")
        {'version': '1k', 'logs': 'standard'}
    """
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown option of {source}", received=key, next_step=nearest(key, known))
    return {**known, **options}


def check_listed_once(table: Any, column: str, path: Path) -> None:
    """Each value of a column stands in one row, so that a join by it does not multiply rows.

    Raises:
        DataError: some value stands in several.
    """
    sizes = table.aggregate(rows=table.count(), values=table[column].nunique()).to_pyarrow().to_pylist()[0]
    if sizes["values"] < sizes["rows"]:
        raise DataError(
            f"{column} must be listed once in {path.name}",
            received=f"{sizes['rows']:,} rows with {sizes['values']:,} values",
            next_step="Get the file again",
        )


class Reading:
    """Files of one source on their way to tables.

    Args:
        engine: where the tables are.
        paths: all raw files, for the manifest.
        progress: shows text files as they are read.
    """

    def __init__(self, engine: Engine, paths: Sequence[Path], progress: Progress | None = None) -> None:
        self.engine, self.paths, self.progress = engine, tuple(paths), progress
        self.folder = Path(os.path.commonpath([path.parent for path in paths]))
        self._rejected: list[Path] = []
        self._rejected_rows = 0

    def delimited(self, paths: Sequence[Path], columns: Sequence[str] | None = None, **layout: Any) -> list[Path]:
        """Text files as Parquet files whose columns are all text, rows in the order of the lines.

        Args:
            paths: files of the same columns.
            columns: those to keep; by default all.
            layout: further options of :func:`domlora.data.readers.delimited_to_parquet`.
        """
        work = self.engine.work
        return self._taken(delimited_to_parquet(paths, work, columns=columns, progress=self.progress, **layout))

    def json_lines(self, paths: Sequence[Path], columns: Sequence[str]) -> list[Path]:
        """Files with a JSON object a line as Parquet files of some of its entries, all of them text."""
        return self._taken(json_lines_to_parquet(paths, self.engine.work, columns=columns, progress=self.progress))

    def parquet(self, path: Path, wanted: Collection[str]) -> list[Path]:
        """A raw file that is Parquet already, once it is known that it holds the wanted columns."""
        found = _schema(path).names
        for name in wanted:
            if name not in found:
                raise DataError(f"{path} has no such column", received=name, next_step=nearest(name, found))
        return [path]

    def rewritten(
        self, paths: Sequence[Path], change: Callable[[pa.RecordBatch], pa.Table], columns: Sequence[str] | None = None
    ) -> list[Path]:
        """A Parquet file of what ``change`` makes of each batch of rows; memory holds one batch.

        Args:
            paths: Parquet files of one schema.
            change: rows → rows, for no rows too.
            columns: which columns ``change`` gets; all by default.
        """
        target = self._fresh() / "part-00000.parquet"
        schema = _schema(paths[0])
        empty = schema.empty_table().select(columns or schema.names)
        nothing = pa.RecordBatch.from_arrays([column.combine_chunks() for column in empty.columns], schema=empty.schema)
        try:
            with pq.ParquetWriter(target, change(nothing).schema) as writer:
                for path in paths:
                    for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=columns):
                        writer.write_table(change(batch))
        except (pa.ArrowException, OSError) as error:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"{names} cannot be read ({error})", next_step="Get the file again") from error
        return [target]

    def written(self, table: pa.Table) -> list[Path]:
        """A small table as a Parquet file, so that an engine can read it."""
        target = self._fresh() / "part-00000.parquet"
        pq.write_table(table, target)
        return [target]

    def table(self, paths: Sequence[Path]) -> Any:
        """A lazy table of Parquet files."""
        return self.engine.read(paths)

    def finished(self, name: str, table: Any, key: Sequence[str]) -> RawTable:
        """What preparation gets."""
        rejected = self._rejected[0] if self._rejected else None
        if len(self._rejected) > 1:
            [rejected] = self.written(pa.concat_tables(map(pq.read_table, self._rejected)))
        return RawTable(
            name=name,
            table=table,
            key=tuple(key),
            folder=self.folder,
            inputs={path.relative_to(self.folder).as_posix(): sha256_of(path) for path in self.paths},
            rejected=rejected,
            rejected_rows=self._rejected_rows,
        )

    def _fresh(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="raw-", dir=self.engine.work))

    def _taken(self, converted: Converted) -> list[Path]:
        if converted.rejected is not None:
            self._rejected.append(converted.rejected)
        self._rejected_rows += converted.rejected_rows
        return list(converted.paths)


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a Parquet file ({error})", next_step="Get the file again") from error
