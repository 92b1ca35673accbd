"""From Parquet files to a decision, against sums that pandas makes of the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from domlora.abtest.aggregate import Log, Sums, columns_of, log_of, over_units
from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment, Guardrail
from domlora.abtest.power import needed
from domlora.abtest.segments import EXPOSURES, FEEDBACK
from domlora.abtest.statistics import Columns, compare, interval, moments_of, student
from domlora.errors import DataError

KEPT = ["shown", "clicks", "conversions", "payers", "value"]
DAY = 86_400.0


class Rows(NamedTuple):
    """Columns of an exposure log, and what came of each row."""

    time_s: NDArray[Any]
    unit: NDArray[Any]
    domain: NDArray[Any]
    experiment: NDArray[Any]
    arm: NDArray[Any]
    click: NDArray[Any]
    conversion: NDArray[Any]
    value: NDArray[Any]


def running(name: str = "wide", **values: Any) -> Experiment:
    given = {"started_s": 14 * DAY, "slot": (0.0, 1.0), "status": "running", **values}
    return Experiment(name, given.pop("arms", (Arm("now"), Arm("wide", version=2))), **given)


def make_rows(
    num_units: int = 2000, days: int = 10, lift: float = 0.0, seed: int = 0, before: int = 14, treated: float = 0.5
) -> Rows:
    """Units of unequal activity and taste, seen before the start and after it; a coin decides their arm."""
    random = np.random.default_rng(seed)
    activity, taste = random.gamma(1.5, 1.0, num_units), random.beta(2.0, 18.0, num_units)
    arm = random.random(num_units) < treated
    seen = random.poisson(np.repeat(activity[:, None], before + days, 1))
    unit, day = (np.repeat(grid.ravel(), seen.ravel()) for grid in np.indices(seen.shape))
    running = day >= before
    chance = taste[unit] * np.where(running & arm[unit], 1 + lift, 1.0)
    click = random.random(len(unit)) < chance
    conversion = click & (random.random(len(unit)) < 0.3)
    return Rows(
        (day + random.random(len(unit))) * DAY,
        np.char.add("u", unit.astype(str)),
        np.where(unit % 3 == 0, "toys", "books"),
        np.where(running, "wide", ""),
        np.where(running, np.where(arm[unit], "wide", "now"), ""),
        click,
        conversion,
        np.where(conversion, random.gamma(2.0, 10.0, len(unit)), 0.0),
    )


def write_log(folder: Path, rows: Rows) -> Path:
    size = len(rows.unit)
    names = np.char.add("r", np.arange(size).astype(str))
    columns = {name: pa.nulls(size, EXPOSURES.field(name).type) for name in EXPOSURES.names}
    columns |= {"time_s": rows.time_s, "request_id": names, "row": np.zeros(size, np.int32), "unit": rows.unit}
    columns |= {"domain": rows.domain, "experiment": rows.experiment, "arm": rows.arm}
    _write(folder / "exposures", columns, EXPOSURES)
    for event, happened, value in (
        ("click", rows.click, np.ones(size)),
        ("conversion", rows.conversion, rows.value),
    ):
        told = {"time_s": rows.time_s + 60, "request_id": names, "row": np.zeros(size, np.int32), "unit": rows.unit}
        told |= {"event": np.full(size, event), "value": value}
        _write(folder / "feedback", {name: each[happened] for name, each in told.items()}, FEEDBACK)
    return folder


def _write(folder: Path, columns: dict[str, Any], schema: pa.Schema) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema=schema
    )
    pq.write_table(table, folder / f"{len(list(folder.iterdir()))}-a-0.L0.parquet")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return make_rows(lift=0.2)


@pytest.fixture(scope="module")
def log(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("store") / "log", rows)


def by_unit(rows: Rows, end: float = np.inf, domain: str | None = None) -> pd.DataFrame:
    """One row a unit, by another road: now, and in the two weeks before."""
    table = pd.DataFrame(rows._asdict()).assign(shown=1.0)
    table = table[table["domain"] == domain] if domain else table
    sums = {}
    for name, part in (
        ("", table[(table.time_s >= 14 * DAY) & (table.time_s < end)]),
        ("before_", table[table.time_s < 14 * DAY]),
    ):
        by = part.groupby("unit")[["shown", "click", "conversion", "value"]].sum().astype(float)
        by.columns = ["shown", "clicks", "conversions", "value"]
        sums[name] = by.assign(payers=by["conversions"].clip(upper=1))[KEPT].add_prefix(name)
    whole = sums[""].join(sums["before_"]).fillna(0.0)
    return whole.join(table[table.arm != ""].groupby("unit")["arm"].first())


def moments(table: pd.DataFrame, arm: str) -> np.ndarray:
    return moments_of(table[table.arm == arm].drop(columns="arm").to_numpy())


def test_moments_are_those_of_pandas(rows: Rows, log: Path) -> None:
    with_log = duckdb.connect()
    with_log.from_parquet(f"{log}/exposures/*.parquet").create_view("exposures")
    with_log.from_parquet(f"{log}/feedback/*.parquet").create_view("feedback")
    sums = over_units(Log(with_log), running(cuped_s=14 * DAY))
    for arm in ("now", "wide"):
        assert np.allclose(sums.overall[arm], moments(by_unit(rows), arm))
        for domain in ("toys", "books"):
            assert np.allclose(sums.by_domain[arm, domain], moments(by_unit(rows, domain=domain), arm))
        for look in (0, 4, 9):
            kept = [0, 1, 2, 6, 7]  # the constant, and what the primary metric reads
            until = by_unit(rows, end=(14 + look + 1) * DAY)
            assert np.allclose(sums.by_look[arm][look][np.ix_(kept, kept)], moments(until, arm)[np.ix_(kept, kept)])


@pytest.mark.parametrize("metric", ["ctr", "cvr", "payers", "value"])
def test_looks_of_any_metric_end_where_the_whole_is(log: Path, metric: str) -> None:
    with log_of(log) as opened:
        sums = over_units(opened, running(primary=metric))
    columns = columns_of(metric, cuped=True)
    last, whole = (
        compare(*(each[arm] for arm in ("now", "wide")), columns)
        for each in ({arm: looks[-1] for arm, looks in sums.by_look.items()}, sums.overall)
    )
    assert np.allclose(last, whole, rtol=1e-9)


def test_lifts_of_every_metric(rows: Rows, log: Path) -> None:
    found = {each.metric: each for each in analyze(running(cuped_s=0.0), log).overall}
    table = by_unit(rows)
    now, new = moments(table, "now"), moments(table, "wide")
    for metric, (over, under) in {"ctr": (2, 1), "cvr": (3, 2), "payers": (4, 0), "value": (5, 0)}.items():
        one = compare(now, new, Columns(over, under))
        low, high = interval(one, student(1.959963984540054, one.freedom))
        got = found[metric]
        assert np.allclose([got.control, got.treatment, got.lift, got.low, got.high],
                           [one.control, one.treatment, one.lift, low, high])  # fmt: skip
        assert got.control_units == now[0, 0]
    assert found["ctr"].low > 0


def test_the_period_before_narrows_the_interval(log: Path) -> None:
    plain, adjusted = (analyze(running(cuped_s=length), log).overall[0] for length in (0.0, 14 * DAY))
    assert adjusted.reduction > 0.1
    assert adjusted.high - adjusted.low < 0.95 * (plain.high - plain.low)


def test_a_large_lift_is_shipped(log: Path) -> None:
    experiment = running(effect=0.1, guardrails=(Guardrail("cvr", 0.5),))
    found = analyze(experiment, log, until_s=24 * DAY)
    assert (found.decision.verdict, found.decision.arm) == ("ship", "wide"), found.decision
    assert found.guardrails["wide"][0].state == "kept"
    assert len(found.looks["wide"]) <= 10
    assert found.looks["wide"][-1].low > 0


def test_a_broken_split_says_so_and_shows_no_lift(tmp_path: Path) -> None:
    rows = make_rows(lift=0.2, seed=5)
    lost = (rows.arm == "wide") & (np.char.endswith(rows.unit, "7") | np.char.endswith(rows.unit, "3"))
    kept = Rows(*(column[~lost] for column in rows))
    found = analyze(running(), write_log(tmp_path, kept))
    assert found.sample_ratio.broken
    assert found.decision.verdict == "broken split"
    assert "do not fit their weights" in found.decision.reasons[0]
    assert not found.overall
    assert "broken split" in found.to_markdown()


def test_a_small_loss_is_seen_by_all_looks_together(tmp_path: Path) -> None:
    """Neither day is far off by itself; at a plan that is nearly reached, the boundary is 2.6 standard errors."""
    rows = make_rows(num_units=4000, seed=17)
    now, wide = (np.unique(rows.unit[rows.arm == arm]) for arm in ("now", "wide"))
    lost = (rows.arm == "wide") & np.isin(rows.unit, wide[len(now) - round(3 * np.sqrt(2 * len(now))) :])
    log = write_log(tmp_path, Rows(*(column[~lost] for column in rows)))
    found, patient = (analyze(running(effect=effect), log, until_s=24 * DAY) for effect in (0.09, 0.01))
    assert 0.0001 < found.sample_ratio.p_value < 0.01
    assert found.sample_ratio.broken
    assert found.decision.next_step.startswith("Stop it; look for lost")
    assert not patient.sample_ratio.broken, "a plan of a hundred times the data has spent nothing yet"


def test_the_first_look_waits_for_clicks(log: Path) -> None:
    early = analyze(running(effect=0.1), log, until_s=15 * DAY)
    rare = analyze(running(effect=0.1, primary="value"), log, until_s=15 * DAY)
    assert len(early.looks["wide"]) == 1
    assert rare.looks["wide"] == ()
    assert "some hundreds of conversions" in rare.decision.reasons[0]
    assert "may be anything from" in early.decision.reasons[0]


def test_an_arm_that_is_never_clicked_is_stopped(tmp_path: Path) -> None:
    rows = make_rows(seed=8)
    dead = rows._replace(click=rows.click & (rows.arm != "wide"), conversion=rows.conversion & (rows.arm != "wide"))
    found = analyze(running(effect=0.1), write_log(tmp_path, dead), until_s=24 * DAY)
    assert found.decision.verdict == "stop"
    assert "falls by 99.9 %" in found.decision.reasons[0]


def test_weights_are_what_the_split_is_held_to(tmp_path: Path) -> None:
    log = write_log(tmp_path, make_rows(treated=0.2, seed=6))
    assert analyze(running(), log).sample_ratio.broken
    assert not analyze(running(arms=(Arm("now", weight=4), Arm("wide"))), log).sample_ratio.broken


def test_units_in_two_arms_and_held_out_ones_are_left_out(tmp_path: Path) -> None:
    rows = make_rows(seed=7)
    arm = np.where((rows.unit == "u1") & (np.arange(len(rows.unit)) % 2 == 0) & (rows.arm != ""), "now", rows.arm)
    arm = np.where((rows.unit == "u1") & (arm != "now") & (arm != ""), "wide", arm)
    arm = np.where((rows.unit == "u2") & (arm != ""), "holdout", arm)
    found = analyze(running(), write_log(tmp_path, rows._replace(arm=arm)))
    assert (found.sample_ratio.crossed, found.sample_ratio.held_out) == (1, 1)
    seen = len(np.unique(rows.unit[rows.arm != ""]))
    assert sum(found.sample_ratio.units.values()) == seen - 2


def test_units_that_are_all_held_out(tmp_path: Path) -> None:
    rows = make_rows(num_units=50, seed=7)
    found = analyze(running(), write_log(tmp_path, rows._replace(arm=np.where(rows.arm == "", "", "holdout"))))
    assert (found.domains, sum(found.sample_ratio.units.values()), found.sample_ratio.crossed) == ((), 0, 0)
    assert found.sample_ratio.held_out == len(np.unique(rows.unit[rows.arm != ""]))
    assert found.decision.verdict == "not enough data yet"
    assert found.to_markdown().startswith("# wide: not enough data yet")


def _small(feedback: list[tuple[Any, ...]]) -> Log:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE exposures (time_s DOUBLE, request_id VARCHAR, row INT, unit VARCHAR, domain VARCHAR, "
                       "experiment VARCHAR, arm VARCHAR)")  # fmt: skip
    connection.executemany(
        "INSERT INTO exposures VALUES (?, ?, ?, ?, 'toys', 'wide', ?)",
        [(*shown, row, unit, arm)
         for shown, unit, arm in (((10.0, "r1"), "ann", "now"), ((500.0, "r2"), "ann", "now"), ((20.0, "r3"), "bob", "wide"))
         for row in (0, 1)],
    )  # fmt: skip
    connection.execute(
        "CREATE TABLE feedback (time_s DOUBLE, request_id VARCHAR, row INT, unit VARCHAR, event VARCHAR, value DOUBLE)"
    )
    if feedback:
        connection.executemany("INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?)", feedback)
    return Log(connection)


@pytest.mark.parametrize(
    ("feedback", "told"),
    [
        ([], (0, 0, 0)),
        ([(11.0, "r1", 1, None, "click", 1.0)], (1, 0, 0)),
        ([(11.0, "r1", 1, None, "click", 1.0)] * 3, (1, 0, 0)),  # told three times
        ([(11.0, "r1", 1, None, "click", 0.0), (11.0, "r1", 0, None, "shown", 1.0)], (0, 0, 0)),
        ([(11.0, "r9", 0, None, "click", 1.0)], (0, 0, 0)),  # of another request
        ([(11.0, "r1", 0, None, "click", 1.0), (12.0, "r1", 0, None, "conversion", 30.0)], (1, 1, 30)),
        ([(600.0, None, None, "ann", "conversion", 9.0)], (0, 1, 9)),  # the unit alone: what it saw last
        ([(600.0, "", -1, "ann", "conversion", 9.0)], (0, 1, 9)),
        ([(5.0, None, None, "ann", "conversion", 9.0)], (0, 0, 0)),  # before it saw anything
        ([(90_000.0, None, None, "ann", "conversion", 9.0)], (0, 0, 0)),  # a day later
        ([(11.0, "r1", 0, None, "conversion", float("nan"))], (0, 0, 0)),
    ],
)
def test_feedback_finds_its_row(feedback: list[tuple[Any, ...]], told: tuple[float, ...]) -> None:
    sums = over_units(_small(feedback), running(started_s=0.0))
    shown, clicks, conversions, payers, value = sums.overall["now"][0][1:6]
    assert (clicks, conversions, value) == told
    assert (shown, payers) == (4, min(told[1], 1))


def test_a_request_that_came_twice_counts_once(rows: Rows, tmp_path: Path) -> None:
    """Every third one again, a second later and before: as sums, by domain, by look, and in what a plan reads."""
    again = rows._replace(time_s=rows.time_s + 1.0)
    places = tmp_path / "once", tmp_path / "twice"
    for place in places:
        write_log(place, rows)
    folder = write_log(tmp_path / "more", again) / "exposures"
    table = pq.read_table(next(folder.iterdir()))
    pq.write_table(table.take(np.arange(0, len(table), 3)), places[1] / "exposures" / "9-a-0.L0.parquet")
    once, twice = (_sums(place) for place in places)
    assert once.crossed == twice.crossed == 0
    for one, other in ((once.overall, twice.overall), (once.by_domain, twice.by_domain), (once.by_look, twice.by_look)):
        assert one.keys() == other.keys()
        assert all(np.allclose(one[key], other[key]) for key in one)
    assert needed(places[1], effect=0.05).days == pytest.approx(needed(places[0], effect=0.05).days, rel=1e-3)


def _sums(place: Path) -> Sums:
    with log_of(place) as opened:
        return over_units(opened, running(cuped_s=14 * DAY))


def test_the_first_answer_counts_where_two_have_one_id() -> None:
    log = _small([(60.0, "r1", 1, None, "click", 1.0)])
    log.connection.execute("INSERT INTO exposures VALUES (50.0, 'r1', 1, 'bob', 'toys', 'wide', 'wide')")
    sums = over_units(log, running(started_s=0.0))
    assert sums.overall["now"][0][1:3].tolist() == [4.0, 1.0]
    assert sums.overall["wide"][0][1:3].tolist() == [2.0, 0.0]
    assert sums.crossed == 0


def test_until_and_stop_bound_what_is_seen(log: Path) -> None:
    early = analyze(running(effect=0.5), log, until_s=17 * DAY)
    stopped = analyze(running(effect=0.5, status="stopped", stopped_s=17 * DAY), log)
    assert early.totals["wide"] == pytest.approx(stopped.totals["wide"])
    assert early.until_s < 17 * DAY
    assert np.allclose(early.looks["wide"], stopped.looks["wide"])
    assert early.looks["wide"][0].number == 0
    assert not analyze(running(effect=0.5), log, until_s=14.9 * DAY).looks["wide"], "the first day is not over"
    half = running(effect=0.5, status="stopped", stopped_s=14.9 * DAY)
    assert len(analyze(half, log).looks["wide"]) == 1, "the last look ends with the experiment"


def test_an_analysis_is_json_and_markdown(log: Path) -> None:
    found = analyze(running(effect=0.1), log)
    raw = json.loads(found.to_json())
    assert raw["decision"]["verdict"] == found.decision.verdict
    assert raw["looks"]["wide"][0]["number"] == found.looks["wide"][0].number
    text = found.to_markdown()
    assert "| toys | wide |" in text
    assert text.startswith("# wide: ")


def test_what_cannot_be_analyzed(log: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold exposures"):
        analyze(running(), tmp_path)
    with pytest.raises(DataError, match="exposures of the experiment"):
        analyze(running("deep"), log)
    with pytest.raises(DataError, match="must have been started"):
        analyze(Experiment("wide", (Arm("now"), Arm("wide"))), log)


def test_a_damaged_segment_costs_its_rows_alone(rows: Rows, log: Path, tmp_path: Path) -> None:
    write_log(tmp_path, rows)
    for kind in ("exposures", "feedback"):
        (tmp_path / kind / "9-a-0.L0.parquet").write_bytes(b"PAR1")
    found, whole = (analyze(running(), place) for place in (tmp_path, log))
    assert found.totals == {arm: pytest.approx(sums) for arm, sums in whole.totals.items()}
    assert needed(tmp_path, effect=0.05).units == pytest.approx(needed(log, effect=0.05).units, rel=1e-6)


def test_needed_days_follow_the_log(log: Path) -> None:
    found = needed(log, effect=0.05)
    assert needed(log, effect=0.025).days > 2 * found.days > 0
    half = needed(log, effect=0.05, share=0.5)
    assert half.days > found.days
    again = needed(log, effect=found.detectable[14])
    assert again.days == pytest.approx(14, rel=0.02)
    assert columns_of("ctr", cuped=False).under == 1
