"""Ranks that Ray Train places train what one process trains; ``pytest -m ray`` where Ray is installed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from small_log import write_log
from typer.testing import CliRunner

from domlora.bundle import Bundle
from domlora.cli.program import app
from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.errors import ConfigError, DataError, EngineError
from domlora.training.distributed.ranks import joined
from domlora.training.parallel.on_ray_train import on_ray_train

SHORT = ["--set=train.pretrain.fit.max_epochs=2", "--set=train.pretrain.fit.batch_size=400", "--set=model.dropout=0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "lo"}
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have none of pytest's search paths
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def rows(folder: Path) -> Path:
    prepare(load_plan(str(write_log(folder, 6000, 300))), folder / "rows", folder=folder)
    return folder / "rows"


@pytest.mark.ray
def test_two_ranks_of_ray_end_where_one_process_does(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows(tmp_path).parent)  # paths are relative ones
    run = partial(CliRunner().invoke, app, catch_exceptions=False)
    base = ["pretrain", "--data", "rows", *SHORT, "--out"]
    adapter = ["adapt", "--data", "rows", "--bundle", "alone", "--set=train.adapt.fit.max_epochs=1", "--out"]
    assert run([*base, "alone"]).exit_code == 0
    assert run([*adapter, "alone_adapted"]).exit_code == 0
    assert run(["launch", "--workers", "2", *base, "ranks"]).exit_code == 0
    assert run(["launch", "--workers", "2", *adapter, "ranks_adapted"]).exit_code == 0
    for one, two in (("alone", "ranks"), ("alone_adapted", "ranks_adapted")):
        alone, ranks = Bundle.open(tmp_path / one), Bundle.open(tmp_path / two)
        assert ranks.facts["valid"] == pytest.approx(alone.facts["valid"], abs=1e-5)
        weights = ranks.model.state_dict()
        for name, weight in alone.model.state_dict().items():
            assert (weight - weights[name]).abs().max() < 1e-4, name


def dies_once(folder: Path) -> tuple[int, int]:
    with joined() as here:
        if here.rank == 1 and not (folder / "died").exists():
            (folder / "died").touch()
            time.sleep(3)  # Ray Train gives up where a rank dies before it was looked at once
            os._exit(1)
        return here.rank, here.size


def refuses() -> None:
    raise DataError("rows must be there", received="none")


@pytest.mark.ray
def test_lost_ranks_are_started_again_as_often_as_allowed(cluster: None, tmp_path: Path) -> None:
    work = partial(dies_once, tmp_path)
    with pytest.raises(EngineError, match="ranks must live"):
        on_ray_train(work, workers=2, restarts=0)
    (tmp_path / "died").unlink()
    assert on_ray_train(work, workers=2, restarts=1) == (0, 2)


@pytest.mark.ray
def test_what_a_rank_refuses_is_told_in_its_own_words(cluster: None) -> None:
    with pytest.raises(DataError, match="rows must be there"):
        on_ray_train(refuses, workers=1, restarts=0)


def test_verbs_that_ranks_do_not_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    invoke = partial(CliRunner().invoke, app)
    assert "pretrain" in str(invoke(["launch", "pretrian", "--data", "rows"]).exception)
    monkeypatch.setitem(sys.modules, "ray", None)
    found = invoke(["launch", "--workers", "2", "pretrain", "--data", "rows", "--out", "base"])
    assert isinstance(found.exception, ConfigError)
    assert "pip install" in str(found.exception)
