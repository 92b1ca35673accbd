"""From the event log to sums over units, in DuckDB: a row of the log is never seen by Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from domlora.abtest.experiments import Experiment
from domlora.abtest.segments import EXPOSURES, FEEDBACK, reading, whole_ones
from domlora.abtest.statistics import Columns
from domlora.errors import DataError

__all__ = ["COLUMNS", "TODAY", "Log", "Sums", "columns_of", "log_of", "over_units", "spread_of"]

Floats = NDArray[np.float64]

TODAY = ("shown", "clicks", "conversions", "payers", "value")
"""What is summed by unit."""
COLUMNS = (*TODAY, *(f"before_{name}" for name in TODAY))
"""The order of the moments' columns, after the constant 1."""

_RATIOS = {
    "ctr": ("clicks", "shown"),
    "cvr": ("conversions", "clicks"),
    "payers": ("payers", None),
    "value": ("value", None),
}
_KEYS = ("arm", "domain")
_WINDOW_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Log:
    """Two relations of a DuckDB connection with the columns of the event log.

    Args:
        connection: temporary tables are made in it.
        exposures, feedback: names of tables or views.
    """

    connection: Any
    exposures: str = "exposures"
    feedback: str = "feedback"

    def rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        found: list[tuple[Any, ...]] = self.connection.execute(query, list(parameters)).fetchall()
        return found


@dataclass(frozen=True, slots=True)
class Sums:
    """What an analysis is made of.

    Args:
        until_s: time of the last exposure.
        by_domain: moments by arm and domain; units are those of the domain.
        overall: moments by arm.
        by_look: by arm, moments (looks, K + 1, K + 1) of what is known by the end of each look.
        crossed: units that were seen in more than one arm, and left out.
        held_out: units that were kept out.
    """

    until_s: float
    by_domain: Mapping[tuple[str, str], Floats]
    overall: Mapping[str, Floats]
    by_look: Mapping[str, Floats]
    crossed: int
    held_out: int


@contextmanager
def log_of(folder: Path, *, memory: str = "4GB", threads: int | None = None) -> Iterator[Log]:
    """The event log in a folder, which holds ``exposures/*.parquet`` and ``feedback/*.parquet``.

    Damaged files are left out, with a warning.

    Args:
        folder: the log, or the store around it.
        memory: what DuckDB may take; beyond, it goes to disk.
        threads: of DuckDB; None for all cores.

    Raises:
        DataError: nothing was shown yet.
    """
    place = folder / "log" if (folder / "log").is_dir() else folder
    with reading(place) as found, TemporaryDirectory(prefix="domlora-ab-") as spare:
        files = {kind: whole_ones(paths) for kind, paths in found.items()}
        if not files["exposures"]:
            raise DataError("a log must hold exposures", received=str(folder), next_step="Serve some requests first")
        connection = duckdb.connect(config={"memory_limit": memory, "temp_directory": spare})
        try:
            if threads is not None:
                connection.execute(f"SET threads = {threads}")
            connection.execute("SET preserve_insertion_order = false")
            connection.execute("SET enable_progress_bar = false")  # it would stand among the lines of who prints
            _make_view(connection, "exposures", files["exposures"], EXPOSURES)
            _make_view(connection, "feedback", files["feedback"], FEEDBACK)
            yield Log(connection)
        finally:
            connection.close()


def columns_of(metric: str, *, cuped: bool) -> Columns:
    """Where the moments hold a metric, as :func:`domlora.abtest.statistics.compare` wants it.

    >>> columns_of("ctr", cuped=False), columns_of("value", cuped=True)
    (Columns(over=2, under=1, before=None), Columns(over=5, under=0, before=(10, 0)))
    """
    over, under = _RATIOS[metric]
    places = [0 if name is None else 1 + COLUMNS.index(name) for name in (over, under)]
    past = [0 if name is None else 1 + COLUMNS.index(f"before_{name}") for name in (over, under)]
    return Columns(places[0], places[1], (past[0], past[1]) if cuped else None)


