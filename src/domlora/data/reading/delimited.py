"""CSV and its relatives → Parquet, every column as text; lines that cannot be used are kept aside with their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, read_csv

from domlora.data.reading.dialect import (
    STAND_IN,
    Dialect,
    Row,
    RowReader,
    any_field_size,
    end_of_rows,
    likely_separator,
)
from domlora.data.reading.text_files import (
    Converted,
    Rejects,
    common_columns,
    fresh_folder,
    is_utf8,
    line_blocks,
    num_lines,
    refuse_repeated,
    unusable,
    write_rows,
)
from domlora.errors import DataError, nearest

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["delimited_tables", "delimited_to_parquet", "header_of"]

MAX_ROW_BYTES = 1 << 24
_HEADER_BYTES = 1 << 16
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def delimited_to_parquet(
    paths: Sequence[Path],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    separator: str = ",",
    quote: str | None = '"',
    encoding: str = "utf-8",
    columns: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Text files with a row a line, also in gzip, to Parquet files whose columns are text.

    A line with too few or too many fields, a quote that is not closed, a NUL, or bytes of another encoding is kept aside
    with its number, and reading goes on. A quoted field may hold separators and line ends. Empty lines, a byte order mark
    and Windows line ends do not matter. Columns without a name (the index that pandas writes) are left out.

    Args:
        paths: files of the same columns, in whatever order.
        folder: a folder for the results, in a new folder inside it.
        names: of the columns; None for files whose first line is a header.
        separator, quote, encoding: see :class:`Dialect`.
        columns: those to keep; by default all.
        progress: shows a bar.

    Raises:
        DataError: a file that is not such a text, that has no header, or of which no line can be used.
    """
    dialect = Dialect(separator, quote, encoding)
    out = fresh_folder(folder)
    found: list[Path] = []
    first: list[str] = []
    rows = 0
    with closing(Rejects(out / "rejected.parquet")) as rejects:
        for number, path in enumerate(paths):
            header = list(names) if names is not None else header_of(path, dialect)
            named = [name for name in header if name]
            first = named if not number else first
            common_columns(path, named, paths[0], first)
            kept = list(columns) if columns is not None else first
            tables = delimited_tables(path, dialect, header, kept, rejects, named=names is not None, progress=progress)
            found.append(out / f"part-{number:05d}.parquet")
            rows += write_rows(tables, pa.schema([(name, pa.string()) for name in kept]), found[-1])
    if not rows:
        raise DataError(f"{paths[0]} must have rows, and has only a header", next_step="Get the file again")
    return Converted(found, rejects.path if rejects.count else None, rejects.count)


def header_of(path: Path, dialect: Dialect) -> list[str]:
    """The names in the first line of a file, blank ones as empty text.

    Raises:
        DataError: there is no header, or it uses another separator, or repeats a name.
    """
    text = dialect.plain(next(line_blocks(path, block_bytes=_HEADER_BYTES)))
    row = _first_row(path, text, dialect)
    names = [field.strip() for field in row.fields]
    other = likely_separator(text[: row.used], dialect)
    if len(names) == 1 and other is not None:
        raise DataError(
            f"the header of {path} must be separated by {dialect.separator!r}, and holds {other!r}",
            received=names[0][:100],
            next_step=f"Set source.separator = {_toml(other)}",
        )
    numbers = [name for name in names if _NUMBER.fullmatch(name)]
    if numbers or not any(names):
        raise DataError(
            f"the first line of {path} must name the columns, and looks like data",
            received=names[:10],
            next_step=f"Put a line of names before it, such as {dialect.separator.join(['click', 'user', 'item'])}",
        )
    refuse_repeated(path, names)
    return names


def delimited_tables(
    path: Path,
    dialect: Dialect,
    header: Sequence[str],
    kept: Sequence[str],
    rejects: Rejects,
    *,
    named: bool = False,
    progress: Progress | None = None,
) -> Iterator[pa.Table]:
    """The usable rows of a file, a block at a time.

    Args:
        path: the file.
        dialect: of its text.
        header: names of all columns, empty ones for columns that do not count.
        kept: names of the columns of the result, in order.
        rejects: takes the lines that cannot be used.
        named: the file has no header line.
        progress: shows a bar.
    """
    parser = _Parser(path, dialect, header, kept, rejects)
    carry, line, rows, skip = b"", 1, 0, not named
    for text in line_blocks(path, progress):
        text = carry + dialect.plain(text)
        if skip:
            row = _first_row(path, text, dialect)
            line, text, skip = line + num_lines(text[: row.used]), text[row.used :], False
        table, used = parser.rows(text, line)
        rows += table.num_rows
        if not rows and parser.first_fault:
            raise parser.nothing_usable()
        yield table
        line, carry = line + num_lines(text[:used]), text[used:]
    if carry:
        table, _ = parser.rows(carry, line, last=True)
        if not rows + table.num_rows and parser.first_fault:
            raise parser.nothing_usable()
        yield table


def _first_row(path: Path, text: bytes, dialect: Dialect) -> Row:
    """The first row that is not blank, as text, and the bytes up to its end."""
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    with any_field_size():
        row = RowReader(lines[: start + 1000], dialect).at(start)
    raw = b"".join(lines[start : start + row.num_lines])
    if row.reason or b"\0" in raw or not is_utf8(raw):
        raise DataError(
            f"the header of {path} cannot be read ({row.reason or 'bytes that are not text'})",
            received=raw[:100],
            next_step="Check the file's quotes and encoding; it must be UTF-8",
        )
    names = [field.encode("latin-1").decode() for field in row.fields]
    return row._replace(fields=names, used=sum(map(len, lines[: start + row.num_lines])))


