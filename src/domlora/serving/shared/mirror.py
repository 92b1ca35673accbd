"""A replica's side: its store's folder is a copy of a shared store, and follows it. Needs no torch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from domlora.errors import BundleError, ConfigError, DomloraError
from domlora.serving.shared.fetch import bring_experiments, bring_state, bring_versions
from domlora.serving.shared.place import Place
from domlora.serving.shared.publishing import COPY, remember, remembered
from domlora.serving.shared.record import Record
from domlora.serving.store import Store
from domlora.serving.writing import hold, turn

__all__ = ["Mirror"]

_LOG = logging.getLogger("domlora.serving")
_LOOKING, _LEADING, _LOOKED = "lock.follow", "lock.mirror", ".looked"
_LONG_S, _LIST_S = 600.0, 60.0
_RETRY_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)


class Mirror:
    """Keeps a store at the newest generation of a shared one. Of several processes of a machine one does it.

    A generation is taken over when all of it is here and was compared with its sha256; until then, and while the shared
    store cannot be reached, what was served stays.

    Args:
        place: the shared store.
        store: the copy; whatever somebody changes in it by hand is taken back.
        look_s: between looks.
        seen: called after each look with the generation that is served, and whether it is known to be the newest one.

    Raises:
        ConfigError: the folder holds a store of somebody's own, whose changes would be lost.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mirror = Mirror(Place(f"{folder}/place"), Store.create(Path(folder) / "copy"))
        ...     mirror.first()
        Traceback (most recent call last):
        domlora.errors.BundleError: a shared store must have a version to be served. Publish one with: ...
    """

    def __init__(
        self,
        place: Place,
        store: Store,
        look_s: float = 0.5,
        seen: Callable[[int, bool], object] | None = None,
    ) -> None:
        _mark(store)
        self._place, self._store, self._look_s, self._seen = place, store, look_s, seen
        self._record = remembered(store, place)
        self._listed_at = self._look_at = 0.0
        self._failures, self._failure, self._checked = 0, "", False
        self._thread: threading.Thread | None = None
        self._leads: int | None = None

    def first(self) -> None:
        """Be at the newest generation, or at the one that is here if the shared store cannot be had.

        Raises:
            BundleError: no version is here, and none can be had.
        """
        self._look(time.time())
        if self._store.state().live is None:
            if self._failure:
                raise BundleError(self._failure)
            raise BundleError(
                "a shared store must have a version to be served",
                next_step="Publish one with: domlora store publish STORE URL",
            )

    def step(self) -> None:
        """Go on by one step, which waits for nobody: a thread looks when it is time."""
        now = time.monotonic()
        if now < self._look_at or (self._thread is not None and self._thread.is_alive()):
            return
        self._look_at = now + self._look_s
        if self._leads is None:
            self._leads = hold(self._store.folder / _LEADING)
        if self._leads is not None:
            self._thread = threading.Thread(target=self._look, name="mirror", daemon=True)
            self._thread.start()

    def _look(self, unless_since_s: float = float("inf")) -> None:
        """Take over what is new. Failures are said once, and tried again later and later.

        Args:
            unless_since_s: no look if another process of this machine has looked since this moment, well or not.
        """
        looked = self._store.folder / _LOOKED
        try:
            with turn(self._store.folder / _LOOKING, _LONG_S):
                if looked.exists() and looked.stat().st_mtime > unless_since_s and self._store.state().live:
                    return
                try:
                    self._take_newest()
                finally:
                    looked.touch()
        except DomloraError as error:
            self._failed(str(error), repr(error.__cause__))
        except Exception as error:
            _LOG.exception("shared store not read")
            self._failed(f"the shared store cannot be read ({type(error).__name__})", repr(error))
        else:
            if self._failure:
                _LOG.info("shared store read again", extra={"fields": {"generation": self._record.generation}})
            self._failures, self._failure = 0, ""
        if self._seen is not None:
            self._seen(self._record.generation, not self._failure)

    def _failed(self, reason: str, cause: str) -> None:
        if reason != self._failure:
            fields = {"reason": reason, "cause": cause, "generation": self._record.generation}
            _LOG.error("shared store not read", extra={"fields": fields})
        pause_s = _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
        self._failures, self._failure = self._failures + 1, reason
        self._look_at = time.monotonic() + max(pause_s, self._look_s)

    def _take_newest(self) -> None:
        met = remembered(self._store, self._place)  # another process may have led
        if met.generation > self._record.generation:
            self._record = met
        newest = self._newest()
        if newest.generation > self._record.generation:
            self._take(newest)
            _LOG.info("generation taken over", extra={"fields": {"generation": newest.generation}})
        elif self._record.generation and (not self._checked or self._store.state() != self._record.state):
            self._take(self._record)  # the disk may have lost something, or somebody has changed the copy
        self._checked = True

    def _newest(self) -> Record:
        """By one small request; by a listing now and then, for old generations are removed."""
        now = time.monotonic()
        if not self._listed_at or now - self._listed_at > _LIST_S:
            newest = self._place.newest()
            self._listed_at = now
            return newest
        newest = self._record
        while (following := self._place.after(newest.generation)) is not None:
            newest = following
        return newest

    def _take(self, record: Record) -> None:
        before = self._store.state().live
        bring_versions(self._place, self._store, record, record.needed())
        bring_state(self._place, self._store, record.state)
        bring_experiments(self._store, record)
        remember(self._store, self._place, record)
        self._record = record
        kept = {before, *record.needed()}  # the one before, for a process that has not switched yet, and to go back
        for number in set(self._store.versions()) - kept:
            self._store.drop_version(number)


def _mark(store: Store) -> None:
    """Note that a folder is a copy, before there is anything in it."""
    mark = store.folder / COPY
    if not mark.exists() and (store.versions() or store.state().live is not None):
        raise ConfigError(
            "a copy of a shared store must have a folder of its own, and there is another store",
            received=store.folder.name,
            next_step="Pass a new folder as --bundle",
        )
    mark.touch()
