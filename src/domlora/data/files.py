"""Where raw files are: a named folder, the cache, or the publisher's archive."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from domlora.errors import DataError
from domlora.files import new_folder

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Archive", "cache_folder", "find_raw"]

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Archive:
    """A published data set: which files make it up and where to get them.

    Args:
        title: its name for messages.
        folder: the folder inside the archive, also the folder's name in the cache.
        layouts: sets of file names, each of which is enough; the first is the archive's own.
        url, md5: the archive and its checksum, both as published.
        terms: a file of the archive with its terms of use, kept beside the data.
        inner: further folders below a given one in which a layout may lie.
    """

    title: str
    folder: str
    layouts: tuple[tuple[str, ...], ...]
    url: str
    md5: str
    terms: str = "README"
    inner: tuple[str, ...] = ()


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/domlora``, or ``~/.cache/domlora``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "domlora"


def find_raw(archive: Archive, raw: Path | None = None, progress: Progress | None = None) -> tuple[Path, ...]:
    """The files of one layout: under ``raw``, else ``$DOMLORA_DATA``, else the cache, else downloaded into the cache.

    Args:
        archive: the set.
        raw: the folder that holds the files, or its parent. When given, no other place is tried.
        progress: shows a bar while downloading.

    Raises:
        DataError: the files are nowhere; the message names the files and the folders that would do.
    """
    if raw is not None:
        found = _look(archive, raw.expanduser())
        if not found:
            raise DataError(
                f"{archive.title} needs {_wanted(archive)}",
                received=str(raw),
                next_step="Pass the folder that holds them",
            )
        return found
    named = os.environ.get("DOMLORA_DATA")
    for folder in [*([Path(named).expanduser()] if named else []), cache_folder()]:
        if found := _look(archive, folder):
            return found
    _download(archive, progress)
    return _look(archive, cache_folder())


def _look(archive: Archive, folder: Path) -> tuple[Path, ...]:
    for inside in (".", archive.folder, *archive.inner):
        for layout in archive.layouts:
            paths = tuple(folder / inside / name for name in layout)
            if all(path.is_file() for path in paths):
                return paths
    return ()


def _wanted(archive: Archive) -> str:
    return " or ".join(" and ".join(layout) for layout in archive.layouts)


def _download(archive: Archive, progress: Progress | None) -> None:
    """Fetch, check and unpack the archive into the cache, which gets all of it or nothing."""
    target = cache_folder() / archive.folder
    try:
        with new_folder(target) as fresh:
            packed = fresh / "archive.zip"
            digest = _fetch(archive, packed, progress)
            if digest != archive.md5:
                raise DataError(f"{archive.url} must have the md5 {archive.md5}", received=digest)
            _unpack(archive, packed, fresh)
            packed.unlink()
    except (OSError, HTTPException, zipfile.BadZipFile, DataError) as error:
        if _look(archive, cache_folder()):
            return  # another process was faster
        raise DataError(
            f"{archive.title} is not on this machine and could not be fetched from {archive.url} ({error})",
            next_step=f"Put {_wanted(archive)} into {target}, or name their folder with --raw or DOMLORA_DATA",
        ) from error


def _fetch(archive: Archive, path: Path, progress: Progress | None) -> str:
    """Save the archive; returns its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT_S) as reply, path.open("wb") as file:
        size_bytes = int(reply.headers.get("Content-Length") or 0) or None
        task = progress.add_task(f"Download {archive.title}", total=size_bytes) if progress else None
        while chunk := reply.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            if progress and task is not None:
                progress.advance(task, len(chunk))
    return digest.hexdigest()


def _unpack(archive: Archive, packed: Path, folder: Path) -> None:
    """Take the known files by name, so that no name inside the archive ever becomes a path."""
    with zipfile.ZipFile(packed) as content:
        for name in (*archive.layouts[0], archive.terms):
            member = f"{archive.folder}/{name}"
            if member not in content.namelist():
                raise DataError(f"{archive.url} must hold {member}", received=content.namelist()[:20])
            with content.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)
