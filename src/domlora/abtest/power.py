"""How long an experiment takes, from what the log says about units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from domlora.abtest.aggregate import Floats, columns_of, log_of, spread_of
from domlora.abtest.experiments import check_metric, check_within
from domlora.abtest.sequential import drift, planned_information
from domlora.abtest.statistics import compare
from domlora.errors import ConfigError

__all__ = ["Need", "needed", "needed_units"]

_DAY_S = 86_400.0
_RECENT = 7


@dataclass(frozen=True, slots=True)
class Need:
    """What it takes to find a lift.

    Args:
        metric, effect, power, alpha: what was asked.
        value: the metric as it is now.
        units: of both arms; None if the traffic never brings them.
        days: with the log's traffic; infinite likewise.
        detectable: for some lengths in days, the lift that is found with this power.
    """

    metric: str
    effect: float
    power: float
    alpha: float
    value: float
    units: int | None
    days: float
    detectable: dict[int, float]


def needed_units(
    relative_variance: float, effect: float, power: float = 0.8, alpha: float = 0.05, part: float = 0.5
) -> int:
    """Units of two arms together that find a lift.

    ``n = V · (1 / part + 1 / (1 − part)) · drift² / log(1 + effect)²``, looks included.

    Args:
        relative_variance: of one unit's metric over the square of the metric; ``(1 − p) / p`` for a share p of units.
        effect: the relative lift.
        power, alpha: the chance of finding it, and that of a false alarm.
        part: share of the units in the treatment.

    Raises:
        ConfigError: an effect, power, alpha or part that is not between 0 and 1.

    >>> needed_units((1 - 0.1) / 0.1, effect=0.05)
    124584
    """
    _check(effect, power, alpha, part)
    information = planned_information(effect, power, alpha)
    return int(np.ceil(relative_variance * (1 / part + 1 / (1 - part)) * information))


def needed(
    log: Path,
    *,
    metric: str = "ctr",
    effect: float = 0.01,
    power: float = 0.8,
    alpha: float = 0.05,
    share: float = 1.0,
    part: float = 0.5,
    domains: Sequence[str] | None = None,
    lengths: Sequence[int] = (7, 14, 28),
    day_s: float = _DAY_S,
) -> Need:
    """Units and days until a lift would be found on the traffic of a log, day by day as it came.

    What a day adds is less than the day before where units return; after the log's end its last week goes on.

    Args:
        log: its folder, or the store around it.
        metric, effect, power, alpha: see :class:`domlora.abtest.experiments.Experiment`.
        share: of all units that take part.
        part: of these in the treatment.
        domains: only these.
        lengths: days for which the detectable lift is told.
        day_s: length of a day of the log.

    Raises:
        ConfigError: no such metric; an effect, power, alpha or part that is not between 0 and 1; a share above 1.
        DataError: the log has no units.
    """
    check_metric(metric)
    _check(effect, power, alpha, part)
    if not 0 < share <= 1:
        raise ConfigError("the share of all units must be above 0 and at most 1", received=share)
    with log_of(log) as opened:
        looks = spread_of(opened, look_s=day_s, metric=metric, domains=domains)
    found = compare(looks, looks, columns_of(metric, cuped=False))
    with np.errstate(all="ignore"):
        relative = (found.control_error / found.control) ** 2 / share
        information = np.nan_to_num(1.0 / (relative * (1 / part + 1 / (1 - part))), posinf=0.0)
    days = _reach(information, planned_information(effect, power, alpha))
    units = looks[:, 0, 0] * share
    detectable = {length: _detectable(_at(information, length), drift(power, alpha)) for length in lengths}
    total = int(_at(units, days)) if np.isfinite(days) else None
    return Need(metric, effect, power, alpha, float(found.control[-1]), total, days, detectable)


def _check(effect: float, power: float, alpha: float, part: float) -> None:
    for name, value in (("effect", effect), ("power", power), ("alpha", alpha), ("the treatment's part", part)):
        check_within(value, name, 0.0, 1.0)


def _slope(values: Floats) -> float:
    recent = min(_RECENT, len(values) - 1)
    return float((values[-1] - values[-1 - recent]) / recent) if recent else float(values[-1])


def _at(values: Floats, day: float) -> float:
    """What there is after some days, on the line through the last week beyond the end."""
    if day > len(values):
        return float(values[-1] + (day - len(values)) * _slope(values))
    return float(np.interp(day, np.arange(len(values) + 1), np.concatenate([[0.0], values])))


def _reach(values: Floats, goal: float) -> float:
    """The day on which there is so much."""
    if values[-1] >= goal:
        whole = np.maximum.accumulate(np.concatenate([[0.0], values]))
        return float(np.interp(goal, whole, np.arange(len(whole))))
    slope = _slope(values)
    return len(values) + (goal - float(values[-1])) / slope if slope > 0 else float("inf")


def _detectable(information: float, standard_errors: float) -> float:
    return float(np.expm1(standard_errors / np.sqrt(information))) if information > 0 else float("inf")
