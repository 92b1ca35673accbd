"""Analyze an experiment: sums over units, lifts, the split, the looks, and what follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from domlora.abtest.aggregate import COLUMNS, TODAY, Floats, Log, Sums, columns_of, log_of, over_units
from domlora.abtest.decide import Decision, Lift, Watched, broken_split, decide
from domlora.abtest.experiments import METRICS, Arm, Experiment
from domlora.abtest.sequential import Look, crosses, look_at, planned_information
from domlora.abtest.statistics import adjusted, compare, interval, sample_ratio, student, variation
from domlora.abtest.tables import markdown_of

__all__ = ["Analysis", "SampleRatio", "analyze", "looks_of"]

_BROKEN = 0.0001  # whenever somebody looks
_BROKEN_AT_LOOKS = 0.01  # at all looks together
_FEWEST, _COARSEST = 30, 0.1  # units of an arm, and the variation of its sums: else an interval says nothing
_ALMOST_NOTHING = 0.001  # of the control: an arm to which nothing happened has no logarithm


@dataclass(frozen=True, slots=True)
class SampleRatio:
    """Whether the split is the one that was asked for.

    Args:
        units: by arm.
        expected: share by arm.
        p_value: of a split as far from that, by chance.
        broken: the p-value is below 0.0001, or the arms' units left a boundary at some look, which chance does in 1 % of
            experiments; then nothing is shown.
        crossed: units that were seen in several arms and left out.
        held_out: units of the holdout.
    """

    units: Mapping[str, int]
    expected: Mapping[str, float]
    p_value: float
    broken: bool
    crossed: int
    held_out: int


@dataclass(frozen=True, slots=True)
class Analysis:
    """All that is known about an experiment.

    Args:
        experiment, primary: its name and the metric that decides.
        until_s: time of the last exposure.
        totals: by arm: units, and the sums of what they did.
        sample_ratio: the split.
        overall: lifts of all metrics, an arm after the other.
        domains: the same by domain.
        looks: by arm, of the primary metric over all domains.
        guardrails: by arm.
        decision: what follows.
    """

    experiment: str
    primary: str
    until_s: float
    totals: Mapping[str, Mapping[str, float]]
    sample_ratio: SampleRatio
    overall: tuple[Lift, ...]
    domains: tuple[Lift, ...]
    looks: Mapping[str, tuple[Look, ...]]
    guardrails: Mapping[str, tuple[Watched, ...]]
    decision: Decision

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not known is None."""
        raw = asdict(self)
        raw["looks"] = {arm: [look._asdict() for look in looks] for arm, looks in self.looks.items()}
        found: dict[str, Any] = _plain(raw)
        return found

    def to_json(self) -> str:
        """Its text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """Tables for people."""
        return markdown_of(self.to_dict())


def analyze(
    experiment: Experiment,
    log: Log | Path,
    *,
    until_s: float | None = None,
    window_s: float = 86_400.0,
) -> Analysis:
    """Compare the arms of an experiment.

    Args:
        experiment: one that was started.
        log: the folder of the event log or the store around it, or relations of a DuckDB connection.
        until_s: look no further; a look that ends before it is complete. None: the last exposure.
        window_s: how long after what a unit saw last feedback without a row belongs to it.

    Raises:
        DataError: the experiment was not started, or there is nothing to see yet.
    """
    with nullcontext(log) if isinstance(log, Log) else log_of(log) as opened:
        sums = over_units(opened, experiment, until_s=until_s, window_s=window_s)
    split = _split(experiment, sums, until_s)
    if split.broken:
        decision = broken_split(split.units, split.p_value)
        return Analysis(
            experiment.name,
            experiment.primary,
            sums.until_s,
            _totals(experiment, sums),
            split,
            (),
            (),
            {},
            {},
            decision,
        )
    overall, domains = _overall(experiment, sums), _by_domain(experiment, sums)
    looks = _looks(experiment, sums, until_s)
    rails = {arm: _watch(experiment, sums, arm, each) for arm, each in looks.items()}
    decision = decide(experiment, looks, rails, [each for each in domains if each.metric == experiment.primary])
    return Analysis(
        experiment.name,
        experiment.primary,
        sums.until_s,
        _totals(experiment, sums),
        split,
        overall,
        domains,
        looks,
        rails,
        decision,
    )


def _split(experiment: Experiment, sums: Sums, until_s: float | None) -> SampleRatio:
    units = {arm.name: _units(sums.overall.get(arm.name)) for arm in experiment.arms}
    weights = [arm.weight for arm in experiment.arms]
    p_value = sample_ratio(list(units.values()), weights)
    expected = {arm.name: arm.weight / sum(weights) for arm in experiment.arms}
    broken = p_value < _BROKEN or any(_uneven(experiment, sums, arm, until_s) for arm in experiment.arms[1:])
    return SampleRatio(units, expected, p_value, broken, sums.crossed, sums.held_out)


def _uneven(experiment: Experiment, sums: Sums, arm: Arm, until_s: float | None) -> bool:
    """Whether the units of an arm and the control's were too far from their weights at a look, all looks regarded."""
    control, treatment = _by_look(experiment, sums, arm.name, until_s)
    found = compare(control, treatment, columns_of(experiment.primary, cuped=experiment.cuped_s > 0))
    part = arm.weight / (arm.weight + experiment.control.weight)
    units, treated = control[:, 0, 0] + treatment[:, 0, 0], treatment[:, 0, 0]
    alpha = _alpha(experiment)
    with np.errstate(all="ignore"):
        z = (treated - part * units) / np.sqrt(part * (1 - part) * units)
        fractions = 1.0 / (found.error**2 * planned_information(experiment.effect, experiment.power, alpha))
    return crosses(z, fractions, _BROKEN_AT_LOOKS / (len(experiment.arms) - 1))


