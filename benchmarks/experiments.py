"""What the statistics of experiments promise, tried on units whose click probabilities are known.

``python benchmarks/experiments.py --out experiments.json`` takes some minutes; ``--rows 1e7`` also times the analysis of a
log of that many exposures. Every share has its 95 % interval (Wilson).

A unit has its own activity (rows a day) and its own taste (click probability), both drawn once, so that its rows resemble
each other and units differ in size: what makes naive intervals too short.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.power import needed_units
from domlora.abtest.sequential import look_at, planned_information
from domlora.abtest.statistics import Columns, Comparison, compare, interval, moments_of, sample_ratio

__all__ = ["found", "peeked", "planned", "ratio_coverage", "splits"]

CTR = Columns(over=2, under=1)
DAYS = 30
Z = float(stats.norm.isf(0.025))
DAY_S = 86_400.0


class Run(NamedTuple):
    """Both arms by day: ratio, its error in logarithms, and the naive one that takes rows for independent."""

    comparison: Comparison
    naive_error: NDArray[np.float64]


def simulate(random: np.random.Generator, units: int, lift: float) -> Run:
    """Half of the units in each arm, for 30 days."""
    moments, naive = [], 0.0
    for effect in (0.0, lift):
        activity, taste = random.gamma(2.0, 0.65, units // 2), random.beta(4.0, 36.0, units // 2)
        shown = random.poisson(activity, (DAYS, units // 2))
        clicks = random.binomial(shown, np.minimum(taste * (1 + effect), 1.0))
        sums = np.cumsum(np.stack([shown, clicks], -1), 0, dtype=np.float64)
        moments.append(moments_of(sums))
        total = sums.sum(1)
        naive = naive + 1 / total[:, 1] - 1 / total[:, 0]
    return Run(compare(moments[0], moments[1], CTR), np.sqrt(naive))


def planned(effect: float, power: float, seed: int = 0) -> int:
    """Units of both arms, from a pilot as it would be made: units as they are now, the same days."""
    pilot = simulate(np.random.default_rng(seed), 40_000, 0.0).comparison
    relative = float((pilot.control_error[-1] / pilot.control[-1]) ** 2) * 20_000
    return needed_units(relative, effect, power)


def found(runs: int, effect: float, power: float, seed: int = 1) -> dict[str, Any]:
    """A true lift at its planned size: is it found, and do the intervals hold it?"""
    random, units = np.random.default_rng(seed), planned(effect, power)
    information, counts = planned_information(effect, power, 0.05), np.zeros(5, int)
    for _ in range(runs):
        run = simulate(random, units, effect).comparison
        low, high = interval(run, Z)
        looks = look_at(run.lift, run.error, information, 0.05)
        counts += [
            low[-1] <= effect <= high[-1],
            all(look.low <= effect <= look.high for look in looks),
            any(look.crossed and look.lift > 0 for look in looks),
            bool(low[-1] > 0),
            any(look.crossed and look.number < 20 for look in looks),
        ]
    names = ("interval_holds_it", "all_bounds_hold_it", "found_by_looks", "found_by_one_test", "found_before_day_20")
    return {"units": units, **{name: share(int(count), runs) for name, count in zip(names, counts, strict=True)}}


def peeked(runs: int, units: int = 3000, seed: int = 2) -> dict[str, Any]:
    """No lift, looked at every day: how often is one claimed?"""
    random = np.random.default_rng(seed)
    effect = 0.15
    information = planned_information(effect, 0.8, 0.05) * units / planned(effect, 0.8)
    counts = np.zeros(3, int)
    for _ in range(runs):
        run, naive = simulate(random, units, 0.0)
        looks = look_at(run.lift, run.error, information, 0.05)
        counts += [
            any(look.crossed for look in looks),
            bool((np.abs(run.z) > Z).any()),
            bool((np.abs(np.log1p(run.lift)) > Z * naive).any()),
        ]
    names = ("boundary", "single_test_each_day", "rows_as_independent_each_day")
    return {"looks": DAYS, **{name: share(int(count), runs) for name, count in zip(names, counts, strict=True)}}


def splits(runs: int, units: int = 200_000, seed: int = 3) -> dict[str, Any]:
    """A fair split, and ones that lose 1 % and 2 % of the treated units: how often is it called broken?"""
    random, result = np.random.default_rng(seed), {}
    for name, lost in (("fair", 0.0), ("1_percent_lost", 0.01), ("2_percent_lost", 0.02)):
        treated = random.binomial(units, 0.5, runs)
        seen = random.binomial(treated, 1 - lost)
        called = sum(
            sample_ratio([units - all_, kept], [1, 1]) < 0.001 for all_, kept in zip(treated, seen, strict=True)
        )
        result[name] = share(int(called), runs)
    return {"units": units, **result}


def ratio_coverage(runs: int, units: int = 1000, seed: int = 4) -> dict[str, Any]:
    """A ratio of units of very unequal size (one has 10 rows, another 400): do 95 % of intervals hold the truth?"""
    random, lift = np.random.default_rng(seed), 0.1
    counts = np.zeros(2, int)
    for block in np.array_split(np.arange(runs), max(runs // 100, 1)):
        shape = (2, len(block), units // 2)
        size, taste = np.ceil(random.lognormal(2.0, 1.2, shape)), random.beta(1.0, 19.0, shape)
        clicks = random.binomial(size.astype(int), np.minimum(taste * np.array([1, 1 + lift])[:, None, None], 1.0))
        one = compare(*moments_of(np.stack([size, clicks], -1)), CTR)
        rows, rate = size.sum(-1), clicks.sum(-1) / size.sum(-1)
        error = np.sqrt(rate * (1 - rate) / rows)
        naive = Comparison(rate[0], rate[1], error[0], error[1], np.zeros(len(block)))
        counts += [int(((low <= lift) & (lift <= high)).sum()) for low, high in (interval(one, Z), interval(naive, Z))]
    return {"units": units, "by_unit": share(int(counts[0]), runs), "by_row": share(int(counts[1]), runs)}


def share(count: int, runs: int) -> dict[str, Any]:
    bounds = stats.binomtest(count, runs).proportion_ci(method="wilson")
    return {
        "share": count / runs,
        "low": round(float(bounds.low), 4),
        "high": round(float(bounds.high), 4),
        "runs": runs,
    }


def timed(rows: int) -> dict[str, Any]:
    """A log of so many exposures: 10 a request, 30 a unit, 20 domains, half of them from the two weeks before the start."""
    experiment = Experiment(
        "wide", (Arm("now"), Arm("wide", version=2)), status="running", slot=(0.0, 1.0), started_s=14 * DAY_S
    )
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), rows)
        begun = time.perf_counter()
        result = analyze(experiment, Path(name))
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    units = sum(result.sample_ratio.units.values())
    return {
        "rows": rows,
        "units": units,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak),
        "cores": duckdb_threads(),
    }


def write(folder: Path, rows: int, parts: int = 10) -> None:
    for kind in ("exposures", "feedback"):
        (folder / kind).mkdir()
    day = "(n // 10 * 37 % 28)"
    for part in range(parts):
        exposures = folder / "exposures" / f"{part}.parquet"
        duckdb.execute(
            f"""COPY (SELECT ({day} * {DAY_S} + n % 86400)::DOUBLE AS time_s, 'r' || lpad((n // 10)::VARCHAR, 20, '0')
            AS request_id, (n % 10)::INTEGER AS row, 'user-' || u AS unit, 'd' || (n // 10 % 20) AS domain,
            CASE WHEN {day} < 14 THEN '' ELSE 'wide' END AS experiment,
            CASE WHEN {day} < 14 THEN '' WHEN hash(u) % 2 = 0 THEN 'now' ELSE 'wide' END AS arm, '3' AS bundle,
            '3' AS adapter, NULL::VARCHAR AS item, 0.1::FLOAT AS probability
            FROM (SELECT range AS n, hash(range // 10) % {rows // 30} AS u
                FROM range({part * rows // parts}, {(part + 1) * rows // parts}))) TO '{exposures}'"""
        )
        duckdb.execute(
            f"""COPY (SELECT time_s + 5 AS time_s, request_id, row, unit, e AS event, 1.0::DOUBLE AS value
            FROM '{exposures}', (VALUES ('click', 0.05), ('conversion', 0.004)) AS events(e, p)
            WHERE hash(request_id, row, e) % 10000 < p * 10000) TO '{folder / "feedback" / f"{part}.parquet"}'"""
        )


def duckdb_threads() -> int:
    found = duckdb.execute("SELECT current_setting('threads')").fetchone()
    return int(found[0]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    parser.add_argument("--rows", type=float, default=0, help="time the analysis of a log of so many exposures")
    told = parser.parse_args()
    less = 10 if told.quick else 1
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "split": lambda: splits(2000 // less),
        "ratio, unequal units": lambda: ratio_coverage(2000 // less),
        "no lift, 30 looks": lambda: peeked(2000 // less),
        "lift 1.5 %, power 95 %": lambda: found(200 // less, 0.015, 0.95),
        "lift 1.5 %, power 80 %": lambda: found(200 // less, 0.015, 0.8, seed=11),
    }
    if told.rows:
        parts["log"] = lambda: timed(int(told.rows))
    result = {}
    for name, part in parts.items():
        result[name] = part()
        print(json.dumps({name: result[name]}, indent=1), flush=True)
    if told.out:
        told.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
