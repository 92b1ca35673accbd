"""Parquet files of events: a reader sees a whole one or none.

LOG/exposures/TIME-WRITER-COUNT.L0.parquet    what was answered, one row a scored row and experiment
LOG/feedback/TIME-WRITER-COUNT.L0.parquet     what happened then

``TIME`` is when the file was written, in nanoseconds, so that names sort by age. ``L0`` files were written by a server;
:func:`compact` makes one ``L1`` of sixty of them, one ``L2`` of sixty ``L1``. What it cannot read, such as a file that a
power cut left half on disk, gets ``.damaged`` after its name, and is no segment any more.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from domlora.files import sync_one

__all__ = [
    "EXPOSURES",
    "FEEDBACK",
    "EventSink",
    "Kind",
    "SegmentFiles",
    "compact",
    "reading",
    "retain",
    "segments",
    "whole_ones",
]

_LOG = logging.getLogger("domlora.serving")
Kind = Literal["exposures", "feedback"]
KINDS: tuple[Kind, ...] = ("exposures", "feedback")

EXPOSURES = pa.schema(
    [
        ("time_s", pa.float64()),
        ("request_id", pa.string()),
        ("row", pa.int32()),
        ("unit", pa.string()),
        ("domain", pa.string()),
        ("experiment", pa.string()),
        ("arm", pa.string()),
        ("bundle", pa.string()),
        ("adapter", pa.string()),
        ("item", pa.string()),
        ("probability", pa.float32()),
    ]
)
FEEDBACK = pa.schema(
    [
        ("time_s", pa.float64()),
        ("request_id", pa.string()),
        ("row", pa.int32()),
        ("unit", pa.string()),
        ("event", pa.string()),
        ("value", pa.float64()),
    ]
)

_JOURNAL, _DAMAGED = ".merging.json", ".damaged"
_FAN_IN, _TOP_LEVEL = 60, 2
_MAX_MERGED_BYTES = 256 << 20
_ROW_GROUP = 250_000
_DAY_S = 86_400


class EventSink(Protocol):
    """Where events go: files by default, or a queue."""

    def write(self, kind: Kind, table: pa.Table) -> None:
        """Take all rows of the table, or raise ``OSError`` having taken none: they are offered again later."""

    def close(self) -> None:
        """Nothing comes after this."""


class SegmentFiles:
    """Each table as one Parquet file, written beside its place and renamed.

    Args:
        folder: the log, which is made.
        sync: bring each file to disk before it gets its name. Without, the machine's crash (not the process's) may cost what
            the system has not written yet, some 30 s.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     files = SegmentFiles(Path(name))
        ...     files.write("feedback", FEEDBACK.empty_table())
        ...     [len(paths) for paths in (segments(Path(name), "exposures"), segments(Path(name), "feedback"))]
        [0, 1]
    """

    def __init__(self, folder: Path, *, sync: bool = False) -> None:
        self.folder, self._sync = folder, sync
        self.writer = f"{os.getpid()}_{secrets.token_hex(4)}"
        self._count = 0

    def write(self, kind: Kind, table: pa.Table) -> None:
        """Write one segment.

        Raises:
            OSError: the disk is full or cannot be written; nothing is left there.
        """
        place = self.folder / kind
        place.mkdir(parents=True, exist_ok=True)
        self._count += 1
        name = f"{time.time_ns():020d}-{self.writer}-{self._count:06d}.L0.parquet"
        fresh = place / f".{name}.tmp"
        try:
            pq.write_table(table, fresh, compression="zstd", use_dictionary=_repeated(table.schema))
            if self._sync:
                sync_one(fresh)
            fresh.rename(place / name)
            if self._sync:
                sync_one(place)
        except BaseException:
            with suppress(OSError):
                fresh.unlink()
            raise

    def close(self) -> None:
        """Nothing is open between two writes."""


def segments(folder: Path, kind: Kind) -> list[Path]:
    """The segments of a log, oldest first, without those that a merged one has replaced."""
    place = folder / kind
    found = {path.name: path for path in place.glob("*.parquet")} if place.is_dir() else {}
    merged, parts = _journal(place)
    if merged in found:
        for name in parts:
            found.pop(name, None)
    return [found[name] for name in sorted(found)]


def whole_ones(paths: list[Path]) -> list[Path]:
    """Those that begin and end as Parquet files do; one warning names the others."""
    damaged = []
    for path in paths:
        try:
            with _reading_all_of(path):
                pq.read_metadata(path)
        except _DamagedError:
            damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        _LOG.warning("%d damaged segments of the log are left out: %s", len(damaged), names)
    return [path for path in paths if path not in damaged]


@contextmanager
def reading(folder: Path) -> Iterator[dict[Kind, list[Path]]]:
    """The segments of a log by kind, none of which is merged or removed inside the block.

    Example:
        >>> with reading(Path("/no/such/log")) as found:
        ...     found
        {'exposures': [], 'feedback': []}
    """
    held = [_lock(folder / kind, fcntl.LOCK_SH) for kind in KINDS if (folder / kind).is_dir()]
    try:
        yield {kind: segments(folder, kind) for kind in KINDS}
    finally:
        for handle in held:
            if handle is not None:
                os.close(handle)


def compact(folder: Path, *, settle_s: float = 60.0) -> int:
    """Merge sixty segments of a level into one of the next, as often as there are sixty; the number of merged ones.

    A killed process leaves what was there before, or what comes after. One process at a time does this; another one, or one
    that would disturb a reader, goes away and may come back.

    Args:
        folder: the log.
        settle_s: segments younger than this are left alone, since others may not have read them yet.

    Raises:
        OSError: the disk is full or cannot be written; nothing is changed.
    """
    alone = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) if folder.is_dir() else None
    if alone is None:
        return 0
    try:
        return sum(_compact(folder / kind, settle_s) for kind in KINDS if (folder / kind).is_dir())
    finally:
        os.close(alone)


def retain(folder: Path, days: float) -> int:
    """Remove segments written more than so many days ago; the number of them.

    A merged segment is as old as its youngest part.
    """
    oldest, removed = time.time() - days * _DAY_S, 0
    for kind in KINDS:
        for path in [*segments(folder, kind), *(folder / kind).glob(f"*{_DAMAGED}")]:
            if _written_s(path) < oldest:
                removed += _remove(path)
    return removed


def _remove(path: Path) -> bool:
    with _swapping(path.parent) as free:
        if free:
            path.unlink(missing_ok=True)
        return free


def _compact(place: Path, settle_s: float) -> int:
    merged = 0
    if (place / _JOURNAL).exists():
        with _swapping(place) as free:
            if not free:
                return 0
            _finish(place)
    for level in range(_TOP_LEVEL):
        settled = [
            path
            for path in sorted(place.glob(f"*.L{level}.parquet"))
            if time.time() - _written_s(path) > (settle_s if level == 0 else 0)
        ]
        for start in range(0, len(settled) - _FAN_IN + 1, _FAN_IN):
            for parts in _cut(settled[start : start + _FAN_IN]):
                merged += _merge(place, parts, level + 1)
    return merged


def _cut(parts: list[Path]) -> Iterator[list[Path]]:
    """Parts in runs that are not too large together."""
    run: list[Path] = []
    size = 0
    for path in parts:
        size += path.stat().st_size
        if run and size > _MAX_MERGED_BYTES:
            yield run
            run, size = [], path.stat().st_size
        run.append(path)
    yield run


def _merge(place: Path, parts: list[Path], level: int) -> bool:
    """One segment instead of several; False if somebody is reading, or one of them was removed or is damaged."""
    newest = parts[-1].name.removesuffix(".parquet").rpartition(".")[0]
    name = f"{newest}.L{level}.parquet"
    fresh = place / f".{name}.tmp"
    try:
        _write_together(fresh, parts)
        sync_one(fresh)
        with _swapping(place) as free:
            if not free or not all(path.exists() for path in parts):
                return False
            _put_whole(place / _JOURNAL, json.dumps({"merged": name, "parts": [path.name for path in parts]}))
            fresh.rename(place / name)
            sync_one(place)
            _finish(place)
        return True
    except _DamagedError as error:
        _set_aside(error.path)
        return False
    finally:
        fresh.unlink(missing_ok=True)


class _DamagedError(Exception):
    """A segment is no whole Parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name)
        self.path = path


