"""Changing a bundle: one process at a time, and whoever reads sees it before or after."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from domlora.bundle.names import STAGING
from domlora.errors import BundleError
from domlora.files import sync, sync_one

__all__ = ["locked", "put", "replace_file", "staged"]

_WAIT_S = 10.0


@contextmanager
def locked(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Hold the bundle against other processes that change it; the system lets go when the process ends, however it ends.

    Raises:
        BundleError: no folder, or another process held it for all of ``wait_s``.
    """
    deadline = time.monotonic() + (_WAIT_S if wait_s is None else wait_s)
    while (handle := _held(folder)) is None:
        if time.monotonic() > deadline:
            raise BundleError(
                "one process at a time may change a bundle, and another one does",
                received=str(folder),
                next_step="Try again when it has ended",
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too and does not close it
        os.close(handle)


def _held(folder: Path) -> int | None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BundleError(
            f"a bundle must be a folder that can be read ({error.strerror})",
            received=str(folder),
            next_step="Write one with: domlora pretrain CONFIG --data DIR --out BUNDLE",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # not replaced as a whole before we had it
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder inside the bundle for what is not complete yet."""
    fresh = folder / STAGING
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def put(fresh: Path, folder: Path, names: list[str]) -> None:
    """Move parts into the bundle, in this order, each on disk before it has its name."""
    sync(fresh)
    parents = {(folder / name).parent for name in names}
    for parent in parents:
        parent.mkdir(exist_ok=True)
    for name in names:
        (fresh / name).rename(folder / name)
    for place in (*parents, folder):
        sync_one(place)


def replace_file(fresh: Path, folder: Path, name: str, text: str) -> None:
    """Write a file anew by one rename."""
    (fresh / name).write_text(text, encoding="utf-8")
    sync_one(fresh / name)
    (fresh / name).replace(folder / name)
    sync_one(folder)
