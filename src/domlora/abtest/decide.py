"""What follows from an analysis: ship, stop, or wait, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from domlora.abtest.experiments import Experiment
from domlora.abtest.sequential import Look

__all__ = ["Decision", "Lift", "Verdict", "Watched", "broken_split", "decide"]

Verdict = Literal["ship", "stop", "not enough data yet", "broken split"]

_RECENT = 7  # looks that tell how fast information comes in
_EVENTS = {
    "ctr": "some 100 clicks",
    "cvr": "some 100 conversions",
    "payers": "some 100 units with a conversion",
    "value": "some hundreds of conversions",
}


@dataclass(frozen=True, slots=True)
class Lift:
    """A metric in an arm and in the control.

    Args:
        arm, metric: of what.
        domain: None for all together.
        control, treatment: the metric, adjusted if there is a period before.
        lift, low, high: relative, with an interval for one look at the end.
        p_value: of no lift, for one look.
        adjusted: the same with regard to all domains (Benjamini-Hochberg); that of no other for all together.
        control_units, treatment_units: how many.
        reduction: share of the variance that the period before explains.
    """

    arm: str
    metric: str
    domain: str | None
    control: float
    treatment: float
    lift: float
    low: float
    high: float
    p_value: float
    adjusted: float
    control_units: int
    treatment_units: int
    reduction: float


@dataclass(frozen=True, slots=True)
class Watched:
    """A guardrail and where it stands.

    Args:
        metric, margin: of the guardrail.
        low, high: bounds of the lift that hold at all looks together.
        state: ``kept`` if a fall by more than the margin is ruled out, ``broken`` if it is certain, else ``open``.
    """

    metric: str
    margin: float
    low: float
    high: float
    state: Literal["kept", "broken", "open"]

    @classmethod
    def of(cls, metric: str, margin: float, low: float, high: float) -> Watched:
        """Judge one.

        >>> [Watched.of("cvr", 0.02, *bounds).state for bounds in ((-0.01, 0.04), (-0.09, -0.03), (-0.03, 0.01))]
        ['kept', 'broken', 'open']
        """
        if low > -margin:
            return cls(metric, margin, low, high, "kept")
        return cls(metric, margin, low, high, "broken" if high < -margin else "open")


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do.

    Args:
        verdict: in words.
        arm: which one to ship.
        reasons: sentences, the decisive one first.
        but_not: domains in which the arm is worse for certain; leave them out when it is shipped.
        next_step: what to do now, for who does this for the first time.
    """

    verdict: Verdict
    arm: str | None = None
    reasons: tuple[str, ...] = ()
    but_not: tuple[str, ...] = ()
    next_step: str = ""


def broken_split(units: Mapping[str, int], p_value: float) -> Decision:
    """Nothing can be said."""
    counted = ", ".join(f"{name} {count:,}" for name, count in units.items())
    return Decision(
        "broken split",
        reasons=(
            f"the arms' units ({counted}) do not fit their weights (p = {p_value:.1g}), so that the arms are not alike "
            "and no lift is shown",
        ),
        next_step="Stop it; look for lost or doubled exposures, a redirect or a crash in one arm, or bots; then start a new "
        "experiment",
    )


def decide(
    experiment: Experiment,
    looks: Mapping[str, Sequence[Look]],
    guardrails: Mapping[str, Sequence[Watched]],
    domains: Sequence[Lift] = (),
) -> Decision:
    """Judge each arm, then all.

    An arm is shipped when it has crossed its boundary upwards and every guardrail is kept. It is stopped when a guardrail is
    broken, when it crossed downwards, when the planned lift is ruled out, or when the planned information is there and
    nothing was found. All bounds hold at all looks together, so that this may be asked every day.

    Args:
        experiment: with its plan.
        looks: by arm, of the primary metric.
        guardrails: by arm, now.
        domains: lifts of the primary metric by domain.

    Example:
        >>> from domlora.abtest.experiments import Arm
        >>> experiment = Experiment("wide", (Arm("now"), Arm("wide", version=4)), effect=0.015)
        >>> look = Look(6, 0.6, 2.7, 3.1, 0.021, 0.003, 0.04, True)
        >>> print(*decide(experiment, {"wide": [look]}, {}).reasons)
        wide: ctr rises by 2.1 % (0.3 % to 4.0 %, at all looks together)
    """
    each = {arm.name: _judge(experiment, arm.name, looks.get(arm.name, ()), guardrails.get(arm.name, ()))
            for arm in experiment.arms[1:]}  # fmt: skip
    reasons = tuple(reason for decision in each.values() for reason in decision.reasons)
    ready = [name for name, decision in each.items() if decision.verdict == "ship"]
    if ready:
        best = max(ready, key=lambda name: looks[name][-1].lift)
        worse = _worse(domains, best, looks[best][-1].critical)
        said = (f"{best}: {experiment.primary} falls in {', '.join(worse)}; leave it out there",) if worse else ()
        return Decision("ship", best, (*each[best].reasons, *said), worse, _shipping(experiment, best))
    if all(decision.verdict == "stop" for decision in each.values()):
        return Decision(
            "stop", None, reasons, (), f"Stop it (domlora ab stop STORE {experiment.name}); keep what was there"
        )
    return Decision("not enough data yet", None, reasons, (), "Let it run, and look again as often as you like")


