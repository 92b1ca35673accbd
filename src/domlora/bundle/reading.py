"""A version's parts from disk, each file checked against its sha256."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from os import scandir
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.file import base_fingerprint, load_adapters_
from domlora.bundle.delta import applied, read_delta
from domlora.bundle.mapped import map_tensors
from domlora.bundle.names import number_of
from domlora.bundle.records import DAMAGED, Record, read_checked
from domlora.errors import BundleError
from domlora.features.encode import Encoder
from domlora.files import sha256_of
from domlora.layers.rows import empty_tables
from domlora.models.build import build_model

__all__ = ["MAPPED_FROM_BYTES", "OPTIMIZER", "WHOLE", "check_files", "read_adapters_", "read_base", "read_optimizer"]

WHOLE, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MAPPED_FROM_BYTES = 1 << 30
"""A base of so many bytes is mapped instead of read, so that its tables may be longer than memory."""


def check_files(folder: Path, record: Record, *, adapters: bool = True, known: Mapping[str, str] | None = None) -> None:
    """Check every file of a version.

    Args:
        adapters: whether those of adapters are read too; that they are there, and nothing else, is seen in any case.
        known: files that were read already, with the sha256 that they have.

    Raises:
        BundleError: a file is missing, damaged, a link, or not listed.
    """
    found = {name for part in record.parts for name in _names(folder, part)}
    if found != record.files.keys():
        differing = sorted(found ^ record.files.keys())
        raise BundleError("a version must have the files that its record lists, and no others", received=differing[:5])
    for name, digest in record.files.items():
        if not adapters and name.startswith("adapters/"):
            continue
        seen = (known or {}).get(name) or sha256_of(folder / name)
        if seen != digest:
            raise BundleError(DAMAGED, received=name)


def read_base(folder: Path, record: Record) -> tuple[Encoder, nn.Module]:
    """The encoder and the model of a version, without adapters.

    Raises:
        BundleError: weights that do not fit the model, or deltas that do not fit each other.
    """
    encoder = Encoder.open(folder / record.encoder)
    first, *deltas = record.base
    whole = folder / first / WHOLE
    is_long = whole.is_file() and whole.stat().st_size >= MAPPED_FROM_BYTES
    with empty_tables() if is_long else nullcontext():
        model = build_model(schema=encoder.schema, **record.model)
    try:
        state: Mapping[str, Tensor] = map_tensors(whole) if is_long else load_file(whole)
        for before, part in zip(record.base, deltas, strict=False):
            old, new = (record.fingerprints[str(number_of(each, "base"))] for each in (before, part))
            state = applied(state, read_delta(folder / part, old=old, new=new))
        if is_long:
            model.load_state_dict(_aligned(state, model), assign=True)
        else:
            model.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"the base must fit the model of its version ({error})", received=record.base) from error
    if base_fingerprint(model) != record.fingerprint:
        raise BundleError(
            "the base must be the one that its version names, and this is another base", received=record.base
        )
    return encoder, model.eval()


def _aligned(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Mapped tensors for tables alone: products have other bits where weights lie elsewhere in memory."""
    empty = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    return {name: tensor if name in empty else tensor.clone() for name, tensor in state.items()}


def read_adapters_(folder: Path, record: Record, encoder: Encoder, model: nn.Module) -> None:
    """Attach a version's adapters, if it has any.

    Raises:
        BundleError: one is damaged, of another base or of other options.
    """
    if record.adapter is None:
        return
    domains = encoder.schema.domains
    if record.adapters.keys() != set(domains):
        differing = sorted(record.adapters.keys() ^ set(domains))
        raise BundleError("a version must have an adapter for each domain of its schema", received=differing[:5])
    attach_(model, len(domains), **asdict(_adapter_options(record.adapter)))
    by_part: dict[str, list[str]] = {}
    for name in record.files:
        by_part.setdefault(name.rpartition("/")[0], []).append(name)

    def contents(part: str) -> dict[str, bytes]:
        return {name.rpartition("/")[2]: read_checked(folder, name, record.files[name]) for name in by_part[part]}

    parts = [record.adapters[domain] for domain in domains]
    bases = [record.fingerprints[str(number_of(part, "adapters/"))] for part in parts]
    load_adapters_(model, {part: (contents(part), base) for part, base in zip(parts, bases, strict=True)})


def _adapter_options(raw: Mapping[str, Any]) -> AdapterOptions:
    """From JSON, which knows no tuples."""
    globs: dict[str, Any] = {name: tuple(raw[name]) for name in ("include", "exclude")}
    return AdapterOptions(**{**raw, **globs})


def read_optimizer(folder: Path, record: Record) -> dict[str, Tensor]:
    """What an update's optimizer remembers; nothing where a version has none."""
    if record.optimizer is None:
        return {}
    try:
        return load_file(folder / record.optimizer / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"an optimizer's state must be whole ({error})", received=record.optimizer) from error


def _names(folder: Path, part: str) -> list[str]:
    """What a part holds."""
    try:
        with scandir(folder / part) as entries:
            links = [entry.name for entry in entries if not entry.is_file(follow_symlinks=False)]
        if (folder / part).is_symlink() or links:
            raise BundleError("a part of a bundle must hold plain files alone", received=[part, *links][:5])
        with scandir(folder / part) as entries:
            return [f"{part}/{entry.name}" for entry in entries]
    except OSError as error:
        raise BundleError(f"a part of the bundle must be readable ({error.strerror})", received=part) from error
