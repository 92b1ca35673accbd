"""Minutes of load on the real server; run one with ``pytest -m reliability tests/reliability/r01_load.py -s``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import serving, write_export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "live"
    write_export(folder)
    return folder


@pytest.fixture
def serve(exported: Path, tmp_path: Path) -> Callable:
    return partial(serving, exported, tmp_path / "log")