def _totals(experiment: Experiment, sums: Sums) -> dict[str, dict[str, float]]:
    return {
        arm.name: dict(zip(("units", *TODAY), map(float, _of(sums.overall, arm.name)[0]), strict=False))
        for arm in experiment.arms
    }


def _overall(experiment: Experiment, sums: Sums) -> tuple[Lift, ...]:
    control = _of(sums.overall, experiment.control.name)
    found = [
        _lifts(arm.name, metric, (None,), control[None], _of(sums.overall, arm.name)[None], experiment)
        for arm in experiment.arms[1:]
        for metric in METRICS
    ]
    return tuple(each for lifts in found for each in lifts)


def _by_domain(experiment: Experiment, sums: Sums) -> tuple[Lift, ...]:
    names = sorted({domain for _, domain in sums.by_domain})
    if not names:  # all units were kept out
        return ()
    stacks = {arm.name: np.stack([_of(sums.by_domain, (arm.name, name)) for name in names]) for arm in experiment.arms}
    found = [
        _lifts(arm.name, metric, names, stacks[experiment.control.name], stacks[arm.name], experiment)
        for arm in experiment.arms[1:]
        for metric in METRICS
    ]
    return tuple(each for lifts in found for each in lifts)


def _lifts(
    arm: str, metric: str, domains: Sequence[str | None], control: Floats, treatment: Floats, experiment: Experiment
) -> list[Lift]:
    """One metric in many domains at once."""
    found = compare(control, treatment, columns_of(metric, cuped=experiment.cuped_s > 0))
    few = np.minimum(control[:, 0, 0], treatment[:, 0, 0]) < _FEWEST
    with np.errstate(all="ignore"):
        critical = student(stats.norm.isf(experiment.alpha / 2), found.freedom)
        low, high = (np.where(few, np.nan, bound) for bound in interval(found, critical))
        lift, p_value = found.lift, np.where(few, np.nan, found.p_value)
    figures = np.stack([found.control, found.treatment, lift, low, high, p_value, adjusted(p_value)], -1)
    units = np.stack([control[:, 0, 0], treatment[:, 0, 0]], -1).astype(int).tolist()
    rows: list[Any] = [
        [*one, *two, three] for one, two, three in zip(figures.tolist(), units, found.reduction.tolist(), strict=True)
    ]
    return [Lift(arm, metric, domain, *rows[i]) for i, domain in enumerate(domains)]


