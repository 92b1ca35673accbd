"""What a shared store holds at one moment: one small object for each generation, written once. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from domlora.abtest.experiments import Experiment
from domlora.errors import BundleError, DomloraError
from domlora.serving.sealed import opened, sealed
from domlora.serving.state import State

__all__ = ["Record", "Version"]

_FORMAT = "domlora shared store 1"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DELTA_FILE = re.compile(r"(files/)?(adapters/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Version:
    """An exported folder of a shared store.

    Args:
        manifest: sha256 of its manifest, which has those of all other files.
        delta_of: sha256 of the manifest of the version that ``delta`` was made from; None where there is no delta.
        delta: the files of the delta, each with its sha256.
    """

    manifest: str
    delta_of: str | None = None
    delta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """All that a shared store holds.

    Args:
        generation: one more with each change; 0 is the empty store, which no object describes.
        state: what is served, as :class:`domlora.serving.state.State` says it of a folder.
        versions: by number.
        experiments: the text of each, by name.

    Example:
        >>> record = Record(1, State(live=3), {3: Version("0" * 64)})
        >>> Record.from_json(record.to_json()) == record
        True
    """

    generation: int = 0
    state: State = field(default_factory=State)
    versions: Mapping[int, Version] = field(default_factory=dict)
    experiments: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Its content, with a sha256 of its own."""
        versions = {
            str(number): {"manifest": each.manifest, "delta_of": each.delta_of, "delta": dict(each.delta)}
            for number, each in self.versions.items()
        }
        raw = {
            "generation": self.generation,
            "state": self.state.to_json(),
            "versions": versions,
            "experiments": dict(self.experiments),
        }
        return sealed(raw, _FORMAT).encode()

    @classmethod
    def from_json(cls, content: bytes, name: str = "a record") -> Self:
        """Read it; nothing in it can lead out of a folder.

        Args:
            content: what :meth:`to_json` gave.
            name: of the object, to be named if it is damaged.

        Raises:
            BundleError: damaged, or of another format.
        """
        try:
            raw = opened(content, _FORMAT)
            record = cls(
                int(raw["generation"]),
                State.from_json(raw["state"].encode()),
                {int(number): Version(**each) for number, each in raw["versions"].items()},
                raw["experiments"],
            )
            record.check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DomloraError) as error:
            raise BundleError(
                f"an object of a shared store must be whole ({error})",
                received=name,
                next_step="Remove that object, and publish again",
            ) from error
        return record

    def check(self) -> None:
        """Raises ValueError where parts do not fit each other, or a name could lead out of a folder."""
        if self.state.live is not None and self.state.live not in self.versions:
            raise ValueError(f"version {self.state.live} is live, and not there")
        digests = [
            digest for version in self.versions.values() for digest in (version.manifest, *version.delta.values())
        ]
        digests += [adapter.sha256 for adapter in self.state.adapters.values()]
        names = [name for version in self.versions.values() for name in version.delta]
        if not all(map(_SHA256.fullmatch, digests)) or not all(map(_DELTA_FILE.fullmatch, names)):
            raise ValueError("it names files that no store has")
        for name, text in self.experiments.items():
            if Experiment.from_json(text.encode()).name != name:
                raise ValueError(f"experiment {name!r} has another name")

    def needed(self) -> set[int]:
        """The versions that answer: the live one, and those of the arms of running experiments."""
        found = set() if self.state.live is None else {self.state.live}
        return found | {number for number in self._of_arms() if number in self.versions}

    def _of_arms(self) -> Iterator[int]:
        for text in self.experiments.values():
            experiment = Experiment.from_json(text.encode())
            if experiment.status == "running":
                yield from (arm.version for arm in experiment.arms if arm.version is not None)
