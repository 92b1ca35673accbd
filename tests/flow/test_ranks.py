"""Ranks of torchrun: results do not depend on their number, and a rank that is killed costs nothing but time."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import distance, kill_one, run

from domlora.bundle import Bundle

PROGRAM = Path(__file__).with_name("on_ranks.py")
FIT = {"batch_size": 500, "evaluations_per_epoch": 4, "max_epochs": 3}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run(1, str(PROGRAM), str(out))
    return out


def test_three_ranks_end_where_one_does(alone: Path, tmp_path: Path) -> None:
    run(3, str(PROGRAM), str(tmp_path))
    files = sorted(alone.iterdir())
    assert len(files) == 5
    for file in files:
        assert distance(file, tmp_path / file.name) < 1e-12, file.name


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    run(1, str(PROGRAM), str(tmp_path / "straight"), "9")
    for size, last in ((2, 2), (3, 3), (1, 9)):
        run(size, str(PROGRAM), str(tmp_path), str(last))
    assert distance(tmp_path / "straight" / "whole.safetensors", tmp_path / "whole.safetensors") < 1e-12


def pretrain(data: Path, out: Path) -> list[str]:
    settings = [f"--set=train.joint.fit.{name}={value}" for name, value in FIT.items()]
    return ["-m", "domlora", "pretrain", "--data", str(data), "--out", str(out), "--method", "joint", *settings]


def test_a_rank_that_is_killed_comes_back(prepared: Path, tmp_path: Path) -> None:
    run(2, *pretrain(prepared, tmp_path / "whole"))
    kill_one(2, tmp_path / ".killed.checkpoint", *pretrain(prepared, tmp_path / "killed"))
    whole, killed = (Bundle.open(tmp_path / name) for name in ("whole", "killed"))
    assert killed.facts["valid"] == pytest.approx(whole.facts["valid"], abs=1e-6)
    after = killed.model.state_dict()
    for name, weights in whole.model.state_dict().items():
        assert (weights - after[name]).abs().max() <= 1e-6, name
