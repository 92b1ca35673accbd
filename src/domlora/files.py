"""Files and folders that are there or not, never half."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from domlora.errors import DataError

__all__ = ["new_folder", "sha256_of"]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False, marker: str = "manifest.json") -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out``, complete and on disk, when the block ends well.

    When the block fails or is interrupted, nothing is left behind and a former ``out`` stays as it was. What a process that
    was killed has left there goes with the next attempt.

    Args:
        out: where the folder will be; its parents are made.
        overwrite: replace a folder that is there. Only one that holds ``marker`` is replaced, so that a mistyped path
            cannot cost anybody a home directory.
        marker: a file that every folder of this kind holds.

    Raises:
        DataError: ``out`` exists and may not be replaced.
    """
    if out.exists() and not overwrite:
        raise DataError("the output folder must not exist", received=str(out), next_step="Pass overwrite to replace it")
    if out.exists() and not (out / marker).is_file():
        raise DataError(
            f"only a folder with a {marker} is replaced", received=str(out), next_step="Choose another folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    held = _hold(work)
    try:
        fresh = work / "new"  # made by mkdir and not by mkdtemp, whose folders nobody else may read
        fresh.mkdir()
        yield fresh
        _sync(fresh)
        _put(fresh, out, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A lock on a folder that the system lets go when the process ends, however it ends; None if another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(out: Path) -> None:
    """Temporary folders of the same ``out`` whose process is gone. A former ``out`` among them is brought back."""
    for work in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        held = _hold(work) if work.is_dir() else None
        if held is None:
            continue
        if (work / "old").exists() and not out.exists():
            (work / "old").rename(out)
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)


def _put(fresh: Path, out: Path, old: Path) -> None:
    """Rename ``fresh`` to ``out``, with a former ``out`` moved to ``old`` and brought back if that fails."""
    try:
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except BaseException:  # an interrupt too, wherever it falls
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    _sync_one(out.parent)


def _sync(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:  # one at a time, thousands of small files wait for the disk thousands of times
        list(pool.map(_sync_one, folder.rglob("*")))
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
