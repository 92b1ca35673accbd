"""The same seed, the same visits; a server's ranking earns what the truth says; the analysis finds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest

from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.log import EventLog
from domlora.abtest.segments import reading
from domlora.errors import ConfigError, EngineError
from domlora.serving.store import Store
from domlora.simulation.accelerated import Audience, write_log
from domlora.simulation.demo import compare_with_truth, make_store, running_server, start_experiment
from domlora.simulation.exact import true_lifts
from domlora.simulation.population import Population
from domlora.simulation.traffic import Traffic

POPULATION = Population(num_users=300)
RUNNING = Experiment(
    "wide", (Arm("now"), Arm("wide")), status="running", started_s=0.0, slot=(0.0, 1.0), look_s=100.0, cuped_s=0.0
)


def test_visits_depend_on_the_seed_and_on_nothing_else() -> None:
    one = [POPULATION.visit(number) for number in (700, 3, 5000)]
    again = [Population(num_users=300).visit(number) for number in (5000, 3, 700)][::-1]
    for a, b in zip(one, again, strict=True):
        assert (a.user, a.domain, a.unit) == (b.user, b.domain, b.unit)
        for name in ("items", "dense", "probability", "lot"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (Population(num_users=300, seed=1).visit(3).lot != one[1].lot).any()
    assert len(set(one[0].items.tolist())) == POPULATION.num_candidates


def test_clicks_are_as_probable_as_is_said() -> None:
    visits = [POPULATION.visit(number) for number in range(3000)]
    probability = np.stack([visit.probability for visit in visits])
    clicks = np.stack([visit.lot < visit.probability for visit in visits])
    assert probability.mean() == pytest.approx(POPULATION.click_rate, rel=0.1)
    spread = np.sqrt((probability * (1 - probability)).sum())
    assert abs(clicks.sum() - probability.sum()) < 4 * spread
    shown = np.array([2, 0])
    assert visits[0].clicked(shown).tolist() == [row for row in shown if clicks[0, row]]


def test_what_the_server_encodes_is_what_was_learned() -> None:
    visit = POPULATION.visit(11)
    asked, rows = POPULATION.question(visit), POPULATION.rows(1, first=11)
    columns = {**asked["candidates"], "domain": [asked["request"]["domain"]] * POPULATION.num_candidates}
    found = POPULATION.encoder.encode_arrays(columns)
    np.testing.assert_array_equal(found["ids"][0], rows.ids[0].numpy())
    np.testing.assert_array_equal(found["dense"], visit.dense)
    assert found["domain"][0] == visit.domain


def test_the_log_that_is_written_directly_holds_the_truth(tmp_path: Path) -> None:
    audience = Audience(num_users=3000, click_rate=0.1, lifts={"wide": 0.3})
    for name in ("a", "b"):
        log = EventLog(tmp_path / name, flush_s=3600.0, max_pending_rows=10**7)
        write_log(log, [RUNNING], audience, visits=12_000, start_s=0.0, seconds=1000.0, seed=3)
        log.close()
    tables = []
    for name in ("a", "b"):
        with reading(tmp_path / name) as found:
            tables.append([pq.read_table(paths) for paths in found.values()])
    assert tables[0][0].equals(tables[1][0])
    assert tables[0][1].equals(tables[1][1])
    lift = next(each for each in analyze(RUNNING, tmp_path / "a").overall if each.metric == "ctr")
    assert lift.low < audience.lift("wide", "now") < lift.high
    assert lift.low > 0


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError):
        Population(num_items=5)
    with pytest.raises(ConfigError):
        Population(click_rate=1.0)
    with pytest.raises(ConfigError):
        Audience(lifts={"wide": -1.0})
    with pytest.raises(ConfigError, match="like http"):
        Traffic("localhost:8000", POPULATION)
    with pytest.raises(ConfigError, match="seconds or visits"):
        Traffic("http://127.0.0.1:1", POPULATION).run()
    with mock.patch("time.sleep"), pytest.raises(EngineError, match="must answer visits"):
        Traffic("http://127.0.0.1:1", POPULATION).run(visits=1)


def test_traffic_through_a_server(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", POPULATION, num_rows=6000, epochs=2)
    experiment = start_experiment(tmp_path / "store")
    with running_server(tmp_path / "store") as url:
        tally = Traffic(url, POPULATION, connections=1).run(visits=300)
        again = Traffic(url, POPULATION, connections=1).run(visits=300)
    assert tally.visits == 300 == sum(arm.visits for arm in tally.arms.values())
    with reading(tmp_path / "store" / "log") as found:
        shown, events = (pq.read_table(paths).to_pylist() for paths in (found["exposures"], found["feedback"]))
    assert again == replace(tally, seconds=again.seconds), "the same visits, the same luck"
    assert len(shown) == 2 * 300 * POPULATION.num_candidates
    assert len([row for row in events if row["event"] == "shown"]) == 2 * 900
    assert len([row for row in events if row["event"] == "click"]) == 2 * tally.clicks
    truth = true_lifts(Store.open(store.folder), experiment, POPULATION, num_visits=500)
    assert f"truth is {truth['adapted']}" in compare_with_truth(tmp_path / "store", experiment.name, truth)
