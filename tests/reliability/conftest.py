"""Minutes of load on the real server; run one with ``pytest -m reliability tests/reliability/r01_load.py -s``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import SAID, serving, write_export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "live"
    write_export(folder)
    return folder


@pytest.fixture
def serve(exported: Path, tmp_path: Path) -> Callable:
    return partial(serving, exported, tmp_path / "log")


@pytest.fixture(scope="module", autouse=True)
def line(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the tests of a script have said, in one line: ``R7: ...``."""
    SAID.clear()
    yield
    number = int(request.path.stem[1:3])
    sys.stdout.write(f"\nR{number}: {'; '.join(SAID) or 'no figure'}\n")
