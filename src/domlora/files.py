"""Files and folders that are there or not, never half."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from domlora.errors import DataError, DomloraError

__all__ = ["allow_open_files", "new_folder", "only_one", "put_file", "sha256_of", "sync", "sync_one", "told"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EROFS)


def allow_open_files() -> int:
    """Let this process have as many open files as it may, and say how many: often 1,024 where it may ask for a million."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else allowed


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
        DataError: ``out`` exists and may not be replaced, or the disk is full, over a quota, or cannot be written.
    """
    with told(out):
        _check_replaceable(out, overwrite, marker)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        held = _hold(work)
    try:
        fresh = work / "new"  # made by mkdir and not by mkdtemp, whose folders nobody else may read
        with told(out):
            fresh.mkdir()
        with told(out, disk_alone=True):
            yield fresh
        with told(out):
            sync(fresh)
            _put(fresh, out, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Be the only process that makes ``out``, from here to the end of the block; a second one is refused at once.

    The lock is a file beside ``out``. The system lets it go when the process ends, however it ends, and the file is removed
    here or by the next one. On a file system that knows no locks nobody is refused.

    Raises:
        DataError: another process is at it, or the folder around ``out`` cannot be written.
    """
    place = out.parent / f".{out.name}.lock"
    with told(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = _lock(place)
    if handle is None:
        raise DataError(
            f"one process at a time may write a folder, and process {_owner(place)} is writing this one",
            received=str(out),
            next_step="Wait for it, end it, or choose another folder",
        )
    try:
        with told(out):
            os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        with suppress(OSError):
            place.unlink()
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile has the handle too and does not close it
        os.close(handle)


def _lock(place: Path) -> int | None:
    """A file of this process alone, empty; None if another one has it."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # no locks on this file system
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(place)):
                os.ftruncate(handle, 0)
                return handle
        os.close(handle)  # its owner removed it between our two calls


def _owner(place: Path) -> str:
    with suppress(OSError):
        return place.read_text(encoding="utf-8") or "?"
    return "?"


@contextmanager
def told(out: Path, *, disk_alone: bool = False) -> Iterator[None]:
    """What the system refuses inside the block, as one line about ``out``.

    Args:
        disk_alone: only what a disk refuses whoever writes, such as one that is full; other errors of the system may be
            about other files and pass. Libraries that put such an error into words of their own are understood too.

    Raises:
        DataError: the rule, and what is still there.
    """
    try:
        yield
    except DomloraError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None or (disk_alone and number not in _DISK):
            raise
        full = number in _FULL
        raise DataError(
            f"{'the disk must have room for' if full else 'it must be possible to write'} the output "
            f"({os.strerror(number)})",
            received=str(out),
            next_step=f"{_room(out) if full else 'Let this user write there, or choose another folder'}. "
            "What was there before is as it was; then run the same command again",
        ) from error


def _number_of(error: Exception) -> int | None:
    """What the system said, also where a library only quotes it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((n for n in _DISK if os.strerror(n) in str(error)), None)


def _room(out: Path) -> str:
    with suppress(OSError, StopIteration):
        there = next(folder for folder in out.absolute().parents if folder.is_dir())
        return f"Make room ({shutil.disk_usage(there).free / 1e6:,.0f} MB are free in {there})"
    return "Make room"


def _check_replaceable(out: Path, overwrite: bool, marker: str) -> None:
    if out.exists() and not overwrite:
        raise DataError("the output folder must not exist", received=str(out), next_step="Pass overwrite to replace it")
    if out.exists() and not (out / marker).is_file():
        raise DataError(
            f"only a folder with a {marker} is replaced", received=str(out), next_step="Choose another folder"
        )


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
    sync_one(out.parent)


def put_file(place: Path, content: bytes, fresh: Path) -> None:
    """Put a file in place by one rename, when it is on disk.

    Args:
        fresh: in the same folder, where it is written first; never there afterwards.

    Raises:
        DataError: the disk is full, or cannot be written; what was there is as it was.
    """
    with told(place):
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(place)
        finally:
            fresh.unlink(missing_ok=True)
        sync_one(place.parent)


def sync(folder: Path) -> None:
    """Bring a folder and all in it to disk."""
    with ThreadPoolExecutor(8) as pool:  # one at a time, thousands of small files wait for the disk thousands of times
        list(pool.map(sync_one, folder.rglob("*")))
    sync_one(folder)


def sync_one(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
