"""Every example runs, as a stranger would run it."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
BEFORE, AFTER = EXAMPLES / "adapt_your_model_before.py", EXAMPLES / "adapt_your_model.py"


def run(path: Path, folder: Path) -> str:
    command = [sys.executable, str(path)]
    if "--quick" in path.read_text(encoding="utf-8"):
        command.append("--quick")
    # DeepCTR-Torch asks the network for a newer version when it is imported: here it finds none at once
    offline = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.parametrize("path", sorted({*EXAMPLES.glob("*.py")} - {BEFORE, AFTER}), ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    run(path, tmp_path)


def test_adapting_a_model_changes_few_lines() -> None:
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in (BEFORE, AFTER))
    changed = [line for line in difflib.ndiff(before, after) if line.startswith(("+ ", "- "))]
    assert len(changed) <= 15, changed


@pytest.mark.skipif(not importlib.util.find_spec("deepctr_torch"), reason="DeepCTR-Torch is not installed")
def test_adapting_a_model_helps(tmp_path: Path) -> None:
    before, after = run(BEFORE, tmp_path), run(AFTER, tmp_path)
    assert number("mean over domains", after) > number("mean over domains", before) + 0.01
    assert number("mean over domains", after) < number("of the truth", after)
    assert number("merged differs by", after) <= 1e-6


def number(name: str, printed: str) -> float:
    found = re.search(rf"{name}:\s*([\d.e-]+)", printed)
    assert found, printed
    return float(found[1])
