"""Domains adapted in parallel through the command line: killed, gone on with, and equal to one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.bundle import Bundle
from domlora.cli.program import app
from domlora.config import load_config
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.training.parallel.work import facts_at, places_of, prepare
from domlora.training.parallel.worker import adapt_one

PLAN = """
[source]
files = ["{log}"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.price]
kind = "numeric"
"""
NAMES = [f"scene {number}" for number in range(20)]
RECIPE = [
    "train.onboard.fit.max_epochs=8",
    "train.onboard.fit.patience=8",
    "train.onboard.optimizer.adapters.lr=0.01",
    "train.onboard.prior_rows=100",
]
SETTINGS = [word for setting in RECIPE for word in ("--set", setting)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows and a base; each scene likes prices in its own way, and the last one has three rows."""
    folder, draw = tmp_path_factory.mktemp("parallel"), np.random.default_rng(0)
    scene = np.append(draw.integers(19, size=12_000), [19, 19, 19])
    price = draw.normal(size=len(scene))
    click = draw.random(len(scene)) < 1 / (1 + np.exp(-price * np.linspace(-2, 2, 20)[scene]))
    log = {"item": draw.integers(50, size=len(scene)), "price": price, "click": click.astype(np.int64)}
    pq.write_table(pa.table({**log, "scene": pa.array(NAMES).take(scene)}), folder / "log.parquet")
    (folder / "plan.toml").write_text(PLAN.format(log=folder / "log.parquet"), encoding="utf-8")
    app(["prepare", str(folder / "plan.toml"), "--out", str(folder / "data")], standalone_mode=False)
    base = ["--out", str(folder / "base"), "--set", "model.name=mlp", "--set", "train.pretrain.fit.max_epochs=1"]
    app(["pretrain", "--data", str(folder / "data"), *base], standalone_mode=False)
    return folder


def words(made: Path, *more: str) -> list[str]:
    where = ["--data", str(made / "data"), "--bundle", str(made / "base"), "--work", str(made / "work")]
    return ["adapt-each", *where, "--out", str(made / "out"), *SETTINGS, *more]


def started(made: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "domlora", *words(made, "--workers", "2")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(place.parent.name))
    return found


def workers_of(parent: int) -> list[int]:
    return [worker for server in children(parent) for worker in children(server)]


def wait_until(what: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.01)


def done(folder: Path) -> dict[str, int]:
    """The adapters that are there, and when each was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("adapters/*/*/domlora.json")}


def test_killed_and_started_again_it_does_what_is_missing_and_ends_with_the_same_bytes(made: Path) -> None:
    first = started(made)
    wait_until(lambda: len(done(made / "work")) >= 3, first)
    workers = workers_of(first.pid)
    assert len(workers) == 2
    first.kill()  # the parent: its workers end too
    first.communicate()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    before = done(made / "work")
    assert 3 <= len(before) < 20
    assert not (made / "out").exists()

    second = started(made)
    wait_until(lambda: len(done(made / "work")) > len(before), second)
    os.kill(workers_of(second.pid)[0], signal.SIGKILL)  # a worker: its domain is tried again
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "keep their start, of which 1 have too few rows: scene 19" in out
    after = done(made / "work")
    assert len(after) == 20
    assert {name: after[name] for name in before} == before  # nothing was done twice

    bundle, data, recipe = Bundle.open(made / "base"), Dataset.open(made / "data"), load_config(None, RECIPE).train
    job = prepare(bundle, data, recipe, made / "alone")
    for number in range(20):
        assert not adapt_one(job, number).error
    files = sorted(path.relative_to(made / "alone") for path in (made / "alone" / "adapters").rglob("*.*"))
    assert len([path for path in files if (made / "alone" / path).is_file()]) == 80
    for path in files:
        if (made / "alone" / path).is_file():
            assert (made / "work" / path).read_bytes() == (made / "alone" / path).read_bytes(), path
    check_bundle(made, data)


def check_bundle(made: Path, data: Dataset) -> None:
    """All rows are in one bundle, most of them trained."""
    bundle, domains = Bundle.open(made / "out"), data.schema.domains
    assert bundle.facts["method"] == "adapt_each"
    assert sum(facts["chosen"] == "trained" for facts in bundle.facts["domains"].values()) > 10
    for domain, place in zip(domains, places_of(made / "work", domains), strict=True):
        assert bundle.facts["domains"][domain] == facts_at(place)
        tensors = f"adapters/{place.name}/adapter_model.safetensors"
        assert (made / "out" / tensors).read_bytes() == (place / "adapter_model.safetensors").read_bytes()


def test_a_run_does_not_go_on_with_another_recipe(made: Path) -> None:
    """After the test above, which has left its folder."""
    with pytest.raises(ConfigError, match="a run goes on only with the recipe it began with"):
        app(words(made, "--overwrite", "--set", "train.onboard.min_steps=3"), standalone_mode=False)
