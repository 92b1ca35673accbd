"""How the fields of a text are told apart, and where its rows end."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from domlora.errors import ConfigError

__all__ = ["STAND_IN", "Dialect", "Row", "RowReader", "any_field_size", "end_of_rows", "likely_separator"]

STAND_IN = b"\x1f"
"""The byte that stands for a separator of several bytes, which no parser takes."""
_ANY_SIZE = (1 << 31) - 1
_LIKELY_SEPARATORS = ("\t", ",", ";", "|", "::", "^", "\x01", " ")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How fields are told apart.

    Args:
        separator: between fields, one character or several.
        quote: around fields that hold separators or line ends; doubled inside them. None where it means nothing.
        encoding: of the text; any that holds ASCII as it is.

    Raises:
        ConfigError: a separator, quote or encoding that cannot be.
    """

    separator: str = ","
    quote: str | None = '"'
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if not self.separator or self.separator == self.quote or set(self.separator) & {"\n", "\r", "\0"}:
            raise ConfigError("a separator must be one character or several in a line", received=self.separator)
        if self.quote is not None and not (len(self.quote) == 1 and self.quote.isascii() and self.quote.isprintable()):
            raise ConfigError("a quote must be one character", received=self.quote)
        try:
            plain = "a,\n".encode(self.encoding) == b"a,\n"
        except LookupError:
            plain = False
        if not plain:
            raise ConfigError("an encoding must be one that Python knows and that holds ASCII", received=self.encoding)

    @property
    def byte(self) -> bytes:
        """The separator, or the byte that stands for it."""
        return self.separator.encode() if len(self.separator.encode()) == 1 else STAND_IN

    @property
    def quote_byte(self) -> bytes | None:
        return None if self.quote is None else self.quote.encode()

    def plain(self, text: bytes) -> bytes:
        """Text as read → UTF-8 with the byte that stands for the separator; what is no text stays as it is."""
        if self.encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "ascii"):
            text = text.decode(self.encoding, "surrogateescape").encode("utf-8", "surrogateescape")
        if self.byte == STAND_IN:
            # a NUL is refused later, so that no byte of the file passes for a separator
            text = text.replace(STAND_IN, b"\0").replace(self.separator.encode(), STAND_IN)
        return text


def likely_separator(line: bytes, dialect: Dialect) -> str | None:
    """Another separator that a line holds, the most frequent one."""
    text = line.decode("utf-8", "replace")
    counts = {other: text.count(other) for other in _LIKELY_SEPARATORS if other != dialect.separator}
    best = max(counts, key=lambda other: counts[other])
    return best if counts[best] else None


class Row(NamedTuple):
    """A row of a text: its fields (none if it cannot be used), why not, and the lines it takes."""

    fields: list[str]
    reason: str
    num_lines: int
    is_open: bool = False
    used: int = 0


class RowReader:
    """Rows of lines, each from where one likes, by the parser of the standard library.

    Args:
        lines: with their ends.
        dialect: of the lines.
    """

    def __init__(self, lines: Sequence[bytes], dialect: Dialect) -> None:
        self.lines, self._position, self._is_dry = lines, 0, False
        quoting: Literal[0, 3] = csv.QUOTE_NONE if dialect.quote is None else csv.QUOTE_MINIMAL
        self._reader = csv.reader(
            self, delimiter=dialect.byte.decode(), quotechar=dialect.quote, quoting=quoting, strict=True
        )

    def __iter__(self) -> RowReader:
        return self

    def __next__(self) -> str:
        """The parser asks for another line, also while a quoted field goes on."""
        if self._position == len(self.lines):
            self._is_dry = True
            raise StopIteration
        self._position += 1
        return self.lines[self._position - 1].decode("latin-1")  # a character a byte

    def at(self, position: int) -> Row:
        """The row that begins with a line."""
        self._position, self._is_dry = position, False
        try:
            fields = next(self._reader)
        except csv.Error:
            reason = "a quoted field does not end" if self._is_dry else "text after a closing quote"
            return Row([], reason, 1, self._is_dry)
        return Row(fields, "", self._position - position)


@contextmanager
def any_field_size() -> Iterator[None]:
    """The standard library's parser takes fields of up to 128 KiB; inside this block of any size."""
    before = csv.field_size_limit(_ANY_SIZE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def end_of_rows(text: bytes, dialect: Dialect) -> int:
    """Where the last whole row of a text ends, if each quote opens, closes or is doubled in a quoted field; else 0.

    Quotes are counted from the start: an even one must begin a field or follow another quote (a doubled one), an odd one
    must end a field or be followed by another quote. A line end behind an even number of quotes ends a row.
    """
    quote = dialect.quote_byte
    if quote is None or quote not in text:
        return len(text)
    data = np.frombuffer(text, np.uint8)
    quotes = np.flatnonzero(data == quote[0])
    ends = [*b"\r\n"]  # carriage return, line feed
    before = np.append(np.uint8(ends[1]), data)[quotes[0::2]]
    after = np.append(data, np.uint8(ends[1]))[quotes[1::2] + 1]
    fits = [*ends, dialect.byte[0], quote[0]]
    if not (np.isin(before, fits).all() and np.isin(after, fits).all()):
        return 0
    if len(quotes) % 2 == 0:
        return len(text)
    newlines = np.flatnonzero(data[: quotes[-1]] == ends[1])
    outside = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0
