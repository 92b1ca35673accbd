"""What the handlers of a process share, and which model answers for a domain and a unit."""

from __future__ import annotations

import itertools
import logging
import os
import re
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from domlora.abtest.assignment import Assigner, Assignment, choice
from domlora.errors import BundleError, ConfigError, DataError, UnknownDomainError, nearest
from domlora.features.schema import OOV_ID
from domlora.serving.http.answers import Answer, Request, UnavailableError
from domlora.serving.settings import Settings
from domlora.serving.snapshot import Snapshot

if TYPE_CHECKING:
    from domlora.abtest.log import EventLog
    from domlora.abtest.registry import Registry
    from domlora.serving.http.metrics import Metrics
    from domlora.serving.http.worker import Served
    from domlora.serving.live import Live
    from domlora.serving.rows.store import RowStore
    from domlora.serving.source import Opened

__all__ = ["Header", "Route", "Service", "check_rows", "make"]

_LOG = logging.getLogger("domlora.serving")
_PRINTABLE = re.compile(rb"[!-~]{1,128}")
_MOST_KEPT = 10_000
_MANY = 64  # answers that are counted together
_UNREADABLE = "what answers this request cannot be read"
Header = tuple[bytes, bytes]


class Route(NamedTuple):
    """How rows of one domain are answered.

    Args:
        version: the bundle's version that an experiment's arm names; None for the live one.
        domain: whose adapter; None for the base alone.
        assignments: the arms that led here.
    """

    version: int | None
    domain: str | None
    assignments: tuple[Assignment, ...]


