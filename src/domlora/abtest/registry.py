"""The experiments of a store: one JSON file each, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from domlora.abtest.experiments import Experiment
from domlora.errors import ConfigError, DataError, SchemaError, nearest
from domlora.features.schema import Schema
from domlora.files import put_file, told

__all__ = ["Registry"]

_LOCK = ".lock"


class Registry:
    """Experiments in a folder, for any number of processes.

    A draft may be changed. A running experiment may only be ramped up or stopped: other weights, arms or salts would move
    units between arms. One that was stopped stays as it is; what follows gets a name of its own.

    Args:
        folder: ``STORE/experiments``; made when the first experiment is.

    Example:
        >>> import tempfile
        >>> from domlora.abtest.experiments import Arm
        >>> with tempfile.TemporaryDirectory() as name:
        ...     registry = Registry.open(Path(name) / "experiments")
        ...     _ = registry.create(Experiment("wide", (Arm("now"), Arm("wide", version=4))))
        ...     registry.start("wide", now_s=10.0).slot
        (0.0, 1.0)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: object = None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The registry of a folder, which need not exist yet."""
        return cls(folder)

    def all(self) -> list[Experiment]:
        """Every experiment, by name.

        Raises:
            DataError, ConfigError: a file that is no experiment.
        """
        return [self.get(path.stem) for path in sorted(self.folder.glob("[!.]*.json"))]

    def get(self, name: str) -> Experiment:
        """One experiment.

        Raises:
            ConfigError: there is none of this name.
            DataError: its file is damaged.
        """
        try:
            found = Experiment.from_json((self.folder / f"{name}.json").read_bytes())
        except OSError as error:
            known = [path.stem for path in self.folder.glob("[!.]*.json")]
            raise ConfigError("unknown experiment", received=name, next_step=nearest(name, known)) from error
        if found.name != name:
            raise DataError("an experiment's file must have its name", received=f"{found.name} in {name}.json")
        return found

    def changed(self) -> bool:
        """Whether any file is another one than at the call before; true at the first one."""
        seen = tuple(sorted(_marks(self.folder)))
        before, self._seen = self._seen, seen
        return seen != before

    def answering_with(self, version: int) -> list[str]:
        """The running experiments one of whose arms is a version."""
        running = (each for each in self.all() if each.status == "running")
        return [each.name for each in running if version in {arm.version for arm in each.arms}]

    def create(self, experiment: Experiment) -> Experiment:
        """Add a draft.

        Raises:
            ConfigError: there is an experiment of this name, or this one is no draft.
        """
        with self._turn():
            if (self.folder / f"{experiment.name}.json").exists():
                raise ConfigError("an experiment's name is given once", received=experiment.name)
            return self._put_draft(experiment)

    def change(self, experiment: Experiment) -> Experiment:
        """Put a draft in place of one of the same name.

        Raises:
            ConfigError: it is unknown, runs, or has run.
        """
        with self._turn():
            self._with_status(experiment.name, "draft", "changed; ramp it up or stop it")
            return self._put_draft(experiment)

    def start(self, name: str, now_s: float | None = None) -> Experiment:
        """Give a draft its slot of the layer, and let it run.

        Raises:
            ConfigError: it is no draft, its layer is full, another layer steers the same thing, or an arm names a version
                that the store does not have, or one that reads other columns than the live one.
            DataError: the schema of one of them cannot be read.
        """
        with self._turn():
            draft = self._with_status(name, "draft", "started")
            self._check_versions(draft)
            others = [each for each in self.all() if each.status == "running"]
            _check_apart(draft, others)
            slot = _free_slot(draft, others)
            begun = time.time() if now_s is None else now_s
            return self._write(draft.with_(status="running", started_s=begun, slot=slot))

    def ramp(self, name: str, share: float, now_s: float | None = None) -> Experiment:
        """Raise the share of a running experiment from now on. Later steps that lie below are dropped.

        Raises:
            ConfigError: it does not run, the share is lower than now, or the layer has no room beside its slot.
        """
        with self._turn():
            running = self._with_status(name, "running", "ramped up")
            now = time.time() if now_s is None else now_s
            passed = max(now - (running.started_s or 0.0), 0.0)
            steps = [step for step in running.share if step[0] < passed or step[1] > share]
            ramped = running.with_(share=tuple(sorted([*steps, (passed, share)])))
            others = [each for each in self.all() if each.status == "running" and each.name != name]
            return self._write(ramped.with_(slot=_grown_slot(ramped, others)))

    def stop(self, name: str, now_s: float | None = None) -> Experiment:
        """Let every unit go. Its slot is free again.

        Raises:
            ConfigError: it does not run.
        """
        with self._turn():
            running = self._with_status(name, "running", "stopped")
            return self._write(running.with_(status="stopped", stopped_s=time.time() if now_s is None else now_s))

    def _with_status(self, name: str, status: str, verb: str) -> Experiment:
        found = self.get(name)
        if found.status != status:
            raise ConfigError(
                f"only a {status} experiment can be {verb}",
                received=f"{name}, {found.status}",
                next_step="Make another experiment for another question" if found.status == "stopped" else "",
            )
        return found

    def _check_versions(self, draft: Experiment) -> None:
        place = self.folder.parent / "versions"
        known = {path.name for path in place.iterdir()} if place.is_dir() else None
        for arm in draft.arms:
            if known is not None and arm.version is not None and str(arm.version) not in known:
                raise ConfigError(
                    "an arm's version must be in the store",
                    received=arm.version,
                    next_step=nearest(str(arm.version), known),
                )
        live = _live_version(self.folder.parent)
        for version in {arm.version for arm in draft.arms} - {None, live} if live else ():
            _check_columns(place, version, live)

    def _put_draft(self, experiment: Experiment) -> Experiment:
        if experiment.status != "draft":
            raise ConfigError("a new experiment must be a draft", received=experiment.status)
        return self._write(experiment)

    def _write(self, experiment: Experiment) -> Experiment:
        place = self.folder / f"{experiment.name}.json"
        put_file(place, experiment.to_json().encode(), self.folder / f".{experiment.name}.new")
        return experiment

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One writer at a time; the system lets go when a process ends, however it ends."""
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _marks(folder: Path) -> Iterator[tuple[str, int, int]]:
    """What tells a file from its former self: a rename gives it another inode."""
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if entry.name.endswith(".json") and not entry.name.startswith("."):
            facts = entry.stat()
            yield entry.name, facts.st_ino, facts.st_mtime_ns


