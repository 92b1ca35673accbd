"""What a study says: names, precedence of options, and every mistake in one line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from domlora.config import parse
from domlora.errors import ConfigError
from domlora.studies.single import what_matters
from domlora.studies.study import Arm, DatasetSpec, Study, read_facts, write_facts

SPACE = {
    "train": {
        stage: {"optimizer.dense.lr": {"low": 1e-3, "high": 0.1, "log": True}}
        for stage in ("pretrain", "joint", "adapt")
    }
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ["depfm"]}, "deepfm"),
        ({"methods": ["twostage"]}, "two_stage"),
        ({"seeds": []}, "seed"),
        ({"seeds": [1, 2, -1]}, "seeds of at least 0.*-1"),
        ({"datasets": {"x": {"world": {}, "seeds": [3, 3]}}}, "seeds.*differ"),
        ({"overrides": {"dcm": {}}}, "overrides of a model.*'dcm'.*'dcn'"),
        ({"config": {"modle": {}}}, "model"),
        ({"config": {"model": {"name": "dcn"}}}, "model.name.*'dcn'"),
        ({"datasets": {"x": {"source": "movielens-1m", "folder": "y"}}}, "exactly one"),
        ({"datasets": {"x": {"source": "movielens-1m", "setings": ["y"]}}}, "settings"),
        ({"datasets": {"x": {"folder": "y", "config": {"trian": {}}}}}, "'trian'.*'train'"),
        ({"arms": {"t4": {"method": "joined"}}}, "method of arm 't4'.*'joined'.*'joint'"),
        ({"arms": {"t4": {"methd": "joint"}}}, r"\[arms.t4\].*'methd'.*'method'"),
        (
            {"arms": {"joint": {"method": "joint", "config": {"model": {"dropout": 0.1}}}}},
            "name that no model.*'joint'",
        ),
        ({"arms": {"joint": {"method": "two_stage"}}}, "name that no model.*'joint'"),
        ({"arms": {"base": {"method": "base", "models": ["mlp"]}}}, "name that no model.*'base'"),
        ({"arms": {"mlp": {"method": "joint"}}}, "name that no model.*'mlp'"),
        ({"arms": {"truth": {"method": "joint"}}}, "'truth'"),
        ({"arms": {"a": {"method": "joint", "models": ["mpl"]}}}, "model of arm 'a'.*'mpl'.*'mlp'"),
        ({"arms": {"a": {"method": "joint", "tuned_as": "b"}}}, "tuned_as of arm 'a'.*'b'"),
        ({"arms": {"a": {"method": "joint", "tuned_as": "base"}}}, "same method.*'base'"),
        (
            {"methods": ["a"], "arms": {"a": {"method": "joint", "config": {"train": {"adapter": {"rnk": 1}}}}}},
            "'rank'",
        ),
        ({"methods": ["joint"], "arms": {"a": {"method": "joint"}}, "steps": ["a"]}, "reference or step.*'a'"),
        ({"reference": "joint"}, "reference or step.*'joint'"),
        ({"select": {"joint": {"of": ["base", "two_stage"]}}}, "name that no method.*'joint'"),
        ({"select": {"best": {"of": ["base", "joint"]}}}, "candidate of selection 'best'.*'joint'"),
        ({"select": {"best": {"of": ["base"]}}}, "two candidates.*'base'"),
        ({"select": {"best": {"of": ["base", "base"]}}}, "two candidates"),
        ({"select": {"best": {"from": ["base", "two_stage"]}}}, r"\[select.best\].*'from'"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(study: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        study(**options)
    assert "\n" not in str(caught.value)


def test_an_arm_that_no_method_names_is_not_run(study: Any) -> None:
    plan = study(methods=["joint"], arms={"t4": {"method": "joint"}})
    assert plan.arms_of("mlp") == ("base", "joint")


def test_an_arm_may_be_run_on_some_models_only(study: Any) -> None:
    plan = study(models=["mlp", "star"], methods=["t4", "joint"], arms={"t4": {"method": "joint", "models": ["star"]}})
    assert plan.arms_of("mlp") == ("base", "joint")
    assert plan.arms_of("star") == ("base", "t4", "joint")


def test_a_method_may_be_run_on_some_models_only(study: Any) -> None:
    arms = {"joint": {"method": "joint", "models": ["star"]}}
    plan = study(models=["mlp", "star"], methods=["joint", "two_stage"], arms=arms)
    assert plan.arms_of("mlp") == ("base", "two_stage")
    assert plan.arms_of("star") == ("base", "joint", "two_stage")


def test_a_method_is_an_arm_without_options(study: Any) -> None:
    assert study().arm("joint") == Arm("joint")


def test_the_later_option_wins(study: Any) -> None:
    """Study, dataset, model, what the arm takes over, arm, what was found for it: each sets one key less."""

    def model(*dropped: str) -> dict[str, Any]:
        keys = ("study", "dataset", "override", "below", "arm", "tuned")
        return {f"{key}_": dropped[-1] for key in keys[len(dropped) - 1 :]}

    plan = study(
        methods=["mine"],
        config={"model": model("1")},
        datasets={"world": {"world": {}, "config": {"model": model("1", "2")}}, "plain": {"world": {}}},
        overrides={"mlp": {"model": model("1", "2", "3")}},
        arms={"mine": {"method": "two_stage", "config": {"model": model("1", "2", "3", "4", "5")}}},
    )
    below = {f"model.{key}": value for key, value in model("1", "2", "3", "4").items()}
    tuned = {f"model.{key}": value for key, value in model("1", "2", "3", "4", "5", "6").items()}
    found = {
        k: v for k, v in plan.config_of("world", "mlp", "mine", below=below, tuned=tuned).model.items() if k[-1] == "_"
    }
    assert found == {
        "study_": "1",
        "dataset_": "2",
        "override_": "3",
        "below_": "4",
        "arm_": "5",
        "tuned_": "6",
    }
    plain = {**model("1"), **model("1", "2"), **model("1", "2", "3")}
    assert plan.config_of("world", "mlp").model == {"name": "mlp", "hidden_units": [8], "dropout": 0.0, **plain}
    assert plan.config_of("plain", "mlp").model["dataset_"] == "1"


def test_options_are_merged_key_by_key(study: Any) -> None:
    arms = {"t4": {"method": "joint", "config": {"train": {"adapter": {"temperature": 4}}}}}
    plan = study(models=["mlp", "dcn"], overrides={"dcn": {"model": {"dropout": 0.5}}}, methods=["t4"], arms=arms)
    assert plan.config_of("world", "dcn").model == {"name": "dcn", "hidden_units": [8], "dropout": 0.5}
    assert plan.config_of("world", "mlp").model["dropout"] == 0.0
    arm = plan.config_of("world", "mlp", "t4").train
    assert (arm.adapter.temperature, arm.joint.fit.batch_size) == (4, 64)
    assert plan.config_of("world", "mlp").train.adapter.temperature == 16


def test_fewer_models_leave_the_rest_of_a_file_as_it_is(study: Any) -> None:
    arms = {"wide": {"method": "joint", "models": ["dcn"]}, "t4": {"method": "joint"}}
    overrides = {"dcn": {"model": {"dropout": 0.5}}}
    search = {"space": SPACE, "of": {"dcn": {"model.dropout": [0.0, 0.5]}}}
    plan = study(models=["mlp"], methods=["wide", "t4"], arms=arms, overrides=overrides, search=search)
    assert plan.arms_of("mlp") == ("base", "t4")


def test_a_study_of_some_of_its_datasets(study: Any) -> None:
    plan = study(datasets={"a": {"folder": "x"}, "b": {"folder": "y"}})
    assert list(plan.only(["b"]).datasets) == ["b"]
    with pytest.raises(ConfigError, match=r"unknown dataset.*'c'.*'a', 'b'"):
        plan.only(["a", "c"])


def test_a_device_is_that_of_all_stages_and_changes_no_result(study: Any) -> None:
    here, there = study(), study(device="cuda")
    train = there.config_of("world", "mlp", "two_stage").train
    assert {train.pretrain.fit.device, train.joint.fit.device, train.adapt.fit.device} == {"cuda"}
    assert what_matters(there.config_of("world", "mlp"), "base") == what_matters(here.config_of("world", "mlp"), "base")


def test_options_of_one_model_are_not_those_of_another(study: Any) -> None:
    plan = study(models=["mlp", "dcn"])
    plan.config_of("world", "mlp").model["dropout"] = 0.9
    assert plan.config_of("world", "mlp").model["dropout"] == 0.0
    assert plan.config_of("world", "dcn").model["dropout"] == 0.0


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"trials": 0}, "trials of at least 1"),
        ({"seeds": [1, 1]}, "that differ"),
        ({"pruning": "medain"}, "median"),
        ({"equal": "all"}, "total"),
        ({"trails": 3}, "'trails'.*'trials'"),
        ({"space": {}}, "needs a space"),
        ({"space": {"train.joint.optimizer.dense.lr": {"low": 0.1, "high": 0.01}}}, "train.joint.*low below high"),
        ({"space": {"train.joint.optimizer.dense.lr": {"low": 0.1}}}, "train.joint.optimizer.dense.lr.*high"),
        ({"space": {"train.joint.optimizer.dense.lr": {"low": 0, "high": 1, "log": True}}}, "low above 0"),
        ({"space": {"train.joint.fit.batch_size": {"low": 32, "high": 64, "step": 20}}}, "whole number of steps"),
        ({"space": {"train.joint.fit.batch_size": {"low": 32, "high": 64, "step": 64}}}, "a step must"),
        ({"space": {"train.joint.fit.batch_size": {"low": 32, "high": 64, "stp": 8}}}, "'stp'.*'step'"),
        ({"space": {"train.joint.fit.batch_size": 64}}, "list of choices.*train.joint.fit.batch_size.*64"),
        ({"space": {"train.joint.fit.batch_size": []}}, "list of choices"),
        ({"space": {"train.joint.fit.batch_size": [64, 64]}}, "must differ"),
        ({"space": {"train.joint.fit.batch_size": [64, "32"]}}, "train.joint.fit.batch_size.*'32'"),
        ({"space": {"train.joint.fit.batch_size": {"low": 0.5, "high": 64}}}, "batch_size.*0.5"),
        ({"space": {"train.joint.fitt.batch_size": [64]}}, r"\[train.joint\].*'fitt'.*'fit'"),
        ({"space": {"train.joined.fit.batch_size": [64]}}, "no method reads.*'train.joined.*'train.joint'"),
        ({"space": {"trian.joint.fit.batch_size": [64]}}, "no method reads"),
        ({"space": {"train.joint.fit.seed": [1, 2]}}, "leave this option alone"),
        ({"space": {"train.joint.fit.monitor": ["wauc", "macro_auc"]}}, "leave this option alone"),
        ({"space": {"model.name": ["mlp", "dcn"]}}, "leave this option alone"),
        ({"of": {"jiont": {}}}, "search.of.*'jiont'.*'joint'"),
        ({"of": {"two_stage": {"model.dropout": [0.0, 0.1]}}}, "search.of.two_stage.*'model.dropout'.*train.adapt"),
        ({"of": {"base": {"train.joint.fit.batch_size": [32, 64]}}}, "search.of.base.*'train.joint.*train.pretrain"),
        ({"space": {"model.dropout": [0.0, 0.1]}}, r"'two_stage' has nothing.*\[search.of.two_stage\]"),
    ],
)
def test_a_mistake_in_a_search_is_found_before_anything_runs(study: Any, search: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        study(search={"space": SPACE, **search})
    assert "\n" not in str(caught.value)


def test_an_arm_cannot_search_what_it_sets(study: Any) -> None:
    arms = {"t4": {"method": "joint", "config": {"train": {"adapter": {"temperature": 4}}}}}
    search = {"space": SPACE, "of": {"t4": {"train.adapter.temperature": [4, 8]}}}
    with pytest.raises(ConfigError, match=r"sets an option and searches it too.*temperature"):
        study(methods=["t4"], arms=arms, search=search)


def test_seeds_of_the_search_are_none_of_the_study_unless_asked(study: Any) -> None:
    assert study(seeds=[1, 2], search={"space": SPACE}).tuning_seeds == (0,)
    assert study(seeds=[0, 4], search={"space": SPACE}).tuning_seeds == (5,)
    assert study(seeds=[1, 2], search={"space": SPACE, "seeds": [2, 7]}).tuning_seeds == (2, 7)


def test_a_dataset_may_have_seeds_of_its_own(study: Any) -> None:
    noisy = {"world": {"world": {}}, "noisy": {"world": {}, "seeds": [0, 1, 2, 3]}}
    plan = study(seeds=[1, 2], datasets=noisy)
    assert plan.seeds_of("world") == (1, 2)
    assert plan.seeds_of("noisy") == (0, 1, 2, 3)
    assert plan.tuning_seeds == (4,)


def test_facts_of_a_study(study: Any, tmp_path: Path) -> None:
    assert read_facts(tmp_path / "nowhere") == {"title": "nowhere", "command": ""}
    arms = {"t4": {"method": "joint", "title": "temperature 4"}, "t8": {"method": "joint"}}
    select = {"best": {"of": ["base", "t8"], "title": "none or temperature 8"}}
    plan = study(title="Small", methods=["t4", "t8"], arms=arms, reference="t8", steps=["t4"], select=select)
    runs = {"world": {"seeds": [1], "arms": [["mlp", "base", "hash"]]}}
    write_facts(plan, tmp_path, "domlora study small.toml", runs)
    assert read_facts(tmp_path) == {
        "title": "Small",
        "command": "domlora study small.toml",
        "reference": "t8",
        "steps": ["t4"],
        "titles": {"t4": "temperature 4", "best": "none or temperature 8"},
        "select": {"best": {"of": ["base", "t8"]}},
        "runs": runs,
    }


def test_a_dataset_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        DatasetSpec()


def test_the_study_in_the_docs_is_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "studies.md").read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", text, flags=re.S)
    assert block is not None
    plan = parse(Study, tomllib.loads(block[1]))
    assert plan.config_of("gender", "mlp", "t4").model == {
        "name": "mlp",
        "embedding_dim": 16,
        "hidden_units": [256, 128, 64],
        "dropout": 0.2,
    }
    assert plan.tuned_arms("mlp") == ("base", "joint", "two_stage")
    assert plan.space_of("mlp", "joint").keys() == {
        "model.dropout",
        "train.joint.optimizer.dense.lr",
        "train.adapter.temperature",
    }
    assert plan.space_of("mlp", "two_stage").keys() == {"train.adapt.optimizer.adapters.lr"}
