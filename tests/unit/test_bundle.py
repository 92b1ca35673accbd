from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import adapter_parameters, rows_of
from domlora.bundle import Bundle, verify
from domlora.errors import BundleError, DataError, DomloraError
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

OPTIONS: dict[str, Any] = {"name": "star", "hidden_units": [8, 4], "embedding_dim": 3, "dropout": 0.2}
ADAPTERS = [
    None,
    AdapterOptions(temperature=2.0),
    AdapterOptions(rank=0),
    AdapterOptions(rank=3, bias=False, lora_alpha=6.0),
]


def encoder(domains: tuple[str, ...] = ("app", "web")) -> Encoder:
    schema = Schema((Feature("item", num_ids=4), Feature("age", "numeric", mean=3.0)), domains=domains)
    return Encoder(schema, {"item": ["a", "b"]})


def bundle(adapter: AdapterOptions | None = None, domains: tuple[str, ...] = ("app", "web")) -> Bundle:
    torch.manual_seed(0)
    model = build_model(schema=encoder(domains).schema, **OPTIONS)
    if adapter is not None:
        attach_(model, len(domains), **dataclasses.asdict(adapter))
    with torch.no_grad():
        for _, tensor in [*adapter_parameters(model), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return Bundle(model, OPTIONS, encoder(domains), {"note": "größe", "valid": 0.1 + 0.2})


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    bundle(ADAPTERS[1]).save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["none", "low rank", "bias only", "no bias"])
def test_round_trip_bit_for_bit(tmp_path: Path, adapter: AdapterOptions | None) -> None:
    ours = bundle(adapter)
    ours.save(tmp_path / "bundle")
    theirs = Bundle.open(tmp_path / "bundle")
    assert list(states(theirs.model)) == list(states(ours.model))
    for name, tensor in states(ours.model).items():
        assert torch.equal(states(theirs.model)[name], tensor)
        assert states(theirs.model)[name].dtype == tensor.dtype
    assert (theirs.model_options, theirs.adapter, theirs.facts) == (OPTIONS, adapter, ours.facts)
    assert theirs.encoder.fingerprint() == ours.encoder.fingerprint()
    rows = ours.encoder.encode({"item": ["a", "z"], "age": [1, 2], "domain": ["web", "app"]})
    for model in (ours.model, theirs.model):
        model.eval()
    assert torch.equal(theirs.model(*rows[:3]), ours.model(*rows[:3]))


def test_what_was_opened_scores_at_once(saved: Path) -> None:
    """In evaluation mode: no dropout in the answers of whoever opens a bundle."""
    opened = Bundle.open(saved)
    rows = opened.encoder.encode({"item": ["a"] * 50, "age": [1] * 50, "domain": ["web"] * 50})
    assert len(opened.model(*rows[:3]).unique()) == 1
    assert not opened.model.training


def test_saving_what_was_opened_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    Bundle.open(saved).save(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)
    for name in files(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    ours = bundle(ADAPTERS[1])
    before, training = states(ours.model), ours.model.training
    ours.save(tmp_path / "bundle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(ours.model).items())
    assert ours.model.training == training


def test_files(saved: Path) -> None:
    assert files(saved) == [
        "adapters/app.safetensors",
        "adapters/web.safetensors",
        "base.safetensors",
        "manifest.json",
        "schema.json",
        "vocabularies.json",
    ]
    assert sorted(verify(saved)["files"]) == [name for name in files(saved) if name != "manifest.json"]


NAMES = ["adapters/app.safetensors", "base.safetensors", "manifest.json", "schema.json", "vocabularies.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "bit", "missing", "grown"])
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "bit": flipped, "grown": content + b" "}[damage])
    if (name, damage) == ("manifest.json", "grown"):
        return  # white space after JSON
    with pytest.raises(BundleError, match=name):
        Bundle.open(saved)


def test_any_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    """The manifest vouches for all other files, so something must vouch for it."""
    path = saved / "manifest.json"
    content = path.read_bytes()
    unnoticed = []
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            if json.loads(path.read_bytes()) == json.loads(content):
                continue
        except ValueError:
            pass
        try:
            verify(saved)
        except BundleError:
            continue
        unnoticed.append(position)
    assert not unnoticed


@pytest.mark.parametrize("name", ["extra.txt", "adapters/toys.safetensors", ".hidden"])
def test_an_unknown_file_is_named(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=name):
        Bundle.open(saved)


@pytest.mark.parametrize("key", ["format", "model", "adapter", "facts", "files"])
def test_a_manifest_without_a_part_is_refused(saved: Path, key: str) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest[key]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(saved)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', '{"format": 1, "files": []}', '{"format": 1, "files": 3}'])
def test_json_of_another_form_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        Bundle.open(saved)


def test_a_later_format_is_named(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BundleError, match=r"format.*99"):
        Bundle.open(saved)


def test_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(BundleError, match="domlora pretrain"):
            Bundle.open(path)


def test_weights_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    """Manifest and files agree, and yet the weights are not those of the model."""
    other = bundle(ADAPTERS[1])
    other.model_options = {**OPTIONS, "hidden_units": [8, 5]}
    other.save(tmp_path / "other")
    with pytest.raises(BundleError, match=r"base\.safetensors must fit"):
        Bundle.open(tmp_path / "other")


WEIRD = ["a/b", "..", ".", "ü", "a b", "%2F", "../../x", "~", "C:\\x", "a\nb", "日本語" * 20, "A", "a", "-1", "\x00"]


def test_weird_domain_names_stay_inside(tmp_path: Path) -> None:
    ours = bundle(AdapterOptions(temperature=2.0), tuple(WEIRD))
    ours.save(tmp_path / "in" / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["bundle"]
    assert len(list((tmp_path / "in" / "bundle" / "adapters").iterdir())) == len(WEIRD)
    theirs = Bundle.open(tmp_path / "in" / "bundle")
    assert theirs.encoder.schema.domains == tuple(WEIRD)
    for number in range(len(WEIRD)):
        for name, row in rows_of(ours.model, number).items():
            assert torch.equal(rows_of(theirs.model, number)[name], row)


def test_a_blank_domain_name_never_gets_this_far() -> None:
    with pytest.raises(DomloraError, match="blank"):
        encoder(("app", ""))


def test_an_existing_folder_is_replaced_only_on_request(saved: Path) -> None:
    before = (saved / "base.safetensors").read_bytes()
    with pytest.raises(DataError, match="must not exist"):
        bundle().save(saved)
    assert (saved / "base.safetensors").read_bytes() == before
    bundle().save(saved, overwrite=True)
    assert Bundle.open(saved).adapter is None


def test_a_failed_save_leaves_the_old_bundle(saved: Path) -> None:
    broken = bundle()
    broken.facts = {"not json": object()}
    with pytest.raises(TypeError):
        broken.save(saved, overwrite=True)
    assert Bundle.open(saved).adapter == ADAPTERS[1]
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_a_bundle_moves_and_copies(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    shutil.move(saved, tmp_path / "moved")
    for name in ("copy", "moved"):
        Bundle.open(tmp_path / name)


def test_facts_are_plain_json(tmp_path: Path) -> None:
    """NaN is not JSON; other languages cannot read a manifest that holds one."""
    ours = bundle()
    ours.facts = {"valid": float("nan")}
    try:
        ours.save(tmp_path / "bundle")
    except ValueError:
        return
    json.loads((tmp_path / "bundle" / "manifest.json").read_text(), parse_constant=pytest.fail)
