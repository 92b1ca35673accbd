"""A small prepared dataset, and the path to what the tests of ranks share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import run
from small_log import write_log


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    run(1, "-m", "domlora", "prepare", str(write_log(folder, 60_000, 500)), "--out", str(folder / "rows"))
    return folder / "rows"
