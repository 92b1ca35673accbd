"""A folder that a server serves: exported versions, pushed adapters, and which of them answer. Needs no torch.

versions/N/          exported folders as :mod:`domlora.serving.folder` describes them; never changed
adapters/            pushed adapters, one file each, see :mod:`domlora.serving.payload`; never changed
state.json           what is served, replaced whole; all processes look at it, and what it says survives them
lock, lock.versions  whose turn it is to write
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from domlora.abtest.registry import Registry
from domlora.errors import BundleError, ConfigError, DataError, UnknownDomainError, nearest
from domlora.files import new_folder, sha256_of, told
from domlora.serving.delta import apply, made_from
from domlora.serving.folder import MANIFEST, AdaptedLayer, read_facts, read_manifest
from domlora.serving.marks import mark_of
from domlora.serving.payload import Payload, read_payload
from domlora.serving.program import Program, checked_banks
from domlora.serving.state import STATE, Adapter, State, States, check_domain, check_label, file_of
from domlora.serving.writing import link_all, link_one, turn, write_whole

__all__ = ["Store"]

_WAIT_S, _LONG_S = 10.0, 600.0


class Store:
    """A store on disk. Processes and threads may use one folder at once; writers wait for each other.

    Whoever reads sees a change before or after, never half; a process that is killed leaves at most a file that nobody
    refers to, which the next writer removes.

    Args:
        folder: where it is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store.create(Path(folder) / "store")
        ...     store.state().live, store.versions()
        (None, [])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._facts: dict[int, tuple[object, dict[str, Any]]] = {}
        self.states = States()

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Make an empty one; one that is there is opened.

        Raises:
            DataError: the folder holds something else, or cannot be written.
        """
        if (folder / STATE).is_file():
            return cls.open(folder)
        if folder.exists() and any(each.name not in ("lock", "versions", "adapters") for each in folder.iterdir()):
            raise DataError("a store must be made in a new folder", received=str(folder))
        store = cls(folder)
        with told(folder):
            for inner in ("versions", "adapters"):
                (folder / inner).mkdir(parents=True, exist_ok=True)
        with store._writing():
            if not (folder / STATE).is_file():
                store._put(State())
        return store

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open one that is there.

        Raises:
            BundleError: no store, or its state is damaged.
        """
        store = cls(folder)
        store.state()
        return store

    def content(self) -> bytes:
        """The bytes of its state, for whoever waits for a change of it.

        Raises:
            BundleError: no store.
        """
        try:
            return (self.folder / STATE).read_bytes()
        except OSError as error:
            raise BundleError(
                f"a store must have a readable {STATE} ({error.strerror})",
                received=str(self.folder),
                next_step="Make one with: domlora store add STORE EXPORT",
            ) from error

    def state(self) -> State:
        """What is served now.

        Raises:
            BundleError: no store, or its state is damaged.
        """
        return self.states.read(self.content())

    def versions(self) -> list[int]:
        """Numbers of the exported versions, in order."""
        with suppress(FileNotFoundError):
            return sorted(int(each.name) for each in (self.folder / "versions").iterdir() if each.name.isdecimal())
        return []

    def version_folder(self, number: int) -> Path:
        """Where a version lies.

        Raises:
            BundleError: no such version.
        """
        folder = self.folder / "versions" / str(number)
        if number < 1 or not folder.is_dir():
            known = ", ".join(map(str, self.versions()))
            raise BundleError("the store has no such version", received=number, next_step=f"Known: {known or 'none'}")
        return folder

    def facts(self, number: int) -> dict[str, Any]:
        """The manifest of a version, read once; one that comes later under the same number has its own.

        Raises:
            BundleError: no such version, or its manifest is damaged.
        """
        folder = self.version_folder(number)
        mark, known = mark_of(folder / MANIFEST), self._facts.get(number)
        if known is None or known[0] != mark:
            self._facts[number] = known = mark, read_facts(folder)
        return known[1]

    def add_version(self, exported: Path, number: int | None = None) -> int:
        """Take in an exported folder, by hard links where the disk allows it; the first one becomes the live one.

        Every file is checked and the graphs are opened before the version is there. The same one again is no change.

        Args:
            exported: the folder. It may be removed or replaced afterwards, but not written into.
            number: of the version; the one that it has in the bundle without.

        Raises:
            BundleError: it is damaged, or the store has another version of that number.
        """
        facts = read_facts(exported)
        with self._writing("lock.versions", _LONG_S):
            wanted = (
                number or self._number_of(exported) or facts["bundle_version"] or max(self.versions(), default=0) + 1
            )
            place = self.folder / "versions" / str(wanted)
            if place.is_dir():
                self._check_same(place, exported, wanted)
            else:
                with told(place), new_folder(place, marker=MANIFEST) as fresh:
                    link_all(exported, fresh)
                    Program.open(fresh)
        with self._writing():
            state = self.state()
            if state.live is None:
                self._put(replace(state, live=wanted))
        return wanted

    def add_delta(self, folder: Path, number: int | None = None) -> int:
        """Make a version from one that is there and a delta, see :func:`domlora.serving.delta.write`.

        Raises:
            BundleError: it is damaged, or the store has not the version that it was made from.
        """
        wanted = made_from(folder)
        for old in self.versions():
            if sha256_of(self.version_folder(old) / MANIFEST) == wanted:
                break
        else:
            raise BundleError("a delta must be of a version in the store, and it has no version like that")
        with told(self.folder), tempfile.TemporaryDirectory(prefix=".delta.", dir=self.folder) as place:
            apply(self.version_folder(old), folder, Path(place) / "export")
            return self.add_version(Path(place) / "export", number)

    def drop_version(self, number: int) -> None:
        """Remove a version that is not live. Processes that have it in memory keep it until they let it go.

        Raises:
            BundleError: no such version.
            ConfigError: it is the live one, or a running experiment answers with it.
        """
        with self._writing():
            state = self.state()
            if number == state.live:
                raise ConfigError("the live version must stay", received=number, next_step="Make another live first")
            if names := Registry.open(self.folder / "experiments").answering_with(number):
                stop = f"Stop it first: domlora ab stop {self.folder} {names[0]}"
                raise ConfigError("a running experiment's version must stay", received=number, next_step=stop)
            place = self.version_folder(number)
            gone = place.with_name(f".{number}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            place.rename(gone)
            if str(number) in state.origins:
                self._put(replace(state, origins={n: mark for n, mark in state.origins.items() if n != str(number)}))
        shutil.rmtree(gone, ignore_errors=True)

    def set_live(self, number: int, *, followed: str | None = None) -> None:
        """Let a version answer from now on, after every file of it was checked.

        Args:
            number: of the version.
            followed: the mark of the bundle's version that it is, see :class:`domlora.serving.state.State`.

        Raises:
            BundleError: no such version, or a damaged one; what was live stays so.
        """
        read_manifest(self.version_folder(number))
        with self._writing():
            state = self.state()
            if followed is not None:
                state = replace(state, followed=followed, origins={**state.origins, str(number): followed})
            self._put(replace(state, live=number))

    def replace_state(self, state: State, files: Mapping[str, Path]) -> None:
        """Serve what another store does, after every file that is new to this one was checked.

        Args:
            state: of the other one.
            files: by the name that the state gives them, those of its adapters that are not here yet.

        Raises:
            BundleError: no such version, or a damaged file; what was served stays.
        """
        if state.live not in (None, self.state().live):
            read_manifest(self.version_folder(state.live))
        digests = {adapter.file: adapter.sha256 for adapter in state.adapters.values()}
        with self._writing():
            for name, path in files.items():
                if sha256_of(path) != digests[name]:
                    raise BundleError("an adapter's file is damaged: its sha256 is another", received=name)
                link_one(path, self.folder / name)
            if state != self.state():
                self._put(state)
            self._sweep()

    def put_adapter(
        self, domain: str, content: bytes, version: str | None = None, pinned: bool = False, *, max_rank: int = 256
    ) -> Adapter:
        """Serve an adapter for a domain, known or new. It is on disk when this returns; the same one again is no change.

        Args:
            domain: its name, the one that the file holds.
            content: what :func:`domlora.serving.pack.adapter_payload` gives.
            version: what to call it; what the file says without.
            pinned: keep it in memory.
            max_rank: larger ones are refused.

        Raises:
            BundleError: it is damaged, of another base than the live version's, or does not fit it.
            DataError: a name that cannot be one, or the disk is full.
            ConfigError: the live version takes no adapters, or none for this domain.
        """
        check_domain(domain)
        payload = read_payload(content)
        label = payload.version if version is None else version
        check_label(label)
        with self._writing():
            state = self.state()
            rank = self._fit(state, domain, payload, max_rank)
            digest = hashlib.sha256(content).hexdigest()
            adapter = Adapter(
                domain=domain,
                version=label,
                pinned=pinned,
                sha256=digest,
                size_bytes=len(content),
                base=payload.base,
                since=max(self.versions()),
                rank=rank,
                file=file_of(domain, label, digest),
            )
            self._take_in(state, adapter, content)
        return adapter

    def drop_adapter(self, domain: str) -> None:
        """Stop serving a domain, and remove its pushed adapter if it has one.

        A domain of an exported version stays away in later versions too, until it is pushed or loaded again.

        Raises:
            UnknownDomainError: no such domain.
        """
        with self._writing():
            state = self.state()
            self._check_known(state, domain)
            adapters = {name: each for name, each in state.adapters.items() if name != domain}
            exported = any(domain in self.facts(number)["domains"] for number in self.versions())
            removed = state.removed | {domain} if exported else state.removed - {domain}
            self._put(replace(state, adapters=adapters, removed=removed))
            self._sweep()

    def unload(self, domain: str) -> None:
        """Stop serving a domain; its adapter stays in the store.

        Raises:
            UnknownDomainError: no such domain.
        """
        with self._writing():
            state = self.state()
            self._check_known(state, domain)
            self._put(replace(state, removed=state.removed | {domain}))

    def load(self, domain: str) -> None:
        """Serve a domain again that was unloaded, or dropped and is in the live version.

        Raises:
            UnknownDomainError: the store has no adapter for it.
        """
        with self._writing():
            state = self.state()
            known = {*state.adapters, *self._live_facts(state)["domains"]}
            if domain not in known:
                raise UnknownDomainError(
                    "the store has no adapter for this domain", received=domain, next_step=nearest(domain, known)
                )
            self._put(replace(state, removed=state.removed - {domain}))

    def _fit(self, state: State, domain: str, payload: Payload, max_rank: int) -> int:
        """The largest rank of a payload, after it was found to fit the live version."""
        facts = self._live_facts(state)
        layers = tuple(AdaptedLayer(**layer) for layer in facts["layers"])
        if payload.domain != domain:
            raise BundleError(
                f"the adapter must be of domain {domain!r}, and is another one's", received=payload.domain
            )
        if not layers or (facts["reads_domain"] and domain not in facts["domains"]):
            what = "one for a new domain" if layers else "any adapter"
            raise ConfigError(f"the live version's network cannot take {what}", received=domain)
        if payload.base != facts["base"]:
            raise BundleError(
                "an adapter must stand beside the base that it was trained on, and this one belongs to another base",
                received=payload.base[:12],
                next_step=f"The live version's base is {facts['base'][:12]}",
            )
        checked_banks(layers, payload.banks)
        rank = max(int(payload.banks[f"{layer.name}.lora_A"].shape[1]) for layer in layers)
        if rank > max_rank:
            raise BundleError(f"an adapter's rank must be at most {max_rank}", received=rank)
        return rank

    def _take_in(self, state: State, adapter: Adapter, content: bytes) -> None:
        before = state.adapters.get(adapter.domain)
        if before is not None and before.version == adapter.version and before.sha256 != adapter.sha256:
            rule = "a version of an adapter must not change, and another one of this domain is called so"
            raise BundleError(rule, received=adapter.version, next_step="Push it with another version")
        if before == adapter and adapter.domain not in state.removed:
            return
        if before is None or before.file != adapter.file or not (self.folder / adapter.file).is_file():
            write_whole(self.folder / adapter.file, content)
        adapters = {**state.adapters, adapter.domain: adapter}
        self._put(replace(state, adapters=adapters, removed=state.removed - {adapter.domain}))
        self._sweep()

    def _live_facts(self, state: State) -> dict[str, Any]:
        if state.live is None:
            raise BundleError("the store has no version yet", next_step="Add one with: domlora store add STORE EXPORT")
        return self.facts(state.live)

    def _check_known(self, state: State, domain: str) -> None:
        known = {*state.adapters, *self._live_facts(state)["domains"]} - state.removed
        if domain not in known:
            raise UnknownDomainError("no such domain is served", received=domain, next_step=nearest(domain, known))

    def _number_of(self, exported: Path) -> int | None:
        """The number of a version that is this one."""
        digest = sha256_of(exported / MANIFEST)
        same = (n for n in self.versions() if sha256_of(self.folder / "versions" / str(n) / MANIFEST) == digest)
        return next(same, None)

    def _check_same(self, place: Path, exported: Path, number: int) -> None:
        if sha256_of(place / MANIFEST) != sha256_of(exported / MANIFEST):
            rule = "a version in a store must not change, and the store has another one of this number"
            raise BundleError(rule, received=number, next_step="Give it another number")

    def _sweep(self) -> None:
        """Remove files of adapters that nobody refers to any more. A process that still reads one keeps it open."""
        wanted = {adapter.file.rpartition("/")[2] for adapter in self.state().adapters.values()}
        for name in set(os.listdir(self.folder / "adapters")) - wanted:
            with suppress(OSError):
                (self.folder / "adapters" / name).unlink()

    def _put(self, state: State) -> None:
        write_whole(self.folder / STATE, self.states.written(state))

    def _writing(self, name: str = "lock", wait_s: float = _WAIT_S) -> AbstractContextManager[None]:
        return turn(self.folder / name, wait_s)
