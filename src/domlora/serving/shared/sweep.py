"""Removing from a shared store what no server asks for any more. Needs no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from domlora.errors import BundleError, ConfigError
from domlora.serving.shared.place import Place
from domlora.serving.shared.record import Record

__all__ = ["Swept", "sweep"]


@dataclass(frozen=True, slots=True)
class Swept:
    """What was removed, or would be.

    Args:
        files, size_bytes: removed.
        kept: files that stay.
    """

    files: int
    size_bytes: int
    kept: int


def sweep(place: Place, *, keep_s: float, dry_run: bool = False) -> Swept:
    """Remove the files that were not served within the last ``keep_s`` seconds.

    A file stays that is named by the newest generation, by one that was the newest at some time since then, or that was sent
    since then, because a publisher sends files before the generation that names them. So let ``keep_s`` be longer than any
    publishing takes, and than any server may be behind.

    Args:
        place: the shared store.
        keep_s: seconds.
        dry_run: only say what would be removed.

    Raises:
        ConfigError: ``keep_s`` is below an hour.
        BundleError: a generation or a manifest is damaged, and nothing was removed; the place cannot be reached; or a
            publisher that took longer than ``keep_s`` has named a file that was removed meanwhile.
    """
    if not keep_s >= 3600:
        raise ConfigError("a sweep must keep what was served or sent within the last hour", received=f"{keep_s:g} s")
    since = time.time() - keep_s
    named = {digest for record in _served_since(place, since) for digest in _named_by(place, record)}
    found = place.listed("files")
    old = [each for each in found if each.name not in named and each.modified < since]
    if not dry_run:
        place.remove([f"files/{each.name}" for each in old])
        lost = {each.name for each in old} & set(_named_by(place, place.newest(), missing=True))
        if lost:
            raise BundleError(
                "publishing must not take longer than a sweep keeps files, and one that is named now was removed",
                received=sorted(lost)[:3],
                next_step="Put it there again with: domlora store publish STORE URL --again",
            )
    return Swept(len(old), sum(each.size_bytes for each in old), len(found) - len(old))


def _served_since(place: Place, since: float) -> Iterator[Record]:
    """The generations that were the newest at some time since then."""
    for number, written in sorted(place.generations().items(), reverse=True):
        with suppress(FileNotFoundError):  # a publisher removes the oldest ones
            yield place.generation(number)
        if written < since:
            return


def _named_by(place: Place, record: Record, *, missing: bool = False) -> Iterator[str]:
    """The sha256 of all files that a record names; with ``missing``, those of a manifest that is not there are left out."""
    with TemporaryDirectory() as work:
        for version in record.versions.values():
            yield version.manifest
            yield from version.delta.values()
            path = Path(work) / version.manifest
            try:
                place.get_file(version.manifest, path)
            except BundleError:
                if not missing:
                    raise
                continue
            yield from json.loads(path.read_bytes())["files"].values()
    yield from (adapter.sha256 for adapter in record.state.adapters.values())
