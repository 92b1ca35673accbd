"""Boundaries against published ones and by simulation: what peeking costs, and what it would cost without them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from domlora.abtest.sequential import boundaries, crossing_probability, drift, look_at, planned_information, spent
from domlora.errors import ConfigError

LOOKS = np.arange(1, 31) / 30


def walks(runs: int, looks: np.ndarray, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """z at each look of a test statistic of independent increments."""
    steps = np.diff(looks, prepend=0.0)
    moves = np.random.default_rng(seed).normal(shift * steps, np.sqrt(steps), (runs, len(looks)))
    return np.cumsum(moves, 1) / np.sqrt(looks)


def test_published_boundaries() -> None:
    """O'Brien-Fleming-like spending, five equal looks, two-sided 5 %: ``ldbounds`` and ``gsDesign`` print these."""
    assert boundaries([0.2, 0.4, 0.6, 0.8, 1.0], 0.05) == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=5e-4)
    assert boundaries([0.5, 1.0], 0.05) == pytest.approx([2.963, 1.969], abs=5e-4)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("looks", [LOOKS, [0.07, 0.1, 0.55, 0.8, 1.04], [1.0], [0.02, 0.3]])
def test_all_looks_spend_what_is_allowed(looks: np.ndarray, alpha: float) -> None:
    assert crossing_probability(looks, boundaries(looks, alpha)) == pytest.approx(spent(looks, alpha)[-1], abs=1e-6)


def test_one_look_is_the_usual_test() -> None:
    assert boundaries([1.0], 0.05)[0] == pytest.approx(stats.norm.isf(0.025), abs=1e-5)
    assert drift(0.8, 0.05) > stats.norm.isf(0.025) + stats.norm.ppf(0.8)


def test_peeking_thirty_times_keeps_the_false_alarms() -> None:
    z = walks(20_000, LOOKS)
    alarms = int((np.abs(z) > boundaries(LOOKS, 0.05)).any(1).sum())
    naive = (np.abs(z) > 1.96).any(1).mean()
    assert stats.binomtest(alarms, len(z), 0.05, alternative="greater").pvalue > 0.01
    assert naive > 0.25


def test_the_planned_power_is_reached() -> None:
    z = walks(20_000, LOOKS, shift=drift(0.8, 0.05), seed=1)
    found = int((z > boundaries(LOOKS, 0.05)).any(1).sum())
    assert stats.binomtest(found, len(z), 0.8).pvalue > 0.01


def test_bounds_hold_at_all_looks_together() -> None:
    information, lift = 40_000.0, 0.015
    inside = 0
    for z in walks(60, LOOKS, seed=2):
        error = 1 / np.sqrt(LOOKS * information)
        looks = look_at(np.expm1(np.log1p(lift) + z * error), error, information, 0.05)
        inside += all(look.low <= lift <= look.high for look in looks)
    assert stats.binomtest(inside, 60, 0.95, alternative="less").pvalue > 0.01


def test_looks_end_at_the_plan_and_skip_what_adds_nothing() -> None:
    information = planned_information(0.02, 0.8, 0.05)
    fractions = np.array([np.nan, 0.3, 0.3001, 0.29, 0.7, 1.2, 1.5])
    found = look_at(np.full(7, 0.001), 1 / np.sqrt(fractions * information), information, 0.05)
    assert [look.number for look in found] == [1, 4, 5]
    assert not any(look.crossed for look in found)
    assert look_at([np.nan], [np.nan], information, 0.05) == ()


def test_overwhelming_evidence_crosses_early() -> None:
    found = look_at([0.5], [0.01], 1 / (0.02 * 0.01**2) * 0.02 * 10, 0.05)
    assert found[0].fraction == pytest.approx(0.1)
    assert found[0].critical > 6
    assert found[0].crossed


@pytest.mark.parametrize("fractions", [[], [0.0, 0.5], [0.5, 0.5], [0.6, 0.4]])
def test_fractions_must_rise(fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match="must rise"):
        boundaries(fractions, 0.05)
