"""The table of parameters in the docs is what its command prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.studies.parameters import count_parameters

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "docs" / "results" / "parameters.md"


def test_the_command_prints_the_page() -> None:
    command = [sys.executable, "studies/parameters.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == TABLE.read_text(encoding="utf-8")


def test_a_row_is_the_size_of_a_model_with_numbers() -> None:
    sizes = {"user_id": 6042, "item_id": 3649, "domain": 12}
    schema = Schema(tuple(Feature(n, num_ids=s) for n, s in sizes.items()), tuple(map(str, range(10))))
    model = build_model("star", schema, embedding_dim=32, hidden_units=(256, 128, 64), dropout=0.2)
    counts = count_parameters(model)
    row = next(line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `star`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == [f"{counts['params_total']:,}", f"{counts['params_total'] - counts['params_tables']:,}"]
