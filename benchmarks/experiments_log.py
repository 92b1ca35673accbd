"""Experiments through the event log: the same looks as from sums that were drawn, and how long the analysis takes."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from domlora.abtest.aggregate import COLUMNS, Log
from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.statistics import moments_of

__all__ = ["agreement", "timed"]

DAY_S = 86_400.0


def agreement(runs: int, looks_of: Callable[..., Any], seed: int = 7) -> dict[str, Any]:
    """Logs of 400 units and 10 days: how far the analysis of a log is from that of the sums it was drawn from."""
    random, apart, looks, same = np.random.default_rng(seed), 0.0, 0, 0
    for _ in range(max(runs, 1)):
        taste, activity = random.beta(8.0, 32.0, 400), random.gamma(2.0, 2.0, 400)
        shown = random.poisson(activity, (10, 400))
        clicks, treated = random.binomial(shown, taste), random.random(400) < 0.5
        plan = Experiment("wide", (Arm("now"), Arm("wide")), effect=0.2, cuped_s=0.0)
        expected = looks_of(*(_sums(shown, clicks, treated == side) for side in (False, True)), plan)
        running = plan.with_(status="running", slot=(0.0, 1.0), started_s=0.0)
        with _log(shown, clicks, treated) as connection:
            found = analyze(running, Log(connection), until_s=10 * DAY_S).looks["wide"]
        same += [look.number for look in found] == [look.number for look in expected]
        looks += len(found)
        apart = max(
            [apart, *(abs(a.z - b.z) + abs(a.critical - b.critical) for a, b in zip(found, expected, strict=True))]
        )
    return {"runs": max(runs, 1), "same_looks": same, "looks": looks, "largest_difference": apart}


def _sums(shown: NDArray[np.int64], clicks: NDArray[np.int64], part: NDArray[np.bool_]) -> NDArray[np.float64]:
    size = len(COLUMNS) + 1
    result = np.zeros((len(shown), size, size))
    for day in range(len(shown)):
        one = np.stack([shown[: day + 1, part].sum(0), clicks[: day + 1, part].sum(0)], -1)
        result[day, :3, :3] = moments_of(one[one[:, 0] > 0])
    return result


def _log(shown: NDArray[np.int64], clicks: NDArray[np.int64], treated: NDArray[np.bool_]) -> Any:
    day, unit = (np.repeat(grid.ravel(), shown.ravel()) for grid in np.indices(shown.shape))
    place = np.arange(len(unit)) - np.repeat(np.cumsum(shown.ravel()) - shown.ravel(), shown.ravel())
    clicked = np.flatnonzero(place < np.repeat(clicks.ravel(), shown.ravel()))
    names = np.char.add("r", np.arange(len(unit)).astype(str))
    time_s = day * DAY_S + place
    table = {"time_s": time_s, "request_id": names, "row": np.zeros(len(unit), np.int32), "unit": unit.astype(str)}
    table |= {"domain": np.full(len(unit), "toys"), "experiment": np.full(len(unit), "wide")}
    table["arm"] = np.where(treated[unit], "wide", "now")
    events = {name: table[name][clicked] for name in ("time_s", "request_id", "row", "unit")}
    events |= {"event": np.full(len(clicked), "click"), "value": np.ones(len(clicked))}
    connection = duckdb.connect()
    for name, columns in (("exposures", table), ("feedback", events)):
        connection.register(f"{name}_told", pa.table({key: pa.array(each) for key, each in columns.items()}))
        connection.execute(f"CREATE TABLE {name} AS FROM {name}_told")
    return connection


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
