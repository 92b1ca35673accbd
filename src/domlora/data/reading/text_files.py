"""Text files as blocks of whole lines, lines that cannot be used, and the Parquet files that text becomes."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from domlora.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "Converted",
    "Rejects",
    "common_columns",
    "fresh_folder",
    "is_utf8",
    "line_blocks",
    "num_lines",
    "refuse_repeated",
    "unusable",
    "write_rows",
]

BLOCK_BYTES = 1 << 23
MAX_LINE_BYTES = 1 << 27
_TEXT_CHARACTERS = 1000
_BUFFERED_REJECTS = 10_000
_HEAD_BYTES = 1 << 10
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHERS = (  # first bytes, what they mean, and what to do
    (b"PK\x03\x04", "a zip archive or an Excel sheet", "Unpack it, or save the sheet as CSV"),
    (b"PAR1\x15", "Parquet", "Name it .parquet, or set source.format = 'parquet'"),
    (b"Obj\x01", "Avro", "Convert it to Parquet"),
    (b"BZh91AY", "packed with bzip2", "Unpack it: bunzip2"),
    (b"\xfd7zXZ", "packed with xz", "Unpack it: unxz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "Unpack it: unzstd"),
    (b"\xff\xfe", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
    (b"\xfe\xff", "UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"),
)


class Converted(NamedTuple):
    """Text files that have become Parquet.

    Args:
        paths: Parquet files of one schema, one for each text file.
        rejected: a Parquet file of the lines that no row could be made of, if there are any: ``file``, ``line`` (from 1),
            ``reason`` and ``text`` (its first 1,000 characters).
        rejected_rows: how many those are.
    """

    paths: list[Path]
    rejected: Path | None
    rejected_rows: int


class Rejects:
    """Lines that cannot be used, kept in a Parquet file that is made with the first of them.

    Args:
        path: of that file.
    """

    _schema = pa.schema({"file": pa.string(), "line": pa.int64(), "reason": pa.string(), "text": pa.string()})

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._rows: list[tuple[str, int, str, str]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, file: Path, line: int, reason: str, text: bytes) -> None:
        """One line; bytes that are no text are shown as ``\\xff``."""
        shown = text[: 4 * _TEXT_CHARACTERS].decode("utf-8", "backslashreplace").rstrip("\r\n")[:_TEXT_CHARACTERS]
        self._rows.append((str(file), line, reason, shown))
        self.count += 1
        if len(self._rows) >= _BUFFERED_REJECTS:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self._schema, compression="zstd")
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        self._rows = []


def fresh_folder(folder: Path) -> Path:
    """A new folder inside a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="read-", dir=folder))


def write_rows(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> int:
    """Tables of one schema as one Parquet file; returns the number of rows."""
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table)
            rows += table.num_rows
    return rows


def unusable(path: Path, line: int, reason: str, next_step: str) -> DataError:
    """The error of a file of which no line so far could be used."""
    return DataError(f"{path} must have rows, and none could be read; line {line}: {reason}", next_step=next_step)


def is_utf8(text: bytes) -> bool:
    """Whether bytes are valid UTF-8."""
    offsets = pa.array([0, len(text)], pa.int64()).buffers()[1]
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(text)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def num_lines(text: bytes) -> int:
    r"""Line ends in a text: ``\n``, ``\r\n`` or ``\r``."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def line_blocks(path: Path, progress: Progress | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """A text file, also one in gzip, in blocks of whole lines; a byte order mark is left out.

    Args:
        path: the file.
        progress: shows a bar.
        block_bytes: about how large a block is.

    Raises:
        DataError: the file is missing, unreadable, empty, cut short or damaged, or holds something else than text.
    """
    with _opened(path) as (raw, stream):
        advance = _shown(path, progress)
        carry = b""
        while piece := _read(path, stream, block_bytes):
            is_last = len(piece) < block_bytes
            piece = carry + piece
            # the last byte may be the first half of \r\n
            cut = len(piece) if is_last else piece.rfind(b"\n") + 1 or piece.rfind(b"\r", 0, -1) + 1
            carry = piece[cut:]
            if len(carry) > MAX_LINE_BYTES:
                raise DataError(
                    f"a line of {path} is longer than {MAX_LINE_BYTES >> 20} MiB", next_step="Check its line ends"
                )
            if cut:
                yield piece[:cut]
            advance(raw.tell())
        if carry:
            yield carry
        advance(None)


def _shown(path: Path, progress: Progress | None) -> Callable[[int | None], None]:
    """A bar for a file; returns a function that takes the bytes read so far, or None at the end."""
    if progress is None:
        return lambda _: None
    task = progress.add_task(f"Read {path.name}", total=path.stat().st_size)
    return lambda done: progress.remove_task(task) if done is None else progress.update(task, completed=done)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """The file as it lies on disk, and its text, at the first byte after a byte order mark."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", next_step=f"Name its files: {path}/*")
        raw = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror})", next_step="Check the path and its permissions"
        ) from error
    with closing(raw):
        head = raw.read(len(_GZIP))
        raw.seek(0)
        if not head:
            raise DataError(f"{path} is empty", next_step="Leave it out, or get it again")
        if (head == _GZIP) != (path.suffix.lower() == ".gz"):
            rule = "is named .gz, but is no gzip file" if head != _GZIP else "is a gzip file, but is not named so"
            raise DataError(f"{path} {rule}", next_step="Rename it, or get it again")
        stream = gzip.GzipFile(fileobj=raw) if head == _GZIP else raw
        _check_head(path, _read(path, stream, _HEAD_BYTES))
        stream.seek(0)
        if _read(path, stream, len(_BOM)) != _BOM:
            stream.seek(0)
        yield raw, stream


def _read(path: Path, stream: Any, size_bytes: int) -> bytes:
    try:
        data: bytes = stream.read(size_bytes)
        return data
    except EOFError as error:
        raise DataError(f"{path} is cut short", next_step="Get it again") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error})", next_step="Get it again") from error


def _check_head(path: Path, head: bytes) -> None:
    for start, what, next_step in _OTHERS:
        if head.startswith(start):
            raise DataError(f"{path} must be text, and is {what}", next_step=next_step)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path} is a web page", next_step="Get it again; a server may have answered with an error")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} must be text, and is a tar archive", next_step="Unpack it")
    if head.count(b"\0") > len(head) // 4:
        what = "UTF-16 text" if b"\0" in (head[:1], head[1:2]) else "binary data"
        raise DataError(f"{path} must be text, and seems to be {what}", next_step="Convert it to UTF-8")
    if len(head) < _HEAD_BYTES and not head.removeprefix(_BOM).strip():
        raise DataError(f"{path} is empty but for blanks", next_step="Leave it out, or get it again")


def common_columns(path: Path, names: Sequence[str], first: Path, expected: Sequence[str]) -> None:
    """Refuse a file whose columns are not those of the first one, in whatever order."""
    if set(names) != set(expected):
        raise DataError(
            f"{path} and {first} must have the same columns",
            received={"missing": sorted({*expected} - {*names}), "new": sorted({*names} - {*expected})},
            next_step="Give logs of different columns their own runs, or make them agree",
        )


def refuse_repeated(path: Path, names: Sequence[str]) -> None:
    """Refuse names that engines cannot tell apart: DuckDB and Spark do not heed case."""
    sizes = Counter(name.casefold() for name in names if name)
    repeated = [name for name in names if sizes[name.casefold()] > 1]
    if repeated:
        raise DataError(
            f"columns of {path} must have different names, whatever their case",
            received=repeated,
            next_step="Rename one",
        )
