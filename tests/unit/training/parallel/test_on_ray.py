"""The same tasks on Ray; ``pytest -m ray`` where Ray is installed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from operator import call
from pathlib import Path
from typing import Any

import pytest

from domlora.bundle import Bundle
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.training.fit import FitOptions
from domlora.training.parallel.on_ray import on_ray
from domlora.training.parallel.run import adapt_apart
from domlora.training.parallel.work import places_of, prepare
from domlora.training.parallel.worker import adapt_one
from domlora.training.stages import Onboarding, Recipe, Stage, pretrain

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4]}
SHORT = FitOptions(max_epochs=3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
def test_a_task_that_kills_its_workers_is_given_up_and_all_others_end(cluster: None) -> None:
    tasks: list[Any] = [partial(os._exit, 1), *(partial(math.sqrt, n) for n in (4.0, 9.0, 16.0))]
    found = {task.args[0]: result for task, result in on_ray(call, tasks, workers=2, tries=2)}
    assert found == {1: None, 4.0: 2.0, 9.0: 3.0, 16.0: 4.0}


@pytest.mark.ray
def test_what_the_work_raises_is_raised(cluster: None) -> None:
    with pytest.raises(ValueError, match="math domain"):
        list(on_ray(math.sqrt, [4.0, -1.0], workers=2))


@pytest.mark.ray
def test_domains_end_with_the_bytes_of_one_after_another(cluster: None, tmp_path: Path) -> None:
    data, recipe = (
        World(num_domains=4).dataset(2000, seed=1)[0],
        Recipe(pretrain=Stage(SHORT), onboard=Onboarding(SHORT)),
    )
    bundle = Bundle(pretrain(data, MODEL, recipe)[0], MODEL, data.encoder)
    job = prepare(bundle, data, recipe, tmp_path / "alone")
    for number in range(4):
        assert not adapt_one(job, number).error
    _, found = adapt_apart(bundle, data, recipe, tmp_path / "work", partial(on_ray, workers=2))
    assert found.made == 4
    names = data.schema.domains
    for one, two in zip(places_of(tmp_path / "alone", names), places_of(tmp_path / "work", names), strict=True):
        assert len(list(one.iterdir())) == 4
        for path in one.iterdir():
            assert (two / path.name).read_bytes() == path.read_bytes()


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what Python holds of a module that it could not find
    with pytest.raises(ConfigError, match=r"needs more libraries.*pip install 'domlora\[ray\]'"):
        list(on_ray(abs, [1], workers=1))
    with pytest.raises(ConfigError, match="at least 1"):
        list(on_ray(abs, [1], workers=0))
