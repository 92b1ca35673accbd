"""From what somebody wants served to a store: an exported folder, a store, or a bundle that goes on learning.

Needs no torch: a bundle is exported by a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from domlora.errors import BundleError, DomloraError
from domlora.files import sha256_of, told
from domlora.serving.folder import FORMAT, MANIFEST, read_facts
from domlora.serving.marks import mark_of
from domlora.serving.state import STATE
from domlora.serving.store import Store
from domlora.serving.writing import hold, turn

__all__ = ["FolderFollower", "Follower", "Follows", "Opened", "open_store"]

_LOG = logging.getLogger("domlora.serving")
_BUNDLE_FORMAT = 3
_COMING, _LOCK = ".coming", "lock.follow"
_RETRY_S, _LONG_S = 60.0, 600.0
_SOON_S = 10.0  # a folder that is being copied here is not whole for a while


class Follows(Protocol):
    """What brings newer versions into a store while it is served."""

    def step(self) -> None:
        """Go on by one step, which waits for nobody."""


class Opened(NamedTuple):
    """What is served.

    Args:
        store: the store.
        follower: of an exported folder, a bundle or a shared store, brings its newer versions.
    """

    store: Store
    follower: Follows | None


def open_store(path: Path, place: Path | None = None) -> Opened:
    """The store of what is at a path. Any number of processes may call this at once: the first makes it, the others wait.

    Args:
        path: a store; or an exported folder or a bundle, for which a store is made beside it.
        place: where that store is; ``PATH.store`` without.

    Raises:
        BundleError: neither of them, or one that is damaged.
        DataError: the store cannot be written.
    """
    path = path.absolute()
    if (path / STATE).is_file():
        return Opened(Store.open(path), None)
    kind = _kind(path)
    store = Store.create(place or path.with_name(f"{path.name}.store"))
    if kind == FORMAT:
        exports = FolderFollower(path, store)
        exports.first()
        return Opened(store, exports)
    follower = Follower(path, store)
    follower.first()
    return Opened(store, follower)


def _kind(path: Path) -> str | int:
    """The format that a folder's manifest names.

    Raises:
        BundleError: it is nothing that can be served.
    """
    try:
        kind: str | int = json.loads((path / MANIFEST).read_bytes())["format"]
        if kind in (FORMAT, _BUNDLE_FORMAT):
            return kind
        found = f"a manifest of format {kind!r}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"no readable {MANIFEST} ({type(error).__name__})"
    raise BundleError(
        f"what is served must be an exported folder, a store or a bundle, and this has {found}",
        received=str(path),
        next_step="Write one with: domlora export, or domlora store add",
    )


def _free(wanted: int | None, store: Store) -> int:
    """The number wanted if no version has it, else the next one."""
    versions = store.versions()
    return wanted if wanted and wanted not in versions else max(versions, default=0) + 1


class FolderFollower:
    """Keeps a store at what lies in an exported folder: adds it when it is another one, and makes it live.

    It acts when the folder changes, so that a version that somebody made live by hand stays until then. One process does it;
    the others see what it did in the store.

    Args:
        folder: that ``domlora export --overwrite`` replaces.
        store: the store that is served.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = folder, store
        self._seen: object = None
        self._retry_at = 0.0

    def first(self) -> None:
        """Take over what is there, after others that are at it.

        Raises:
            BundleError: it is damaged.
        """
        mark = mark_of(self._folder / MANIFEST)
        with turn(self._store.folder / _LOCK, _LONG_S):
            self._take()
        self._seen = mark

    def step(self) -> None:
        """Take over what is there if the folder has changed and no other process is at it.

        Raises:
            BundleError: it is damaged, or not whole yet; it is tried again after a while.
        """
        mark = mark_of(self._folder / MANIFEST)
        if mark is None or mark == self._seen or time.monotonic() < self._retry_at:
            return
        handle = hold(self._store.folder / _LOCK)
        if handle is None:
            return
        try:
            self._retry_at = time.monotonic() + _SOON_S
            self._take()
            self._seen, self._retry_at = mark, 0.0
        finally:
            os.close(handle)

    def _take(self) -> None:
        """Serve the folder, unless the store has seen it: then what it serves since stays."""
        mark, state = f"export:{self._digest()}", self._store.state()
        if mark == state.followed:
            return
        known = [int(number) for number, origin in state.origins.items() if origin == mark]
        number = known[0] if known else self._add()
        self._store.set_live(number, followed=mark)
        _LOG.info("version added", extra={"fields": {"version": number}})

    def _digest(self) -> str:
        try:
            return sha256_of(self._folder / MANIFEST)
        except OSError as error:
            rule = f"an exported folder must have a readable {MANIFEST} ({error.strerror})"
            raise BundleError(rule, received=str(self._folder)) from error

    def _add(self) -> int:
        wanted = read_facts(self._folder)["bundle_version"]
        return self._store.add_version(self._folder, _free(wanted, self._store))


