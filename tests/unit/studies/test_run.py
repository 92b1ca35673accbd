"""The runner: what is run, what is run again, and what a killed run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import Any
from unittest import mock

import pytest
import torch

from domlora.config import Config, parse
from domlora.errors import ConfigError, EngineError
from domlora.studies.report import study_tables
from domlora.studies.reporting.tables import read_results, tabulate
from domlora.studies.run import run_study
from domlora.studies.single import train_once, what_matters
from domlora.studies.study import read_facts


def keys(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return sorted((line["model"], line["method"], line["seed"]) for line in lines)


def test_one_line_a_run_with_the_base_and_the_truth(study: Any, tmp_path: Path) -> None:
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


def test_what_is_there_is_not_run_again(study: Any, tmp_path: Path) -> None:
    results = run_study(study(), tmp_path)
    first, seen = results.read_bytes(), []
    run_study(study(), tmp_path, on_result=seen.append)
    assert results.read_bytes() == first
    assert len(seen) == 3  # old lines are shown too
    run_study(study(seeds=[1, 2]), tmp_path)
    assert results.read_bytes().startswith(first)
    assert len(read_results(results)) == 6


def test_an_option_of_the_second_stage_does_not_run_the_base_again(study: Any, tmp_path: Path) -> None:
    run_study(study(), tmp_path)
    other = {"train": {"adapt": {"fit": {"batch_size": 32}}}}
    lines = read_results(run_study(study(config=other), tmp_path))
    assert [line["method"] for line in lines].count("base") == 1
    assert [line["method"] for line in lines].count("two_stage") == 2


def test_half_a_line_of_a_killed_run_spoils_no_other(study: Any, tmp_path: Path) -> None:
    results = run_study(study(), tmp_path)
    whole = results.read_bytes()
    results.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 40])
    lines = read_results(run_study(study(), tmp_path))
    assert keys(lines) == keys(read_results(results))
    assert len(lines) == 3


def test_two_processes_give_what_one_gives(study: Any, tmp_path: Path) -> None:
    def scores(folder: Path, jobs: int) -> dict[str, float]:
        lines = read_results(run_study(study(seeds=[1, 2]), folder, jobs=jobs))
        return {line["key"]: line["wauc"] for line in lines}

    one, two = scores(tmp_path / "one", 1), scores(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    assert all(abs(one[key] - two[key]) < 1e-3 for key in one)  # threads may round sums in another order
    assert not list((tmp_path / "two").glob("checkpoints/*"))


def test_threads_are_those_that_torch_was_given(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run_study(study(methods=["base"]), tmp_path)
    assert set(asked) == {7}


def test_each_seed_is_a_world_of_its_own(study: Any, tmp_path: Path) -> None:
    lines = read_results(run_study(study(seeds=[1, 2], methods=["base"]), tmp_path))
    assert len({line["data_fingerprint"] for line in lines}) == 2


ARMS = {
    "t2": {"method": "joint", "config": {"train": {"adapter": {"temperature": 2}}}},
    "t16": {"method": "joint", "config": {"train": {"adapter": {"temperature": 16}}}},
    "wide": {"method": "two_stage", "config": {"model": {"hidden_units": [16]}}},
    "again": {"method": "bias_only", "config": {"model": {"hidden_units": [16]}}},
}


def by_method(results: Path) -> dict[str, dict[str, Any]]:
    return {line["method"]: line for line in read_results(results)}


def test_a_line_says_what_was_run(study: Any, tmp_path: Path) -> None:
    lines = by_method(run_study(study(methods=["t2", "joint"], arms=ARMS), tmp_path))
    assert [lines[name]["kind"] for name in ("base", "t2", "joint")] == ["base", "joint", "joint"]
    assert lines["t2"]["config"]["adapter"]["temperature"] == 2
    assert lines["t2"]["config"].keys() == {"model", "method", "joint", "adapter"}
    assert lines["base"]["config"].keys() == {"model", "method", "pretrain"}
    assert not any(lines[name]["tuned"] for name in ("base", "t2", "joint"))
    assert lines["t2"]["params_per_domain"] == lines["t2"]["params_adapters"] // 2 > lines["joint"]["params_per_domain"]
    assert lines["base"]["params_per_domain"] == 0
    assert lines["truth"]["params_per_domain"] == 0


def test_equal_options_under_two_names_are_trained_once(study: Any, tmp_path: Path) -> None:
    """The temperature of ``t16`` is the one that ``joint`` has anyhow."""
    with mock.patch("domlora.studies.run.train_once", wraps=train_once) as trained:
        lines = by_method(run_study(study(methods=["joint", "t16"], arms=ARMS), tmp_path))
    assert trained.call_count == 2
    assert lines["t16"]["wauc"] == lines["joint"]["wauc"]
    assert lines["t16"]["key"] != lines["joint"]["key"]
    assert lines["t16"]["history"] == lines["joint"]["history"]


def test_an_arm_that_changes_the_base_starts_from_one_of_its_own(study: Any, tmp_path: Path) -> None:
    lines = by_method(run_study(study(methods=["two_stage", "wide", "again"], arms=ARMS), tmp_path))
    assert len(list((tmp_path / "bases").glob("*"))) == 2  # wide and again share one
    assert lines["wide"]["params_total"] > lines["two_stage"]["params_total"] > lines["base"]["params_total"]
    wide = {"model": {"hidden_units": [16]}}
    alone = by_method(run_study(study(wide, methods=["two_stage"]), tmp_path / "alone"))
    assert lines["wide"]["history"] == alone["two_stage"]["history"]
    assert lines["wide"]["history"][0]["wauc"] == alone["base"]["valid_wauc"]
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_base_that_is_gone_is_trained_again(study: Any, tmp_path: Path) -> None:
    lines = by_method(run_study(study(), tmp_path))
    rmtree(tmp_path / "bases")
    more = by_method(run_study(study(methods=["two_stage", "bias_only"]), tmp_path))
    assert more["bias_only"]["history"][0]["wauc"] == lines["base"]["valid_wauc"]


def test_options_of_a_dataset_are_its_own(study: Any, tmp_path: Path) -> None:
    world = {"world": {"num_domains": 2, "num_dense": 3}, "num_rows": 500}
    datasets = {"one": world, "two": {**world, "config": {"model": {"hidden_units": [4]}}}}
    lines = read_results(run_study(study(datasets=datasets, methods=["base"]), tmp_path))
    units = {line["dataset"]: line["config"]["model"]["hidden_units"] for line in lines if line["method"] == "base"}
    assert units == {"one": [8], "two": [4]}


def test_a_report_is_of_the_study_as_it_is_now(study: Any, tmp_path: Path) -> None:
    """Options that were changed and changed back, an arm and a seed that were dropped."""
    for plan in (study(seeds=[1, 2]), study({"model": {"dropout": 0.5}}), study(methods=["joint"]), study()):
        results = run_study(plan, tmp_path)
    lines, facts = read_results(results), read_facts(tmp_path)
    tables = study_tables(lines, facts)
    assert [(r["method"], r["seed"]) for r in tables.runs] == [("base", 1), ("two_stage", 1), ("truth", 1)]
    assert {r["config"]["model"]["dropout"] for r in tables.runs if r["method"] != "truth"} == {0.0}
    assert tables.cautions[0].startswith(f"{len(lines) - 3} runs of other options")


def test_another_version_of_torch_makes_no_run_anew(study: Any, tmp_path: Path) -> None:
    results = run_study(study(), tmp_path)
    old = [line | {"versions": {"torch": "2.0"}, "key": f"old{n}"} for n, line in enumerate(read_results(results))]
    results.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    with mock.patch("domlora.studies.run.train_once", side_effect=AssertionError):
        lines = by_method(run_study(study(), tmp_path))
    assert {line["versions"]["torch"] for line in lines.values()} == {"2.0"}  # what made them, not what found them


def test_a_run_that_diverges_leaves_the_others_alone(study: Any, tmp_path: Path) -> None:
    arms = {"wild": {"method": "base", "config": {"train": {"pretrain": {"optimizer": {"dense": {"lr": 1e30}}}}}}}
    seen: list[dict[str, Any]] = []
    with pytest.raises(EngineError, match=r"1 that failed, first world mlp wild 1"):
        run_study(study(methods=["wild", "two_stage"], arms=arms), tmp_path, on_result=seen.append)
    assert [line["method"] for line in seen if "failed" not in line] == ["truth", "base", "two_stage"]
    assert "wild" not in by_method(tmp_path / "results.jsonl")


def test_seeds_of_a_dataset_are_its_own(study: Any, tmp_path: Path) -> None:
    small = {"world": {"num_domains": 2, "num_dense": 3}, "num_rows": 500}
    plan = study(methods=["base"], datasets={"one": small, "noisy": {**small, "seeds": [2, 3]}})
    lines = [line for line in read_results(run_study(plan, tmp_path)) if line["model"] == "mlp"]
    assert {(line["dataset"], line["seed"]) for line in lines} == {("one", 1), ("noisy", 2), ("noisy", 3)}


def test_lines_from_before_there_were_arms_still_count(study: Any, tmp_path: Path) -> None:
    """They are read as they are; a study that goes on adds what they lack, without a training."""
    results = run_study(study(), tmp_path)
    new = ("kind", "config", "tuned", "params_per_domain")
    old = [{key: value for key, value in line.items() if key not in new} for line in read_results(results)]
    results.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    assert tabulate(read_results(results)).datasets[0].methods == ("base", "two_stage")
    with mock.patch("domlora.studies.run.train_once", side_effect=AssertionError):
        lines = by_method(run_study(study(), tmp_path))
    assert lines["two_stage"]["kind"] == "two_stage"
    assert lines["two_stage"]["config"]["adapter"]["temperature"] == 16
    assert {line["method"]: line["wauc"] for line in old} == {name: line["wauc"] for name, line in lines.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"model": {"dropuot": 0.1}}}, "'dropuot'.*'dropout'"),
        ({"overrides": {"mlp": {"model": {"hidden_units": []}}}}, "hidden_units"),
        ({"models": ["mlp", "deepfm"]}, "at least 2"),
        ({"methods": ["a"], "arms": {"a": {"method": "joint", "config": {"model": {"drop": 0}}}}}, "'drop'"),
        ({"search": {"space": {"model.dropout": [0.1, 1.5]}}, "methods": ["base"]}, "dropout.*1.5"),
        ({"search": {"space": {"model.drop": [0.1, 0.5]}}, "methods": ["base"]}, "'drop'.*'dropout'"),
    ],
)
def test_an_option_that_a_model_does_not_have_is_found_before_it_trains(
    study: Any, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with (
        mock.patch("domlora.studies.run.train_once", side_effect=AssertionError),
        pytest.raises(ValueError, match=said) as caught,
    ):
        run_study(study(**options), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_found_before_anything_is_written(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device must be one.*tpu9"):
        run_study(study(device="tpu9"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_does_not_matter_to_a_method_is_not_among_what_matters() -> None:
    config = parse(Config, {"train": {"joint": {"fit": {"batch_size": 7}}}})
    assert what_matters(config, "base") == what_matters(parse(Config, {}), "base")
    assert what_matters(config, "joint") != what_matters(parse(Config, {}), "joint")
