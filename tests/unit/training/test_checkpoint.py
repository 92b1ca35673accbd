from __future__ import annotations

import json
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
