"""What arms are truly worth: their rankings of the same visits, and the known probabilities of what they show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from domlora.abtest.experiments import Arm, Experiment
from domlora.errors import ConfigError
from domlora.features.schema import FIRST_ID
from domlora.serving.program import Program
from domlora.serving.store import Store
from domlora.simulation.population import Population, Visit

__all__ = ["Lift", "true_lifts"]

_FIRST = 20_000_000  # of visits that are neither learned from nor simulated
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lift:
    """A relative difference and its 95 % interval; 0.1 is 10 % more than the control.

    >>> str(Lift(0.1, 0.08, 0.12))
    '+10.00 % [+8.00, +12.00]'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:+.2f} % [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def true_lifts(
    store: Store, experiment: Experiment, population: Population, *, num_shown: int = 3, num_visits: int = 4_000
) -> dict[str, Lift]:
    """The true lift of each arm in clicks, paired over visits that both arms rank; the interval is that of the visits drawn.

    Adapters that were pushed to the store are not looked at.

    Args:
        store: where the arms' versions lie.
        experiment: whose arms are compared.
        population: whose probabilities count.
        num_shown: candidates that a user sees.
        num_visits: how many are ranked.

    Raises:
        ConfigError: no version is live and an arm names none.
    """
    visits = [population.visit(number) for number in range(_FIRST, _FIRST + num_visits)]
    worth = {arm.name: _worth(store, arm, visits, num_shown) for arm in experiment.arms}
    base = worth[experiment.control.name]
    return {arm.name: _lift(worth[arm.name], base) for arm in experiment.arms[1:]}


def _worth(store: Store, arm: Arm, visits: list[Visit], num_shown: int) -> Array:
    """Expected clicks on what an arm shows, ``(visits,)``."""
    number = arm.version or store.state().live
    if number is None:
        raise ConfigError("a store must have a live version", next_step="Add one")
    program = Program.open(store.version_folder(number))
    candidates = len(visits[0].items)
    domain = np.repeat([visit.domain for visit in visits], candidates)
    ids = (domain + FIRST_ID).reshape(-1, 1)
    answering = domain if arm.adapters else np.full_like(domain, -1)
    logit = program(ids, np.concatenate([visit.dense for visit in visits]), answering)
    best = np.argsort(-logit.reshape(len(visits), candidates), axis=1, kind="stable")[:, :num_shown]
    probability = np.stack([visit.probability for visit in visits])
    expected: Array = np.take_along_axis(probability, best, axis=1).sum(axis=1)
    return expected


def _lift(worth: Array, base: Array) -> Lift:
    ratio = float(worth.mean() / base.mean())
    error = float((worth - ratio * base).std(ddof=1)) / math.sqrt(len(base)) / float(base.mean())
    reach = NormalDist().inv_cdf(0.975) * error
    return Lift(ratio - 1, ratio - 1 - reach, ratio - 1 + reach)
