"""Where a shared store lies: a folder that all machines see, or a bucket. Needs no torch.

generations/N.json   what is served, see :mod:`domlora.serving.shared.record`; the newest one counts, none is ever changed
files/SHA256         files of versions, deltas and adapters, called by their content
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from domlora.errors import BundleError, ConfigError, DomloraError, needing
from domlora.files import sha256_of, sync_one
from domlora.serving.shared.record import Record

__all__ = ["Item", "Place"]

_S3 = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 2, "read_timeout": 10, "retries": {"max_attempts": 2}},
}
_KEPT = 100  # generations; a replica that is further behind finds the newest one by its next listing


class Item(NamedTuple):
    """An object of a shared store: its name in its folder, when it was written (seconds since 1970), and its size."""

    name: str
    modified: float
    size_bytes: int


class Place:
    """A shared store's files. What is read is compared with its sha256; what is written is there whole or not at all.

    Two writers cannot both write the same generation: a file is linked and an object is put only where there is none
    (``If-None-Match: *``), so no file system is taken here that cannot promise this.

    Args:
        url: a folder, or ``s3://BUCKET/PATH``; keys and endpoint of the latter come from the environment
            (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` and the like) or from the machine's role.

    Raises:
        ConfigError: another kind of URL, or its library is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = Place(folder)
        ...     place.put(Record(1))
        ...     place.newest().generation, place.after(1)
        (1, None)
    """

    def __init__(self, url: str) -> None:
        protocol = url.partition("://")[0] if "://" in url else "file"
        if protocol not in ("file", "s3"):
            raise ConfigError("a shared store must be a folder or s3://BUCKET/PATH", received=url)
        with needing("s3" if protocol == "s3" else "shared", f"the shared store {url!r}"):
            from fsspec.core import url_to_fs

            self._files, root = url_to_fs(url, **(_S3 if protocol == "s3" else {}))
        self._local = protocol == "file"
        self._root: str = root.rstrip("/")
        self.url: str = self._files.unstrip_protocol(self._root)

    def newest(self) -> Record:
        """The newest generation, found by listing; an empty record where there is none.

        Raises:
            BundleError: the place cannot be reached, or that object is damaged.
        """
        with suppress(FileNotFoundError):
            numbers = self.generations()
            if numbers:
                return self.generation(max(numbers))
        return Record()

    def after(self, generation: int) -> Record | None:
        """The generation that follows one, None where there is none yet: one small request.

        Raises:
            BundleError: the place cannot be reached, or that object is damaged.
        """
        with suppress(FileNotFoundError):
            return self.generation(generation + 1)
        return None

    def generations(self) -> dict[int, float]:
        """When each generation was written.

        Raises:
            BundleError: the place cannot be reached.
        """
        found = {each.name.removesuffix(".json"): each.modified for each in self.listed("generations")}
        return {int(number): written for number, written in found.items() if number.isdecimal()}

    def listed(self, folder: str) -> list[Item]:
        """What lies in ``generations`` or ``files``; nothing where there is none.

        Raises:
            BundleError: the place cannot be reached.
        """
        with _reached(), suppress(FileNotFoundError):
            return [_item(told) for told in self._files.ls(f"{self._root}/{folder}", detail=True)]
        return []

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; some may be gone already.

        Raises:
            BundleError: the place cannot be reached; some are removed.
        """
        for name in names:
            with _reached(), suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

    def put(self, record: Record) -> None:
        """Add a generation, the last thing that a publisher writes.

        Raises:
            BundleError: somebody else has written this generation, or the place cannot be reached.
        """
        name, content = self._name(record.generation), record.to_json()
        try:
            with _reached():
                self._create(f"{self._root}/{name}", content)
        except FileExistsError as error:
            raise BundleError(
                "a shared store must be as its publisher knew it, and somebody else has changed it",
                received=f"generation {record.generation}",
                next_step="Run domlora store pull, then publish again",
            ) from error
        with suppress(Exception):  # of no consequence, and the next publisher removes it
            self._files.rm_file(f"{self._root}/{self._name(record.generation - _KEPT)}")

    def put_file(self, digest: str, path: Path) -> None:
        """Add a file.

        Raises:
            BundleError: it is another one than its sha256 says, or the place cannot be reached.
        """
        if sha256_of(path) != digest:
            raise BundleError("a file must be whole to be published, and its sha256 is another", received=path.name)
        target = f"{self._root}/files/{digest}"
        with _reached():
            if self._local:
                _copy_whole(path, Path(target))
            else:
                self._files.put_file(str(path), target)

    def get_file(self, digest: str, path: Path) -> None:
        """Bring a file.

        Raises:
            BundleError: it is missing or damaged, or the place cannot be reached.
        """
        name = f"files/{digest}"
        try:
            with _reached():
                self._files.get_file(f"{self._root}/{name}", str(path))
        except FileNotFoundError as error:
            raise BundleError("a shared store must hold what its record names", received=name) from error
        if sha256_of(path) != digest:
            path.unlink()
            raise BundleError(
                "an object of a shared store is damaged: its sha256 is another",
                received=name,
                next_step="Put it there again with: domlora store publish STORE URL --again",
            )

    def generation(self, generation: int) -> Record:
        """One generation.

        Raises:
            FileNotFoundError: there is none of this number.
            BundleError: the place cannot be reached, or that object is damaged.
        """
        name = self._name(generation)
        with _reached():
            record = Record.from_json(self._files.cat_file(f"{self._root}/{name}"), name)
        if record.generation != generation:
            raise BundleError("a generation's object must have its number", received=f"{record.generation} in {name}")
        return record

    def _create(self, path: str, content: bytes) -> None:
        """Write an object that is not there yet; FileExistsError if it is."""
        if not self._local:
            self._files.pipe_file(path, content, mode="create")
            return
        fresh = _beside(Path(path))
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(fresh, path)  # unlike a rename it replaces nothing
            sync_one(fresh.parent)
        finally:
            fresh.unlink(missing_ok=True)

    def _name(self, generation: int) -> str:
        return f"generations/{generation:012d}.json"


def _item(told: Mapping[str, Any]) -> Item:
    modified = told["mtime"] if "mtime" in told else told["LastModified"].timestamp()
    return Item(told["name"].rpartition("/")[2], modified, told["size"])


@contextmanager
def _reached() -> Iterator[None]:
    """What a file system's library raises, as one error; each has its own classes. Names of places stay out of it."""
    try:
        yield
    except (DomloraError, FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        raise BundleError(
            f"the shared store must be reachable ({type(error).__name__})", next_step="Look at the network and the keys"
        ) from error


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid4().hex}")


def _copy_whole(source: Path, target: Path) -> None:
    fresh = _beside(target)
    try:
        shutil.copyfile(source, fresh)
        sync_one(fresh)
        fresh.replace(target)
        sync_one(target.parent)
    finally:
        fresh.unlink(missing_ok=True)
