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
        url, md5: the archive and its checksum, both as published; empty where the publisher has no lasting address.
        publisher: who hands out the files, for messages.
        wanted: what to say is needed, where all names of all layouts would be a long list.
        terms: a file of the archive with its terms of use, kept beside the data.
        inner: further folders below a given one in which a layout may lie.
    """

    title: str
    folder: str
    layouts: tuple[tuple[str, ...], ...]
    url: str = ""
    md5: str = ""
    publisher: str = ""
    wanted: str = ""
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
                f"{archive.title} needs {_wanted(archive)}{_absent(archive, raw.expanduser())}",
                received=str(raw),
                next_step=f"Pass the folder that holds them{_from(archive)}",
            )
        return found
    named = os.environ.get("DOMLORA_DATA")
    for folder in [*([Path(named).expanduser()] if named else []), cache_folder()]:
        if found := _look(archive, folder):
            return found
    if not archive.url:
        raise DataError(f"{archive.title} is not on this machine and is not fetched", next_step=_advice(archive))
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
    return archive.wanted or " or ".join(" and ".join(layout) for layout in archive.layouts)


def _from(archive: Archive) -> str:
    return f" (from {archive.publisher})" if archive.publisher else ""


def _advice(archive: Archive) -> str:
    target = cache_folder() / archive.folder
    return f"Put {_wanted(archive)}{_from(archive)} into {target}, or name their folder with --raw or DOMLORA_DATA"


def _absent(archive: Archive, folder: Path) -> str:
    """What a folder lacks that holds a part of a layout."""
    partly: list[list[str]] = []
    for inside in (".", archive.folder, *archive.inner):
        for layout in archive.layouts:
            missing = [name for name in layout if not (folder / inside / name).is_file()]
            if len(missing) < len(layout):
                partly.append(missing)
    fewest: list[str] = min(partly, key=len, default=[])
    return f", and there is no {', no '.join(fewest)}" if fewest else ""


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
            next_step=_advice(archive),
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
