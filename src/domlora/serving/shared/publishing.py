"""From a store's folder to a shared store, and back to a publisher's: no change of anybody else's is lost. Needs no torch.

A publisher's store remembers in ``shared.json`` what the shared store was when they last met. It publishes only while
that is still so; otherwise what others changed since is pulled first, beside what it has changed itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domlora.errors import BundleError, ConfigError
from domlora.files import sha256_of
from domlora.serving.folder import MANIFEST, read_manifest
from domlora.serving.shared.fetch import bring_experiments, bring_state, bring_versions
from domlora.serving.shared.place import Place
from domlora.serving.shared.record import Record, Version
from domlora.serving.state import State
from domlora.serving.store import Store
from domlora.serving.writing import turn, write_whole

__all__ = ["COPY", "MET", "Published", "publish", "pull", "remember", "remembered"]

MET, COPY = "shared.json", ".copy"  # the latter marks a replica's folder, which has not all versions
_LOCK, _LONG_S, _AT_ONCE = "lock.shared", 600.0, 8
_GONE = object()


@dataclass(frozen=True, slots=True)
class Published:
    """What was published.

    Args:
        generation: that the shared store has now.
        files, size_bytes: that were sent.
    """

    generation: int
    files: int
    size_bytes: int


def publish(store: Store, place: Place, *, delta: bool = False, again: bool = False) -> Published:
    """Let a shared store hold what a store does: versions, adapters, experiments, and which of them answer.

    Files come first and the record of them last, so that a reader sees all of a change or nothing. Nothing to change is
    no new generation.

    Args:
        store: whose content is published.
        place: the shared store; an empty place becomes one.
        delta: also send what differs between the version that was live there and each new one, see
            :mod:`domlora.serving.delta`. Needs ``onnx``.
        again: send files that should be there already, since one of them was found damaged.

    Raises:
        BundleError: the shared store has changed since it was last published or pulled, a file is damaged, a version has
            another content there, or the place cannot be reached. The shared store is as it was.
        ConfigError: the store is a server's copy.
    """
    _check_own(store)
    with turn(store.folder / _LOCK, _LONG_S), tempfile.TemporaryDirectory() as work:
        met, newest = remembered(store, place), place.newest()
        if newest.generation != met.generation:
            raise BundleError(
                "a shared store must be as this store last met it, and has changed since",
                received=f"generation {newest.generation}, known {met.generation}",
                next_step="Run domlora store pull STORE URL, then publish again",
            )
        ours = _record_of(store, met)
        same = ours == met
        deltas = {} if same or not delta else _deltas(store, met, ours, Path(work))
        ours = replace(ours, versions={**ours.versions, **{number: each for number, (each, _) in deltas.items()}})
        files = dict(_files(store, ours, deltas))
        known = set() if again else set(dict(_files(store, met, {}, missing=True)))
        sent = {digest: path for digest, path in files.items() if digest not in known}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda digest: place.put_file(digest, sent[digest]), sent))
        size = sum(path.stat().st_size for path in sent.values())
        if not same:
            ours = replace(ours, generation=met.generation + 1)
            place.put(ours)
            remember(store, place, ours)
        return Published(ours.generation, len(sent), size)


def pull(store: Store, place: Place) -> Record:
    """Bring into a publisher's store what others have changed, beside what it has changed itself.

    Raises:
        BundleError: both have changed the same thing; something is missing or damaged, or the place cannot be reached.
            The store's state is as it was.
        ConfigError: the store is a server's copy.
    """
    _check_own(store)
    with turn(store.folder / _LOCK, _LONG_S):
        met, theirs = remembered(store, place), place.newest()
        if theirs.generation != met.generation:
            merged = _merged(met, _record_of(store, met), theirs)
            bring_versions(place, store, theirs, [number for number in theirs.versions if number in merged.versions])
            bring_state(place, store, merged.state)
            bring_experiments(store, merged)
            for number in set(store.versions()) - set(merged.versions):
                store.drop_version(number)
            remember(store, place, theirs)
        return theirs


def remembered(store: Store, place: Place) -> Record:
    """What a shared store was when a store last met it; an empty record if it never did.

    Raises:
        BundleError: it has met another one, or its memory is damaged.
    """
    path = store.folder / MET
    if not path.is_file():
        return Record()
    try:
        raw = json.loads(path.read_bytes())
        url, text = raw["url"], raw["record"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"a store's {MET} must be whole", next_step="Remove it, and pull") from error
    if url != place.url:
        raise BundleError(
            "a store must stay with one shared store", received=place.url, next_step=f"This one's is {url}"
        )
    return Record.from_json(text.encode(), MET)


def remember(store: Store, place: Place, record: Record) -> None:
    """Note what a shared store is now.

    Raises:
        DataError: the disk is full.
    """
    content = json.dumps({"url": place.url, "record": record.to_json().decode()})
    write_whole(store.folder / MET, content.encode())


def _check_own(store: Store) -> None:
    if (store.folder / COPY).exists():
        raise ConfigError(
            "what is published must be a store of its own, and this is a server's copy",
            received=store.folder.name,
            next_step="Run domlora store pull NEW_FOLDER URL, and publish from there",
        )


def _record_of(store: Store, met: Record) -> Record:
    """A store's content as a record; versions keep their deltas."""
    versions = {}
    for number in store.versions():
        digest, before = sha256_of(store.version_folder(number) / MANIFEST), met.versions.get(number)
        if before is not None and before.manifest != digest:
            raise BundleError(
                "a version must not change, and the shared store has another one of this number", received=number
            )
        versions[number] = before or Version(digest)
    experiments = {
        path.stem: path.read_text(encoding="utf-8") for path in (store.folder / "experiments").glob("[!.]*.json")
    }
    return Record(met.generation, store.state(), versions, experiments)