@contextmanager
def _reading_all_of(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        raise _DamagedError(path) from error
    except OSError as error:
        if error.errno is not None:  # the system's word, and not Parquet's: another time it may be read
            raise
        raise _DamagedError(path) from error


def _set_aside(path: Path) -> None:
    """Call a damaged segment something else, when nobody reads: the others can be merged then."""
    with _swapping(path.parent) as free:
        if free and path.exists():
            path.rename(path.with_name(f"{path.name}{_DAMAGED}"))
            _LOG.warning("segment damaged", extra={"fields": {"file": path.name}})


def _write_together(fresh: Path, parts: list[Path]) -> None:
    with _reading_all_of(parts[0]):
        schema = pq.read_schema(parts[0])
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(fresh, schema, compression="zstd", use_dictionary=_repeated(schema)) as writer:
        for path in parts:
            with _reading_all_of(path):
                waiting.append(pq.read_table(path, schema=schema, partitioning=None))
            if sum(len(table) for table in waiting) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _repeated(schema: pa.Schema) -> list[str]:
    """Columns whose values come again and again; a dictionary of all probabilities would only be in the way."""
    return [name for name in schema.names if name not in ("row", "probability", "value")]


def _finish(place: Path) -> None:
    """Do what the journal says is left to do; the place is locked."""
    merged, parts = _journal(place)
    if merged is not None and (place / merged).exists():
        for name in parts:
            (place / name).unlink(missing_ok=True)
    (place / _JOURNAL).unlink(missing_ok=True)


def _journal(place: Path) -> tuple[str | None, list[str]]:
    try:
        found = json.loads((place / _JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, []
    return found["merged"], found["parts"]


def _put_whole(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    sync_one(fresh)
    fresh.rename(path)


@contextmanager
def _swapping(place: Path) -> Iterator[bool]:
    """Whether no reader is there, and none comes inside the block."""
    handle = _lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path, how: int) -> int | None:
    """A lock on a folder that ends with the handle; None if it is not to be had at once."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # no locks on this file system
        pass
    return handle


def _written_s(path: Path) -> float:
    return int(path.name.partition("-")[0]) / 1e9
