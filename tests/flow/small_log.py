"""A log of two features and two scenes, and the plan to prepare it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["write_log"]

PLAN = """
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.user]
"""


def write_log(folder: Path, size: int, values: int) -> Path:
    """Write ``log.parquet`` with so many values a feature, and give the plan beside it."""
    draw = np.random.default_rng(0)
    table = {
        "item": draw.integers(values, size=size),
        "user": draw.integers(values, size=size),
        "scene": pa.array(draw.choice(["home", "cart"], size)),
        "click": draw.integers(2, size=size),
    }
    pq.write_table(pa.table(table), folder / "log.parquet")
    plan = folder / "plan.toml"
    plan.write_text(PLAN, encoding="utf-8")
    return plan
