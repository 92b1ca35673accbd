"""Ship, stop or wait, and the words for it."""

from __future__ import annotations

import math

import pytest

from domlora.abtest.decide import Decision, Lift, Watched, decide
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.sequential import Look

PLAN = Experiment("wide", (Arm("now"), Arm("wide", version=2)), effect=0.015)


def look(number: int, low: float, high: float, fraction: float = 0.5) -> Look:
    lift = math.expm1((math.log1p(low) + math.log1p(high)) / 2)
    return Look(number, fraction, 2.5, 0.0, lift, low, high, not low <= 0 <= high)


def judged(*looks: Look, rails: tuple[Watched, ...] = (), domains: tuple[Lift, ...] = ()) -> Decision:
    return decide(PLAN, {"wide": looks}, {"wide": rails}, domains)


@pytest.mark.parametrize(
    ("looks", "verdict", "text"),
    [
        ((), "not enough data yet", "some 100 clicks"),
        ((look(0, -0.2, 0.3, 0.05), look(1, -0.1, 0.2, 0.1)), "not enough data yet", "10% of the plan's data"),
        ((look(0, -0.2, 0.3, 0.05), look(1, -0.1, 0.2, 0.1)), "not enough data yet", "the rest in about 18 days"),
        ((look(9, 0.004, 0.02),), "ship", "rises by 1.2 %"),
        ((look(9, 0.004, 0.02), look(10, -0.001, 0.02)), "ship", "rises by"),
        ((look(9, 0.004, 0.02), look(10, -0.02, 0.01)), "stop", "ruled out"),
        ((look(9, -0.03, -0.01),), "stop", "falls by 2.0 %"),
        ((look(9, -0.01, 0.014),), "stop", "a lift of 1.5 % of ctr is ruled out"),
        ((look(9, -0.001, 0.02, 1.01),), "stop", "no lift of ctr was found"),
    ],
)  # fmt: skip
def test_one_arm(looks: tuple[Look, ...], verdict: str, text: str) -> None:
    found = judged(*looks)
    assert found.verdict == verdict
    assert text in found.reasons[0]
    assert (found.arm == "wide") == (verdict == "ship")


def test_guardrails() -> None:
    won = look(9, 0.004, 0.02)
    kept, broken, unsure = (Watched.of("cvr", 0.02, *each) for each in ((-0.01, 0.1), (-0.1, -0.03), (-0.1, 0.1)))
    assert judged(won, rails=(kept,)).verdict == "ship"
    assert judged(won, rails=(kept, broken)).verdict == "stop"
    waiting = judged(won, rails=(unsure,))
    assert waiting.verdict == "not enough data yet"
    assert "cvr by 2.0 % is not ruled out" in waiting.reasons[1]
    assert Watched.of("cvr", 0.02, math.nan, math.nan).state == "open"


def test_domains_that_fall_are_named() -> None:
    lift = Lift("wide", "ctr", "toys", 0.1, 0.08, -0.2, -0.3, -0.1, 1e-6, 1e-5, 900, 900, 0.0)
    other = Lift("wide", "ctr", "books", 0.1, 0.09, -0.1, -0.2, 0.01, 0.04, 0.08, 900, 900, 0.0)
    found = judged(look(9, 0.004, 0.02), domains=(lift, other))
    assert (found.verdict, found.but_not) == ("ship", ("toys",))
    assert "falls in toys" in found.reasons[-1]


def test_the_best_of_several_arms() -> None:
    plan = PLAN.with_(arms=(*PLAN.arms, Arm("deep", version=3)))
    good, better, bad = look(9, 0.004, 0.02), look(9, 0.01, 0.03), look(9, -0.02, 0.001)
    assert decide(plan, {"wide": [good], "deep": [better]}, {}).arm == "deep"
    assert decide(plan, {"wide": [bad], "deep": [bad]}, {}).verdict == "stop"
    assert decide(plan, {"wide": [bad], "deep": [look(9, -0.01, 0.05)]}, {}).verdict == "not enough data yet"