def _live_version(store: Path) -> int | None:
    """The version that answers; None where that is not known."""
    try:
        live: int | None = json.loads((store / "state.json").read_bytes())["live"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return live


def _check_columns(place: Path, version: int | None, live: int | None) -> None:
    """Requests are made for the live version, so an arm's must read the same columns."""
    wanted, has = (_columns(place / str(number)) for number in (live, version))
    if wanted != has:
        told = {"lacks": sorted(wanted - has)[:8], "adds": sorted(has - wanted)[:8]}
        raise ConfigError(
            "an arm's version must read the columns of the live one, for which requests are made",
            received=f"version {version}, which "
            + " and ".join(f"{word} {names}" for word, names in told.items() if names),
            next_step=f"Let the arm be a version with the columns of version {live}",
        )


def _columns(folder: Path) -> frozenset[str]:
    try:
        return frozenset(Schema.load(folder / "schema.json").columns)
    except (OSError, UnicodeDecodeError, SchemaError) as error:
        raise DataError(f"a version must have a whole schema ({error})", received=f"version {folder.name}") from error


def _check_apart(draft: Experiment, others: list[Experiment]) -> None:
    """A unit is in one experiment of each layer, so what two layers steer must not be the same."""
    for other in others:
        both = draft.steers() & other.steers()
        if other.layer != draft.layer and both and _meet(draft.domains, other.domains):
            raise ConfigError(
                f"two layers must not steer the same thing on one domain, and {other.name!r} steers the "
                f"{' and the '.join(sorted(both))} already",
                received=draft.name,
                next_step=f"Use the layer {other.layer!r}, other domains, or stop {other.name!r}",
            )


def _meet(one: tuple[str, ...] | None, two: tuple[str, ...] | None) -> bool:
    return one is None or two is None or bool(set(one) & set(two))


def _taken(layer: str, others: list[Experiment]) -> list[tuple[float, float]]:
    return sorted(each.slot for each in others if each.layer == layer and each.slot is not None)


def _free_slot(draft: Experiment, others: list[Experiment]) -> tuple[float, float]:
    """The first gap that is wide enough; where slots meet they have the very same number."""
    start, width = 0.0, draft.largest_share
    taken = _taken(draft.layer, others)
    for begin, end in [*taken, (1.0, 1.0)]:
        if begin - start >= width - 1e-9:
            return start, min(start + width, begin)
        start = end
    raise ConfigError(
        f"the layer {draft.layer!r} has no room for so many units",
        received=width,
        next_step=f"{sum(end - begin for begin, end in taken):.0%} are taken; take less, stop one, or use another layer",
    )


def _grown_slot(ramped: Experiment, others: list[Experiment]) -> tuple[float, float]:
    start, end = ramped.slot or (0.0, 0.0)
    wall = min((begin for begin, _ in _taken(ramped.layer, others) if begin >= end), default=1.0)
    if wall - start < ramped.largest_share - 1e-9:
        raise ConfigError(
            f"the slot of {ramped.name!r} can grow to {wall - start:.0%} of all units", received=ramped.largest_share
        )
    return start, max(end, min(start + ramped.largest_share, wall))