def _shipping(experiment: Experiment, name: str) -> str:
    """How to serve an arm to everybody."""
    arm = next(each for each in experiment.arms if each.name == name)
    steps = [f"Stop it (domlora ab stop STORE {experiment.name})"]
    if arm.version is not None:
        steps.append(f"serve version {arm.version} to all (domlora store set-live STORE {arm.version})")
    if not arm.adapters:
        steps.append("remove the adapters (DELETE /v1/adapters/DOMAIN)")
    return ", ".join(steps) if len(steps) > 1 else f"{steps[0]}: then all get what this arm gets"


def _judge(experiment: Experiment, arm: str, looks: Sequence[Look], guardrails: Sequence[Watched]) -> Decision:
    for rail in guardrails:
        if rail.state == "broken":
            fall = f"{rail.metric} falls by more than {_percent(rail.margin)} ({_bounds(rail.low, rail.high)})"
            return Decision("stop", reasons=(f"{arm}: {fall}",))
    if not looks:
        few = f"too little data for a first look: each arm needs {_EVENTS[experiment.primary]}, and a look to be over"
        return Decision("not enough data yet", reasons=(f"{arm}: {few}",))
    last, metric = looks[-1], experiment.primary
    crossed = any(look.crossed and look.lift * last.lift > 0 for look in looks)
    bounds = _bounds(last.low, last.high)
    if crossed and last.lift < 0:
        return Decision("stop", reasons=(f"{arm}: {metric} falls by {_percent(-last.lift)} ({bounds})",))
    if crossed:
        return _won(f"{arm}: {metric} rises by {_percent(last.lift)} ({bounds})", arm, guardrails)
    if last.high < experiment.effect:
        reason = f"{arm}: a lift of {_percent(experiment.effect)} of {metric} is ruled out ({bounds})"
        return Decision("stop", reasons=(reason,))
    if last.fraction >= 1.0:
        reason = f"{arm}: all data of the plan is there and no lift of {metric} was found ({bounds})"
        return Decision("stop", reasons=(reason,))
    unsure = f"{arm}: the lift of {metric} may be anything from {bounds}; {_left(experiment, looks)}"
    return Decision("not enough data yet", reasons=(unsure,))


def _won(reason: str, arm: str, guardrails: Sequence[Watched]) -> Decision:
    unsure = [rail for rail in guardrails if rail.state == "open"]
    if not unsure:
        return Decision("ship", arm, (reason,))
    said = (
        f"{arm}: a fall of {rail.metric} by {_percent(rail.margin)} is not ruled out yet ({_bounds(rail.low, rail.high)})"
        for rail in unsure
    )
    return Decision("not enough data yet", reasons=(reason, *said))


def _worse(domains: Sequence[Lift], arm: str, critical: float) -> tuple[str, ...]:
    """Domains that fall, all domains and looks regarded."""
    from scipy import stats

    level = 2.0 * stats.norm.sf(critical)
    return tuple(each.domain for each in domains if each.domain is not None and each.arm == arm and each.lift < 0
                 and each.adjusted < level)  # fmt: skip


def _left(experiment: Experiment, looks: Sequence[Look]) -> str:
    last, earlier = looks[-1], looks[max(-len(looks), -_RECENT)]
    passed, gained = last.number - earlier.number, last.fraction - earlier.fraction
    speed = gained / passed if passed and gained > 0 else last.fraction / (last.number + 1)
    return (
        f"{last.fraction:.0%} of the plan's data is there, the rest in about "
        f"{_lasting((1.0 - last.fraction) / speed * experiment.look_s)} at most"
    )


def _lasting(seconds: float) -> str:
    """Rounded up, in the largest unit of which there are two or more.

    >>> _lasting(6.2 * 86_400), _lasting(5_000), _lasting(20)
    ('7 days', '84 minutes', '20 seconds')
    """
    size, name = next(
        ((size, name) for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")) if seconds >= 2 * size),
        (1, "seconds"),
    )
    return f"{np.ceil(seconds / size):,.0f} {name}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bounds(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}, at all looks together"
