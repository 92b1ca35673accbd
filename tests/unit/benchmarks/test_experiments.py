"""The trial of the experiments' statistics, on a few runs: parts, page, and going on where it ended."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def experiments() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("experiments")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_setting_can_be_judged(experiments: ModuleType) -> None:
    for name, setting in experiments.SETTINGS.items():
        found = experiments.false_alarms(setting, 2)
        assert found["alarms"]["runs"] == 2, name
        assert 0 < found["effect"] < 1, name


def test_splits_and_logs(experiments: ModuleType) -> None:
    found = experiments.splits(200)
    assert found["200000 0.0"]["called"]["share"] < 0.06
    assert found["200000 0.05"]["called"]["share"] == 1.0
    assert found["200000 0.01"]["called"]["share"] > found["200000 0.01"]["one_test"]["share"]
    told = experiments.agreement(2, experiments.looks_of)
    assert told["same_looks"] == 2
    assert told["largest_difference"] < 1e-9


def test_what_is_known_is_not_done_again(experiments: ModuleType, tmp_path: Path) -> None:
    share = {"share": 0.04, "low": 0.03, "high": 0.05, "runs": 500}
    names = ("found", "interval_holds_it", "both", "found_and_its_bounds_hold_it", "by_unit", "by_row", "alarms")
    known = dict.fromkeys((*names, "alarms_upwards", "single_test_each_look"), share)
    known |= {"units": [100, 100], "looks": 10, "runs": 3, "same_looks": 3, "largest_difference": 0.0, "cpu_s": 60.0}
    figures = dict.fromkeys(experiments.parts_of(1, 0), known)
    figures |= {name: {**known, "units": 1000} for name in figures if not name.startswith("no lift")}
    figures["split"] = {"a": {"units": 1000, "lost": 0.01, "called": share, "one_test": share}, "cpu_s": 60.0}
    (tmp_path / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    command = [sys.executable, str(BENCHMARKS / "experiments.py"), "--out", "figures.json", "--page", "page.md"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "", "no part was run"
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert f"which took {len(figures)} minutes of one core" in page
    assert "| CTR 1 %, 10 looks | 100 + 100 | 10 | 500 | 4.0 % (3.0 to 5.0) |" in page
    assert "| 1,000 | 4 % (4 %) |" in page
