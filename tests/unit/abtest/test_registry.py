"""Experiments on disk: a life in one direction, slots that do not overlap, files that are whole."""

from __future__ import annotations

import json
import multiprocessing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from domlora.abtest.experiments import Arm, Experiment, Guardrail
from domlora.abtest.registry import Registry
from domlora.errors import ConfigError, DataError
from domlora.features.schema import Feature, Schema

ARMS = (Arm("now"), Arm("wide", version=2))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "experiments")


def draft(name: str, share: float = 1.0, **values: Any) -> Experiment:
    return Experiment(name, values.pop("arms", ARMS), share=((0.0, share),), **values)


def begun(registry: Registry, name: str, share: float = 1.0, **values: Any) -> Experiment:
    registry.create(draft(name, share, **values))
    return registry.start(name, now_s=100.0)


def test_a_life(registry: Registry) -> None:
    registry.create(draft("wide"))
    registry.change(draft("wide", 0.2, guardrails=(Guardrail("cvr", 0.05),)))
    assert registry.start("wide", now_s=100.0).started_s == 100.0
    registry.ramp("wide", 0.7, now_s=160.0)
    stopped = registry.stop("wide", now_s=300.0)
    assert stopped.share == ((0.0, 0.2), (60.0, 0.7))
    assert stopped.share_at(200.0) == 0.7
    assert stopped.share_at(300.0) == 0.0
    assert Registry.open(registry.folder).all() == [stopped]


def test_what_a_running_or_stopped_experiment_refuses(registry: Registry) -> None:
    begun(registry, "wide", 0.5)
    with pytest.raises(ConfigError, match="only a draft experiment can be changed"):
        registry.change(draft("wide", arms=(Arm("now", weight=9), Arm("wide"))))
    with pytest.raises(ConfigError, match="given once"):
        registry.create(draft("wide"))
    with pytest.raises(ConfigError, match="never go down"):
        registry.ramp("wide", 0.2, now_s=200.0)
    registry.stop("wide")
    for verb in (registry.start, registry.stop, lambda name: registry.ramp(name, 0.9)):
        with pytest.raises(ConfigError, match="only a"):
            verb("wide")


def test_slots_of_a_layer_never_overlap(registry: Registry) -> None:
    one, two = begun(registry, "one", 0.4), begun(registry, "two", 0.3)
    assert (one.slot, two.slot) == ((0.0, 0.4), (0.4, 0.7))
    registry.create(draft("three", 0.5))
    with pytest.raises(ConfigError, match=r"no room .* 70% are taken"):
        registry.start("three")
    with pytest.raises(ConfigError, match="can grow to 40%"):
        registry.ramp("one", 0.5, now_s=200.0)
    assert registry.ramp("two", 0.6, now_s=200.0).slot == (0.4, 1.0)
    registry.stop("one")
    assert begun(registry, "four", 0.4).slot == (0.0, 0.4)


def test_a_planned_ramp_reserves_its_end(registry: Registry) -> None:
    registry.create(Experiment("slow", ARMS, share=((0.0, 0.01), (86400.0, 0.6))))
    assert registry.start("slow", now_s=0.0).slot == (0.0, 0.6)
    ramped = registry.ramp("slow", 0.2, now_s=10.0)
    assert ramped.share == ((0.0, 0.01), (10.0, 0.2), (86400.0, 0.6)), "later steps stay"


def test_two_layers_do_not_steer_the_same(registry: Registry) -> None:
    begun(registry, "wide", domains=("toys", "books"))
    registry.create(draft("deep", layer="second"))
    with pytest.raises(ConfigError, match="'wide' steers the version already"):
        registry.start("deep")
    begun(registry, "games", layer="second", domains=("games",))
    begun(registry, "bare", layer="third", arms=(Arm("now"), Arm("bare", adapters=False)))


def test_an_arm_names_a_version_of_the_store(registry: Registry) -> None:
    (registry.folder.parent / "versions" / "1").mkdir(parents=True)
    registry.create(draft("wide"))
    with pytest.raises(ConfigError, match="must be in the store"):
        registry.start("wide")
    (registry.folder.parent / "versions" / "2").mkdir()
    registry.start("wide")


