"""However ``prepare`` is killed, its output is complete or absent, and the next attempt ends with the same bytes.

``DOMLORA_KILLS=20 pytest tests/flow/test_killed.py`` tries it more often than the three times here.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.dataset import Dataset

KILLS = int(os.environ.get("DOMLORA_KILLS", "3"))
PLAN = """
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.price]
kind = "numeric"
"""


def command(folder: Path, out: str) -> list[str]:
    words = ["prepare", str(folder / "plan.toml"), "--out", str(folder / out), "--overwrite"]
    return [sys.executable, "-c", "from domlora.cli import main; main()", *words]


def test_a_killed_process_leaves_all_or_nothing(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    size = 200_000
    table = {
        "item": draw.integers(5000, size=size),
        "price": draw.random(size),
        "scene": pa.array(draw.choice(["home", "cart"], size)),
        "click": draw.integers(2, size=size),
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    (tmp_path / "plan.toml").write_text(PLAN, encoding="utf-8")
    started = time.perf_counter()
    subprocess.run(command(tmp_path, "whole"), check=True, capture_output=True)
    seconds = time.perf_counter() - started
    whole = (tmp_path / "whole" / "manifest.json").read_bytes()
    moments = random.Random(1)
    for _ in range(KILLS):
        process = subprocess.Popen(command(tmp_path, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * moments.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        if (tmp_path / "killed").exists():
            assert (tmp_path / "killed" / "manifest.json").read_bytes() == whole
            data = Dataset.open(tmp_path / "killed")
            assert sum(data.read(split).num_rows for split in ("train", "valid", "test")) == size
    subprocess.run(command(tmp_path, "killed"), check=True, capture_output=True)
    assert (tmp_path / "killed" / "manifest.json").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "log.parquet", "plan.toml", "whole"]
