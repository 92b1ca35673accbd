"""The verbs of ``domlora ab``, from a draft to a decision on a log in a store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from domlora.abtest.assignment import Assigner
from domlora.abtest.log import EventLog, Feedback
from domlora.abtest.registry import Registry
from domlora.cli import app
from domlora.errors import ConfigError
from domlora.serving.store import Store

DAY = 86_400.0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Store.create(tmp_path / "store").folder


def run(*words: object) -> str:
    found = CliRunner().invoke(app, ["ab", *map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_from_a_draft_to_a_decision(store: Path) -> None:
    """Assigned by us, logged by the event log, analyzed by the command line: the parts fit together."""
    told = ["--arm", "now", "--arm", "wide,version=2,weight=1", "--effect", "0.3", "--guardrail", "cvr=0.9"]
    assert "wide: draft" in run("create", store, "wide", *told, "--share", "0.5", "--share", "1@2")
    (store / "versions" / "2").mkdir()
    registry = Registry.open(store / "experiments")
    begun = time.time() - 5.5 * DAY
    assert registry.start("wide", now_s=begun).share == ((0.0, 0.5), (2 * DAY, 1.0))
    serve_days(store, registry, begun)
    assert "| wide | running | default | 100% | now, wide | ctr |" in run("list", store)
    assert json.loads(run("list", store, "--json"))[0]["primary"] == "ctr"
    raw = json.loads(run("analyze", store, "wide", "--json"))
    assert raw["sample_ratio"]["crossed"] == 0
    assert (raw["decision"]["verdict"], raw["decision"]["arm"]) == ("ship", "wide")
    assert "# wide: ship wide" in run("analyze", store, "wide")
    assert "days find" in run("power", store, "--effect", "0.1")
    assert json.loads(run("power", store, "--json"))["metric"] == "ctr"
    for option, value, said in (
        ("--metric", "clicks", "unknown metric"),
        ("--effect", "0", "effect must be between"),
        ("--power", "1", "power must be between"),
        ("--alpha", "2", "alpha must be between"),
        ("--part", "0", "part must be between"),
        ("--share", "0", "share of all units"),
    ):
        with pytest.raises(ConfigError, match=said):
            run("power", store, option, value)
    assert "wide: stopped" in run("stop", store, "wide")


def serve_days(store: Path, registry: Registry, begun: float) -> None:
    assigner, random = Assigner(registry.all()), np.random.default_rng(0)
    log = EventLog(store / "log", flush_s=60.0, tidy_s=None)
    for day in range(5):
        for unit in range(600):
            name, request, now = f"user-{unit}", f"r{day}-{unit}", begun + day * DAY + unit
            assignments = assigner.assign(name, "toys", now)
            log.exposed(request, now, name, "toys", assignments, "1", "1", np.full(4, 0.1, np.float32))
            better = bool(assignments) and assignments[0].arm.name == "wide"
            for row in np.flatnonzero(random.random(4) < (0.2 if better else 0.1)):
                log.happened(Feedback(request, int(row), "click", 1.0, now + 9))
                if random.random() < 0.5:
                    log.happened(Feedback(request, int(row), "conversion", 5.0, now + 90))
    log.close()


def test_ramp_from_the_command_line(store: Path) -> None:
    run("create", store, "bare", "--arm", "now", "--arm", "bare,adapters=off", "--share", "0.1", "--domain", "toys")
    assert "bare: running, 10% of all units" in run("start", store, "bare")
    assert "bare: running, 40% of all units" in run("ramp", store, "bare", "0.4")
    found = Registry.open(store / "experiments").get("bare")
    assert (found.look_s, found.cuped_s, found.salt) == (DAY, 14 * DAY, "")
    assert found.domains == ("toys",)
    assert not found.arms[1].adapters


def test_looks_the_period_before_and_the_salt(store: Path) -> None:
    told = ("--look-s", "3600", "--cuped-s", "0", "--salt", "again")
    assert "domlora ab start" in run("create", store, "hours", "--arm", "now", "--arm", "bare,adapters=off", *told)
    found = Registry.open(store / "experiments").get("hours")
    assert (found.look_s, found.cuped_s, found.salt) == (3600.0, 0.0, "again")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--arm", "now", "--arm", "wide,colour=4"), "an arm is NAME"),
        (("--arm", "now", "--arm", "wide,weight=x"), "takes a number"),
        (("--arm", "now", "--arm", "wide,version=1.5"), "takes a whole number"),
        (("--arm", "now"), "two or more arms"),
        (("--arm", "now", "--arm", "wide", "--look-s", "0"), "times must be seconds"),
        (("--arm", "now", "--arm", "wide", "--salt", "A b"), "the name of a salt"),
        (("--arm", "now", "--arm", "wide", "--guardrail", "clicks=1"), "unknown metric"),
    ],
)
def test_options_that_make_no_sense(store: Path, words: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run("create", store, "wide", *words)
    with pytest.raises(ConfigError, match="must be a folder"):
        run("list", store / "nowhere")


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """Such as an exported one, whose store is beside it."""
    arms = ("--arm", "now", "--arm", "bare,adapters=off")
    exported = tmp_path / "exported"
    exported.mkdir()
    with pytest.raises(ConfigError, match=r"no state\.json.*domlora store add"):
        run("create", exported, "wide", *arms)
    Store.create(tmp_path / "exported.store")
    with pytest.raises(ConfigError, match=r"store beside it: .*exported\.store"):
        run("create", exported, "wide", *arms)
    assert list(exported.iterdir()) == []


@pytest.mark.parametrize("words", [["analyze", "wide"], ["power"]])
def test_what_the_extra_brings_is_named(store: Path, words: list[str]) -> None:
    run("create", store, "wide", "--arm", "now", "--arm", "bare,adapters=off")
    told = ["domlora", "ab", words[0], str(store), *words[1:]]
    code = f"import sys; sys.modules['scipy'] = None; from domlora.cli import main; sys.argv = {told!r}; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'domlora[ab]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
