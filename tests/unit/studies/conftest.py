"""A study of one small world, and changes to it."""

from __future__ import annotations

from typing import Any

import pytest

from domlora.config import merged, parse
from domlora.studies.study import Study

SMALL = {
    "name": "small",
    "datasets": {"world": {"world": {"num_domains": 2, "num_dense": 3}, "num_rows": 500}},
    "models": ["mlp"],
    "methods": ["two_stage"],
    "config": {
        "model": {"hidden_units": [8], "dropout": 0.0},
        "train": {stage: {"fit": {"batch_size": 64, "max_epochs": 1}} for stage in ("pretrain", "joint", "adapt")},
    },
}


@pytest.fixture(scope="session")
def study() -> Any:
    """Makes the study with other options: whole ones, and ``config`` merged into its own."""

    def make(config: dict[str, Any] | None = None, **options: Any) -> Study:
        return parse(Study, {**SMALL, "config": merged(SMALL["config"], config or {}), **options})

    return make
