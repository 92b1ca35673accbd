"""What the statistics of experiments promise, tried on units whose click probabilities are known.

``python benchmarks/experiments.py --out runs/experiments.json --page docs/results/experiments.md`` takes ten minutes of
one core. What the file already has is not done again, so that a run that was ended goes on. ``--rows 1e7`` also times the
analysis of a log of that many exposures.

A unit has its own activity (rows a day) and its own taste (click probability), both drawn once, so that its rows resemble
each other and units differ in size: what makes naive intervals too short. Sums over units are drawn directly and judged by
the functions that ``domlora ab analyze`` calls; the part "log" holds both ways against each other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from experiments_log import agreement, timed
from experiments_page import write_page
from numpy.typing import NDArray
from scipy import stats

from domlora.abtest.aggregate import COLUMNS, columns_of
from domlora.abtest.analysis import looks_of
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.power import needed_units
from domlora.abtest.sequential import boundaries, drift
from domlora.abtest.statistics import Columns, Comparison, compare, interval, moments_of

__all__ = ["SETTINGS", "Setting", "false_alarms", "found", "planned", "ratio_coverage", "splits"]

Floats = NDArray[np.float64]
CTR = Columns(over=2, under=1)
Z = float(stats.norm.isf(0.025))
NEVER = 1.75  # standard errors: no boundary is below a single test's 1.96


@dataclass(frozen=True)
class Setting:
    """Units that behave alike in both arms, and how often they are looked at.

    Args:
        units: of the control and of the treatment.
        looks: ends of days.
        rate: mean click probability; that of a purchase for ``value``.
        activity: rows a day.
        alike: units' probabilities differ less if it is larger (``a + b`` of a beta distribution).
        primary: ``ctr``, or ``value`` with log-normal values.
        arriving: units come on all days, not all on the first one.
        cuped: share of the looks' days that there were before the start.
    """

    units: tuple[int, int]
    looks: int = 30
    rate: float = 0.1
    activity: float = 1.3
    alike: float = 40.0
    primary: str = "ctr"
    arriving: bool = False
    cuped: float = 0.0


BASE = Setting((1500, 1500))
SETTINGS = {
    "CTR 10 %, 30 looks": BASE,
    "CTR 1 %, 10 looks": Setting((800, 800), 10, 0.01, 8.0),
    "CTR 5 %, 5 looks": Setting((800, 800), 5, 0.05, 4.0),
    "CTR 20 %, 60 looks": Setting((200, 200), 60, 0.2, 1.3, 10.0),
    "100 units an arm, 10 looks": Setting((100, 100), 10, 0.2, 6.0),
    "ten times as many in the control": Setting((3000, 300), 10, 0.05, 6.0),
    "units arrive all the time": Setting((600, 600), 14, 0.1, 2.6, arriving=True),
    "with the period before (CUPED)": Setting((500, 500), 10, 0.1, 2.0, cuped=1.0),
    "value by unit, log-normal": Setting((3000, 3000), 6, 0.01, 4.0, primary="value"),
    "value, too few purchases": Setting((600, 600), 6, 0.01, 4.0, primary="value"),
}


def drawn(random: np.random.Generator, setting: Setting, runs: int, units: int, lift: float = 0.0) -> Floats:
    """Moments of an arm by the end of each look, as the analysis makes them of a log: (runs, looks, K + 1, K + 1)."""
    shape = (runs, setting.looks, units)
    taste = random.beta(setting.rate * setting.alike, (1 - setting.rate) * setting.alike, (runs, 1, units))
    activity = random.gamma(2.0, setting.activity / 2, (runs, 1, units))
    daily = np.broadcast_to(activity, shape)
    if setting.arriving:
        daily = daily * (np.arange(setting.looks)[:, None] >= random.integers(setting.looks, size=(runs, 1, units)))
    clicks, others = (
        random.poisson(daily * np.minimum(part, 1.0)) for part in (taste * (1 + lift), 1 - taste * (1 + lift))
    )
    columns = {
        "shown": np.cumsum(clicks + others, 1, dtype=np.float64),
        "clicks": np.cumsum(clicks, 1, dtype=np.float64),
    }
    if setting.primary == "value":
        columns["value"] = np.cumsum(_values(random, clicks), 1)
    if setting.cuped:
        past = activity * setting.looks * setting.cuped
        before = random.poisson(past * taste), random.poisson(past * (1 - taste))
        columns |= {
            "before_clicks": before[0] * np.ones(shape),
            "before_shown": (before[0] + before[1]) * np.ones(shape),
        }
    return _moments(columns, columns["shown"] > 0)


def _values(random: np.random.Generator, clicks: NDArray[np.int64]) -> Floats:
    """Log-normal, the mean of purchases of a day for each of them."""
    values, bought = np.zeros(clicks.shape), clicks > 0
    values[bought] = clicks[bought] * random.lognormal(0.0, 1.0, int(bought.sum()))
    return values


def _moments(columns: Mapping[str, Floats], seen: NDArray[np.bool_]) -> Floats:
    size = len(COLUMNS) + 1
    result = np.zeros((*seen.shape[:2], size, size))
    known = {0: seen.astype(np.float64), **{1 + COLUMNS.index(name): each * seen for name, each in columns.items()}}
    for a, one in known.items():
        for b, two in known.items():
            if a <= b:
                result[..., a, b] = result[..., b, a] = np.einsum("rlu,rlu->rl", one, two)
    return result


def planned(setting: Setting, effect: float, power: float, seed: int = 0) -> int:
    """Units of both arms, from a pilot as it would be made: units as they are now, the same days."""
    return needed_units(_relative(setting, seed), effect, power)


def _relative(setting: Setting, seed: int) -> float:
    """Of one unit's metric, the variance over the square."""
    pilot = drawn(np.random.default_rng(seed), setting, 1, 60_000)[0, -1]
    one = compare(pilot, pilot, columns_of(setting.primary, cuped=setting.cuped > 0))
    return float((one.control_error / one.control) ** 2) * 60_000


