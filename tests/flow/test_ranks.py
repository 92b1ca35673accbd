"""Ranks of torchrun: results do not depend on their number, and a rank that is killed costs nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from domlora.bundle import Bundle

PROGRAM = Path(__file__).with_name("on_ranks.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
FIT = {"batch_size": 500, "evaluations_per_epoch": 4, "max_epochs": 3}


def torchrun(size: int, *words: str) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(size), "--max-restarts", "2", "--monitor-interval", "0.5"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *words]


def run(size: int, *words: str) -> None:
    command = [sys.executable, *words] if size == 1 else torchrun(size, *words)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def distance(one: Path, two: Path) -> float:
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw, size = tmp_path_factory.mktemp("data"), np.random.default_rng(0), 60_000
    table = {
        "item": draw.integers(500, size=size),
        "user": draw.integers(500, size=size),
        "scene": pa.array(draw.choice(["home", "cart"], size)),
        "click": draw.integers(2, size=size),
    }
    pq.write_table(pa.table(table), folder / "log.parquet")
    columns = '[columns]\ndomain = "scene"\nlabel = "click"\n[features.item]\n[features.user]\n'
    (folder / "plan.toml").write_text('[source]\nfiles = ["log.parquet"]\n' + columns, encoding="utf-8")
    run(1, "-m", "domlora", "prepare", str(folder / "plan.toml"), "--out", str(folder / "rows"))
    return folder / "rows"


def pretrain(data: Path, out: Path) -> list[str]:
    settings = [f"--set=train.joint.fit.{name}={value}" for name, value in FIT.items()]
    return ["-m", "domlora", "pretrain", "--data", str(data), "--out", str(out), "--method", "joint", *settings]


def workers_of(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_rank_that_is_killed_comes_back(prepared: Path, tmp_path: Path) -> None:
    run(2, *pretrain(prepared, tmp_path / "whole"))
    command = torchrun(2, *pretrain(prepared, tmp_path / "killed"))
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        checkpoint, patience = tmp_path / ".killed.checkpoint" / "checkpoint.json", time.monotonic() + 120
        while not checkpoint.exists() and time.monotonic() < patience:
            time.sleep(0.05)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        assert process.stderr is not None
        told = process.stderr.read().decode()
        assert process.wait() == 0, told[-3000:]
    whole, killed = (Bundle.open(tmp_path / name) for name in ("whole", "killed"))
    assert killed.facts["valid"] == pytest.approx(whole.facts["valid"], abs=1e-6)
    after = killed.model.state_dict()
    for name, weights in whole.model.state_dict().items():
        assert (weights - after[name]).abs().max() <= 1e-6, name
