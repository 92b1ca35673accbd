"""The two kinds of JSON of a bundle: the manifest, and a record of each version."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from domlora.bundle.names import MANIFEST, VERSIONS, check_layout, number_of
from domlora.errors import BundleError

__all__ = ["DAMAGED", "Manifest", "Record", "digest_of", "read_checked", "read_manifest", "read_record", "record_name"]

DAMAGED = "a file of the bundle is damaged: its sha256 is not the one it was written with"
_FORMAT = 3
_START = "Write one with: domlora pretrain CONFIG --data DIR --out BUNDLE"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The one file of a bundle that changes.

    Args:
        default: the version that is opened if nobody says which.
        last: the highest number ever given; none is given twice.
        encoder: where the default version's encoder is, for whoever asks the folder for no more than that.
        versions: the sha256 of each version's record.
    """

    default: int
    last: int
    encoder: str
    versions: Mapping[int, str]

    def to_json(self) -> str:
        """Its text, with a sha256 of its own: it vouches for all other files, so something must vouch for it."""
        raw = {**asdict(self), "versions": {str(k): v for k, v in sorted(self.versions.items())}, "format": _FORMAT}
        return json.dumps({**raw, "sha256": _digest(raw)}, indent=1, sort_keys=True)

    def with_version(self, record: Record, digest: str, *, default: bool) -> Self:
        versions = {**self.versions, record.version: digest}
        added = replace(self, last=record.version, versions=versions)
        return replace(added, default=record.version, encoder=record.encoder) if default else added


@dataclass(frozen=True, slots=True)
class Record:
    """What a version is made of.

    Args:
        version, parent: its number and that of the version it came from.
        created: in UTC.
        library_version: of domlora.
        model, adapter, facts: as of the bundle.
        encoder, base, adapters, optimizer: its parts; ``base`` is a whole one and deltas in order.
        encoder_fingerprint: of the encoder.
        fingerprints: of the bases of those versions that wrote a part of this one. An adapter names the base that it was
            written beside; that it still belongs to this version's is what the record vouches for.
        digests: of each domain's adapter, see :func:`domlora.adapters.file.adapter_digests`.
        files: the sha256 of every file of its parts.
    """

    version: int
    parent: int | None
    created: str
    library_version: str
    model: dict[str, Any]
    adapter: dict[str, Any] | None
    facts: dict[str, Any]
    encoder: str
    encoder_fingerprint: str
    base: list[str]
    adapters: dict[str, str]
    optimizer: str | None
    fingerprints: dict[str, str]
    digests: dict[str, str]
    files: dict[str, str]

    @property
    def parts(self) -> list[str]:
        """Its folders, those of earlier versions among them."""
        return [self.encoder, *self.base, *self.adapters.values(), *([self.optimizer] if self.optimizer else [])]

    @property
    def written(self) -> list[str]:
        """Those of its parts that it has from nobody else."""
        return [part for part in self.parts if part.endswith(f"@{self.version}")]

    @property
    def fingerprint(self) -> str:
        """Of its base."""
        return self.fingerprints[str(number_of(self.base[-1], "base"))]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Self:
        """Read a record; names that could lead out of the bundle are refused.

        Raises:
            BundleError: another form.
        """
        try:
            record = cls(**json.loads(content))
            dicts = (record.model, record.facts, record.adapters, record.fingerprints, record.digests, record.files)
            if not record.base or not all(isinstance(each, dict) for each in dicts):
                raise TypeError("a part of it has another type")
            number_of(record.encoder, "encoder")
            if record.optimizer is not None:
                number_of(record.optimizer, "optimizer")
            for kind, parts in (("base", record.base), ("adapters/", record.adapters.values())):
                missing = {str(number_of(part, kind)) for part in parts} - record.fingerprints.keys()
                if missing:
                    raise KeyError(*sorted(missing))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"a version must have a whole record ({error!r})", received=name) from error
        return record


def record_name(version: int) -> str:
    """Where a version's record is."""
    return f"{VERSIONS}/{version}.json"


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after a look at what lies beside it.

    Raises:
        BundleError: no bundle, one of another format, a damaged manifest, or files that no bundle has.
    """
    try:
        raw: dict[str, Any] = json.loads(_content(folder / MANIFEST))
        if raw["format"] != _FORMAT:
            raise BundleError(
                f"a bundle must have format {_FORMAT}",
                received=raw["format"],
                next_step="Write it anew, with domlora pretrain or adapt",
            )
        if raw.pop("sha256") != _digest(raw):
            raise ValueError(f"{MANIFEST} has another sha256 than it says")
        versions = {int(number): str(digest) for number, digest in raw["versions"].items()}
        manifest = Manifest(int(raw["default"]), int(raw["last"]), raw["encoder"], versions)
        if not (manifest.default in versions and max(versions) <= manifest.last):
            raise ValueError(f"{MANIFEST} has a default or a last version that it does not list")
        number_of(manifest.encoder, "encoder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"a bundle must have a whole {MANIFEST} ({error})", received=str(folder), next_step=_START
        ) from error
    check_layout(folder)
    return manifest


def read_record(folder: Path, manifest: Manifest, version: int) -> Record:
    """The record of a version.

    Raises:
        BundleError: no such version, or its record is missing or damaged.
    """
    if version not in manifest.versions:
        known = ", ".join(map(str, sorted(manifest.versions)))
        raise BundleError("the bundle has no such version", received=version, next_step=f"Known: {known}")
    name = record_name(version)
    record = Record.from_json(read_checked(folder, name, manifest.versions[version]), name)
    if record.version != version or (version == manifest.default and record.encoder != manifest.encoder):
        raise BundleError("a version's record and the manifest must agree", received=name)
    return record


def read_checked(folder: Path, name: str, digest: str) -> bytes:
    """A file's content, read once.

    Raises:
        BundleError: it is missing, a link, or has another sha256.
    """
    try:
        content = _content(folder / name)
    except OSError as error:
        raise BundleError(f"a file of the bundle must be readable ({error.strerror})", received=name) from error
    if digest_of(content) != digest:
        raise BundleError(DAMAGED, received=name)
    return content


def digest_of(content: bytes) -> str:
    """The sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def _digest(manifest: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(manifest, sort_keys=True, allow_nan=False).encode())
