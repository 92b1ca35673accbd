"""More shards than a process may have files open at first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PLAN = """
shard_rows = 20
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
"""


def prepared(folder: Path, limit: str) -> subprocess.CompletedProcess[str]:
    numbers = range(4000)
    columns = {"item": [n % 7 for n in numbers], "scene": ["a", "b"] * 2000, "click": [n % 3 == 0 for n in numbers]}
    pq.write_table(pa.table(columns), folder / "log.parquet")
    (folder / "plan.toml").write_text(PLAN, encoding="utf-8")
    command = [sys.executable, "-m", "domlora", "prepare", str(folder / "plan.toml"), "--out", str(folder / "rows")]
    shell = ["bash", "-c", f'ulimit {limit} -n 100; exec "$@"', "bash"]
    return subprocess.run([*shell, *command], capture_output=True, text=True, check=False)


def test_the_soft_limit_is_raised(tmp_path: Path) -> None:
    done = prepared(tmp_path, "-S")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([*(tmp_path / "rows").rglob("part-*.parquet")]) > 80


def test_the_hard_limit_is_told(tmp_path: Path) -> None:
    done = prepared(tmp_path, "-SH")
    assert done.returncode == 2
    assert "each shard needs an open file, and this process may have 60" in done.stderr
    assert "Raise shard_rows" in done.stderr
    assert not (tmp_path / "rows").exists()
