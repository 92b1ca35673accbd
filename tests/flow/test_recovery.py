"""Whenever a training is killed, the same command goes on and ends with the bits of an uninterrupted run.

More often, and over more verbs: ``python benchmarks/kills.py --kills 50``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

KILLS = 5
ROWS = 4000


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("kills")
    finally:
        sys.path.remove(folder)


def test_killed_trainings_end_with_the_same_bits(kills: ModuleType, tmp_path: Path) -> None:
    for trial in kills.trials_of(tmp_path, ("pretrain", "adapt"), ROWS):
        found = kills.try_kills(trial, KILLS, seed=1)
        assert found.good, found
        assert found.kills == KILLS
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing is left behind


def test_a_bad_value_ends_a_training_with_one_line_that_names_it(kills: ModuleType, tmp_path: Path) -> None:
    data = kills.prepared(tmp_path, "data", 4000, ("home", "cart"))
    fast = ["--set", "train.pretrain.optimizer.dense.lr=1e4", "--set", "train.pretrain.optimizer.tables.lr=1e4"]
    words = ["pretrain", "--data", data, "--out", tmp_path / "base", *fast, "--set", "train.pretrain.fit.batch_size=64"]
    done = subprocess.run(kills.command(*words), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the loss of step 1 (epoch 0, batch 1 of it) must not explode" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base").exists()