@dataclass(slots=True)
class Service:
    """What handlers share.

    Args:
        live: what answers.
        settings: of the server.
        metrics: that are counted.
        registry: of experiments; None where there are none.
        log: of exposures and feedback.
        rows: of tables that versions do not hold; None where they hold all.
    """

    live: Live
    settings: Settings
    metrics: Metrics
    registry: Registry | None = None
    log: EventLog | None = None
    rows: RowStore | None = None
    _held: frozenset[int] = field(init=False, default=frozenset())
    _assigner: Assigner | None = field(init=False, default=None)
    _served: Snapshot | None = field(init=False, default=None)
    _said: dict[tuple[str, str | None, str | None], tuple[Header, ...]] = field(init=False, default_factory=dict)
    _answers: deque[tuple[str, int, str | None, int, float]] = field(init=False, default_factory=deque)
    _scored: deque[tuple[str | None, NDArray[np.float32]]] = field(init=False, default_factory=deque)
    _requests: itertools.count[int] = field(init=False, default_factory=itertools.count)
    _process: str = field(init=False, default_factory=lambda: os.urandom(6).hex())

    def __post_init__(self) -> None:
        policy = self.settings.unknown_domain
        if policy not in ("base", "error", *self.live.known()):
            raise ConfigError(
                "unknown_domain must be 'base', 'error' or a domain", received=policy, next_step=self._near(policy)
            )
        self.refresh()

    def refresh(self) -> bool:
        """Look whether there is something new to serve; called by a thread."""
        self.tell()
        changed = self.live.refresh()
        if self.live.current is not self._served:
            self._served = self.live.current
            self.metrics.know(self.live.known())
            self.metrics.serves(self._served.version)
        if changed:
            self.metrics.swapped()
        if self.registry is not None and self.registry.changed():
            self._follow(self.registry)
        return changed

    @property
    def versions(self) -> list[str]:
        """Those in memory, the live one first."""
        live = self.live.current.version
        return [live, *(version for version in map(str, sorted(self._held)) if version != live)]

    def close(self) -> None:
        """Write what is not written yet."""
        self.tell()
        if self.log is not None:
            self.log.close()

    def request_id(self, request: Request) -> str:
        """The one that the client or a proxy gave, or a new one."""
        given = request.headers.get(b"x-request-id")
        if given is not None and _PRINTABLE.fullmatch(given):
            return given.decode()
        return f"{self._process}{next(self._requests):x}"

    def route(self, domain: str | None, unit: str | None, num_rows: int = 1, version: int | None = None) -> Route:
        """Which version and whose adapter answer.

        Args:
            domain: a name; empty or None for no domain, which the policy for unknown ones is for too.
            unit: who is assigned to arms of experiments; None to be in none.
            num_rows: of this domain, to be counted if it is unknown.
            version: to answer with, whatever experiments say.

        Raises:
            UnknownDomainError: there is no such domain, and the policy is ``error``.
        """
        if self._assigner is None or unit is None or version is not None:
            return Route(version, self._name_of(domain, version, num_rows), ())
        assignments = self._assigner.assign(unit, domain or None, time.time())
        chosen = choice(assignments)
        name = self._name_of(domain, chosen.version, num_rows)
        return Route(chosen.version, name if chosen.adapters else None, assignments)

    def snapshot(self, domain: str | None, version: int | None) -> Snapshot:
        """What answers for a domain, its adapter in memory.

        Raises:
            UnavailableError: the adapter or the version cannot be read.
        """
        try:
            if domain is not None:
                return self.live.ensure(domain, version)
            return self.live.current if version is None else self.live.of(version)
        except BundleError as error:
            raise UnavailableError(_UNREADABLE, next_step="Try again later") from error

    def snapshot_of_all(self, domains: Collection[str], version: int | None) -> Snapshot:
        """One that answers for all these domains; see :meth:`snapshot`."""
        try:
            return self.live.ensure_all(domains, version)
        except BundleError as error:
            raise UnavailableError(_UNREADABLE, next_step="Try again later") from error

    def check_rows(self, num_rows: int) -> None:
        """Raises DataError for none, or for more than are allowed."""
        check_rows(num_rows, self.settings.max_rows)

    def check_ids(self, snapshot: Snapshot, ids: NDArray[np.int64]) -> None:
        """Count values that no row of training had, or refuse them, as the settings say."""
        unknown = ids == OOV_ID
        if not np.count_nonzero(unknown):  # costs a fifth of unknown.any()
            return
        counts = unknown.sum(axis=0).tolist()
        slots = [feature.name for feature in snapshot.program.schema.slots]
        for name, count in zip(slots, counts, strict=True):
            if count and self.settings.unknown_ids == "error":
                raise DataError(
                    f"feature {name!r} must have values that training had",
                    received=f"{count} others",
                    next_step="Leave those rows out, or serve with --unknown-ids count",
                )
            if count:
                self.metrics.unknown_ids(name, count)

    def count(self, domain: str | None, probability: NDArray[np.float32]) -> None:
        """Rows scored, to be told to the metrics later; see :meth:`tell`."""
        self._scored.append((domain, probability))

    def answered(self, route: str, answer: Answer, seconds: float) -> None:
        """An answer, likewise."""
        self._answers.append((route, answer.status, answer.domain, answer.rows, seconds))
        if len(self._answers) >= _MANY:
            self.tell()

    def tell(self) -> None:
        """Tell the metrics what was counted: many at once cost a fraction of what each costs between two scorings."""
        answers = []
        with suppress(IndexError):  # two threads may be here
            while True:
                answers.append(self._answers.popleft())
        self.metrics.answered_all(answers)
        scored = []
        with suppress(IndexError):
            while True:
                scored.append(self._scored.popleft())
        for domain, (total, number) in _totals(scored).items():
            self.metrics.scored(domain, total, number)
        if self.rows is not None:
            self.metrics.looked_up(self.rows.take_counts())

    def headers(self, bundle: str, adapter: str | None, domain: str | None) -> tuple[Header, ...]:
        """What an answer's headers say of the model; no adapter and no domain where rows have several."""
        key = (bundle, adapter, domain)
        said = self._said.get(key)
        if said is None:
            if len(self._said) >= _MOST_KEPT:
                self._said.clear()
            said = self._said[key] = _headers(bundle, adapter, domain)
        return said

    def _name_of(self, domain: str | None, version: int | None, num_rows: int) -> str | None:
        """Whose adapter is for this domain."""
        if domain and domain in self.live.known(version):
            return domain
        policy = self.settings.unknown_domain
        if policy == "error":
            raise UnknownDomainError(
                "a request must name a domain that has an adapter",
                received=domain[:100] if domain else domain,
                next_step=self._near(domain or ""),
            )
        if domain:
            self.metrics.unknown_domain(num_rows)
        return policy if policy != "base" and policy in self.live.known(version) else None

    def _near(self, domain: str) -> str:
        return nearest(domain[:100], islice(self.live.known(), 200))  # a guess among thousands takes very long

    def _follow(self, registry: Registry) -> None:
        """Take over the experiments, but for those of a version that cannot be read."""
        running = [experiment for experiment in registry.all() if experiment.status == "running"]
        wanted = {each.name: {arm.version for arm in each.arms if arm.version is not None} for each in running}
        failed = {version for version in set().union(*wanted.values()) if not self._has(version)}
        for name, versions in wanted.items():
            if versions & failed:
                _LOG.error("experiment left out", extra={"fields": {"experiment": name, "versions": sorted(failed)}})
        self._held = frozenset(set().union(*wanted.values()) - failed)
        self._assigner = Assigner([each for each in running if not wanted[each.name] & failed])
        self.live.hold(self._held)  # last: a request that is still led to a version must not have to open it again

    def _has(self, version: int) -> bool:
        try:
            self.live.of(version)
        except BundleError:
            return False
        return True