def _files(
    store: Store, record: Record, deltas: Mapping[int, tuple[Version, Path]], *, missing: bool = False
) -> Iterator[tuple[str, Path]]:
    """All files of a record by their sha256; with ``missing``, those of versions that the store has no more are left out."""
    for number, version in record.versions.items():
        if missing and number not in store.versions():
            continue
        folder = store.version_folder(number)
        facts = store.facts(number) if missing else read_manifest(folder)
        yield version.manifest, folder / MANIFEST
        yield from ((digest, folder / name) for name, digest in facts["files"].items())
    for adapter in record.state.adapters.values():
        yield adapter.sha256, store.folder / adapter.file
    for version, folder in deltas.values():
        yield from ((digest, folder / name) for name, digest in version.delta.items())


def _deltas(store: Store, met: Record, ours: Record, work: Path) -> dict[int, tuple[Version, Path]]:
    """For each new version a delta from the one that is live in the shared store, where that is here too."""
    from domlora.serving.delta import write

    old = met.state.live
    if old is None or old not in store.versions():
        return {}
    found = {}
    for number in ours.versions.keys() - met.versions.keys():
        folder = work / str(number)
        write(store.version_folder(old), store.version_folder(number), folder)
        files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}
        found[number] = (Version(ours.versions[number].manifest, met.versions[old].manifest, files), folder)
    return found


def _merged(met: Record, ours: Record, theirs: Record) -> Record:
    """Both changes of a record, thing by thing."""
    before, our, their = _things(met), _things(ours), _things(theirs)
    merged: dict[tuple[str, Any], Any] = {}
    for thing in before.keys() | our.keys() | their.keys():
        was, we, they = (each.get(thing, _GONE) for each in (before, our, their))
        if we not in (was, they) and they != was:
            raise BundleError(
                "two publishers must not change the same thing, and this store and another have",
                received=" ".join(str(part) for part in thing if part),
                next_step="Take your change back in this store, then pull again",
            )
        value = they if we == was else we
        if value is not _GONE:
            merged[thing] = value
    record = _record(theirs.generation, merged)
    if record.state.live is not None and record.state.live not in record.versions:
        raise BundleError(
            "the live version must stay, and another publisher has dropped it", received=record.state.live
        )
    return record


def _things(record: Record) -> dict[tuple[str, Any], Any]:
    """All that two publishers can change each by themselves."""
    state = record.state
    return {
        ("live", ""): state.live,
        ("followed", ""): state.followed,
        **{("adapter", domain): adapter for domain, adapter in state.adapters.items()},
        **{("removed", domain): True for domain in state.removed},
        **{("origin", number): origin for number, origin in state.origins.items()},
        **{("version", number): version for number, version in record.versions.items()},
        **{("experiment", name): text for name, text in record.experiments.items()},
    }


def _record(generation: int, things: Mapping[tuple[str, Any], Any]) -> Record:
    of = {kind: {name: value for (each, name), value in things.items() if each == kind} for kind, _ in things}
    state = State(
        live=things[("live", "")],
        adapters=of.get("adapter", {}),
        removed=frozenset(of.get("removed", {})),
        followed=things[("followed", "")],
        origins=of.get("origin", {}),
    )
    return Record(generation, state, of.get("version", {}), of.get("experiment", {}))
