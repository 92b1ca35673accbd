"""The search of a study: equal budgets, validation only, and no trace of an interruption."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from domlora import cli
from domlora.config import parse
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, EngineError
from domlora.studies.reporting.tables import read_results
from domlora.studies.run import run_study
from domlora.studies.searching.trials import Watch
from domlora.studies.searching.tuning import Found, Tuned, tune
from domlora.studies.single import train_once
from domlora.studies.study import Study
from domlora.training.methods import METHODS

LR = {"low": 1e-3, "high": 0.1, "log": True}
SEARCH = {
    "trials": 3,
    "space": {
        "model.dropout": [0.0, 0.2],
        "train": {stage: {"optimizer.dense.lr": LR} for stage in ("pretrain", "joint")},
        "train.adapt.optimizer.adapters.lr": LR,
    },
}
ARMS = {
    "t2": {"method": "joint", "config": {"train": {"adapter": {"temperature": 2}}}, "tuned_as": "joint"},
    "plain": {"method": "two_stage", "config": {"model": {"dropout": 0.1}}},
}
KEYS = {
    "base": {"model.dropout", "train.pretrain.optimizer.dense.lr"},
    "joint": {"model.dropout", "train.joint.optimizer.dense.lr"},
    "two_stage": {"train.adapt.optimizer.adapters.lr"},
    "plain": {"train.adapt.optimizer.adapters.lr"},
}


def search(study: Study, folder: Path, jobs: int = 1) -> Tuned:
    folder.mkdir(parents=True, exist_ok=True)
    return tune(study, study.datasets, folder, jobs=jobs, on_found=lambda _: None)


def states(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "tuning.db", timeout=60) as database:
        return [state for (state,) in database.execute("select state from trials")]


@pytest.fixture(scope="module")
def searched(study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A study with every kind of arm, tuned and run."""
    plan = study(methods=["joint", "two_stage", "t2", "plain"], arms=ARMS, models=["mlp", "star"], search=SEARCH)
    folder = tmp_path_factory.mktemp("searched")
    run_study(plan, folder)
    return plan, folder


def test_every_arm_gets_as_many_trials(searched: tuple[Study, Path]) -> None:
    tuned = json.loads((searched[1] / "tuned.json").read_text(encoding="utf-8"))["tuned"]["world"]
    assert tuned.keys() == {"mlp", "star"}
    for arms in tuned.values():
        assert {arm: found["best"].keys() for arm, found in arms.items()} == KEYS
        for found in arms.values():
            assert found["trials"] == len(found["values"]) == 3
            assert found["best_value"] == max(value for value in found["values"] if value is not None)
    assert len(states(searched[1])) == 2 * 4 * 3


def test_lines_are_of_the_tuned_options(searched: tuple[Study, Path]) -> None:
    tuned = json.loads((searched[1] / "tuned.json").read_text(encoding="utf-8"))["tuned"]["world"]
    lines = {(line["model"], line["method"]): line for line in read_results(searched[1] / "results.jsonl")}
    del lines["truth", "truth"]
    assert all(line["tuned"] for line in lines.values())
    for model, arms in tuned.items():
        base, joint, adapt = (arms[arm]["best"] for arm in ("base", "joint", "two_stage"))
        config = {arm: lines[model, arm]["config"] for arm in (*KEYS, "t2")}
        for arm in ("base", "two_stage", "plain"):  # those that start from the base have its options
            assert config[arm]["pretrain"]["optimizer"]["dense"]["lr"] == base["train.pretrain.optimizer.dense.lr"]
        assert config["base"]["model"]["dropout"] == config["two_stage"]["model"]["dropout"] == base["model.dropout"]
        assert config["plain"]["model"]["dropout"] == 0.1  # but for what an arm says itself
        assert config["two_stage"]["adapt"]["optimizer"]["adapters"]["lr"] == next(iter(adapt.values()))
        for arm, temperature in (("joint", 16), ("t2", 2)):
            assert config[arm]["joint"]["optimizer"]["dense"]["lr"] == joint["train.joint.optimizer.dense.lr"]
            assert config[arm]["adapter"]["temperature"] == temperature
        assert lines[model, "two_stage"]["history"][0]["wauc"] == lines[model, "base"]["valid_wauc"]


