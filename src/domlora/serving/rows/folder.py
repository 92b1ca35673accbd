"""The rows of the tables that an export leaves out: a folder beside it, to be pushed. Needs numpy alone.

manifest.json        the tables: where each begins in ``rows.bin``, its shape and its sha256
rows.bin             float32, row after row
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from domlora.errors import BundleError
from domlora.serving.rows.layout import RemoteTable, Rows, digest_of

__all__ = ["RowsFolder", "folder_beside", "write_rows"]

_FORMAT = "domlora rows 1"
_MANIFEST, _CONTENT = "manifest.json", "rows.bin"
_CHUNK = 1 << 16  # rows


class _Cut(Protocol):
    @property
    def table(self) -> RemoteTable: ...
    def rows(self, numbers: slice) -> NDArray[np.float32]: ...


class _Place(NamedTuple):
    """A table in the file."""

    name: str
    num_rows: int
    width: int
    offset: int
    sha256: str


def folder_beside(export: Path) -> Path:
    """Where the rows of an export are.

    >>> folder_beside(Path("exports/monday")).name
    'monday.rows'
    """
    return export.with_name(f"{export.name}.rows")


def write_rows(cuts: Iterable[_Cut], folder: Path) -> list[RemoteTable]:
    """Write the rows into an empty folder; the tables, with their sha256."""
    tables, places = [], []
    with (folder / _CONTENT).open("wb") as out:
        for each in cuts:
            table, offset = each.table, out.tell()
            digest = digest_of(table.num_rows, table.width)
            for start in range(0, table.num_rows, _CHUNK):
                part = np.ascontiguousarray(each.rows(slice(start, start + _CHUNK)))
                digest.update(part.data)
                out.write(part.data)
            tables.append(table._replace(sha256=digest.hexdigest()))
            places.append(_Place(table.name, table.num_rows, table.width, offset, tables[-1].sha256))
    facts = {"format": _FORMAT, "tables": [place._asdict() for place in places]}
    (folder / _MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return tables


class RowsFolder:
    """Rows from the folder itself: a :class:`~domlora.serving.rows.layout.Source` that has all of them.

    Args:
        folder: what :func:`write_rows` wrote. Mapped, not read.

    Raises:
        BundleError: it is none, or its file is too short.
    """

    strict = True

    def __init__(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            if facts["format"] != _FORMAT:
                raise ValueError(f"format {facts['format']!r}")
            places = [_Place(**told) for told in facts["tables"]]
            self.tables: Mapping[str, _Place] = {place.name: place for place in places}
            self._rows: Mapping[str, NDArray[np.float32]] = {
                place.name: _mapped(folder / _CONTENT, place) for place in places
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"a folder of rows must be whole ({error})",
                received=str(folder),
                next_step="Write it with: domlora export ... --remote-tables PATTERN",
            ) from error

    @classmethod
    def of(cls, path: Path) -> Self:
        """The folder itself, or that of an export."""
        beside = folder_beside(path)
        return cls(beside if (beside / _CONTENT).is_file() else path)

    def rows(self, name: str) -> NDArray[np.float32]:
        """All rows of a table ``(num_rows, width)``, mapped."""
        return self._rows[name]

    def verify(self, name: str) -> None:
        """Compare a table with its sha256.

        Raises:
            BundleError: it is damaged.
        """
        place = self.tables[name]
        digest = digest_of(place.num_rows, place.width)
        for start in range(0, place.num_rows, _CHUNK):
            digest.update(np.ascontiguousarray(self._rows[name][start : start + _CHUNK]).data)
        if digest.hexdigest() != place.sha256:
            raise BundleError("rows of a table are damaged: their sha256 is not the manifest's", received=name)

    def check(self, tables: Sequence[RemoteTable]) -> None:
        for table in tables:
            if table.name not in self.tables or self.tables[table.name].sha256 != table.sha256:
                raise BundleError("a folder of rows must be that of the export", received=table.name)

    def fetch(self, wanted: Sequence[tuple[RemoteTable, Rows]]) -> list[list[bytes | None]]:
        return [[row.tobytes() for row in self._rows[table.name][numbers]] for table, numbers in wanted]

    def degraded(self, num_rows: int) -> None:
        raise AssertionError(num_rows)  # it has every row


def _mapped(file: Path, place: _Place) -> NDArray[np.float32]:
    if not place.num_rows:
        return np.empty((0, place.width), np.float32)
    return np.memmap(file, np.float32, "r", place.offset, (place.num_rows, place.width))
