"""Whatever happens to a file of a bundle: it is refused and named, and nothing is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from domlora.adapters.bank import adapter_parameters, base_state
from domlora.bundle import Bundle, verify, versions
from domlora.errors import BundleError
from domlora.files import sha256_of

Make = Callable[..., Bundle]
PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."

PARTS = {
    1: ["encoder@1", "base@1", "adapters/app@1", "adapters/web@1"],
    2: ["encoder@1", "base@1", "adapters/app@1", "base@2", "adapters/web@2", "optimizer@2"],
}
LEAVES = {
    "encoder": ["schema.json", "vocabularies.json"],
    "adapters": ["adapter_config.json", "adapter_model.safetensors", "domlora.json"],
    "optimizer": ["optimizer.safetensors"],
    "base@1": ["model.safetensors"],
    "base@2": ["delta.safetensors", "delta.json"],
}


def leaves(part: str) -> list[str]:
    return next(names for kind, names in LEAVES.items() if part.startswith(kind))


USERS = {
    f"{part}/{leaf}": {v for v in PARTS if part in PARTS[v]}
    for v in PARTS
    for part in PARTS[v]
    for leaf in leaves(part)
}
USERS |= {"versions/1.json": {1}, "versions/2.json": {2}, "manifest.json": {1, 2}}


def build(make: Make, folder: Path, seed: int = 0) -> Path:
    """Two versions: a base and a delta, an adapter kept and one written anew, an optimizer."""
    made = make(domains=("app", "web"), seed=seed)
    made.save(folder)
    with torch.no_grad():
        base_state(made.model)["embedding.weight"][5] += 1 + seed
        for _, bank in adapter_parameters(made.model):
            bank[1] += 1
    made.optimizer = {"moment": torch.rand(2000)}
    made.publish(folder)
    return folder


@pytest.fixture
def pair(make: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp() / "pair"
    if not shared.exists():
        build(make, shared)
    shutil.copytree(shared, tmp_path / "bundle")
    return tmp_path / "bundle"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, match: str, opened: set[int], *, verified: bool = True) -> None:
    """By whoever reads it, with one line, and nothing is changed."""
    before = content_of(folder)
    for number in opened:
        with pytest.raises(BundleError, match=match) as caught:
            Bundle.open(folder, version=number)
        assert "\n" not in str(caught.value)
    if verified:
        with pytest.raises(BundleError, match=match):
            verify(folder)
    assert content_of(folder) == before


def swapped(folder: Path, name: str) -> None:
    """With a file of the same name, or else with any other."""
    others = [
        other for other in USERS if other != name and (folder / other).read_bytes() != (folder / name).read_bytes()
    ]
    other = next((other for other in others if Path(other).name == Path(name).name), others[0])
    one, two = (folder / name).read_bytes(), (folder / other).read_bytes()
    (folder / name).write_bytes(two)
    (folder / other).write_bytes(one)


def linked(folder: Path, name: str) -> None:
    """The content is right, and lies elsewhere."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path, str], None]:
    return lambda folder, name: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


CORRUPTIONS: dict[str, Callable[[Path, str], None]] = {
    "truncated": rewritten(lambda content: content[:-1]),
    "empty": rewritten(lambda _: b""),
    "flipped bit": rewritten(flipped),
    "zeroed page": rewritten(lambda content: bytes(min(4096, len(content))) + content[4096:]),
    "grown": rewritten(lambda content: content + b"\0"),
    "pickle": rewritten(lambda _: PICKLE),
    "swapped": swapped,
    "missing": lambda folder, name: (folder / name).unlink(),
    "linked": linked,
}


def test_the_table_above_has_every_file(pair: Path) -> None:
    assert content_of(pair).keys() == USERS.keys()
    assert [version.number for version in versions(pair)] == [1, 2]
    assert verify(pair).files == len(USERS) - 3


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("name", USERS)
def test_every_corruption_of_every_file(pair: Path, name: str, corruption: str) -> None:
    CORRUPTIONS[corruption](pair, name)
    place = "." if corruption == "swapped" else Path(name).name if corruption in ("missing", "linked") else name
    refused(pair, place, USERS[name])
    if corruption not in ("swapped", "linked"):
        for number in {1, 2} - USERS[name]:
            assert Bundle.open(pair, version=number).version == number


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        ".hidden",
        "weights@1",
        "base@0",
        "versions/notes",
        "versions/1.pt",
        "adapters/toys",
        "adapters/@1",
        *(f"{part}/pytorch_model.bin" for part in PARTS[2]),
    ],
)
def test_a_file_too_many(pair: Path, name: str) -> None:
    (pair / name).write_bytes(PICKLE)
    refused(pair, name, {2})


@pytest.mark.parametrize("name", ["base@1/more", "adapters/app@1/more"])
def test_a_folder_too_many(pair: Path, name: str) -> None:
    (pair / name).mkdir()
    refused(pair, "more", {2})


@pytest.mark.parametrize("name", [*PARTS[2], "versions", "adapters", "adapters/app@1/domlora.json"])
def test_a_link_in_the_place_of_a_part(pair: Path, name: str) -> None:
    linked(pair, name)
    refused(pair, Path(name).name, {2})


