"""The documents name what is there, and their links lead to files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from domlora.models.build import MODELS

DOCS = Path(__file__).parents[1] / "docs"
MODELS_PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


def rows_below(heading: str) -> list[list[str]]:
    """The cells of the first table behind some text, without its head."""
    lines = MODELS_PAGE[MODELS_PAGE.index(heading) :].splitlines()
    table = [line for line in lines if line.startswith("|")]
    end = next((number for number, line in enumerate(lines[lines.index(table[0]) :]) if not line.startswith("|")), None)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:end]]


def test_every_model_has_its_row() -> None:
    rows = rows_below("# Models")
    assert [(row[0], row[1]) for row in rows] == [(f"`{key}`", f"`{model.__name__}`") for key, model in MODELS.items()]


def test_the_command_makes_the_numbers() -> None:
    block = re.search(r"```\n(python -c .*?)\n```", MODELS_PAGE, flags=re.S)
    assert block is not None
    command = [sys.executable, *shlex.split(block[1])[1:]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    made = {(key, dims): [int(count) for count in counts] for key, dims, *counts in map(str.split, printed)}
    said = {
        (key, row[1]): [int(cell.replace(",", "")) for cell in row[3:]]
        for row in rows_below("## Parameters")
        for key in re.findall(r"`(\w+)`", row[0])
    }
    for dims in ("8", "128"):
        said["star", dims][0] *= 2  # shared, and one domain's own
    assert said == made


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_relative_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
        assert (path.parent / target).is_file(), target
