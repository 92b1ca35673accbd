"""A trained model as one directory that describes itself.

    manifest.json        what is in here, with the sha256 of every file
    schema.json  vocabularies.json       the encoder: raw value to id
    base.safetensors     the weights that all domains share
    adapters/DOMAIN/     one domain's row of every bank, each a directory that PEFT reads too and that can be used alone

Written beside its place and renamed, so that a reader sees a whole bundle or none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, options_of
from domlora.adapters.bank import base_state
from domlora.adapters.file import base_fingerprint, load_adapter_, write_adapter
from domlora.errors import BundleError
from domlora.features.encode import Encoder
from domlora.files import new_folder, sha256_of
from domlora.models.build import build_model, stored_options

__all__ = ["Bundle", "adapter_folders", "verify"]

_MANIFEST, _BASE, _FORMAT = "manifest.json", "base.safetensors", 2
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # names that Windows keeps for itself


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
                "model": stored_options(self.model_options),
                "adapter": None if self.adapter is None else asdict(self.adapter),
                "facts": self.facts,
                "files": {name: sha256_of(fresh / name) for name in _files(fresh)},
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
            base = base_fingerprint(model)
            for number, place in enumerate(adapter_folders(encoder.schema.domains).values()):
                load_adapter_(model, number, folder / place, base=base)
        return cls(model.eval(), manifest["model"], encoder, manifest["facts"])

    def _save_adapters(self, fresh: Path) -> None:
        base = base_fingerprint(self.model)  # once, and not once a domain
        for number, place in enumerate(adapter_folders(self.encoder.schema.domains).values()):
            (fresh / place).mkdir(parents=True)
            write_adapter(self.model, number, fresh / place, base=base)


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
        known, found = manifest["files"], set(_files(folder)) - {_MANIFEST}
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


def adapter_folders(domains: Sequence[str]) -> dict[str, str]:
    """Where in a bundle of these domains each one's adapter is: its name in the signs that every file system has.

    Names that a disk could take for each other (``A`` and ``a``), for a device or for a parent folder, and names longer than
    a folder's may be, end in ``@`` and a part of their sha256. No other name has an ``@``, which is written as ``%40``.

    >>> for folder in adapter_folders(["Books", "home & garden", "A", "a", ".."]).values():
    ...     print(folder)
    adapters/Books
    adapters/home%20%26%20garden
    adapters/A@559aead08264d579
    adapters/a@ca978112ca1bbdca
    adapters/%2E%2E@5ec1f7e700f37c3d
    """
    names = {domain: quote(domain, safe="") for domain in domains}
    alike = Counter(name.lower() for name in names.values())
    for domain, name in names.items():
        if alike[name.lower()] > 1 or name.strip(".") != name or len(name) > 200 or _DEVICE.match(name):
            digest = hashlib.sha256(domain.encode()).hexdigest()[:16]
            names[domain] = f"{name.replace('.', '%2E')[:200]}@{digest}"
    return {domain: f"adapters/{name}" for domain, name in names.items()}


def _digest(manifest: Mapping[str, Any]) -> str:
    """What vouches for the file that vouches for all others."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
