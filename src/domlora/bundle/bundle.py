"""A trained model and what it takes to build it again; read from a folder, written to one, or added to it as a version."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, options_of
from domlora.bundle.disk import locked, put, replace_file, staged
from domlora.bundle.names import MANIFEST
from domlora.bundle.reading import check_files, read_adapters_, read_base, read_optimizer
from domlora.bundle.records import Manifest, read_manifest, read_record, record_name
from domlora.bundle.versions import sweep
from domlora.bundle.writing import Parent, write_version
from domlora.features.encode import Encoder
from domlora.files import new_folder, sha256_of, told

__all__ = ["Bundle"]


@dataclass(slots=True)
class Bundle:
    """A model, what it takes to build it again, and where it came from.

    Args:
        model: as :func:`domlora.models.build.build_model` made it, with adapters attached or not.
        model_options: ``name`` and the options that ``build_model`` was given.
        encoder: raw values to ids.
        facts: anything worth keeping that is JSON: configuration, data fingerprints, validation figures.
        optimizer: what the optimizer of an update remembers.
        version: the version that it was opened or written as; None before.

    Example:
        >>> from domlora.features.schema import Feature, Schema
        >>> from domlora.models.build import build_model
        >>> schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
        >>> encoder = Encoder(schema, {"item": ["a", "b"]})
        >>> options = {"name": "mlp", "hidden_units": [8]}
        >>> bundle = Bundle(build_model(schema=schema, **options), options, encoder)
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bundle.save(Path(folder) / "bundle")
        ...     opened = Bundle.open(Path(folder) / "bundle")
        ...     opened.facts["note"] = "as before"
        ...     opened.publish(Path(folder) / "bundle")
        2
    """

    model: nn.Module
    model_options: dict[str, Any]
    encoder: Encoder
    facts: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    version: int | None = None

    @property
    def adapter(self) -> AdapterOptions | None:
        """What ``attach_`` was given, or None for a model without adapters."""
        return options_of(self.model)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write a new bundle, whose one version is 1.

        Args:
            overwrite: replace a bundle that is there, with all its versions.

        Raises:
            DataError: the folder exists and ``overwrite`` is false, or it holds something else.
            BundleError: another process is changing the bundle that is to be replaced.
        """
        replaced = overwrite and (folder / MANIFEST).is_file()
        with locked(folder) if replaced else nullcontext(), new_folder(folder, overwrite=overwrite) as fresh:
            record = write_version(self, fresh, 1, None)
            manifest = Manifest(1, 1, record.encoder, {1: sha256_of(fresh / record_name(1))})
            (fresh / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        self.version = 1

    @classmethod
    def open(cls, folder: Path, *, version: int | None = None) -> Self:
        """Read a version after checking every file of it.

        Args:
            version: its number; None for the default.

        Raises:
            BundleError: no bundle, no such version, a file missing, damaged or unknown, or parts that do not fit each other.
        """
        manifest = read_manifest(folder)
        record = read_record(folder, manifest, manifest.default if version is None else version)
        check_files(folder, record, adapters=False)  # those are read and checked in one
        encoder, model = read_base(folder, record)
        read_adapters_(folder, record, encoder, model)
        optimizer = read_optimizer(folder, record)
        return cls(model.eval(), record.model, encoder, record.facts, optimizer, record.version)

    def publish(self, folder: Path, *, default: bool = True) -> int:
        """Add a version to the bundle at ``folder``, and write only what its parent, the version opened, does not have.

        Whoever reads sees the bundle as it was or with the new version. A process that is killed leaves parts that nobody
        refers to and that the next one removes. A parent that is not there any more costs nothing but space.

        Args:
            default: whether it is what is opened from now on; otherwise it is a candidate, see
                :func:`domlora.bundle.set_default`.

        Returns:
            Its number.

        Raises:
            BundleError: no bundle, another process is changing it, or the parent's files are damaged.
            DataError: an adapter is not finite, or the disk is full or cannot be written; the bundle is as it was.
        """
        with told(folder, disk_alone=True), locked(folder):
            manifest = read_manifest(folder)
            sweep(folder, manifest)
            parent = None
            if self.version is not None and self.version in manifest.versions:
                parent = Parent(folder, read_record(folder, manifest, self.version))
            number = manifest.last + 1
            with staged(folder) as fresh:
                record = write_version(self, fresh, number, parent)
                digest = sha256_of(fresh / record_name(number))
                put(fresh, folder, [*record.written, record_name(number)])
                changed = manifest.with_version(record, digest, default=default)
                replace_file(fresh, folder, MANIFEST, changed.to_json())
        self.version = number
        return number
