"""A small prepared dataset, and the path to what the tests of ranks share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import run


@pytest.fixture(scope="session")
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
