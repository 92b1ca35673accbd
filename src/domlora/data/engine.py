"""Where table expressions run: DuckDB on this machine by default, or Spark; both give the same rows."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr.operations import DatabaseTable

from domlora.errors import ConfigError, DataError, nearest, needing

__all__ = ["HASH_BITS", "Engine", "EngineName", "open_engine"]

EngineName = Literal["duckdb", "spark"]
_BATCH_ROWS = 1 << 17
# what is soon thrown away: quick to write; a column of more values than that is looked through for a dictionary in vain
_WRITING = {"compression": "uncompressed", "parquet_version": "v2", "dictionary_size_limit": 4096}
HASH_BITS = 60
"""Of md5, as a number: 15 hexadecimal digits, which fit a signed integer."""


@ibis.udf.scalar.builtin(name="conv", signature=(("string", "int32", "int32"), "string"))
def _in_base(digits: Any, base: int, other: int) -> str: ...  # type: ignore[empty-body]


@ibis.udf.scalar.builtin(name="printf", signature=(("string", "int64"), "string"))
def _printed(form: str, number: Any) -> str: ...  # type: ignore[empty-body]


@ibis.udf.scalar.builtin(name="format_string", signature=(("string", "int64"), "string"))
def _formatted(form: str, number: Any) -> str: ...  # type: ignore[empty-body]


class Engine:
    """A connection, and a folder for what is computed once.

    Args:
        connection: an Ibis backend.
        name: which.
        work: a folder that is thrown away afterwards.
    """

    def __init__(self, connection: Any, name: EngineName, work: Path) -> None:
        self.connection, self.name, self.work = connection, name, work
        self._stored: dict[str, list[Path]] = {}  # the name of a table → its files

    def read(self, paths: Sequence[Path]) -> Any:
        """A lazy table of Parquet files of one schema."""
        if self.name == "duckdb":
            # a folder called day=7 would replace what a column called day holds
            return self.connection.read_parquet([str(path) for path in paths], hive_partitioning=False)
        frame = self.connection._session.read.parquet(*(str(path) for path in paths))
        name = ibis.util.gen_name("domlora")
        frame.createOrReplaceTempView(name)
        return self.connection.table(name)

    def stored(self, rows: Any) -> Any:
        """The rows, computed once: kept in files in the work folder, never in memory."""
        paths = self._written(rows)
        table = self.read(paths)
        self._stored[table.get_name()] = paths
        return table

    def kept(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Any:
        """Rows that are made here, a piece at a time, as a table."""
        path = self.work / f"{ibis.util.gen_name('rows')}.parquet"
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
            for batch in batches:
                file.write_batch(batch)
        return self.read([path])

    def batches(self, rows: Any) -> Iterator[pa.RecordBatch]:
        """The rows a piece at a time, in the order that ``order_by`` gave them, else in none."""
        for path in self._files_of(rows):
            with pq.ParquetFile(path, pre_buffer=False) as file:  # else all of a file stays in memory until its end
                yield from file.iter_batches(_BATCH_ROWS)

    def frame(self, rows: Any) -> Any:
        """The rows as Spark's own data frame, to run what only Spark can."""
        return self.connection._session.read.parquet(*(str(path) for path in self._files_of(rows)))

    def _files_of(self, rows: Any) -> list[Path]:
        """The files of stored rows; of others, files that are written now."""
        operation = rows.op()
        known = self._stored.get(operation.name) if isinstance(operation, DatabaseTable) else None
        return known or self._written(rows)

    def _written(self, rows: Any) -> list[Path]:
        path = self.work / f"{ibis.util.gen_name('rows')}.parquet"
        self.connection.to_parquet(rows, path, **_WRITING if self.name == "duckdb" else {})
        return [path] if path.is_file() else sorted(path.glob("*.parquet"))

    def number(self, text: Any) -> Any:
        """A hash of a text that is equal everywhere: the first 60 bits of its md5 as an integer."""
        return self.integer(text.hexdigest("md5"))

    def integer(self, digest: Any) -> Any:
        """The first 60 bits of a hexadecimal text as an integer."""
        digits = digest.left(HASH_BITS // 4)
        if self.name == "spark":
            return _in_base(digits, 16, 10).cast("int64")
        return (ibis.literal("0x") + digits).cast("int64")

    def digits(self, number: Any) -> Any:
        """The hexadecimal text of such an integer."""
        form = f"%0{HASH_BITS // 4}x"
        return _formatted(form, number) if self.name == "spark" else _printed(form, number)


@contextmanager
def open_engine(name: str, work: Path | None = None, *, memory_bytes: int = 3 << 29) -> Iterator[Engine]:
    """An engine, whose files are gone when the block ends.

    Args:
        name: ``duckdb`` or ``spark``.
        work: where its temporary folder is made; by default where temporary files are.
        memory_bytes: what DuckDB may take before it writes to the temporary folder. Spark has its own settings.

    Raises:
        ConfigError: no such engine, or it is not installed.
        DataError: what the engine said about the rows.
    """
    if name not in get_args(EngineName):
        raise ConfigError("unknown engine", received=name, next_step=nearest(name, get_args(EngineName)))
    folder = Path(tempfile.mkdtemp(prefix=".domlora-", dir=work))
    try:
        if name == "spark":
            yield Engine(_spark(), "spark", folder)
        else:
            yield Engine(_duckdb(folder, memory_bytes), "duckdb", folder)
    except Exception as error:
        if not isinstance(error, duckdb.Error) and not type(error).__module__.startswith(("py4j.", "pyspark.")):
            raise
        said = "; ".join(str(error).splitlines()[:3])
        raise DataError(f"the rows cannot be used ({said})", next_step="Check the raw files") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _duckdb(folder: Path, memory_bytes: int) -> Any:
    connection = ibis.duckdb.connect(
        temp_directory=str(folder / "spilled"),
        memory_limit=f"{memory_bytes >> 20}MiB",
        preserve_insertion_order=False,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    connection.raw_sql("SET enable_progress_bar = false")  # it has its own, also where nobody watches
    return connection


def _spark() -> Any:
    with needing("spark", "the engine 'spark'"):
        from pyspark.sql import SparkSession
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # workers write shards: they need this library too
    builder = SparkSession.builder.appName("domlora")
    # what the user's own settings (spark-defaults.conf, spark-submit) say stays as it is
    builder = builder.config("spark.sql.session.timeZone", "UTC").config("spark.sql.ansi.enabled", "false")
    return ibis.pyspark.connect(builder.getOrCreate())