def over_units(log: Log, experiment: Experiment, *, until_s: float | None = None, window_s: float = _WINDOW_S) -> Sums:
    """Sum an experiment's log up by unit, and the units' squares and products by arm, domain and look.

    A row counts once, also where its request was sent twice under one id: as it was answered first. A click counts once a
    row, and so does a conversion, with the largest value that was told; a value of 0 says that it did not happen. Feedback
    belongs to the row of its request. Where it names no row, it belongs to what its unit saw last, at most ``window_s``
    before. What came of a row counts at the time when the row was shown.

    Args:
        log: of any number of experiments.
        experiment: one that was started.
        until_s: what comes later is not looked at.
        window_s: for feedback that names no row.

    Raises:
        DataError: the experiment was not started, or the log has nothing of it.
    """
    if experiment.started_s is None:
        raise DataError("an experiment must have been started", received=experiment.name, next_step="Start it")
    start, end = experiment.started_s, min(until_s or np.inf, experiment.stopped_s or np.inf)
    _make_happened(log, end, window_s)
    shown = "experiment = ? AND time_s >= ? AND time_s < ?"
    told = [experiment.name, start, end]
    last = log.rows(
        f"SELECT max(time_s)::DOUBLE FROM {log.exposures} WHERE {shown} AND coalesce(unit, '') <> ''", told
    )[0][0]
    if last is None:
        raise DataError("the log must hold exposures of the experiment", received=experiment.name)
    crossed, held_out = _make_seen(log, shown, told, experiment)
    _make_before(log, start - experiment.cuped_s, start)
    looks = int((last - start) // experiment.look_s) + 1
    return Sums(
        float(last),
        _moments(log, _totals("unit, arm, domain", "before_by_domain", ("unit", "domain")), _KEYS, COLUMNS),
        {
            key[0]: each
            for key, each in _moments(log, _totals("unit, arm", "before", ("unit",)), ("arm",), COLUMNS).items()
        },
        _by_look(log, looks, columns_of(experiment.primary, cuped=True)),
        crossed,
        held_out,
    )


def spread_of(log: Log, *, look_s: float, metric: str, domains: Sequence[str] | None = None) -> Floats:
    """Moments of all that is in the log, as if it were one arm, by the end of each whole look: (looks, K + 1, K + 1).

    Raises:
        DataError: the log has no units.
    """
    _make_happened(log, float("inf"), _WINDOW_S)
    within = "TRUE" if domains is None else f"domain IN ({', '.join('?' * len(domains))})"
    told = list(domains or ())
    found = log.rows(
        f"SELECT min(time_s)::DOUBLE, max(time_s)::DOUBLE FROM {log.exposures} WHERE coalesce(unit, '') <> '' AND {within}",
        told,
    )
    start, end = found[0]
    if start is None:
        raise DataError("a log must hold units", received=log.exposures, next_step="Send a unit with each request")
    _sum_up(log, f"(SELECT * REPLACE ('' AS arm) FROM {_once(log, within, told)})", told, start, look_s)
    _make_before(log, start, start)
    looks = _by_look(log, int((end - start) // look_s) + 1, columns_of(metric, cuped=False))[""]
    return looks[: max(int((end - start) / look_s), 1)]


def _make_view(connection: Any, kind: str, files: Sequence[Path], schema: Any) -> None:
    if files:
        connection.from_parquet([str(path) for path in files], union_by_name=True).create_view(kind)
    else:
        connection.register(kind, schema.empty_table())


def _make_happened(log: Log, end: float, window_s: float) -> None:
    """What came of each row: the table ``happened``."""
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE told AS
        SELECT request_id, row, unit, time_s, event, value FROM {log.feedback}
        WHERE event IN ('click', 'conversion') AND value > 0 AND NOT isnan(value) AND time_s < {_number(end)}"""
    )
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE happened AS
        WITH unplaced AS (SELECT * FROM told WHERE row IS NULL OR row < 0),
        seen AS (SELECT unit, time_s, request_id, row FROM {log.exposures} SEMI JOIN unplaced USING (unit)),
        placed AS (
            SELECT request_id, row, event, value FROM told WHERE row >= 0
            UNION ALL
            SELECT s.request_id, s.row, u.event, u.value FROM unplaced u ASOF JOIN seen s
                ON u.unit = s.unit AND u.time_s >= s.time_s
            WHERE u.time_s - s.time_s <= {_number(window_s)}
        )
        SELECT request_id, row, max((event = 'click')::DOUBLE) AS clicks, max((event = 'conversion')::DOUBLE) AS conversions,
            coalesce(max(value) FILTER (event = 'conversion'), 0.0) AS value
        FROM placed GROUP BY request_id, row"""
    )


def _make_seen(log: Log, shown: str, told: list[Any], experiment: Experiment) -> tuple[int, int]:
    """Sums by unit, arm, domain and look: the table ``seen``; units in several arms are counted and taken out."""
    names = [arm.name for arm in experiment.arms]
    _sum_up(log, _once(log, shown, told), told, told[1], experiment.look_s)
    listed = ", ".join("?" * len(names))
    held_out = log.rows(f"SELECT count(DISTINCT unit) FROM seen WHERE arm NOT IN ({listed})", names)[0][0]
    log.rows(f"DELETE FROM seen WHERE arm NOT IN ({listed})", names)
    log.connection.execute(
        "CREATE OR REPLACE TEMP TABLE crossed AS SELECT unit FROM seen GROUP BY unit HAVING min(arm) <> max(arm)"
    )
    crossed = log.rows("SELECT count(*) FROM crossed")[0][0]
    if crossed:
        log.connection.execute("DELETE FROM seen WHERE unit IN (FROM crossed)")
    return int(crossed), int(held_out)


def _once(log: Log, within: str, told: Sequence[Any]) -> str:
    """A query of exposures with each row of an answer once, as it was shown first.

    A row is there for each experiment, and again where a client or a proxy sent two requests under one id. In one experiment
    few are: a hash tells them from the others, and only they are compared.
    """
    some, columns = f"{within} AND coalesce(request_id, '') <> ''", "time_s, request_id, row, unit, domain, arm"
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE twice AS SELECT hash(request_id, row) AS key FROM {log.exposures} WHERE {some}
        GROUP BY key HAVING count(*) > 1""",
        told,
    )
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE firsts AS SELECT DISTINCT ON (request_id, row) {columns} FROM {log.exposures}
        WHERE {some} AND hash(request_id, row) IN (FROM twice) ORDER BY request_id, row, time_s, unit, domain, arm""",
        told,
    )
    rest = f"SELECT {columns} FROM {log.exposures} WHERE {within} AND hash(request_id, row) NOT IN (FROM twice)"
    return f"({rest} UNION ALL FROM firsts)"


def _sum_up(log: Log, source: str, told: list[Any], start: float, look_s: float) -> None:
    # 64 bits of hash stand for a unit: among 1e7 of them, two are taken for one with a chance of 3e-6
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE seen AS
        SELECT hash(unit) AS unit, arm, coalesce(domain, '') AS domain,
            floor((time_s - {_number(start)}) / {_number(look_s)})::INTEGER AS look,
            count(*)::DOUBLE AS shown, coalesce(sum(clicks), 0.0) AS clicks,
            coalesce(sum(conversions), 0.0) AS conversions, coalesce(sum(value), 0.0) AS value
        FROM {source} LEFT JOIN happened USING (request_id, row)
        WHERE coalesce(unit, '') <> '' GROUP BY ALL""",
        told,
    )


def _make_before(log: Log, start: float, end: float) -> None:
    """The same sums of the period before, of units that were seen since: the tables ``before`` and ``before_by_domain``."""
    within = f"time_s >= {_number(start)} AND time_s < {_number(end)}"
    within += " AND coalesce(unit, '') <> '' AND hash(unit) IN (SELECT unit FROM seen)"
    log.connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE before_by_domain AS
        SELECT hash(unit) AS unit, coalesce(domain, '') AS domain, count(*)::DOUBLE AS before_shown,
            coalesce(sum(clicks), 0.0) AS before_clicks, coalesce(sum(conversions), 0.0) AS before_conversions,
            coalesce(sum(value), 0.0) AS before_value
        FROM {_once(log, within, ())} LEFT JOIN happened USING (request_id, row) GROUP BY ALL"""
    )
    log.connection.execute(
        "CREATE OR REPLACE TEMP TABLE before AS SELECT unit, sum(before_shown) AS before_shown, sum(before_clicks) AS "
        "before_clicks, sum(before_conversions) AS before_conversions, sum(before_value) AS before_value "
        "FROM before_by_domain GROUP BY unit"
    )


