"""What a store serves at the moment: the one file of it that changes. Needs no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from domlora.errors import BundleError, DataError
from domlora.serving.sealed import opened, sealed

__all__ = ["STATE", "Adapter", "State", "States", "check_domain", "check_label", "file_of"]

STATE = "state.json"
_FORMAT = "domlora store 1"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_FILE = re.compile(r"adapters/[A-Za-z0-9_.~%@+-]+\.safetensors")
_PLAIN = re.compile(r"[a-z0-9_~][a-z0-9_.~%-]{0,99}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # names that Windows keeps for itself
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Adapter:
    """One that was pushed.

    Args:
        domain, version: whose it is, and what it is called in answers and logs.
        pinned: it is in memory of every process and stays there.
        sha256, size_bytes: of its file.
        base: fingerprint of the network that it belongs to; versions with another base do not use it.
        since: the newest version that was in the store; later ones of the same base use their own adapter again.
        rank: the largest one of its layers.
        file: in the store.
    """

    domain: str
    version: str
    pinned: bool
    sha256: str
    size_bytes: int
    base: str
    since: int
    rank: int
    file: str


@dataclass(frozen=True, slots=True)
class State:
    """What is served.

    Args:
        live: the version that answers; None in a new store.
        adapters: pushed ones by domain.
        removed: domains that are not served, whatever a version holds.
        followed: the mark of the bundle's version that was last taken over, see :class:`domlora.serving.source.Follower`.
        origins: by its number, the mark of each version that came from a bundle so.
    """

    live: int | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    followed: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Its text, with a sha256 of its own.

        >>> State.from_json(State(live=3).to_json().encode()).live
        3
        """
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        adapters = {domain: _as_dict(adapter) for domain, adapter in self.adapters.items()}
        return sealed({**told, "adapters": adapters, "removed": sorted(self.removed)}, _FORMAT)

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Read it, and refuse names that could lead out of the store.

        Raises:
            BundleError: damaged, or of another format.
        """
        try:
            raw = opened(content, _FORMAT)
            adapters = {name: Adapter(**each) for name, each in raw.pop("adapters").items()}
            if not all(_FILE.fullmatch(each.file) for each in adapters.values()):
                raise ValueError("it names files that no store has")
            return cls(adapters=adapters, removed=frozenset(raw.pop("removed")), **raw)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"a store must have a whole {STATE} ({error})",
                next_step=f"Bring {STATE} back from a copy, or make the store anew with: domlora store add",
            ) from error


class States:
    """States as bytes and back; the last one is remembered, for reading that of a thousand adapters takes 10 ms."""

    def __init__(self) -> None:
        self._last: tuple[bytes | None, State] = (None, State())

    def read(self, content: bytes) -> State:
        """What the bytes say.

        Raises:
            BundleError: they are damaged, or of another format.
        """
        known, state = self._last
        if content != known:
            state = State.from_json(content)
            self._last = (content, state)
        return state

    def written(self, state: State) -> bytes:
        """Its bytes."""
        content = state.to_json().encode()
        self._last = (content, state)
        return content


def check_domain(name: str) -> None:
    """Refuse what cannot be the name of a domain: empty, overlong, with control characters, or like a way out of a folder.

    >>> check_domain("home/kitchen")
    >>> check_domain("../kitchen")
    Traceback (most recent call last):
    domlora.errors.DataError: a domain's name must not look like a path out of a folder. Received: '../kitchen'.
    """
    if not name.strip() or len(name) > _LONGEST or not name.isprintable() or not _is_text(name):
        raise DataError(f"a domain's name must be 1 to {_LONGEST} printable characters", received=name[:_LONGEST])
    if name.startswith("/") or "\\" in name or {".", ".."} & set(name.split("/")):
        raise DataError("a domain's name must not look like a path out of a folder", received=name)


def check_label(version: str) -> None:
    """Refuse what cannot be what a version of an adapter is called.

    >>> check_label("2026-05-26.1")
    """
    if not _LABEL.fullmatch(version):
        raise DataError(
            "an adapter's version must be 1 to 64 letters, digits, dots, dashes, underscores or pluses",
            received=version[:100],
        )


def file_of(domain: str, version: str, sha256: str) -> str:
    """Where in a store an adapter lies: a name of its own on every file system, and never written twice.

    >>> file_of("toys", "2", "c0ffee00c0ffee00"), file_of("Toys", "2", "c0ffee00c0ffee00")
    ('adapters/toys@2-c0ffee00.safetensors', 'adapters/Toys@fd16c1f32fde488d@2-c0ffee00.safetensors')
    """
    name = quote(domain, safe="")
    if not _PLAIN.fullmatch(name) or _DEVICE.match(name):
        digest = hashlib.sha256(domain.encode()).hexdigest()[:16]
        name = f"{name.replace('.', '%2E')[:100]}@{digest}"
    return str(Path("adapters") / f"{name}@{version}-{sha256[:8]}.safetensors")


def _as_dict(adapter: Adapter) -> dict[str, Any]:
    """For a tenth of what ``asdict`` takes, which copies every text."""
    return {name: getattr(adapter, name) for name in Adapter.__slots__}


def _is_text(name: str) -> bool:
    """Whether it has no half of a surrogate pair, which no file name may have."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
