"""Rows from Redis or Valkey, with those used last kept in this process. Needs ``redis``, and no torch."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from domlora.errors import BundleError, ConfigError
from domlora.serving.rows.cache import Cache
from domlora.serving.rows.chain import NUMBER_BITS, Chain, Level
from domlora.serving.rows.keys import changed_rows, connect, prefix_of, told_of
from domlora.serving.rows.layout import RemoteTable, Rows

__all__ = ["Counts", "RowStore"]

_LOG = logging.getLogger("domlora.serving")
_PAUSE_S = 0.5  # a store that did not answer is left alone for so long: requests must not all wait for it
_RETRY_S = 5.0  # where rows lie is looked up so often at most
_IDLE_S = 3600.0  # where the rows of a table lie is forgotten when nobody has asked for so long
_AT_ONCE = 4096  # rows of one question: the store answers nobody else meanwhile
_NUMBER = (1 << NUMBER_BITS) - 1


_Asked = tuple[int, int, int]  # a row that is not in this process: its table, its place there and its code


class Counts(NamedTuple):
    """What happened since it was asked for last.

    Args:
        hits: rows that were in this process.
        fetched: rows that came from the store.
        missing: rows that could not be had.
        degraded: rows of requests that were answered with fallbacks.
        failures: times that the store did not answer.
        seconds: of each round trip.
    """

    hits: int
    fetched: int
    missing: int
    degraded: int
    failures: int
    seconds: Sequence[float]


class RowStore:
    """The store as one process sees it; versions and threads share it.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``.
        timeout_s: that one answer of the store may take.
        cache_bytes: of memory, for the rows used last.
        missing: ``degrade`` answers with the row of an out-of-vocabulary value in place of one that cannot be had; ``error``
            does not answer.

    Raises:
        ConfigError: no such address or policy, or the client library is not installed.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 0.05, cache_bytes: int = 256 << 20, missing: str = "degrade"
    ) -> None:
        if missing not in ("degrade", "error"):
            raise ConfigError("missing rows must 'degrade' answers or be an 'error'", received=missing)
        self._client, self.strict = connect(url, timeout_s), missing == "error"
        import redis  # here, since connect says what to install where it is not

        self._failure = (redis.RedisError, OSError)
        self._cache = Cache(cache_bytes)
        self._chains: dict[str, Chain] = {}
        self._read_at: dict[str, float] = {}
        self._used_at: dict[str, float] = {}
        self._pushes: list[bytes] = []  # prefixes of keys, by the number of a level
        self._lock, self._quiet_until = threading.Lock(), 0.0
        self._counts, self._seconds = Counter[str](), deque[float](maxlen=10_000)
        self._own = threading.local()

    def check(self, tables: Sequence[RemoteTable]) -> None:
        """Look whether all of these tables are there. A store that does not answer now is no reason to refuse.

        Raises:
            BundleError: one is not, or not whole.
        """
        for table in tables:
            try:
                self._chain(table)
            except self._failure as error:
                self._failed(error)

    def fetch(self, wanted: Sequence[tuple[RemoteTable, Rows]]) -> list[list[bytes | None]]:
        """The rows of each table, in one round trip for those that are not in this process."""
        found: list[list[bytes | None]] = []
        asked: list[_Asked] = []
        try:
            for number, (table, rows) in enumerate(wanted):
                codes = self._chain(table).codes(rows).tolist()
                found.append(self._cache.get(codes))
                if None in found[-1]:
                    asked += [(number, at, codes[at]) for at, row in enumerate(found[-1]) if row is None]
            if asked:
                self._fill(found, asked, [4 * table.width for table, _ in wanted])
        except self._failure as error:
            self._failed(error)
        except BundleError as error:  # the store did not answer when this version was opened, and does not have it
            _LOG.error("rows not in the store", extra={"fields": {"reason": str(error)}})
        found += [[None] * len(rows) for _, rows in wanted[len(found) :]]
        missing = [rows.count(None) for rows in found]
        self._count(sum(len(rows) for _, rows in wanted), len(asked), sum(missing))
        self._doubt(table.sha256 for (table, _), number in zip(wanted, missing, strict=True) if number)
        return found

    def degraded(self, num_rows: int) -> None:
        """Count rows of a request that were answered with fallbacks."""
        self._own.degraded = getattr(self._own, "degraded", 0) + num_rows
        with self._lock:
            self._counts["degraded"] += num_rows

    def take_degraded(self) -> int:
        """How many those were in this thread since this was asked last."""
        found: int = getattr(self._own, "degraded", 0)
        self._own.degraded = 0
        return found

    def take_counts(self) -> Counts:
        """What happened since this was asked last."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            seconds, self._seconds = [*self._seconds], deque(maxlen=10_000)
        told = {name: counts[name] for name in ("hits", "fetched", "missing", "degraded", "failures")}
        return Counts(**told, seconds=seconds)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _fill(self, found: list[list[bytes | None]], asked: list[_Asked], sizes: list[int]) -> None:
        """Ask the store, and put its answers where they belong."""
        for start in range(0, len(asked), _AT_ONCE):
            part, before = asked[start : start + _AT_ONCE], time.perf_counter()
            self._check_quiet()
            prefixes = self._pushes
            keys = [b"%b%d" % (prefixes[code >> NUMBER_BITS], code & _NUMBER) for _, _, code in part]
            answers = self._client.mget(keys)
            self._seconds.append(time.perf_counter() - before)
            fresh = []
            for (table, place, code), row in zip(part, answers, strict=True):
                if row is not None and len(row) == sizes[table]:
                    found[table][place] = row
                    fresh.append((code, row))
            self._cache.put(fresh)

    def _chain(self, table: RemoteTable) -> Chain:
        """Where the rows of a table lie; read once, and again where it was forgotten."""
        self._used_at[table.sha256] = time.monotonic()
        chain = self._chains.get(table.sha256)
        if chain is None:
            self._check_quiet()
            chain = self._chains[table.sha256] = Chain(list(self._levels(table)))
            self._read_at[table.sha256] = time.monotonic()
            self._forget()
        return chain

    def _forget(self) -> None:
        """Let go of tables of versions that nobody is answered with any more: each day's update brings new ones."""
        idle = time.monotonic() - _IDLE_S
        for sha256 in [each for each, used in self._used_at.copy().items() if used < idle]:
            for known in (self._used_at, self._read_at, self._chains):
                known.pop(sha256, None)

    def _levels(self, table: RemoteTable) -> Iterator[Level]:
        sha256: str | None = table.sha256
        while sha256 is not None:
            told = told_of(self._client, sha256)
            if told is None or not told.complete or told.width != table.width:
                raise BundleError(
                    f"rows of table {table.name!r} must be in the store, and are not all there",
                    received=sha256[:16],
                    next_step="Push them with: domlora store rows push EXPORT URL",
                )
            push = self._push(sha256)
            if told.after is None:
                yield Level(push)
            else:
                starts = np.array([[to, there - to] for there, to, _ in told.pieces], np.int64)
                yield Level(push, changed_rows(self._client, sha256), starts[:, 0], starts[:, 1])
            sha256 = told.after

    def _push(self, sha256: str) -> int:
        prefix = prefix_of(sha256)
        with self._lock:
            if prefix not in self._pushes:
                self._pushes.append(prefix)
            return self._pushes.index(prefix)

    def _doubt(self, tables: Iterable[str]) -> None:
        """Look anew where the rows of these tables lie: somebody may have pushed them again, and in another way."""
        for sha256 in tables:
            if time.monotonic() > self._read_at.get(sha256, 0.0) + _RETRY_S:
                self._chains.pop(sha256, None)

    def _check_quiet(self) -> None:
        if time.monotonic() < self._quiet_until:
            raise ConnectionError("the store did not answer a moment ago")

    def _failed(self, error: Exception) -> None:
        if time.monotonic() < self._quiet_until:
            return
        self._quiet_until = time.monotonic() + _PAUSE_S
        with self._lock:
            self._counts["failures"] += 1
        _LOG.error("rows not fetched", extra={"fields": {"reason": f"{type(error).__name__}: {error}"}})

    def _count(self, total: int, asked: int, missing: int) -> None:
        with self._lock:
            self._counts["hits"] += total - max(asked, missing)  # none was asked for where no key is known
            self._counts["fetched"] += max(asked - missing, 0)
            self._counts["missing"] += missing
