"""Weeks of an experiment in a second: no server, but its assignment and its log.

For studies of the analysis itself: how often it is wrong, when the truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from domlora.abtest.assignment import Assigner
from domlora.abtest.experiments import Experiment
from domlora.abtest.log import EventLog, Feedback
from domlora.errors import ConfigError, DataError

__all__ = ["Audience", "write_log"]


@dataclass(frozen=True)
class Audience:
    """Users with click probabilities of their own, and what arms do to them.

    Args:
        num_users: who visit, each time one at random.
        domains: where; each visit one at random.
        num_shown: rows that a visit is shown.
        click_rate: mean probability of a click on a row.
        concentration: of the users' probabilities around it (``a + b`` of a beta distribution); small for users who differ.
        lifts: arm to the relative change of all probabilities: the truth that an analysis is to find. 0 where none is named.
        domain_lifts: a domain's change on top of it.

    Raises:
        ConfigError: a number out of range, or probabilities above 1.

    Example:
        >>> Audience(lifts={"wide": 0.1}).lift("wide", "now")
        0.10000000000000009
    """

    num_users: int = 2_000
    domains: tuple[str, ...] = ("books", "games", "toys")
    num_shown: int = 4
    click_rate: float = 0.05
    concentration: float = 20.0
    lifts: Mapping[str, float] = field(default_factory=dict)
    domain_lifts: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.num_users, self.num_shown, len(self.domains)) < 1 or not 0 < self.click_rate < 1:
            raise ConfigError("an audience needs users, domains, rows, and a click rate between 0 and 1", received=self)
        if self.concentration <= 0 or min([0.0, *self.lifts.values(), *self.domain_lifts.values()]) <= -1:
            raise ConfigError("concentration must be above 0 and lifts above -1", received=self)

    def lift(self, arm: str, control: str) -> float:
        """The true relative lift of an arm, where no domain has its own."""
        return (1 + self.lifts.get(arm, 0.0)) / (1 + self.lifts.get(control, 0.0)) - 1

    def probability(self, rate: float, arm: str, domain: str) -> float:
        """Of a click of a user with this rate."""
        changed = rate * (1 + self.lifts.get(arm, 0.0)) * (1 + self.domain_lifts.get((arm, domain), 0.0))
        return min(changed, 1.0)


def write_log(
    log: EventLog,
    experiments: Sequence[Experiment],
    audience: Audience,
    *,
    visits: int,
    start_s: float,
    seconds: float,
    seed: int,
) -> None:
    """Visits at even distances, assigned and logged as a server does it.

    Args:
        log: where exposures and clicks go; flushed at the end.
        experiments: that run; their arms act independently.
        audience: who visits.
        visits: how many.
        start_s: time of the first one, seconds since 1970.
        seconds: that they take.
        seed: the same one gives the same log.

    Raises:
        DataError: the log did not take all.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pyarrow.parquet as pq
        >>> from domlora.abtest.experiments import Arm
        >>> running = Experiment("wide", (Arm("now"), Arm("wide")), status="running", started_s=0.0, slot=(0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as name:
        ...     log = EventLog(Path(name))
        ...     write_log(log, [running], Audience(), visits=50, start_s=0.0, seconds=100.0, seed=1)
        ...     log.close()
        ...     len(pq.read_table(f"{name}/exposures"))
        200
    """
    random = np.random.default_rng(seed)
    assigner = Assigner(experiments)
    a = audience.click_rate * audience.concentration
    rates = random.beta(a, audience.concentration - a, audience.num_users)
    users = random.integers(audience.num_users, size=visits)
    domains = random.integers(len(audience.domains), size=visits)
    lots = random.random((visits, audience.num_shown))
    for number in range(visits):
        user, domain = int(users[number]), audience.domains[domains[number]]
        unit, request_id, time_s = f"user-{user}", f"{seed}-{number}", start_s + seconds * number / visits
        assigned = assigner.assign(unit, domain, time_s)
        probability = float(rates[user])
        for each in assigned:
            probability = audience.probability(probability, each.arm.name, domain)
        shown = np.full(audience.num_shown, probability, np.float32)
        log.exposed(request_id, time_s, unit, domain, assigned, "1", "1", shown)
        clicked = np.flatnonzero(lots[number] < probability).tolist()
        log.happened(*(Feedback(request_id, row, "click", 1.0, time_s, unit) for row in clicked))
    if not log.flush() or log.dropped:
        raise DataError("the log must hold all events", received=f"{log.dropped} dropped; {log.failure}")
