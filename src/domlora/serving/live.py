"""What a process answers with at the moment, and how that changes while it answers. Needs no torch."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from domlora.errors import BundleError, UnknownDomainError, nearest
from domlora.features.encode import Encoder
from domlora.files import sha256_of
from domlora.serving.folder import adapter_file, read_facts
from domlora.serving.payload import read_payload
from domlora.serving.program import Program
from domlora.serving.rows.layout import Source as RowSource
from domlora.serving.snapshot import Snapshot
from domlora.serving.source import Follows
from domlora.serving.state import State
from domlora.serving.store import Store

__all__ = ["Live", "Source"]

_LOG = logging.getLogger("domlora.serving")
_RETRY_S = 5.0  # a version that cannot be opened is tried again so much later: its files are read whole


class Source(NamedTuple):
    """Where a domain's adapter is read from.

    Args:
        version: what it is called: of an exported one the number of its version.
        sha256, file: of it.
        pushed: whether it came alone.
        pinned: whether it stays in memory.
    """

    version: str
    sha256: str
    file: Path
    pushed: bool = False
    pinned: bool = False


class _Now(NamedTuple):
    """What a version answers with; replaced by reference, so that a reader has both or neither."""

    snapshot: Snapshot
    resident: Mapping[str, Source]


class _Version:
    """A version in memory."""

    def __init__(
        self,
        store: Store,
        number: int,
        name: str,
        threads: int,
        others: Iterable[_Version] = (),
        rows: RowSource | None = None,
    ) -> None:
        folder = store.version_folder(number)
        self.facts = facts = read_facts(folder)
        self.number, self.name, self.base = number, name, facts["base"]
        self.lazy = bool(facts["layers"]) and not facts["reads_domain"]
        self.adapted = bool(facts["layers"])
        self.own = {
            domain: Source(str(number), facts["files"].get(adapter_file(place), ""), folder / adapter_file(place))
            for place, domain in enumerate(facts["domains"])
        }
        program = Program.open(folder, threads=threads, domains=(), rows=rows)
        self.words = tuple(facts["files"][name] for name in ("schema.json", "vocabularies.json"))
        same = (each.encoder for each in others if each.words == self.words)
        self.encoder: Encoder = next(same, None) or Encoder.open(folder)
        self.sources: dict[str, Source] = {}
        self.used: dict[str, int] = {}
        self.now: _Now
        self.show(program, {} if self.lazy else self.own)
        _warm_up(program)

    def sources_of(self, state: State, store: Store) -> dict[str, Source]:
        """All domains there are, each with its adapter."""
        found = {domain: source for domain, source in self.own.items() if domain not in state.removed}
        for domain, each in state.adapters.items():
            newer = domain in self.own and self.number > each.since
            if each.base == self.base and not newer and domain not in state.removed:
                told = (each.version, each.sha256, True, each.pinned)
                known = self.sources.get(domain)
                if known is None or (known.version, known.sha256, known.pushed, known.pinned) != told:
                    known = Source(each.version, each.sha256, store.folder / each.file, pushed=True, pinned=each.pinned)
                found[domain] = known
        return found

    def show(self, program: Program, resident: Mapping[str, Source]) -> None:
        adapters = {domain: source.version for domain, source in resident.items()} if self.adapted else {}
        snapshot = Snapshot(
            program=program, encoder=self.encoder, name=self.name, version=str(self.number), adapters=adapters
        )
        self.now = _Now(snapshot, resident)


class Live:
    """The version that answers and its adapters, in this process.

    ``current`` is replaced by reference, so that a request which took it has one model from its first row to its last.
    Adapters are read when they are first asked for; where there are more than ``max_adapters``, the one unused for longest
    goes, pinned ones never. What a single request needs is in memory together, if it is more than that.

    Args:
        store: what is served.
        name: of the model.
        max_adapters: how many are in memory.
        threads: of one call of a program.
        follower: brings newer versions of a bundle or a shared store into this one; looked after by :meth:`refresh`.
        rows: where rows of tables come from that versions do not hold.

    Raises:
        BundleError: the store has no version, or a file of the live one or of a pushed adapter is damaged.
    """

    current: Snapshot

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        max_adapters: int = 1_000,
        threads: int = 1,
        follower: Follows | None = None,
        rows: RowSource | None = None,
    ) -> None:
        self.store, self.loads, self._rows = store, 0, rows
        self._name, self._max_adapters, self._threads, self._follower = name, max_adapters, threads, follower
        self._changing, self._refreshing = threading.RLock(), threading.RLock()
        self._tick = itertools.count()
        self._held: set[int] = set()
        self._versions: dict[int, _Version] = {}
        self._seen, self._retry_at = store.content(), 0.0
        self._state = store.states.read(self._seen)
        if self._state.live is None:
            raise BundleError("the store has no version yet", next_step="Add one with: domlora store add STORE EXPORT")
        self._live = self._opened(self._state.live, self._state, ())
        _check_pushed(self._live.sources)
        self._versions[self._live.number] = self._live
        self.current = self._live.now.snapshot

    @classmethod
    def open(cls, store: Store, **options: Any) -> Self:
        """As the class; for whoever reads it beside ``Store.open``."""
        return cls(store, **options)

    def of(self, version: int | None = None) -> Snapshot:
        """What a version answers with; None for the live one. One that is not in memory is opened, which takes a while.

        Raises:
            BundleError: no such version, or a damaged one.
        """
        return self._version(version).now.snapshot

    def known(self, version: int | None = None) -> Mapping[str, Source]:
        """All domains of a version, in memory or not."""
        return self._version(version).sources

    def resident(self, version: int | None = None) -> Collection[str]:
        """The domains whose adapters are in memory."""
        return self._version(version).now.resident.keys()

    def ensure(self, domain: str, version: int | None = None) -> Snapshot:
        """A snapshot that holds this domain's adapter.

        Raises:
            UnknownDomainError: no such domain.
            BundleError: its file is damaged or cannot be read.
        """
        one = self._live if version is None else self._version(version)
        now = one.now
        if domain in now.resident:
            one.used[domain] = next(self._tick)
            return now.snapshot
        return self._bring(one, (domain,))

    def ensure_all(self, domains: Iterable[str], version: int | None = None) -> Snapshot:
        """One snapshot that holds the adapters of all these domains.

        Raises:
            UnknownDomainError: no such domain.
            BundleError: a file is damaged or cannot be read.
        """
        one, wanted = self._live if version is None else self._version(version), tuple(dict.fromkeys(domains))
        now = one.now
        if all(domain in now.resident for domain in wanted):
            one.used.update((domain, next(self._tick)) for domain in wanted)
            return now.snapshot
        return self._bring(one, wanted)

    def hold(self, versions: Collection[int]) -> None:
        """Keep these versions in memory beside the live one, and no others: experiments answer with them.

        Opening one takes as long as reading its files; call it from a thread that answers nobody.

        Raises:
            BundleError: no such version, or a damaged one; the others are held nevertheless.
        """
        self._held = set(versions)
        try:
            for number in sorted(self._held):
                self._forget_replaced(number)
                self._version(number)
        finally:
            with self._changing:
                self._forget()

    def refresh(self) -> bool:
        """Look whether there is something new to serve, and serve it; whether there was.

        Raises:
            BundleError: what is new cannot be read; what was served stays.
        """
        with self._refreshing:
            content = self.store.content()
            changed = content != self._seen
            if changed:
                before = self._state.live
                self._take_over(self.store.states.read(content))
                self._seen = content
                self._retry_at = self._retry_at if self._state.live == before else 0.0
            if self._state.live not in (None, self._live.number) and time.monotonic() >= self._retry_at:
                self._go_live(self._state)
            if self._follower is not None:
                self._follower.step()
            return changed

    def _take_over(self, state: State) -> None:
        with self._changing:
            self._state = state
            for one in self._versions.values():
                self._renew(one, state)
            self.current = self._live.now.snapshot

    def _go_live(self, state: State) -> None:
        number = state.live or self._live.number
        self._retry_at = time.monotonic() + _RETRY_S
        self._forget_replaced(number)
        fresh = self._versions.get(number) or self._opened(number, state, self._live.now.resident)
        with self._changing:
            self._versions[number] = self._live = fresh
            self.current = fresh.now.snapshot
            self._forget()

    def _version(self, number: int | None) -> _Version:
        if number is None or number == self._live.number:
            return self._live
        one = self._versions.get(number)
        if one is None:
            with self._refreshing:
                one = self._versions.get(number) or self._opened(number, self._state, self._live.now.resident)
                with self._changing:
                    self._renew(one, self._state)
                    self._versions[number] = one
        return one

    def _opened(self, number: int, state: State, warm: Collection[str]) -> _Version:
        """A version as it answers first: with pinned adapters, and with those that are in memory of the one before."""
        one = _Version(self.store, number, self._name, self._threads, list(self._versions.values()), self._rows)
        one.sources = one.sources_of(state, self.store)
        pinned = [domain for domain, source in one.sources.items() if source.pinned]
        self._change(one, dict.fromkeys([*pinned, *(domain for domain in warm if domain in one.sources)]))
        if not one.lazy:
            self._change(one, [domain for domain, source in one.sources.items() if source.pushed])
        return one

    def _renew(self, one: _Version, state: State) -> None:
        """Let a version have the state's adapters: new ones, other ones, and without those that are gone."""
        before, one.sources = one.sources, one.sources_of(state, self.store)
        resident = one.now.resident
        room = self._max_adapters - len(resident)
        gone = [domain for domain in resident if domain not in one.sources]
        other = [domain for domain in resident if one.sources.get(domain, resident[domain]) != resident[domain]]
        fresh = [d for d, source in one.sources.items() if source.pushed and d not in resident and d not in before]
        pinned = [d for d, source in one.sources.items() if source.pinned and d not in resident]
        if gone or other or fresh or pinned or not one.lazy:
            self._change(one, dict.fromkeys([*other, *pinned, *fresh[: max(room, 0)]]), gone)

    def _bring(self, one: _Version, wanted: Collection[str]) -> Snapshot:
        """Read what is missing. One thread at a time, so that nothing is read twice."""
        with self._changing:
            for last in (False, True):
                missing = [domain for domain in wanted if domain not in one.now.resident]
                for domain in missing:
                    if domain not in one.sources:
                        raise UnknownDomainError(
                            "no adapter for this domain",
                            received=domain,
                            next_step=nearest(domain, [*one.sources][:200]),
                        )
                failures = self._change(one, missing, wanted=wanted)
                one.used.update((domain, next(self._tick)) for domain in wanted)
                if not failures:
                    return one.now.snapshot
                if last:
                    raise failures[0]
                one.sources = one.sources_of(self.store.state(), self.store)  # replaced meanwhile: where is it now
        raise AssertionError

    def _change(
        self, one: _Version, new: Iterable[str], gone: Iterable[str] = (), *, wanted: Collection[str] = ()
    ) -> list[BundleError]:
        """One step from a snapshot to the next; what could not be read stays as it was, and is told."""
        program, resident = one.now.snapshot.program, dict(one.now.resident)
        failures = []
        for domain in gone:
            del resident[domain]
            program = program.without(domain) if one.lazy else program
        for domain in new:
            source = one.sources[domain]
            try:
                program = program.with_adapter(domain, _read(source)) if one.adapted else program
            except BundleError as error:
                failures.append(error)
                _LOG.error("adapter not loaded", extra={"fields": {"domain": domain, "reason": str(error)}})
            else:
                self.loads += 1
                resident[domain] = source
                one.used[domain] = next(self._tick)
        for domain in self._idle(one, resident, wanted):
            del resident[domain]
            program = program.without(domain)
        one.show(program, resident)
        if one is getattr(self, "_live", None):
            self.current = one.now.snapshot
        return failures

    def _idle(self, one: _Version, resident: Mapping[str, Source], wanted: Collection[str]) -> list[str]:
        """Those that make room: unused for longest first, no pinned ones and none that this request needs."""
        excess = len(resident) - self._max_adapters
        if excess <= 0 or not one.lazy:
            return []
        idle = [domain for domain, source in resident.items() if not source.pinned and domain not in wanted]
        return sorted(idle, key=lambda domain: one.used.get(domain, -1))[:excess]

    def _forget_replaced(self, number: int) -> None:
        """Let go of a version that was dropped from the store, and in whose place there is another one now."""
        one = self._versions.get(number)
        with suppress(BundleError):  # one that was only dropped answers until it is let go
            if one is not None and one is not self._live and self.store.facts(number) != one.facts:
                with self._changing:
                    del self._versions[number]

    def _forget(self) -> None:
        self._versions = {
            number: one for number, one in self._versions.items() if number in self._held or one is self._live
        }


def _read(source: Source) -> dict[str, NDArray[Any]]:
    """An adapter from its file, its sha256 checked."""
    try:
        content = source.file.read_bytes()
        if hashlib.sha256(content).hexdigest() != source.sha256:
            raise BundleError("an adapter's file is damaged: its sha256 is another", received=source.file.name)
        return dict(read_payload(content).banks) if source.pushed else load(content)
    except (OSError, SafetensorError) as error:
        raise BundleError("an adapter's file must be readable", received=source.file.name) from error


def _check_pushed(sources: Mapping[str, Source]) -> None:
    """Look at all pushed files before the first request does."""
    for source in sources.values():
        if source.pushed and not (source.file.is_file() and sha256_of(source.file) == source.sha256):
            raise BundleError(
                "an adapter's file is missing or damaged: its sha256 is another",
                received=source.file.name,
                next_step="Push it again, or remove it from the store",
            )


def _warm_up(program: Program) -> None:
    """One row of nothing: the first call of a session takes longer than all others."""
    schema = program.schema
    program(np.zeros((1, schema.num_slots), np.int64), np.zeros((1, schema.num_dense), np.float32), np.full(1, -1))