def _experiment(setting: Setting, seed: int) -> Experiment:
    """One whose plan is reached at the last look, more often than not."""
    first, second = setting.units
    error = np.sqrt(_relative(setting, seed) * (1 / first + 1 / second))
    effect = float(np.expm1(drift(0.8, 0.05) * error / np.sqrt(0.93)))
    arms = (Arm("now", weight=float(first)), Arm("wide", weight=float(second)))
    return Experiment("null", arms, effect=min(effect, 0.99), primary=setting.primary, cuped_s=setting.cuped * 86_400.0)


def false_alarms(setting: Setting, runs: int, seed: int = 2) -> dict[str, Any]:
    """No lift, looked at after every day: how often is one claimed?"""
    random, experiment = np.random.default_rng(seed), _experiment(setting, seed)
    columns = columns_of(setting.primary, cuped=setting.cuped > 0)
    counts, ended = np.zeros(3, int), 0
    block = max(1, int(2e6 // (setting.looks * max(setting.units))))
    for start in range(0, runs, block):
        now, new = (drawn(random, setting, min(block, runs - start), units) for units in setting.units)
        with np.errstate(all="ignore"):
            z = np.abs(compare(now, new, columns).z)
        for control, treatment, far in zip(now, new, np.nan_to_num(z).max(1), strict=True):
            looks = looks_of(control, treatment, experiment) if far > NEVER else ()
            crossed = [look for look in looks if look.crossed]
            counts += [bool(crossed), bool(crossed) and crossed[0].lift > 0, far > Z]
            ended += 1
    names = ("alarms", "alarms_upwards", "single_test_each_look")
    shares = {name: share(int(count), ended) for name, count in zip(names, counts, strict=True)}
    return {**asdict(setting), "effect": experiment.effect, **shares}


def found(runs: int, effect: float, power: float, seed: int = 1) -> dict[str, Any]:
    """A true lift at its planned size: is it found, and do the intervals hold it?"""
    random, units = np.random.default_rng(seed), planned(BASE, effect, power)
    plan = Experiment("lift", (Arm("now"), Arm("wide")), effect=effect, power=power, cuped_s=0.0)
    counts = np.zeros(5, int)
    for _ in range(runs):
        control, treatment = (drawn(random, BASE, 1, units // 2, lift)[0] for lift in (0.0, effect))
        low, high = interval(compare(control[-1], treatment[-1], CTR), Z)
        looks = looks_of(control, treatment, plan)
        first = next((look for look in looks if look.crossed), looks[-1])
        up = first.crossed and first.lift > 0
        counts += [
            up,
            low <= effect <= high,
            up and low <= effect <= high,
            up and first.low <= effect <= first.high,
            up and first.number < 20,
        ]
    names = ("found", "interval_holds_it", "both", "found_and_its_bounds_hold_it", "found_before_day_20")
    return {"units": units, **{name: share(int(count), runs) for name, count in zip(names, counts, strict=True)}}


def splits(runs: int, seed: int = 3, looks: int = 30) -> dict[str, Any]:
    """Fair splits, and ones that lose some treated units: how often are they called broken, at any look?

    The rule of the analysis, for many runs at once: the boundary of 1 % at the looks, and a p-value below 0.0001 at any.
    """
    random, bound = np.random.default_rng(seed), boundaries(np.arange(1, looks + 1) / looks, 0.01)
    result = {}
    for units in (20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000):
        for lost in (0.0, 0.005, 0.01, 0.02, 0.05):
            treated = random.binomial(units // looks, 0.5, (runs, looks))
            seen = np.cumsum(random.binomial(treated, 1 - lost), 1)
            total = np.cumsum(units // looks - treated, 1) + seen
            z = np.abs(seen - total / 2) / np.sqrt(total / 4)
            called = (z > bound).any(1) | (z > stats.norm.isf(0.00005)).any(1)
            once = z[:, -1] > stats.norm.isf(0.0005)  # one chi-square test of 0.001 at the end
            result[f"{units} {lost}"] = {
                "units": units,
                "lost": lost,
                "called": share(int(called.sum()), runs),
                "one_test": share(int(once.sum()), runs),
            }
    return result


def ratio_coverage(runs: int, units: int = 1000, seed: int = 4) -> dict[str, Any]:
    """A ratio of units of very unequal size (one has 10 rows, another 400): do 95 % of intervals hold the truth?"""
    random, lift = np.random.default_rng(seed), 0.1
    counts = np.zeros(2, int)
    for block in np.array_split(np.arange(runs), max(runs // 100, 1)):
        shape = (2, len(block), units // 2)
        size, taste = np.ceil(random.lognormal(2.0, 1.2, shape)), random.beta(1.0, 19.0, shape)
        clicks = random.binomial(size.astype(int), np.minimum(taste * np.array([1, 1 + lift])[:, None, None], 1.0))
        now, new = moments_of(np.stack([size, clicks], -1))
        one = compare(now, new, CTR)
        rows, rate = size.sum(-1), clicks.sum(-1) / size.sum(-1)
        error = np.sqrt(rate * (1 - rate) / rows)
        naive = Comparison(rate[0], rate[1], error[0], error[1], np.zeros(len(block)))
        bounds = (interval(one, stats.t.isf(0.025, one.freedom)), interval(naive, Z))
        counts += [int(((low <= lift) & (lift <= high)).sum()) for low, high in bounds]
    return {"units": units, "by_unit": share(int(counts[0]), runs), "by_row": share(int(counts[1]), runs)}


def share(count: int, runs: int) -> dict[str, Any]:
    """With its 95 % interval (Wilson)."""
    low, high = stats.binomtest(count, runs).proportion_ci(method="wilson")
    return {"share": count / runs, "low": round(float(low), 4), "high": round(float(high), 4), "runs": runs}


def parts_of(less: int, rows: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is tried, by name."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "split": partial(splits, 10_000 // less),
        "ratio, unequal units": partial(ratio_coverage, 4_000 // less),
        "log": partial(agreement, 40 // less, looks_of),
    }
    for name, setting in SETTINGS.items():
        parts[f"no lift: {name}"] = partial(false_alarms, setting, 5_000 // less)
    for power in (0.8, 0.95, 0.99):
        parts[f"lift 1.5 %, power {power:.0%}"] = partial(found, 200 // less, 0.015, power)
    if rows:
        parts["time"] = partial(timed, rows)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments.json"), help="the figures; gone on with")
    parser.add_argument("--page", type=Path, help="a Markdown page of them")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the runs")
    parser.add_argument("--rows", type=float, default=0, help="time the analysis of a log of so many exposures")
    told = parser.parse_args()
    result = json.loads(told.out.read_text(encoding="utf-8")) if told.out.exists() else {}
    told.out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts_of(100 if told.quick else 1, int(told.rows)).items():
        if name in result:
            continue
        begun = time.process_time()
        result[name] = {**part(), "cpu_s": round(time.process_time() - begun, 1)}
        print(json.dumps({name: result[name]}), flush=True)
        told.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if told.page:
        write_page(result, told.page)


if __name__ == "__main__":
    main()
