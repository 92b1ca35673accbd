"""The runner: what is run, what is run again, and what a killed run leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from domlora.config import parse
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.models.build import MODELS, build_model
from domlora.studies.study import DatasetSpec, Study, count_parameters, read_facts, run_study
from domlora.studies.tables import read_results

SMALL = {
    "model": {"hidden_units": [8], "dropout": 0.0},
    "train": {stage: {"fit": {"batch_size": 64, "max_epochs": 1}} for stage in ("pretrain", "joint", "adapt")},
}


def study(**options: Any) -> Study:
    plan = {
        "name": "small",
        "datasets": {"world": {"world": {"num_domains": 2, "num_dense": 3}, "num_rows": 500}},
        "models": ["mlp"],
        "methods": ["two_stage"],
        "config": SMALL,
    }
    return parse(Study, {**plan, **options})


def keys(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return sorted((line["model"], line["method"], line["seed"]) for line in lines)


def test_one_line_a_run_with_the_base_and_the_truth(tmp_path: Path) -> None:
    lines = read_results(run_study(study(seeds=[1, 2]), tmp_path))
    assert keys(lines) == [
        (m, how, s) for m, how in (("mlp", "base"), ("mlp", "two_stage"), ("truth", "truth")) for s in (1, 2)
    ]
    assert len({line["key"] for line in lines}) == len(lines)
    for line in lines:
        assert 0 < line["wauc"] < 1
        assert [row["name"] for row in line["domains"]] == ["d0", "d1"]
    adapted = next(line for line in lines if line["method"] == "two_stage")
    assert adapted["params_adapters"] > 0
    assert adapted["history"][0]["epoch"] == 0  # the base is a candidate
    assert adapted["valid_wauc"] == max(entry["wauc"] for entry in adapted["history"])


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    results = run_study(study(), tmp_path)
    first, seen = results.read_bytes(), []
    run_study(study(), tmp_path, on_result=seen.append)
    assert results.read_bytes() == first
    assert len(seen) == 3  # old lines are shown too
    run_study(study(seeds=[1, 2]), tmp_path)
    assert results.read_bytes().startswith(first)
    assert len(read_results(results)) == 6


def test_an_option_of_the_second_stage_does_not_run_the_base_again(tmp_path: Path) -> None:
    run_study(study(), tmp_path)
    other = {**SMALL, "train": {**SMALL["train"], "adapt": {"fit": {"batch_size": 32, "max_epochs": 1}}}}
    lines = read_results(run_study(study(config=other), tmp_path))
    assert [line["method"] for line in lines].count("base") == 1
    assert [line["method"] for line in lines].count("two_stage") == 2


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path: Path) -> None:
    results = run_study(study(), tmp_path)
    whole = results.read_bytes()
    results.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 40])
    lines = read_results(run_study(study(), tmp_path))
    assert keys(lines) == keys(read_results(results))
    assert len(lines) == 3


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    def scores(folder: Path, jobs: int) -> dict[str, float]:
        lines = read_results(run_study(study(seeds=[1, 2]), folder, jobs=jobs))
        return {line["key"]: line["wauc"] for line in lines}

    one, two = scores(tmp_path / "one", 1), scores(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    assert all(abs(one[key] - two[key]) < 1e-3 for key in one)  # threads may round sums in another order
    assert not list((tmp_path / "two").glob("checkpoints/*"))


def test_each_seed_is_a_world_of_its_own(tmp_path: Path) -> None:
    lines = read_results(run_study(study(seeds=[1, 2], methods=["base"]), tmp_path))
    assert len({line["data_fingerprint"] for line in lines}) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ["depfm"]}, "deepfm"),
        ({"methods": ["twostage"]}, "two_stage"),
        ({"seeds": []}, "seed"),
        ({"overrides": {"dcn": {}}}, "mlp"),
        ({"config": {"modle": {}}}, "model"),
        ({"datasets": {"x": {"source": "movielens-1m", "folder": "y"}}}, "exactly one"),
        ({"datasets": {"x": {"source": "movielens-1m", "setings": ["y"]}}}, "settings"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study(**options)


def test_overrides_go_on_top() -> None:
    plan = study(models=["mlp", "dcn"], overrides={"dcn": {"model": {"dropout": 0.5}}})
    assert plan.config_of("dcn").model == {"name": "dcn", "hidden_units": [8], "dropout": 0.5}
    assert plan.config_of("mlp").model["dropout"] == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_all_counted(name: str) -> None:
    schema = World(num_domains=2).schema
    pair = replace(schema, features=(*schema.features, replace(schema.features[0], name="other")))
    model = build_model(name, pair, embedding_dim=4, hidden_units=(8,)).requires_grad_(False)
    counts = count_parameters(model)
    assert counts["params_total"] == sum(p.numel() for p in model.parameters())
    assert 0 < counts["params_tables"] < counts["params_total"]
    assert counts["params_adapters"] == 0
    assert not any(p.requires_grad for p in model.parameters())


def test_facts_of_a_study(tmp_path: Path) -> None:
    assert read_facts(tmp_path / "nowhere") == {"title": "nowhere", "command": ""}
    run_study(replace(study(), title="Small"), tmp_path, command="domlora study small.toml")
    assert read_facts(tmp_path) == {"title": "Small", "command": "domlora study small.toml"}
    assert json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))


def test_a_dataset_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        DatasetSpec()
