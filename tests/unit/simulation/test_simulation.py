"""The same seed, the same visits; a server's ranking earns what the truth says; the analysis finds it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.log import EventLog
from domlora.abtest.segments import reading
from domlora.cli import app
from domlora.errors import ConfigError, EngineError
from domlora.serving.store import Store
from domlora.simulation.accelerated import Audience, write_log
from domlora.simulation.demo import compare_with_truth, demo, make_store, running_server, start_experiment
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("demo") / "store", POPULATION, num_rows=6000, epochs=2)


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """One of its own for each test."""
    shutil.copytree(made.folder, tmp_path / "store")
    return Store.open(tmp_path / "store")


def test_traffic_through_a_server(store: Store, tmp_path: Path) -> None:
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


def simulate(*words: object) -> str:
    found = CliRunner().invoke(app, ["simulate", *map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_the_command_and_two_workers_with_feedback(store: Store) -> None:
    """Connections go to both workers, whose logs and counts are one: nothing is lost or told twice."""
    start_experiment(store.folder)
    told = ("--users", 300, "--visits", 400, "--connections", 24)
    with running_server(store.folder, 0, "--workers", "2", "--flush", "0.2") as url:
        until = time.monotonic() + 60
        while (store.folder.parent / "server.log").read_text().count('"event": "ready"') < 2:
            assert time.monotonic() < until, "a worker did not start"
            time.sleep(0.05)
        said = simulate("--url", url, *told, "--store", store.folder)
        time.sleep(1.0)  # what was counted is told some times a second
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            counts = answer.read().decode()
    assert said.startswith("400 visits in ")
    assert "own-adapters adapted: " in said
    assert "own-adapters: " in said.splitlines()[-1]
    assert "the truth is" in said.splitlines()[-1]
    with reading(store.folder / "log") as found:
        shown, events = (pq.read_table(paths).to_pylist() for paths in (found["exposures"], found["feedback"]))
    assert len({path.name.split("-")[1] for path in found["exposures"]}) == 2, "both workers wrote"
    places = {(row["request_id"], row["row"]) for row in shown}
    assert len(places) == len(shown) == 400 * POPULATION.num_candidates
    clicks = [(event["request_id"], event["row"]) for event in events if event["event"] == "click"]
    assert len(set(clicks)) == len(clicks) == int(said.split(" clicks")[0].split()[-1].replace(",", ""))
    assert set(clicks) <= places
    assert 'domlora_requests_total{route="score",status="200"} 400.0' in counts
    assert "domlora_events_dropped_total 0.0" in counts


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--url", "localhost:8000"), "like http"),
        (("--visits", "5", "--seconds", "5"), "seconds or visits"),
        (("--rate", "-1"), "must be above 0"),
        (("--users", "0"), "users"),
    ],
)
def test_options_that_make_no_sense(words: tuple[str, ...], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        simulate("--url", "http://127.0.0.1:1", *words)


def test_the_demo_ends_with_a_line_and_not_with_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "domlora.simulation.demo", "--folder", str(tmp_path / "file"), "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="must be above 0"):
        demo(tmp_path / "new", rate=-1.0, say=print)
    assert not (tmp_path / "new").exists(), "nothing was trained for it"