class _Parser:
    """Text → table. pyarrow parses; where it could misread a text, lines are looked at one by one before."""

    def __init__(
        self, path: Path, dialect: Dialect, header: Sequence[str], kept: Sequence[str], rejects: Rejects
    ) -> None:
        for name in kept:
            if name not in header:
                raise DataError(f"{path} has no such column", received=name, next_step=nearest(name, header))
        self.path, self.dialect, self.width, self.rejects = path, dialect, len(header), rejects
        self.kept = list(kept)
        self._places = [f"f{list(header).index(name)}" for name in kept]
        self.first_fault: tuple[int, str, bytes] | None = None

    def rows(self, text: bytes, line: int, *, last: bool = False) -> tuple[pa.Table, int]:
        """The usable rows at the start of a text, and the bytes that they and the unusable ones take.

        Args:
            text: whole lines.
            line: the number of the first of them.
            last: nothing comes after them.
        """
        used = end_of_rows(text, self.dialect)
        if used and (used == len(text) or not last) and b"\0" not in text and is_utf8(text[:used]):
            table = self._parsed(text[:used])
            if table is not None:
                return table, used
        with any_field_size():
            good, used = self._checked(text, line, last)
        table = self._parsed(good)
        assert table is not None, "each line was checked"
        return table, used

    def nothing_usable(self) -> DataError:
        assert self.first_fault is not None
        line, reason, text = self.first_fault
        other = likely_separator(text, self.dialect)
        if self.width > 1 and self.dialect.byte not in text and other is not None:
            next_step = f"Is it separated by {other!r}? Set source.separator = {_toml(other)}"
        else:
            next_step = "Check the separator, and that lines have as many fields as the header"
        return unusable(self.path, line, reason, next_step)

    def _parsed(self, text: bytes) -> pa.Table | None:
        """All rows of a text; None if one of them has another number of fields."""
        schema = pa.schema([(name, pa.string()) for name in self.kept])
        if not text:
            return schema.empty_table()
        strange: list[object] = []

        def note(row: object) -> str:
            strange.append(row)
            return "skip"

        quote = self.dialect.quote or False
        parse = ParseOptions(
            delimiter=self.dialect.byte.decode(),
            quote_char=quote,
            double_quote=bool(quote),
            newlines_in_values=bool(quote),
            invalid_row_handler=note,
        )
        read = ReadOptions(column_names=[f"f{place}" for place in range(self.width)], block_size=len(text) + 1)
        types = dict.fromkeys(self._places, pa.string())
        convert = ConvertOptions(
            check_utf8=False, column_types=types, include_columns=self._places, strings_can_be_null=False
        )
        table = read_csv(pa.BufferReader(text), read_options=read, parse_options=parse, convert_options=convert)
        return None if strange else self._restored(table, text).rename_columns(self.kept)

    def _restored(self, table: pa.Table, text: bytes) -> pa.Table:
        """Separators inside quotes, as they were."""
        quote = self.dialect.quote_byte
        if self.dialect.byte != STAND_IN or quote is None or quote not in text:
            return table
        return pa.table(
            {
                name: pc.replace_substring(table.column(name), STAND_IN.decode(), self.dialect.separator)
                for name in table.column_names
            }
        )

    def _checked(self, text: bytes, line: int, last: bool) -> tuple[bytes, int]:
        """The usable lines at the start of a text, and the bytes looked at; a row that the text cuts is left for later."""
        lines = text.splitlines(keepends=True)
        reader, quote, byte = RowReader(lines, self.dialect), self.dialect.quote_byte, self.dialect.byte
        is_clean = b"\0" not in text and is_utf8(text)
        good: list[bytes] = []
        position = used = 0
        while position < len(lines):
            raw = lines[position]
            fields, reason, num_lines = raw.count(byte) + 1, "", 1
            if quote is not None and quote in raw:
                row = reader.at(position)
                if row.is_open and not last and len(text) - used < MAX_ROW_BYTES:
                    break
                fields, reason, num_lines = len(row.fields), row.reason, row.num_lines
                raw = b"".join(lines[position : position + num_lines])
            if reason or fields != self.width or not is_clean:
                reason = reason or self._fault(raw, fields)
            if reason:  # a stray quote can swallow lines: go on with the next one
                raw, num_lines = lines[position], 1
                self._reject(line + position, reason, raw)
            else:
                good.append(raw)
            position, used = position + num_lines, used + len(raw)
        return b"".join(good), used

    def _fault(self, raw: bytes, num_fields: int) -> str:
        if not raw.strip(b"\r\n"):
            return ""
        if b"\0" in raw:
            return "a NUL or another control character"
        if num_fields != self.width:
            return f"{num_fields} field{'s' * (num_fields > 1)} instead of {self.width}"
        return "" if is_utf8(raw) else f"bytes that are not {self.dialect.encoding}"

    def _reject(self, line: int, reason: str, raw: bytes) -> None:
        if self.first_fault is None:
            self.first_fault = (line, reason, raw)
        shown = raw.replace(STAND_IN, self.dialect.separator.encode()) if self.dialect.byte == STAND_IN else raw
        self.rejects.add(self.path, line, reason, shown)


def _toml(text: str) -> str:
    return '"\\t"' if text == "\t" else f'"{text}"'