class Follower:
    """Keeps a store at the default version of a bundle: exports it beside the server, adds it, makes it live.

    It acts when the bundle's default changes, so that a version that somebody made live by hand stays until then. One
    process does it; the others see what it did in the store.

    Args:
        bundle: the folder that ``update``, ``onboard`` and ``set-default`` change.
        store: the store that is served.
    """

    def __init__(self, bundle: Path, store: Store) -> None:
        self._bundle, self._store = bundle, store
        self._export: _Export | None = None
        self._turn: int | None = None
        self._failed, self._retry_at = "", 0.0
        self._seen = b""

    def first(self) -> None:
        """Wait until the store has a version that answers.

        Raises:
            BundleError: the bundle is damaged or cannot be exported.
        """
        if self._store.state().live is not None:
            return
        with turn(self._store.folder / _LOCK, _LONG_S):
            if self._store.state().live is None:
                self._take(_Export(self._bundle, self._store.folder / _COMING, *self._default()))

    def step(self) -> None:
        """Go on by one step, which waits for nobody.

        Raises:
            BundleError: a newer version cannot be exported; it is tried again after a minute.
        """
        if self._export is None:
            self._look()
        elif self._export.ended():
            export, self._export = self._export, None
            try:
                self._take(export)
            except DomloraError:
                self._failed, self._retry_at = export.mark, time.monotonic() + _RETRY_S
                raise
            finally:
                self._leave()

    def _look(self) -> None:
        """See whether the bundle has another default, and begin to take it over."""
        place = self._bundle / MANIFEST
        content = place.read_bytes() if place.is_file() else b""
        if not content or content == self._seen:
            return
        default, mark = self._default()
        if mark == self._store.state().followed:
            self._seen = content
        elif (mark != self._failed or time.monotonic() >= self._retry_at) and self._take_turn():
            self._begin(default, mark)

    def _begin(self, default: int, mark: str) -> None:
        """Start an export, or make a version live again that is in the store."""
        state = self._store.state()
        known = [int(number) for number, origin in state.origins.items() if origin == mark]
        if mark != state.followed and not known:
            self._export = _Export(self._bundle, self._store.folder / _COMING, default, mark)
            return
        try:
            if mark != state.followed:
                self._store.set_live(known[0], followed=mark)
        finally:
            self._leave()

    def _take(self, export: _Export) -> None:
        """Add what was exported, under the bundle's number where that is free."""
        try:
            number = self._store.add_version(export.result(), _free(export.version, self._store))
            self._store.set_live(number, followed=export.mark)
            _LOG.info("version added", extra={"fields": {"version": number, "bundle_version": export.version}})
        finally:
            export.clean()

    def _default(self) -> tuple[int, str]:
        """The bundle's default version, and a mark of it that no other content has."""
        try:
            raw = json.loads((self._bundle / MANIFEST).read_bytes())
            default = int(raw["default"])
            return default, f"{default}:{raw['versions'][str(default)]}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"a bundle must have a whole {MANIFEST}", received=self._bundle.name) from error

    def _take_turn(self) -> bool:
        """Whether no other process follows at the moment; the system lets go when this one ends."""
        self._turn = hold(self._store.folder / _LOCK)
        return self._turn is not None

    def _leave(self) -> None:
        if self._turn is not None:
            os.close(self._turn)
        self._turn = None


class _Export:
    """A process that exports a version of a bundle."""

    def __init__(self, bundle: Path, place: Path, version: int, mark: str) -> None:
        self.version, self.mark, self._place = version, mark, place
        shutil.rmtree(place, ignore_errors=True)
        with told(place):
            place.mkdir()
            self._folder = Path(tempfile.mkdtemp(dir=place)) / "export"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "domlora.serving.pack", str(bundle), str(version), str(self._folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        )

    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> Path:
        """The exported folder, when the process has ended.

        Raises:
            BundleError: what the process said.
        """
        _, said = self._process.communicate()
        if self._process.returncode:
            reason = (said.strip().splitlines() or ["it ended without a word"])[-1]
            raise BundleError(f"a bundle must be exported to be served ({reason})", received=f"version {self.version}")
        return self._folder

    def clean(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
