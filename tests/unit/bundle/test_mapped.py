"""Tensors that stay on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from domlora.bundle import Bundle, reading
from domlora.bundle.mapped import map_tensor, map_tensors, on_disk
from domlora.errors import BundleError, DataError
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

SHORT = b'{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}'
BEFORE = b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [-8, 16]}}'
FEATURES = tuple(Feature(name, num_ids=4) for name in ("user", "item"))
ENCODER = Encoder(Schema(FEATURES, domains=("a", "b", "c")), {name: ["x", "y"] for name in ("user", "item")})
KINDS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


def test_mapped_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in KINDS}
    tensors |= {"flags": torch.tensor([True, False]), "none": torch.empty(0, 3), "number": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    found = map_tensors(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_what_is_changed_is_not_changed_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(3, 2)}, path)
    before, mapped = path.read_bytes(), map_tensors(path)["a"]
    mapped += 1
    assert path.read_bytes() == before
    path.unlink()
    assert mapped.sum() == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (9).to_bytes(8, "little") + b'{"a": 1}!',
        (8).to_bytes(8, "little") + b'{"a": 1}',
        *(len(h).to_bytes(8, "little") + h + bytes(16) for h in (SHORT, BEFORE)),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="must be a safetensors file"):
        map_tensors(tmp_path / "x")


def test_new_numbers_on_disk(tmp_path: Path) -> None:
    numbers = on_disk(torch.Size((5, 3)), tmp_path)
    numbers.copy_(torch.arange(15.0).view(5, 3))
    assert not list(tmp_path.iterdir())
    assert (numbers.dtype, float(numbers.sum())) == (torch.float32, 105)
    assert on_disk(torch.Size((0, 3)), tmp_path).shape == (0, 3)
    with pytest.raises(DataError, match="must be possible to write"):
        on_disk(torch.Size((1,)), tmp_path / "missing")


def test_a_file_of_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(torch.arange(6, dtype=torch.int32).numpy().tobytes())
    assert map_tensor(tmp_path / "rows", torch.int32, (3, 2)).tolist() == [[0, 1], [2, 3], [4, 5]]
    (tmp_path / "rows").write_bytes(b"")
    assert map_tensor(tmp_path / "rows", torch.int32, (0, 2)).shape == (0, 2)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    options = {"name": "deepfm", "hidden_units": [8]}
    Bundle(build_model(schema=ENCODER.schema, **options), options, ENCODER).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_long_base_is_mapped_and_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a delta behind it."""
    read = Bundle.open(bundle)
    monkeypatch.setattr(reading, "MAPPED_FROM_BYTES", 0)
    mapped = Bundle.open(bundle)
    assert list(mapped.model.state_dict()) == list(read.model.state_dict())
    for name, weight in read.model.state_dict().items():
        assert torch.equal(mapped.model.state_dict()[name], weight), name
    assert [p.requires_grad for p in mapped.model.parameters()] == [p.requires_grad for p in read.model.parameters()]
    with torch.no_grad():
        mapped.model.embedding.weight[1] += 1
    mapped.publish(bundle)
    again = Bundle.open(bundle)
    assert again.version == 2
    assert torch.equal(again.model.embedding.weight, mapped.model.embedding.weight)
    assert torch.equal(Bundle.open(bundle, version=1).model.embedding.weight, read.model.embedding.weight)


def test_a_long_base_that_is_damaged_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAPPED_FROM_BYTES", 0)
    file = bundle / "base@1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_tensors_that_share_memory_are_written_as_they_are(tmp_path: Path) -> None:
    options = {"name": "mlp", "hidden_units": [8, 8, 8]}
    model = build_model(schema=ENCODER.schema, **options)
    second, third = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][1:3]
    third.weight = second.weight
    Bundle(model, options, ENCODER).save(tmp_path / "tied")
    state = load_file(tmp_path / "tied" / "base@1" / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name
