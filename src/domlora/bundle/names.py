"""What things are called in a bundle, and what nothing there is ever called."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from domlora.errors import BundleError

__all__ = ["MANIFEST", "STAGING", "VERSIONS", "adapter_folders", "check_layout", "number_of", "parts_on_disk"]

MANIFEST, VERSIONS, STAGING = "manifest.json", "versions", ".new"
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # names that Windows keeps for itself
_PART = re.compile(r"(?:encoder|base|optimizer|adapters/[A-Za-z0-9_.~%@-]+)@([1-9][0-9]{0,8})")
_RECORD = re.compile(rf"{VERSIONS}/[1-9][0-9]{{0,8}}\.json")


def adapter_folders(domains: Sequence[str], version: int = 1) -> dict[str, str]:
    """Where a version of these domains writes each one's adapter: its name in the signs that every file system has.

    What follows the last ``@`` is the version. Names that a disk could take for each other (``A`` and ``a``), for a
    device or for a parent folder, and names longer than a folder's may be, have an ``@`` before that and a part of their
    sha256. No other name has an ``@`` of its own, which is written as ``%40``. Where a version keeps the adapter of an
    earlier one, that one's folder counts, see :func:`domlora.bundle.adapters_of`.

    >>> for folder in adapter_folders(["Books", "home & garden", "A", "a", ".."]).values():
    ...     print(folder)
    adapters/Books@1
    adapters/home%20%26%20garden@1
    adapters/A@559aead08264d579@1
    adapters/a@ca978112ca1bbdca@1
    adapters/%2E%2E@5ec1f7e700f37c3d@1
    """
    names = {domain: quote(domain, safe="") for domain in domains}
    alike = Counter(name.lower() for name in names.values())
    for domain, name in names.items():
        if alike[name.lower()] > 1 or name.strip(".") != name or len(name) > 200 or _DEVICE.match(name):
            digest = hashlib.sha256(domain.encode()).hexdigest()[:16]
            names[domain] = f"{name.replace('.', '%2E')[:200]}@{digest}"
    return {domain: f"adapters/{name}@{version}" for domain, name in names.items()}


def number_of(part: object, kind: str) -> int:
    """The version that wrote a part.

    Raises:
        BundleError: the name is not that of a part of this kind, and could lead out of the bundle.
    """
    found = _PART.fullmatch(part) if isinstance(part, str) and part.startswith(kind) else None
    if found is None:
        raise BundleError(f"a part of a bundle must be called {kind}...@NUMBER", received=part)
    return int(found[1])


def check_layout(folder: Path) -> None:
    """Refuse what no bundle has, in its folder and the two that hold many things: links, and names of another kind.

    Parts that no version knows are what a process left that was killed; they harm nobody.

    Raises:
        BundleError: the name.
    """
    for name, entry in _entries(folder):
        known = name in (MANIFEST, VERSIONS, "adapters", STAGING) or _PART.fullmatch(name) or _RECORD.fullmatch(name)
        if entry.is_symlink() or not known:
            what = "no links" if entry.is_symlink() else "nothing but its own files"
            raise BundleError(f"a bundle must hold {what}", received=name, next_step="Remove it")


def parts_on_disk(folder: Path) -> dict[str, int]:
    """Every part and every record of a version that is there, with the version that wrote it."""
    names = [name for name, _ in _entries(folder)]
    parts = {name: int(found[1]) for name in names if (found := _PART.fullmatch(name))}
    return parts | {name: int(Path(name).stem) for name in names if _RECORD.fullmatch(name)}


def _entries(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    for inner in ("", VERSIONS, "adapters"):
        if inner and not (folder / inner).is_dir():
            continue
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                yield f"{inner}/{entry.name}".lstrip("/"), entry