def test_an_arms_version_reads_the_columns_of_the_live_one(registry: Registry) -> None:
    store = registry.folder.parent
    for number, names in enumerate((("item", "age"), ("age", "item"), ("item", "city")), 1):
        (store / "versions" / str(number)).mkdir(parents=True)
        schema = Schema(tuple(Feature(name, num_ids=5) for name in names), domains=("toys",))
        (store / "versions" / str(number) / "schema.json").write_text(schema.to_json())
    (store / "state.json").write_text('{"live": 1}')
    registry.create(draft("other", arms=(Arm("now"), Arm("city", version=3))))
    with pytest.raises(ConfigError, match=r"version 3, which lacks \['age'\] and adds \['city'\]"):
        registry.start("other")
    begun(registry, "same")
    assert registry.answering_with(2) == ["same"]
    assert registry.answering_with(3) == []
    (store / "versions" / "3" / "schema.json").write_text("{")
    with pytest.raises(DataError, match="whole schema"):
        registry.start("other")


def test_changed_sees_every_change_once(registry: Registry) -> None:
    assert registry.changed()
    assert not registry.changed()
    for act in (lambda: registry.create(draft("wide")), lambda: registry.start("wide"), lambda: registry.stop("wide")):
        act()
        other = Registry.open(registry.folder)
        assert registry.changed()
        assert not registry.changed()
        assert other.changed()


def test_damaged_and_foreign_files(registry: Registry) -> None:
    begun(registry, "wide")
    place = registry.folder / "wide.json"
    whole = json.loads(place.read_text())
    for content, text in (
        ("{", "must be JSON"),
        (json.dumps({**whole, "format": "other"}), "must have the format"),
        (json.dumps({**whole, "name": "other"}), "must have its name"),
        (json.dumps({**whole, "salz": 1}), "unknown key"),
        (json.dumps({**whole, "slot": [0.5, 0.2]}), "slot"),
        (json.dumps({**whole, "stopped_s": 3.0}), "status must agree"),
        (json.dumps({**whole, "arms": [{"name": "now"}]}), "two or more arms"),
        (json.dumps({**whole, "arms": 3}), "arms cannot be read"),
    ):
        place.write_text(content)
        with pytest.raises((ConfigError, DataError), match=text):
            registry.get("wide")


def test_unknown_names(registry: Registry) -> None:
    begun(registry, "wide")
    with pytest.raises(ConfigError, match="Did you mean 'wide'"):
        registry.get("wilde")


def _create(folder: Path, number: int) -> str:
    registry = Registry.open(folder)
    registry.create(draft(f"e{number}", 0.3))
    try:
        registry.start(f"e{number}")
    except ConfigError:
        return "full"
    return "started"


def test_processes_take_turns(registry: Registry) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        ends = pool.starmap(_create, [(registry.folder, number) for number in range(8)])
    slots = sorted(each.slot for each in registry.all() if each.slot)
    assert sorted(ends) == ["full"] * 5 + ["started"] * 3
    assert all(one[1] <= two[0] for one, two in pairwise(slots))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": "Wide"}, "small letters"),
        ({"name": "../x"}, "small letters"),
        ({"arms": (Arm("now"),)}, "two or more arms"),
        ({"arms": (Arm("now"), Arm("now"))}, "different names"),
        ({"arms": (Arm("now"), Arm("holdout"))}, "kept out"),
        ({"share": ((0.0, 0.5), (10.0, 0.4))}, "never go down"),
        ({"share": ((0.0, 1.5),)}, "up to 1"),
        ({"primary": "clicks"}, "unknown metric"),
        ({"holdout": 1.0}, "holdout must be between"),
        ({"effect": 0.0}, "effect must be between"),
        ({"alpha": float("nan")}, "alpha must be between"),
        ({"status": "running"}, "must agree"),
        ({"domains": ()}, "domains must be names"),
        ({"look_s": 0.0}, "must be seconds"),
    ],
)
def test_values_that_make_no_sense(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Experiment(**{"name": "wide", "arms": ARMS, **values})


@pytest.mark.parametrize(
    "values", [{"weight": 0}, {"weight": float("inf")}, {"version": 0}, {"version": True}, {"name": "a b"}]
)
def test_arms_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Arm(**{"name": "now", **values})