def check_rows(num_rows: int, max_rows: int) -> None:
    """Raises DataError for none, or for more than are allowed."""
    if not 0 < num_rows <= max_rows:
        raise DataError(
            f"a request must have 1 to {max_rows} rows",
            received=num_rows,
            next_step="Send several requests" if num_rows else "Send a row",
        )


def _totals(scored: Sequence[tuple[str | None, NDArray[np.float32]]]) -> dict[str | None, tuple[float, int]]:
    """Each domain's sum and number, by one sum over all of them."""
    if not scored:
        return {}
    sizes = [len(part) for _, part in scored]
    whole = np.concatenate([part for _, part in scored])
    sums = np.add.reduceat(whole, np.cumsum([0, *sizes[:-1]]), dtype=np.float64).tolist()
    found: dict[str | None, tuple[float, int]] = {}
    for (domain, _), total, size in zip(scored, sums, sizes, strict=True):
        before, number = found.get(domain, (0.0, 0))
        found[domain] = (before + total, number + size)
    return found


def _headers(bundle: str, adapter: str | None, domain: str | None) -> tuple[Header, ...]:
    said = {"bundle": bundle, "adapter": adapter, "domain": domain}
    return tuple((f"x-domlora-{what}".encode(), quote(value).encode()) for what, value in said.items() if value)


def _row_store(settings: Settings) -> RowStore | None:
    if settings.rows is None:
        return None
    from domlora.serving.rows.store import RowStore

    return RowStore(
        settings.rows,
        timeout_s=settings.rows_timeout_s,
        cache_bytes=settings.rows_cache_bytes,
        missing=settings.rows_missing,
    )


def _mirrored(settings: Settings, metrics: Metrics) -> Opened:
    """The copy of a shared store."""
    from domlora.serving.shared.mirror import Mirror
    from domlora.serving.shared.place import Place
    from domlora.serving.source import Opened
    from domlora.serving.store import Store

    place = Place(str(settings.store_url))
    store = Store.create(settings.bundle.absolute())
    mirror = Mirror(place, store, settings.look_s, metrics.looked)
    mirror.first()
    return Opened(store, mirror)


def make(settings: Settings, metrics: Metrics) -> Served:
    """What a worker runs: the application of what the settings say is served.

    Raises:
        BundleError: it is damaged.
        ConfigError: a setting that does not fit it.
    """
    from domlora.abtest.registry import Registry
    from domlora.serving.http.app import make_app
    from domlora.serving.http.feedback import open_log
    from domlora.serving.http.worker import Served
    from domlora.serving.live import Live
    from domlora.serving.source import open_store

    store, follower = _mirrored(settings, metrics) if settings.store_url else open_store(settings.bundle)
    rows = _row_store(settings)
    live = Live.open(store, name=settings.model_name, max_adapters=settings.max_adapters, follower=follower, rows=rows)
    registry = Registry.open(store.folder / "experiments")
    service = Service(live, settings, metrics, registry, open_log(store.folder / "log", settings, metrics), rows)
    app = make_app(service)
    return Served(app, service.refresh, app.close, app.score)
