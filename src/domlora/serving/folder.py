"""What lies in an exported folder, and that it is what was written. Needs no torch.

manifest.json        what is in here, with the sha256 of every file
mixed.onnx           rows of many domains: banks (D, ...) beside the rows
one.onnx             rows of one domain: the banks of that domain; only for a model with adapters
tables.bin           weights of both graphs, mapped into memory and not read
lookups.onnx  fallback.safetensors   only where tables are left out, see :mod:`domlora.serving.rows.layout`
adapters/            the banks of each domain, numbered as the schema numbers domains
schema.json  vocabularies.json       the encoder: raw value to id
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from domlora.errors import BundleError
from domlora.files import sha256_of

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MIXED",
    "ONE",
    "PLAIN",
    "TABLES",
    "AdaptedLayer",
    "adapter_file",
    "read_facts",
    "read_manifest",
    "seal",
]

FORMAT = "domlora export 1"
MANIFEST, MIXED, ONE, TABLES = "manifest.json", "mixed.onnx", "one.onnx", "tables.bin"
PLAIN = re.compile(r"(adapters/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What files of an export are called: nothing that leads out of its folder."""


class AdaptedLayer(NamedTuple):
    """A layer that banks correct: what a program must know of it.

    Args:
        name: of the module.
        in_features, out_features: of the layer.
        bias: whether domains have a bias in it.
        scale: of ``LowRankLinear``; what is fed holds it already, ``B`` being ``scale B``.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    scale: float = 1.0

    @property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """The shape of one domain's bank by the input that takes it, as ``rows_of`` names it; None for the rank."""
        shapes: dict[str, tuple[int | None, ...]] = {
            f"{self.name}.lora_A": (self.in_features, None),
            f"{self.name}.lora_B": (None, self.out_features),
        }
        return {**shapes, f"{self.name}.lora_bias": (self.out_features,)} if self.bias else shapes


def adapter_file(number: int) -> str:
    """Where the banks of a domain lie.

    >>> adapter_file(7)
    'adapters/00007.safetensors'
    """
    return f"adapters/{number:05d}.safetensors"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: the facts, the sha256 of every other file, and its own."""
    files = {name: sha256_of(folder / name) for name in sorted(_files(folder) - {MANIFEST})}
    manifest = {**facts, "format": FORMAT, "files": files}
    whole = {**manifest, "sha256": _digest(manifest)}
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """The manifest alone, after its own sha256 was compared; the files it lists are not read.

    Raises:
        BundleError: it is missing, damaged or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BundleError(f"an exported folder must have the format {FORMAT!r}", received=manifest["format"])
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError(f"{MANIFEST} has another sha256 than it says")
        if not all(PLAIN.fullmatch(name) for name in manifest["files"]):
            raise ValueError(f"{MANIFEST} names files that no export has")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"an exported folder must have a whole {MANIFEST}",
            received=str(folder),
            next_step="Export the bundle again",
        ) from error
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file was compared with it.

    Raises:
        BundleError: it is missing or of another format; a file is missing, damaged, a link or not listed.
    """
    manifest = read_facts(folder)
    known, found = manifest["files"], _files(folder) - {MANIFEST}
    if found != set(known):
        differing = sorted(found ^ set(known))
        raise BundleError("an exported folder must hold the files that its manifest lists", received=differing[:5])
    for name, digest in known.items():
        if (folder / name).is_symlink() or sha256_of(folder / name) != digest:
            raise BundleError("a file of the export is damaged: its sha256 is not the manifest's", received=name)
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
