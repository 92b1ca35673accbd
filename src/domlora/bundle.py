"""A trained model as one directory that describes itself.

    manifest.json        what is in here, with the sha256 of every file
    schema.json  vocabularies.json       the encoder: raw value to id
    base.safetensors     the weights that all domains share
    adapters/DOMAIN.safetensors          one domain's row of every bank

Written beside its place and renamed, so that a reader sees a whole bundle or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, options_of
from domlora.adapters.bank import base_state, load_rows_, rows_of
from domlora.errors import BundleError
from domlora.features.encode import Encoder
from domlora.files import new_folder, sha256_of
from domlora.models.build import build_model

__all__ = ["Bundle", "verify"]

_MANIFEST, _BASE, _FORMAT = "manifest.json", "base.safetensors", 1


@dataclass(slots=True)
class Bundle:
    """A model, what it takes to build it again, and where it came from.

    Args:
        model: as :func:`domlora.models.build.build_model` made it, with adapters attached or not.
        model_options: ``name`` and the options that ``build_model`` was given.
        encoder: raw values to ids.
        facts: anything worth keeping that is JSON: configuration, data fingerprints, validation figures.

    Example:
        >>> from domlora.features.schema import Feature, Schema
        >>> schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
        >>> encoder = Encoder(schema, {"item": ["a", "b"]})
        >>> options = {"name": "mlp", "hidden_units": [8]}
        >>> bundle = Bundle(build_model(schema=schema, **options), options, encoder)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bundle.save(Path(folder) / "bundle")
        ...     Bundle.open(Path(folder) / "bundle").encoder.schema.domains
        ('app', 'web')
    """

    model: nn.Module
    model_options: dict[str, Any]
    encoder: Encoder
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> AdapterOptions | None:
        """What ``attach_`` was given, or None for a model without adapters."""
        return options_of(self.model)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the bundle.

        Raises:
            DataError: the folder exists and ``overwrite`` is false, or it holds something else.
        """
        with new_folder(folder, overwrite=overwrite) as fresh:
            self.encoder.save(fresh)
            save_file({k: v.contiguous().clone() for k, v in base_state(self.model).items()}, fresh / _BASE)
            if self.adapter is not None:
                self._save_adapters(fresh)
            manifest = {
                "format": _FORMAT,
                "model": self.model_options,
                "adapter": None if self.adapter is None else asdict(self.adapter),
                "facts": self.facts,
                "files": {str(path.relative_to(fresh)): sha256_of(path) for path in _files(fresh)},
            }
            whole = {**manifest, "sha256": _digest(manifest)}
            (fresh / _MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read a bundle after checking every file of it.

        Raises:
            BundleError: no bundle, a file missing, damaged or unknown, or weights that do not fit the model.
        """
        manifest = verify(folder)
        encoder = Encoder.open(folder)
        model = build_model(schema=encoder.schema, **manifest["model"])
        try:
            model.load_state_dict(load_file(folder / _BASE))
        except (RuntimeError, SafetensorError) as error:
            raise BundleError(f"{_BASE} must fit the model of {_MANIFEST} ({error})", received=str(folder)) from error
        if manifest["adapter"] is not None:
            options: dict[str, Any] = manifest["adapter"]
            globs: dict[str, Any] = {name: tuple(options[name]) for name in ("include", "exclude")}
            adapter = AdapterOptions(**{**options, **globs})
            attach_(model, encoder.schema.num_domains, **asdict(adapter))
            for number, domain in enumerate(encoder.schema.domains):
                load_rows_(model, number, load_file(folder / _adapter_file(domain)))
        return cls(model.eval(), manifest["model"], encoder, manifest["facts"])

    def _save_adapters(self, fresh: Path) -> None:
        (fresh / "adapters").mkdir()
        for number, domain in enumerate(self.encoder.schema.domains):
            save_file(rows_of(self.model, number), fresh / _adapter_file(domain))


def verify(folder: Path) -> Mapping[str, Any]:
    """Check every file of a bundle against its manifest, and return the manifest.

    Raises:
        BundleError: the manifest is missing or of an unknown format; a file is missing, damaged or not listed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise BundleError(f"a bundle must have format {_FORMAT}", received=manifest["format"])
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError(f"{_MANIFEST} has another sha256 than it says")
        known, found = manifest["files"], {str(path.relative_to(folder)) for path in _files(folder)} - {_MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"a bundle must have a whole {_MANIFEST}",
            received=str(folder),
            next_step="Write one with: domlora pretrain CONFIG --data DIR --out BUNDLE",
        ) from error
    if found != set(known):
        differing = sorted(found ^ set(known))
        raise BundleError("a bundle must hold the files that its manifest lists", received=differing[:5])
    for name, digest in known.items():
        if sha256_of(folder / name) != digest:
            raise BundleError("a file of the bundle is damaged: its sha256 is not the manifest's", received=name)
    return manifest


def _adapter_file(domain: str) -> str:
    name = quote(domain, safe="")
    if len(name) > 200:  # a file's name has 255 bytes at most
        name = f"{name[:150]}-{hashlib.sha256(domain.encode()).hexdigest()[:32]}"
    return f"adapters/{name}.safetensors"


def _digest(manifest: Mapping[str, Any]) -> str:
    """What vouches for the file that vouches for all others."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
