"""What the README tells a reader to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from domlora import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_make_targets_exist() -> None:
    named = set(re.findall(r"^make (\w+)", README, flags=re.M)) | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "test"} <= named
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert named <= targets


def test_commands_exist() -> None:
    verbs = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    verbs |= {str(group.name) for group in cli.app.registered_groups}
    named = set(re.findall(r"^domlora (\w+)", README, flags=re.M))
    assert named
    assert named <= verbs


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
