"""Which arm a unit gets: a hash that we define, so that every server, every restart and the analysis agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from domlora.abtest.experiments import HOLDOUT, Arm, Experiment

__all__ = ["Assigner", "Assignment", "Choice", "choice", "position"]

_SEPARATOR = "\x1f"  # no name of ours holds it
_PLACES = 1 << 52  # as many as a float64 tells apart, so that 1.0 is never reached


class Assignment(NamedTuple):
    """A unit's arm in one experiment."""

    experiment: str
    arm: Arm


class Choice(NamedTuple):
    """What a request is answered with: the version of the bundle (None: the live one), and whether adapters are used."""

    version: int | None = None
    adapters: bool = True


class _Entry(NamedTuple):
    experiment: Experiment
    salt: str
    ends: tuple[float, ...]
    held: Arm


class Assigner:
    """Deals units out to the experiments that run.

    A unit has a place in [0, 1) of every layer; it takes part in the experiment whose slot covers that place, as far as the
    slot is open at the moment. A second hash, salted by the experiment, gives the arm, a third one, the same for all
    experiments, whether the unit is held out. So:

    * a unit's arm never changes while names, salts and weights stay;
    * a ramp only adds units; nobody leaves or changes sides;
    * two experiments of one layer never share a unit; experiments of two layers split each other's arms evenly.

    Immutable and quick: make a new one when the registry has changed.

    Args:
        experiments: all there are; those that do not run are left out.

    Example:
        >>> arms = (Arm("now"), Arm("wide", version=4))
        >>> running = Experiment("wide", arms, status="running", started_s=0.0, slot=(0.0, 1.0))
        >>> assigner = Assigner([running])
        >>> [assigner.assign(f"user-{i}", "toys", 1.0)[0].arm.name for i in range(4)]
        ['wide', 'wide', 'now', 'wide']
    """

    def __init__(self, experiments: Iterable[Experiment]) -> None:
        layers: dict[str, list[_Entry]] = {}
        for experiment in experiments:
            if experiment.status == "running":
                layers.setdefault(experiment.layer, []).append(_entry(experiment))
        self._layers = tuple((f"layer{_SEPARATOR}{name}", entries) for name, entries in sorted(layers.items()))

    def assign(self, unit: str | None, domain: str | None, now_s: float) -> tuple[Assignment, ...]:
        """The arms of a unit, one an experiment that it takes part in, by name of layer; none without a unit."""
        if not unit or not self._layers:
            return ()
        return tuple(
            Assignment(entry.experiment.name, _arm(entry, unit))
            for salt, entries in self._layers
            if (entry := _covering(entries, position(salt, unit), domain, now_s)) is not None
        )


def position(salt: str, unit: str) -> float:
    """The place of a unit in [0, 1): the first 52 bits of the md5 of the salt, a unit separator and the unit, in UTF-8.

    >>> position("layer", "user-7")
    0.5053246761898271
    """
    text = f"{salt}{_SEPARATOR}{unit}".encode("utf-8", errors="surrogatepass")
    return (int.from_bytes(hashlib.md5(text, usedforsecurity=False).digest()[:7]) >> 4) / _PLACES


def choice(assignments: Sequence[Assignment]) -> Choice:
    """What all arms together ask for; the registry lets no two experiments steer the same thing on a domain.

    >>> choice([Assignment("one", Arm("a", version=3)), Assignment("two", Arm("b", adapters=False))])
    Choice(version=3, adapters=False)
    """
    versions = [each.arm.version for each in assignments if each.arm.version is not None]
    return Choice(versions[0] if versions else None, all(each.arm.adapters for each in assignments))


def _entry(experiment: Experiment) -> _Entry:
    weights = list(accumulate(arm.weight for arm in experiment.arms))
    held = replace(experiment.control, name=HOLDOUT)
    ends = (*(weight / weights[-1] for weight in weights[:-1]), 1.0)
    return _Entry(experiment, f"arm{_SEPARATOR}{experiment.salt or experiment.name}", ends, held)


def _covering(entries: list[_Entry], place: float, domain: str | None, now_s: float) -> _Entry | None:
    for entry in entries:
        start, end = entry.experiment.slot or (0.0, 0.0)
        if start <= place < min(start + entry.experiment.share_at(now_s), end):
            domains = entry.experiment.domains
            return entry if domains is None or domain in domains else None
    return None


def _arm(entry: _Entry, unit: str) -> Arm:
    if entry.experiment.holdout and position("holdout", unit) < entry.experiment.holdout:
        return entry.held
    place = position(entry.salt, unit)
    return next(arm for arm, end in zip(entry.experiment.arms, entry.ends, strict=True) if place < end)
