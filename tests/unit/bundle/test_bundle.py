from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import adapter_parameters, rows_of
from domlora.adapters.file import base_fingerprint, load_adapter_
from domlora.bundle import Bundle, adapter_folders, verify
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
    AdapterOptions(rank=3, lora_alpha=10.0),
    AdapterOptions(temperature=4.0, lora_alpha=3.14159),
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


def parts(folder: Path) -> list[Path]:
    """All files of adapters."""
    return sorted(path for path in folder.rglob("adapters/**/*") if path.is_file())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    bundle(ADAPTERS[1]).save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    "adapter", ADAPTERS, ids=["none", "low rank", "bias only", "no bias", "any scale", "no fraction"]
)
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
    """But for the time."""
    Bundle.open(saved).save(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)
    for name in set(files(saved)) - {"manifest.json", "versions/1.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    one, two = (json.loads((folder / "versions/1.json").read_text()) for folder in (saved, tmp_path / "again"))
    assert {**one, "created": ""} == {**two, "created": ""}


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    ours = bundle(ADAPTERS[1])
    before, training = states(ours.model), ours.model.training
    ours.save(tmp_path / "bundle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(ours.model).items())
    assert ours.model.training == training


def test_files(saved: Path) -> None:
    assert files(saved) == [
        "adapters/app@1/adapter_config.json",
        "adapters/app@1/adapter_model.safetensors",
        "adapters/app@1/domlora.json",
        "adapters/web@1/adapter_config.json",
        "adapters/web@1/adapter_model.safetensors",
        "adapters/web@1/domlora.json",
        "base@1/model.safetensors",
        "encoder@1/schema.json",
        "encoder@1/vocabularies.json",
        "manifest.json",
        "versions/1.json",
    ]
    assert verify(saved).files == len(files(saved)) - 2


def test_a_bundle_of_an_earlier_format_is_refused(saved: Path) -> None:
    """One version, its files side by side."""
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(BundleError, match=r"format 3\. Received: 2\. Write it anew"):
        Bundle.open(saved)


@pytest.mark.parametrize("key", ["format", "default", "last", "encoder", "versions", "sha256"])
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
    with pytest.raises(BundleError, match="the base must fit"):
        Bundle.open(tmp_path / "other")


WEIRD = ["a/b", "..", ".", "ü", "a b", "%2F", "../../x", "~", "C:\\x", "a\nb", "日本語" * 20, "A", "a", "-1", "\x00"]
WEIRD += [".hidden", "a.", "con", "aux.txt", "COM1", "x" * 300, "x" * 301, "X" * 300, "@", "adapters", "manifest.json"]


def test_folders_of_adapters_fit_every_disk() -> None:
    """macOS and Windows take ``A`` for ``a``; Windows drops a last dot and keeps a few names for devices."""
    names = [folder.removeprefix("adapters/") for folder in adapter_folders(WEIRD, 999_999_999).values()]
    assert len({name.lower() for name in names}) == len(names) == len(WEIRD)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_.~%@-]{1,255}", name)
        assert name.strip(".") == name
        assert name.partition(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt1"}


def test_folders_of_adapters_can_be_read() -> None:
    names = ["books", "Toys", "age_18-24", "4", "v1.2", "F"]
    assert adapter_folders(names, 7) == {name: f"adapters/{name}@7" for name in names}
    assert adapter_folders(["home & garden", "x", "X"]) == {
        "home & garden": "adapters/home%20%26%20garden@1",
        "x": "adapters/x@2d711642b726b044@1",
        "X": "adapters/X@4b68ab3847feda7d@1",
    }


def test_no_name_can_be_made_to_meet_another() -> None:
    """What tells ``A`` from ``a`` is a sign that a plain name never has."""
    taken = [folder.removeprefix("adapters/").removesuffix("@1") for folder in adapter_folders(["A", "a"]).values()]
    names = list(adapter_folders(["A", "a", *taken, taken[0].lower(), "A@1"]).values())
    assert len({name.lower() for name in names}) == len(names)


def test_weird_domain_names_stay_inside(tmp_path: Path) -> None:
    ours = bundle(AdapterOptions(temperature=2.0), tuple(WEIRD))
    ours.save(tmp_path / "in" / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["bundle"]
    assert all(len(path.relative_to(tmp_path / "in" / "bundle").parts) == 3 for path in parts(tmp_path / "in"))
    assert len(list((tmp_path / "in" / "bundle" / "adapters").iterdir())) == len(WEIRD)
    theirs = Bundle.open(tmp_path / "in" / "bundle")
    assert theirs.encoder.schema.domains == tuple(WEIRD)
    for number in range(len(WEIRD)):
        for name, row in rows_of(ours.model, number).items():
            assert torch.equal(rows_of(theirs.model, number)[name], row)


def test_an_adapter_is_used_alone(saved: Path, tmp_path: Path) -> None:
    """Copied out of its bundle, beside the same base in another process's model, in another row of the bank."""
    shutil.copytree(saved / "adapters/web@1", tmp_path / "web")
    ours, fresh = bundle(ADAPTERS[1]), build_model(schema=encoder().schema, **OPTIONS)
    fresh.load_state_dict(load_file(saved / "base@1/model.safetensors"))
    attach_(fresh, 3, temperature=2.0, include=("tower.*",))
    load_adapter_(fresh, 2, tmp_path / "web")
    for name, row in rows_of(ours.model, 1).items():
        assert torch.equal(rows_of(fresh, 2)[name], row)


@pytest.mark.parametrize("work", ["save", "open"])
def test_the_base_is_read_once_and_not_once_a_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    ours = bundle(ADAPTERS[1], tuple(f"d{number}" for number in range(20)))
    ours.save(tmp_path / "bundle")
    calls = []

    def counted(model: nn.Module) -> str:
        calls.append(model)
        return base_fingerprint(model)

    for room in ("domlora.bundle.reading", "domlora.bundle.writing", "domlora.adapters.file"):
        monkeypatch.setattr(f"{room}.base_fingerprint", counted)
    if work == "save":
        ours.save(tmp_path / "again")
    else:
        Bundle.open(tmp_path / "bundle")
    assert len(calls) == 1


def test_a_blank_domain_name_never_gets_this_far() -> None:
    with pytest.raises(DomloraError, match="blank"):
        encoder(("app", ""))


def test_a_model_that_would_not_come_back_is_refused(tmp_path: Path) -> None:
    half = bundle()
    half.model.double()
    with pytest.raises(BundleError, match=r"float32 weights.*float64"):
        half.save(tmp_path / "half")
    part = bundle()
    attach_(part.model.tower, 2, domain=None)
    with pytest.raises(BundleError, match="attached to the model as a whole"):
        part.save(tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_on_request(saved: Path) -> None:
    before = (saved / "base@1/model.safetensors").read_bytes()
    with pytest.raises(DataError, match="must not exist"):
        bundle().save(saved)
    assert (saved / "base@1/model.safetensors").read_bytes() == before
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
    json.loads((tmp_path / "bundle" / "versions/1.json").read_text(), parse_constant=pytest.fail)
