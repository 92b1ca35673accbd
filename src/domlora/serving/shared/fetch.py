"""From a shared store to a store's folder. Needs no torch.

What is fetched lies in ``.fetched`` under its sha256 until a version is complete, so that who was interrupted goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from domlora.files import sha256_of, told
from domlora.serving.folder import MANIFEST, read_facts
from domlora.serving.shared.place import Place
from domlora.serving.shared.record import Record, Version
from domlora.serving.state import State
from domlora.serving.store import Store
from domlora.serving.writing import link_one, write_whole

__all__ = ["bring_experiments", "bring_state", "bring_versions"]

_FETCHED = ".fetched"
_AT_ONCE = 8


def bring_versions(place: Place, store: Store, record: Record, wanted: Iterable[int]) -> None:
    """Have these versions in the store; what it has already, or can be made with a delta from what it has, is not fetched.

    Raises:
        BundleError: something is missing or damaged, the store has another version of that number, or the place cannot be
            reached.
        DataError: the disk is full.
    """
    for number in sorted(wanted):
        version = record.versions[number]
        if number in store.versions() and _manifest_of(store, number) == version.manifest:
            continue
        _bring_version(place, store, number, version)


def bring_state(place: Place, store: Store, state: State) -> None:
    """Let the store serve what a state says, once its adapters are there.

    Raises:
        BundleError: an adapter is missing or damaged, or the place cannot be reached.
        DataError: the disk is full.
    """
    new = {
        adapter.file: adapter.sha256
        for adapter in state.adapters.values()
        if not (store.folder / adapter.file).is_file() or sha256_of(store.folder / adapter.file) != adapter.sha256
    }
    found = _fetched(place, store, new.values())
    store.replace_state(state, {file: found[digest] for file, digest in new.items()})
    shutil.rmtree(store.folder / _FETCHED, ignore_errors=True)


def bring_experiments(store: Store, record: Record) -> None:
    """Have the experiments of a record, and no others.

    Raises:
        DataError: the disk is full.
    """
    folder = store.folder / "experiments"
    with told(folder):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("[!.]*.json"):
            if path.stem not in record.experiments:
                path.unlink()
    for name, text in record.experiments.items():
        path = folder / f"{name}.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text.encode())


def _bring_version(place: Place, store: Store, number: int, version: Version) -> None:
    with told(store.folder), tempfile.TemporaryDirectory(prefix=".version.", dir=store.folder) as name:
        folder = Path(name)
        if any(_manifest_of(store, old) == version.delta_of for old in store.versions()):
            _lay_out(place, store, version.delta, folder)
            store.add_delta(folder, number)
            return
        _lay_out(place, store, {MANIFEST: version.manifest}, folder)
        _lay_out(place, store, read_facts(folder)["files"], folder)
        store.add_version(folder, number)


def _lay_out(place: Place, store: Store, files: Mapping[str, str], folder: Path) -> None:
    """Put files in a folder: those that a version here has are linked, the others are fetched."""
    here = {
        digest: store.version_folder(number) / file
        for number in store.versions()
        for file, digest in store.facts(number)["files"].items()
    }
    found = {**here, **_fetched(place, store, set(files.values()) - set(here))}
    for file, digest in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        link_one(found[digest], folder / file)


def _fetched(place: Place, store: Store, digests: Iterable[str]) -> dict[str, Path]:
    folder = store.folder / _FETCHED
    with told(folder):
        folder.mkdir(exist_ok=True)

    def fetch(digest: str) -> None:
        path = folder / digest
        if not path.is_file():
            fresh = path.with_suffix(".new")
            place.get_file(digest, fresh)
            fresh.rename(path)

    wanted = list(dict.fromkeys(digests))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, wanted))
    return {digest: folder / digest for digest in wanted}


def _manifest_of(store: Store, number: int) -> str:
    return sha256_of(store.version_folder(number) / MANIFEST)