def test_what_was_searched_is_not_searched_again(searched: tuple[Study, Path]) -> None:
    plan, folder = searched
    before = [(folder / name).read_bytes() for name in ("tuned.json", "results.jsonl")]
    found: list[Found] = []
    run_study(plan, folder, on_found=found.append)
    assert [(folder / name).read_bytes() for name in ("tuned.json", "results.jsonl")] == before
    assert len(found) == 8  # old ones are shown too


def test_the_test_split_is_never_read(study: Any, tmp_path: Path) -> None:
    read, batches = Dataset.read, Dataset.batches
    asked: set[str] = set()

    def refuse(split: str) -> None:
        asked.add(split)
        assert split != "test"

    def watched_read(data: Dataset, split: str) -> Any:
        refuse(split)
        return read(data, split)

    def watched_batches(data: Dataset, split: str, *args: Any, **options: Any) -> Any:
        refuse(split)
        return batches(data, split, *args, **options)

    with mock.patch.object(Dataset, "read", watched_read), mock.patch.object(Dataset, "batches", watched_batches):
        search(study(search={**SEARCH, "trials": 2}), tmp_path)
    assert {"train", "valid"} <= asked <= {"train", "valid"}


def test_two_processes_find_what_one_finds(study: Any, tmp_path: Path) -> None:
    """To the bit: an arm is searched by one process on one core, however many there are."""
    plan = study(methods=["joint", "two_stage"], search={**SEARCH, "seeds": [5, 6]})
    one, two = search(plan, tmp_path / "one"), search(plan, tmp_path / "two", jobs=2)
    assert one == two
    assert (tmp_path / "one" / "tuned.json").read_bytes() == (tmp_path / "two" / "tuned.json").read_bytes()


KILLED = """
import json, sys
from pathlib import Path
from domlora.config import parse
from domlora.studies.run import run_study
from domlora.studies.single import train_once
from domlora.studies.study import Study
run_study(parse(Study, json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_search_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Killed in a trial, which is marked as failed, made again, and does not count twice."""
    fit = {"batch_size": 64, "max_epochs": 8, "patience": 8}
    plan = {
        "name": "killed",
        "datasets": {"world": {"world": {"num_domains": 2, "num_dense": 3}, "num_rows": 3000}},
        "models": ["mlp"],
        "methods": ["base"],
        "config": {"train": {"pretrain": {"fit": fit}}},
        "search": {"trials": 4, "space": {"train.pretrain.optimizer.dense.lr": LR}},
    }
    process = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(plan), str(tmp_path / "killed")])
    while len(_begun(tmp_path / "killed")) < 3 and process.poll() is None:
        time.sleep(0.03)
    process.kill()
    assert process.wait() < 0, "it ended before it was killed"
    left = states(tmp_path / "killed")
    assert left.count("RUNNING") <= 1
    killed, straight = (search(parse(Study, plan), tmp_path / name) for name in ("killed", "straight"))
    ended = states(tmp_path / "killed")
    assert (ended.count("FAIL"), ended.count("RUNNING"), len(ended)) == (
        left.count("RUNNING"),
        0,
        4 + left.count("RUNNING"),
    )
    assert killed == straight
    assert (tmp_path / "killed" / "tuned.json").read_bytes() == (tmp_path / "straight" / "tuned.json").read_bytes()


def _begun(folder: Path) -> list[str]:
    try:
        return states(folder) if (folder / "tuning.db").exists() else []
    except sqlite3.OperationalError:  # the tables are not there yet
        return []


@pytest.mark.parametrize("method", METHODS)
def test_the_pruner_is_told_the_validations_of_one_fit_or_of_none(study: Any, tmp_path: Path, method: str) -> None:
    told: list[float] = []
    trial = mock.Mock(report=lambda value, _: told.append(value), should_prune=lambda: False)
    watch = Watch(trial, prune=True)
    plan = study({"train": {"pretrain": {"fit": {"max_epochs": 2}}}})
    data = plan.datasets["world"].world.dataset(600, seed=1)[0]
    made = train_once(tmp_path, data, method, plan.config_of("world", "mlp"), 1, on_progress=watch)
    if watch.fits == 1:
        assert len(told) == len(made.fit.history)
        assert max(told) == pytest.approx(made.fit.best_value, abs=0.02)  # the legacy loop tells a coarser AUC
    else:
        assert method in ("separate", "finetune", "moe_mlora", "crossfit")