def looks_of(control: Floats, treatment: Floats, experiment: Experiment) -> tuple[Look, ...]:
    """The looks at the primary metric of an arm, beginning with the first one at which it is close enough to normal.

    **Shape**: moments (looks, K + 1, K + 1) of what is known by the end of each look.

    Args:
        control, treatment: of :data:`domlora.abtest.aggregate.COLUMNS`, as :class:`domlora.abtest.aggregate.Sums` has them.
        experiment: with its plan.
    """
    columns = columns_of(experiment.primary, cuped=experiment.cuped_s > 0)
    found = compare(control, treatment, columns)
    enough = _normal(control, treatment, experiment.primary)
    with np.errstate(all="ignore"):
        none = enough & (treatment[:, 0, columns.over] == 0)
        lift = np.where(enough, np.where(none, _ALMOST_NOTHING - 1.0, found.lift), np.nan)
        error = np.where(none, np.sqrt(2.0) * found.control_error / found.control, found.error)
    alpha = _alpha(experiment)
    information = planned_information(experiment.effect, experiment.power, alpha)
    return look_at(lift, error, information, alpha, np.where(none, np.inf, found.freedom))


def _looks(experiment: Experiment, sums: Sums, until_s: float | None) -> dict[str, tuple[Look, ...]]:
    return {
        arm.name: looks_of(*_by_look(experiment, sums, arm.name, until_s), experiment) for arm in experiment.arms[1:]
    }


def _by_look(experiment: Experiment, sums: Sums, arm: str, until_s: float | None) -> tuple[Floats, Floats]:
    """Moments of the control and of an arm by the end of each look that has ended."""
    ended = _complete(experiment, sums, until_s)
    return _whole(sums.by_look, experiment.control.name, ended), _whole(sums.by_look, arm, ended)


def _normal(control: Floats, treatment: Floats, metric: str) -> NDArray[np.bool_]:
    """Whether a metric is close enough to normal to be judged."""
    units = np.minimum(control[..., 0, 0], treatment[..., 0, 0])
    rough = variation(control, treatment, columns_of(metric, cuped=False))
    return np.asarray((units >= _FEWEST) & (rough < _COARSEST))


def _watch(experiment: Experiment, sums: Sums, arm: str, looks: Sequence[Look]) -> tuple[Watched, ...]:
    if not looks:
        return ()
    found = []
    for rail in experiment.guardrails:
        columns = columns_of(rail.metric, cuped=experiment.cuped_s > 0)
        control, treatment = _of(sums.overall, experiment.control.name), _of(sums.overall, arm)
        low, high = interval(compare(control, treatment, columns), looks[-1].critical)
        enough = _normal(control, treatment, rail.metric)  # what is not may be broken, but not kept
        found.append(Watched.of(rail.metric, rail.margin, float(low) if enough else math.nan, float(high)))
    return tuple(found)


def _alpha(experiment: Experiment) -> float:
    """By arm: each one that is compared with the control has its part of the chance of a false alarm (Bonferroni)."""
    return experiment.alpha / (len(experiment.arms) - 1)


def _complete(experiment: Experiment, sums: Sums, until_s: float | None) -> int:
    """How many looks have ended; that of an experiment that was stopped ends with it."""
    lengths = [len(each) for each in sums.by_look.values()]
    if experiment.stopped_s is not None and (until_s is None or until_s >= experiment.stopped_s):
        return max(lengths, default=0)
    passed = (sums.until_s if until_s is None else until_s) - (experiment.started_s or 0.0)
    return min(int(passed // experiment.look_s), max(lengths, default=0))


def _whole(by_look: Mapping[str, Floats], arm: str, ended: int) -> Floats:
    size = len(COLUMNS) + 1
    return by_look.get(arm, np.zeros((ended, size, size)))[:ended]


def _of(moments: Mapping[Any, Floats], key: object) -> Floats:
    size = len(COLUMNS) + 1
    return moments.get(key, np.zeros((size, size)))


def _units(moments: Floats | None) -> int:
    return 0 if moments is None else int(moments[0, 0])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
