"""Arms that run in turns, so that a machine whose speed drifts is the same machine for all of them.

A round visits every arm once, in an order that is drawn anew each time. A visit is one call that is not timed (it warms the
caches that the arm before left cold) and then as many as fit a time slice; a visit's figure is their mean. What is reported
of an arm is the median over rounds; what is reported of two arms is the median over rounds of the ratio *within* a round,
with the 10th and 90th percentile of those ratios as the spread.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

__all__ = ["Arms", "Ratio", "Timings", "digits", "interleave", "ratio_of", "take_turns"]

Arms = Mapping[str, Callable[[], object]]
SLICE_S, MIN_CALLS = 0.15, 3
SLOW_S = 0.25  # a call this long warms itself: its first milliseconds do not decide


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median, 10th and 90th percentile of the ratios of some rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{digits(self.median)} [{digits(self.low)}, {digits(self.high)}]"


@dataclass(slots=True)
class Timings:
    """Seconds a call of each arm, one figure a round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        return statistics.median(self.seconds[arm])

    def ratio(self, arm: str, over: str) -> Ratio:
        """How many times as long as ``over`` an arm takes."""
        pairs = list(zip(self.seconds[arm], self.seconds[over], strict=True))
        return ratio_of([mine / theirs for mine, theirs in pairs])


def ratio_of(values: list[float]) -> Ratio:
    """The summary of the ratios of some rounds."""
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0], 1)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Ratio(statistics.median(values), tenths[0], tenths[-1], len(values))


def interleave(arms: Arms, seconds: float, min_rounds: int = 5) -> Timings:
    """Time calls of the arms in rounds until ``seconds`` are over, and ``min_rounds`` at the least."""
    slice_s = min(SLICE_S, seconds)
    calls = {name: _calls_of(arm, slice_s) for name, arm in arms.items()}
    return take_turns({name: partial(_visit, arm, calls[name]) for name, arm in arms.items()}, seconds, min_rounds)


def take_turns(arms: Mapping[str, Callable[[], float]], seconds: float, min_rounds: int) -> Timings:
    """The same with arms that say themselves how long they took."""
    timings = Timings({name: [] for name in arms})
    order, draw = list(arms), random.Random(0)
    gc.collect()
    started, done = time.perf_counter(), 0
    while done < min_rounds or time.perf_counter() - started < seconds:
        draw.shuffle(order)
        for name in order:
            timings.seconds[name].append(arms[name]())
        done += 1
    return timings


def _calls_of(arm: Callable[[], object], slice_s: float) -> int:
    """How many calls fit the slice; 0 for a single one that is not warmed: of a slow arm, or with no time to spend."""
    arm()  # the first call allocates
    start = time.perf_counter()
    arm()
    took = time.perf_counter() - start
    return 0 if took > SLOW_S or not slice_s else max(round(slice_s / took), MIN_CALLS)


def _visit(arm: Callable[[], object], calls: int) -> float:
    if calls:
        arm()
    start = time.perf_counter()
    for _ in range(max(calls, 1)):
        arm()
    return (time.perf_counter() - start) / max(calls, 1)


def digits(value: float) -> str:
    """Three figures or so."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