def test_more_trials_go_on_from_those_that_are_there(study: Any, tmp_path: Path) -> None:
    few, many = (study(methods=["base"], search={**SEARCH, "trials": count}) for count in (2, 4))
    first = search(few, tmp_path).found["world", "mlp", "base"]
    more = search(many, tmp_path).found["world", "mlp", "base"]
    assert more.values[:2] == first.values
    assert len(states(tmp_path)) == 4
    assert search(few, tmp_path).found["world", "mlp", "base"] == first


def test_other_options_are_another_search(study: Any, tmp_path: Path) -> None:
    for rows in (64, 32):
        config = {"train": {"pretrain": {"fit": {"batch_size": rows}}}}
        search(study(config, methods=["base"], search={**SEARCH, "trials": 1}), tmp_path)
    assert len(states(tmp_path)) == 2


def test_an_equal_total_counts_the_trials_of_the_base(study: Any, tmp_path: Path) -> None:
    plan = study(methods=["joint", "two_stage"], search={**SEARCH, "trials": 2, "equal": "total"})
    tuned = search(plan, tmp_path)
    counts = {arm: found.trials for (_, _, arm), found in tuned.found.items()}
    assert counts == {"base": 4, "joint": 4, "two_stage": 2}
    base = tuned.found["world", "mlp", "base"]
    half = search(study(methods=["base"], search={**SEARCH, "trials": 2}), tmp_path / "half").found[
        "world", "mlp", "base"
    ]
    assert half.values == base.values[:2]
    assert base.start == half.best
    start = tuned.config_of(plan, "world", "mlp", "two_stage").train.pretrain.optimizer.dense.lr
    assert start == half.best["train.pretrain.optimizer.dense.lr"]


def test_nothing_is_doubled_where_no_arm_starts_from_the_base(study: Any, tmp_path: Path) -> None:
    plan = study(methods=["joint"], search={**SEARCH, "trials": 2, "equal": "total"})
    assert {found.trials for found in search(plan, tmp_path).found.values()} == {2}


def test_a_search_in_which_every_training_explodes(study: Any, tmp_path: Path) -> None:
    space = {"train.pretrain.optimizer.dense.lr": {"low": 1e30, "high": 1e35}}
    with pytest.raises(EngineError, match=r"no trial of 'base'.*must be finite.*lower its learning rates") as caught:
        search(study(methods=["base"], search={"trials": 2, "space": space}), tmp_path)
    assert "\n" not in str(caught.value)


def test_without_optuna_it_says_how_to_get_it(study: Any, tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"optuna": None, "domlora.studies.searching.trials": None}),
        pytest.raises(ConfigError, match=r"needs more libraries.*pip install 'domlora\[study\]'"),
    ):
        run_study(study(search=SEARCH), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "small.toml"
    plan.write_text(
        """
        name = "small"
        models = ["mlp"]
        methods = ["t4"]
        [datasets.world]
        world = { num_domains = 2, num_dense = 3 }
        num_rows = 500
        [config.train]
        pretrain.fit = { batch_size = 64, max_epochs = 1 }
        joint.fit = { batch_size = 64, max_epochs = 1 }
        [arms.t4]
        method = "joint"
        title = "temperature 4"
        config.train.adapter.temperature = 4
        [search]
        trials = 2
        [search.space]
        model.dropout = [0.0, 0.3]
        train.pretrain.optimizer.dense.lr = { low = 1e-4, high = 1e-2, log = true }
        [search.of.t4]
        "train.joint.optimizer.dense.lr" = { low = 1e-4, high = 1e-2, log = true }
        """,
        encoding="utf-8",
    )
    monkeypatch.setattr("sys.argv", ["domlora", "study", str(plan), "--out", str(tmp_path / "runs"), "--jobs", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.count("2 trials  best validation 0.") == 2
    assert said.count("t4") == 2
    assert json.loads((tmp_path / "runs" / "study.json").read_text(encoding="utf-8"))["titles"] == {
        "t4": "temperature 4"
    }
