"""How a store is written: one writer at a time, each file whole or not at all. Needs no torch."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from domlora.errors import BundleError
from domlora.files import put_file, told

__all__ = ["hold", "link_all", "link_one", "turn", "write_whole"]

_PAUSE_S = 0.002


def hold(lock: Path) -> int | None:
    """The handle of a lock that one process of the machine holds until it closes it or ends; None if another one does."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if _had(handle):
        return handle
    os.close(handle)
    return None


@contextmanager
def turn(lock: Path, wait_s: float) -> Iterator[None]:
    """Be the only writer, among processes and threads; the system lets go when a process ends, however it ends.

    Raises:
        BundleError: another one is at it for all of ``wait_s``.
        DataError: the folder cannot be written.
    """
    with told(lock.parent):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while not _had(handle):
            if time.monotonic() > deadline:
                raise BundleError(
                    "one process at a time may change a store, and another one does",
                    received=str(lock.parent),
                    next_step="Try again when it has ended",
                )
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(handle)


def write_whole(place: Path, content: bytes) -> None:
    """Put a file in place by one rename, when it is on disk. For whoever has the turn: the name beside it is always one.

    Raises:
        DataError: the disk is full, or cannot be written; what was there is as it was.
    """
    put_file(place, content, place.with_name(f".{place.name[:100]}.new"))


def link_all(source: Path, target: Path) -> None:
    """All files of a folder into another one, without their bytes where the disk allows it.

    Raises:
        BundleError: a link among them.
    """
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_symlink():
            raise BundleError("an exported folder must hold plain files alone", received=path.name)
        if path.is_dir():
            place.mkdir()
            continue
        link_one(path, place)


def link_one(source: Path, target: Path) -> None:
    """A file under another name; copied where the disk has no links, or is another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _had(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
