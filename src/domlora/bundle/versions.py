"""The versions of a bundle: which there are, which one is served, what differs, and taking some away."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domlora.bundle.disk import locked, replace_file, staged
from domlora.bundle.names import MANIFEST, STAGING, parts_on_disk
from domlora.bundle.reading import check_files
from domlora.bundle.records import Manifest, read_manifest, read_record, record_name

__all__ = ["Verified", "Version", "adapters_of", "gc", "set_default", "sweep", "verify", "versions"]


@dataclass(frozen=True, slots=True)
class Version:
    """A line about a version.

    Args:
        number, parent: of it and of the one it came from.
        default: whether it is opened if nobody says which.
        created: in UTC.
        library_version: of domlora, when it was written.
        domains: how many have an adapter in it.
        size_bytes: of the parts that it wrote, without those that it has from earlier versions.
        written: those parts; of adapters how many.
        facts: as of the bundle.
    """

    number: int
    parent: int | None
    default: bool
    created: str
    library_version: str
    domains: int
    size_bytes: int
    written: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verified:
    """What :func:`verify` read: the versions, and files and bytes, each once."""

    versions: tuple[int, ...]
    files: int
    size_bytes: int


def versions(folder: Path) -> list[Version]:
    """Every version, oldest first. Files of parts are not read.

    Raises:
        BundleError: no bundle, or a damaged record.
    """
    manifest = read_manifest(folder)
    return [_version(folder, manifest, number) for number in sorted(manifest.versions)]


def set_default(folder: Path, version: int) -> None:
    """Let a version be the one that is opened: a candidate, or an earlier one to roll back to.

    All its files are checked first.

    Raises:
        BundleError: no such version, or a damaged one; the default stays as it is.
    """
    with locked(folder):
        manifest = read_manifest(folder)
        record = read_record(folder, manifest, version)
        check_files(folder, record)
        _put(folder, replace(manifest, default=version, encoder=record.encoder))


def verify(folder: Path) -> Verified:
    """Check every file of every version against its sha256.

    Raises:
        BundleError: the first file that is missing, damaged or not listed.
    """
    manifest = read_manifest(folder)
    digests: dict[str, str] = {}
    for number in sorted(manifest.versions):
        record = read_record(folder, manifest, number)
        check_files(folder, record, known=digests)
        digests |= record.files
    size = sum((folder / name).stat().st_size for name in digests)
    return Verified(tuple(sorted(manifest.versions)), len(digests), size)


def gc(folder: Path, *, keep: Collection[int]) -> list[str]:
    """Remove the versions that are not named, and all parts that no version needs any more.

    Args:
        keep: versions to keep; the default is kept in any case.

    Returns:
        What was removed: records of versions and folders of parts.

    Raises:
        BundleError: a version to keep is not there; nothing is removed then.
    """
    with locked(folder):
        manifest = read_manifest(folder)
        kept = {*keep, manifest.default}
        records = [read_record(folder, manifest, number) for number in sorted(kept)]
        _put(folder, replace(manifest, versions={number: manifest.versions[number] for number in kept}))
        wanted = {part for record in records for part in record.parts} | {record_name(number) for number in kept}
        removed = sorted(parts_on_disk(folder).keys() - wanted)
        _remove(folder, removed)
    return removed


def adapters_of(folder: Path, version: int | None = None) -> dict[str, Path]:
    """The folder of each domain's adapter in a version (None: the default), whichever version wrote it.

    Raises:
        BundleError: no bundle, or no such version.
    """
    manifest = read_manifest(folder)
    record = read_record(folder, manifest, manifest.default if version is None else version)
    return {domain: folder / part for domain, part in record.adapters.items()}


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove what a publisher left that was killed: parts of a version that was never given a number."""
    _remove(folder, [STAGING, *(name for name, number in parts_on_disk(folder).items() if number > manifest.last)])


def _version(folder: Path, manifest: Manifest, number: int) -> Version:
    record = read_record(folder, manifest, number)
    own = set(record.written)
    written = Counter(part.partition("@")[0].partition("/")[0] for part in own)
    size = sum((folder / name).stat().st_size for name in record.files if name.rpartition("/")[0] in own)
    return Version(
        number,
        record.parent,
        number == manifest.default,
        record.created,
        record.library_version,
        len(record.adapters),
        size,
        dict(written),
        record.facts,
    )


def _put(folder: Path, manifest: Manifest) -> None:
    with staged(folder) as fresh:
        replace_file(fresh, folder, MANIFEST, manifest.to_json())


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
