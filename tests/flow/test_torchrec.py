"""Tables cut between ranks: the numbers of whole ones, on any number of ranks, also after a kill. Needs TorchRec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import distance, kill_one, run
from safetensors.torch import load_file

from domlora.bundle import Bundle
from domlora.training.distributed.blocks import best_of
from domlora.training.optimizers import FUSED

pytestmark = pytest.mark.torchrec

PROGRAM = str(Path(__file__).with_name("on_torchrec.py"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local")
    run(1, PROGRAM, str(out), "rowwise_adagrad")
    return out


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_tables_have_the_numbers_of_local_ones(local: Path, tmp_path: Path, size: int) -> None:
    """After a hundred steps; 4e-6 is twice the most that was seen, in single precision."""
    run(size, PROGRAM, str(tmp_path), FUSED)
    files = sorted(local.iterdir())
    assert len(files) == 5
    for file in files:
        assert distance(file, tmp_path / file.name) < 4e-6, file.name


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    run(1, PROGRAM, str(tmp_path / "straight"), FUSED, "9")
    for size, last in ((2, 2), (3, 3)):
        run(size, PROGRAM, str(tmp_path), FUSED, str(last))
        files = [*(tmp_path / "checkpoint" / "rows").iterdir()]
        assert len({file.name.partition("-")[0] for file in files}) == size  # each has written its own
    found = best_of(tmp_path / "checkpoint")
    run(1, PROGRAM, str(tmp_path), FUSED, "9")
    assert distance(tmp_path / "straight" / "whole.safetensors", tmp_path / "whole.safetensors") < 4e-6
    # the best epoch was over when the third rank wrote
    for name, weights in load_file(tmp_path / "whole.safetensors").items():
        assert name == "figures" or torch.equal(weights, found[name]), name


def pretrain(data: Path, out: Path, tables: str = FUSED, epochs: int = 3) -> list[str]:
    fit = {"batch_size": 500, "evaluations_per_epoch": 4, "max_epochs": epochs}
    settings = [f"--set=train.joint.fit.{name}={value}" for name, value in fit.items()]
    settings += [f"--set=train.joint.optimizer.tables.name={tables}", "--set=train.joint.optimizer.tables.lr=0.05"]
    settings += ["--set=model.dropout=0"]
    return ["-m", "domlora", "pretrain", "--data", str(data), "--out", str(out), "--method", "joint", *settings]


def test_a_rank_that_is_killed_comes_back(prepared: Path, tmp_path: Path) -> None:
    run(2, *pretrain(prepared, tmp_path / "whole"))
    took = kill_one(2, tmp_path / ".killed.checkpoint", *pretrain(prepared, tmp_path / "killed"))
    assert took < 60  # the restart, and the rest of the run
    whole, killed = (Bundle.open(tmp_path / name) for name in ("whole", "killed"))
    assert killed.facts["valid"] == pytest.approx(whole.facts["valid"], abs=1e-6)
    after = killed.model.state_dict()
    for name, weights in whole.model.state_dict().items():
        assert (weights - after[name]).abs().max() <= 1e-6, name


def test_tables_that_never_were_whole_start_and_end_as_whole_ones(prepared: Path, tmp_path: Path) -> None:
    run(1, *pretrain(prepared, tmp_path / "alone", "rowwise_adagrad", 1))
    run(3, *pretrain(prepared, tmp_path / "ranks", FUSED, 1))
    alone, ranks = (Bundle.open(tmp_path / name) for name in ("alone", "ranks"))
    assert ranks.facts["valid"] == pytest.approx(alone.facts["valid"], abs=1e-4)
    weights = ranks.model.state_dict()
    for name, weight in alone.model.state_dict().items():
        assert (weight - weights[name]).abs().max() < 1e-4, name
    assert not list(tmp_path.glob(".*"))  # nothing is left of the way to the bundle


def test_a_rank_without_a_row_of_a_table(prepared: Path, tmp_path: Path) -> None:
    """The table of two scenes has four rows, of which three ranks have two, two and none."""
    run(3, *pretrain(prepared, tmp_path / "ranks", FUSED, 1), "--set=model.embedding_dims.scene=3")
    sizes = [tuple(table.weight.shape) for table in Bundle.open(tmp_path / "ranks").model.embedding.tables]
    assert (4, 3) in sizes


def test_no_rank_has_room_for_a_table(tmp_path: Path) -> None:
    """Of four ranks: training, checkpoints and the bundle take less than one copy of it, and it must be somewhere."""
    found, script = tmp_path / "found.json", Path(__file__).parents[2] / "benchmarks" / "table_memory.py"
    run(1, str(script), "--rows", "2000000", "--ranks", "4", "--folder", str(tmp_path), "--json", str(found))
    times = json.loads(found.read_text())
    assert 0.25 < times["fused_rowwise_adagrad, ranks: 4"] < 1 < times["rowwise_adagrad, in the model"]