def test_a_link_to_the_bundle_itself_is_fine(pair: Path) -> None:
    """Whoever serves may point at it."""
    (pair.parent / "current").symlink_to(pair)
    assert Bundle.open(pair.parent / "current").version == 2


# ---------------------------------------------------------------- whoever wrote it knew how to compute a sha256


def sealed(folder: Path, change: Callable[[dict[str, Any]], None], version: int = 2) -> None:
    """Change the record of a version so that the manifest vouches for it."""
    path = folder / f"versions/{version}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"][str(version)] = sha256_of(path)
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def as_found(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Give every file the sha256 that it has now."""
    return lambda record: record["files"].update({name: sha256_of(folder / name) for name in record["files"]})


def test_a_file_that_is_sealed_again_is_read(pair: Path) -> None:
    """What the tests below change would otherwise be accepted."""
    sealed(pair, as_found(pair))
    verify(pair)
    assert Bundle.open(pair).version == 2


@pytest.mark.parametrize("part", ["adapters/app@1", "adapters/web@2", "base@2"])
def test_a_part_of_another_base(pair: Path, make: Make, part: str) -> None:
    other = build(make, pair.parent / "other", seed=3)
    shutil.rmtree(pair / part)
    shutil.copytree(other / part, pair / part)
    sealed(pair, as_found(pair))
    refused(pair, "another base", {2}, verified=False)


def test_a_whole_base_of_another_bundle(pair: Path, make: Make) -> None:
    other = build(make, pair.parent / "other", seed=3)
    shutil.copy(other / "base@1/model.safetensors", pair / "base@1/model.safetensors")
    sealed(pair, as_found(pair))
    refused(pair, "another base", {2}, verified=False)


def test_an_adapter_of_another_version(pair: Path) -> None:
    """Of the same domain, written beside a base that is not the one its number says."""
    shutil.rmtree(pair / "adapters/web@2")
    shutil.copytree(pair / "adapters/web@1", pair / "adapters/web@2")
    sealed(pair, as_found(pair))
    refused(pair, "another base", {2}, verified=False)


SEALED = ["base@1/model.safetensors", "base@2/delta.safetensors", "adapters/app@1/adapter_model.safetensors"]
SEALED += ["optimizer@2/optimizer.safetensors", "base@2/delta.json", "adapters/app@1/domlora.json"]


@pytest.mark.parametrize("name", SEALED)
def test_a_pickle_that_is_sealed_is_not_read(pair: Path, name: str) -> None:
    (pair / name).write_bytes(PICKLE)
    sealed(pair, as_found(pair))
    refused(pair, "must|damaged", {2}, verified=False)


EVIL = [
    "../bundle/encoder@1",
    "/etc@1",
    "encoder@1/../x@1",
    "adapters/../base@1",
    "adapters/a/b@1",
    "encoder",
    "base@-1",
]
EVIL += ["..", "", "adapters/..", "encoder@1\n", "base@1/model.safetensors", 3, None, ["encoder@1"]]


@pytest.mark.parametrize("kind", ["encoder", "base", "adapters", "optimizer"])
@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_a_name_that_leads_elsewhere(pair: Path, kind: str, name: object) -> None:
    values = {"encoder": name, "base": ["base@1", name], "adapters": {"app": name, "web": "adapters/web@2"}}
    sealed(pair, lambda record: record.update({kind: values.get(kind, name)}))
    if (kind, name) == ("optimizer", None):
        return  # a version without one
    refused(pair, "must", {2})


@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_a_manifest_whose_encoder_is_elsewhere(pair: Path, name: object) -> None:
    seal(pair, {**json.loads((pair / "manifest.json").read_text()), "encoder": name})
    refused(pair, "must", {1, 2})


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "encoder@1/../../outside", "base@1/more"])
def test_a_file_that_is_elsewhere(pair: Path, name: str) -> None:
    (pair.parent / "outside").write_bytes(b"x")
    digest = sha256_of(pair.parent / "outside")
    sealed(pair, lambda record: record["files"].update({name: digest}))
    refused(pair, "and no others", {2})


@pytest.mark.parametrize("key", ["version", "model", "adapters", "files", "fingerprints", "base", "facts", "digests"])
@pytest.mark.parametrize("value", [None, 3, [], "x"])
def test_a_record_of_another_form(pair: Path, key: str, value: object) -> None:
    sealed(pair, lambda record: record.update({key: value}))
    refused(pair, "must", {2})


def test_a_default_that_is_not_there(pair: Path) -> None:
    seal(pair, {**json.loads((pair / "manifest.json").read_text()), "default": 3})
    refused(pair, "manifest.json", {1, 2})


def test_any_flipped_bit_of_the_manifest_is_found(pair: Path) -> None:
    """It vouches for all other files, so something must vouch for it."""
    path = pair / "manifest.json"
    content = path.read_bytes()
    unnoticed = []
    for position in range(0, len(content), 5):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            same = json.loads(path.read_bytes()) == json.loads(content)
        except ValueError:
            same = False
        try:
            versions(pair)
        except BundleError:
            continue
        if not same:
            unnoticed.append(position)
    assert not unnoticed