def _totals(keys: str, before: str, on: Sequence[str]) -> str:
    """A query of one row a unit (and domain) with all columns."""
    now = "sum(shown) AS shown, sum(clicks) AS clicks, sum(conversions) AS conversions, sum(value) AS value"
    past = ", ".join(
        f"coalesce(before_{name}, 0.0) AS before_{name}" for name in ("shown", "clicks", "conversions", "value")
    )
    return f"""SELECT {keys}, shown, clicks, conversions, least(conversions, 1.0) AS payers, value, {past},
        least(coalesce(before_conversions, 0.0), 1.0) AS before_payers
        FROM (SELECT {keys}, {now} FROM seen GROUP BY {keys}) LEFT JOIN {before} USING ({", ".join(on)})"""


def _moments(log: Log, query: str, keys: Sequence[str], columns: Sequence[str]) -> dict[tuple[Any, ...], Floats]:
    names = ("1.0", *columns)
    pairs = list(combinations_with_replacement(range(len(names)), 2))
    sums = ", ".join(f"sum({names[a]} * {names[b]})" for a, b in pairs)
    found = log.rows(f"SELECT {', '.join(keys)}, {sums} FROM ({query}) GROUP BY {', '.join(keys)}")
    return {row[: len(keys)]: _square(row[len(keys) :], pairs, len(names)) for row in found}


