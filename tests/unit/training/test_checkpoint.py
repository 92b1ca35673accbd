from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from domlora.errors import DataError
from domlora.training.checkpoint import read_checkpoint, write_checkpoint

TENSORS = {
    "a/b.c": torch.randn(3, 4),
    "scalar": torch.tensor(7),
    "bytes": torch.get_rng_state(),
    "empty": torch.empty(2, 0),
    "strided": torch.randn(4, 3).t(),
    "bool": torch.tensor([True, False]),
}
FACTS = {"position": 3, "value": 0.1 + 0.2, "history": [{"loss": 0.5}], "options": "größe"}


def test_round_trip(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    tensors, facts = read_checkpoint(tmp_path / "run")
    assert facts == FACTS
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_figures_that_are_no_numbers_survive(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, {"loss": float("nan"), "best": float("-inf")})
    facts = read_checkpoint(tmp_path / "run")[1]
    assert facts["loss"] != facts["loss"]
    assert facts["best"] == float("-inf")


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    weight = torch.randn(3)
    write_checkpoint(tmp_path / "run", {"a": weight, "b": weight, "c": weight[1:]}, {})
    tensors, _ = read_checkpoint(tmp_path / "run")
    assert torch.equal(tensors["a"], tensors["b"])
    assert torch.equal(tensors["c"], weight[1:])


def test_it_is_replaced(tmp_path: Path) -> None:
    for number in range(3):
        write_checkpoint(tmp_path / "run", {"x": torch.tensor(number)}, {"number": number})
        tensors, facts = read_checkpoint(tmp_path / "run")
        assert tensors["x"] == facts["number"] == number
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "run", TENSORS, {"bad": object()})
    assert read_checkpoint(tmp_path / "run")[1] == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters").write_text("dear")
    with pytest.raises(DataError):
        write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    assert (tmp_path / "run" / "letters").exists()


@pytest.mark.parametrize("name", ["tensors.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "bit"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, {"position": 3})
    path = tmp_path / "run" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        at = content.index(b"sha256") + 12 if name == "checkpoint.json" else len(content) - 1
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "bit": flipped}[damage])
    with pytest.raises(DataError, match=r"must be whole.*Remove the folder"):
        read_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"sha256": 3}'])
def test_json_of_another_form_is_damage_too(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    (tmp_path / "run" / "checkpoint.json").write_text(text)
    with pytest.raises(DataError):
        read_checkpoint(tmp_path / "run")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_checkpoint(tmp_path / "missing")


def test_facts_can_be_read_by_people(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text(encoding="utf-8"))["position"] == 3


def test_a_full_disk_leaves_the_old_one(small_disk: Path) -> None:
    write_checkpoint(small_disk / "run", TENSORS, FACTS)
    with pytest.raises(DataError, match=r"must have room for the output \(No space left on device\).*is as it was"):
        write_checkpoint(small_disk / "run", {"x": torch.zeros(1_000_000)}, FACTS)
    assert read_checkpoint(small_disk / "run")[1] == FACTS
    assert [path.name for path in small_disk.iterdir()] == ["run"]


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from domlora.errors import DataError
from domlora.training.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    write_checkpoint(Path(sys.argv[1]), {"x": torch.zeros(1_000_000)}, {})
except DataError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_leaves_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "must have room for the output (File too large)" in said
    assert read_checkpoint(tmp_path / "run")[1] == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_one_that_may_not_be_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", TENSORS, FACTS)
    (tmp_path / "run" / "checkpoint.json").chmod(0)
    with pytest.raises(DataError, match="must be readable"):
        read_checkpoint(tmp_path / "run")