def _square(values: Sequence[float], pairs: Sequence[tuple[int, int]], size: int) -> Floats:
    matrix = np.zeros((size, size))
    for (a, b), value in zip(pairs, values, strict=True):
        matrix[a, b] = matrix[b, a] = value
    return matrix


def _by_look(log: Log, looks: int, columns: Columns) -> dict[str, Floats]:
    """Moments known by the end of each look, of the columns of one metric; all others stay 0.

    Where a unit's sums grow from u to v in a look, its products grow by v v' − u u', so that one pass makes all looks.
    """
    wanted = sorted({columns.over, columns.under, *(columns.before or ())} - {0})
    names = [COLUMNS[place - 1] for place in wanted]
    pairs = list(combinations_with_replacement(range(len(names) + 1), 2))
    now, was = ["1.0", *names], ["known", *(f"was_{name}" for name in names)]
    grown = ", ".join(f"sum({now[a]} * {now[b]} - {was[a]} * {was[b]})" for a, b in pairs)
    found = log.rows(f"SELECT arm, look, {grown} FROM ({_growing(names)}) GROUP BY arm, look")
    result = {arm: np.zeros((looks, len(COLUMNS) + 1, len(COLUMNS) + 1)) for arm, *_ in found}
    places = np.ix_([0, *wanted], [0, *wanted])
    for arm, look, *values in found:
        result[arm][look][places] = _square(values, pairs, len(names) + 1)
    return {arm: np.cumsum(each, axis=0) for arm, each in result.items()}


def _growing(names: Sequence[str]) -> str:
    """A query of one row a unit and look with the sums up to it, and up to the one before."""
    day = "SELECT unit, arm, look, sum(shown) AS shown, sum(clicks) AS clicks, sum(conversions) AS conversions, "
    day += "sum(value) AS value FROM seen GROUP BY unit, arm, look"
    so_far = ", ".join(f"sum({name}) OVER w AS {name}" for name in ("shown", "clicks", "conversions", "value"))
    sums = f"SELECT unit, arm, look, {so_far}, least(sum(conversions) OVER w, 1.0) AS payers FROM ({day}) "
    sums += "WINDOW w AS (PARTITION BY unit ORDER BY look)"
    past = ", least(coalesce(before_conversions, 0.0), 1.0) AS before_payers"
    past += "".join(f", coalesce(before_{n}, 0.0) AS before_{n}" for n in ("shown", "clicks", "conversions", "value"))
    joined = f"SELECT unit, arm, look, shown, clicks, conversions, payers, value{past} "
    joined += f"FROM ({sums}) LEFT JOIN before USING (unit)"
    was = ", ".join(f"coalesce(lag({name}) OVER u, 0.0) AS was_{name}" for name in names)
    return (
        f"SELECT *, (lag(unit) OVER u IS NOT NULL)::DOUBLE AS known, {was} FROM ({joined}) "
        "WINDOW u AS (PARTITION BY unit ORDER BY look)"
    )


def _number(value: float) -> str:
    return f"'{value!r}'::DOUBLE" if np.isinf(value) else repr(float(value))
