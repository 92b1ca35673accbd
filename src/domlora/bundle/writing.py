"""A version's parts to disk: what differs from its parent, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save, save_file

from domlora.adapters.bank import adapter_layers, base_state
from domlora.adapters.file import adapter_digests, base_fingerprint, write_adapter
from domlora.bundle.delta import Delta, delta_of, write_delta
from domlora.bundle.mapped import unshared
from domlora.bundle.names import VERSIONS, adapter_folders, number_of
from domlora.bundle.reading import OPTIMIZER, WHOLE, check_files, read_base
from domlora.bundle.records import Record, digest_of, record_name
from domlora.errors import BundleError
from domlora.files import sha256_of
from domlora.models.build import stored_options
from domlora.models.growth import pieces_of

if TYPE_CHECKING:
    from domlora.bundle.bundle import Bundle

__all__ = ["Parent", "write_version"]

_MOST_DELTAS = 16


class Parent(NamedTuple):
    """The version that a new one is compared with."""

    folder: Path
    record: Record


def write_version(bundle: Bundle, fresh: Path, number: int, parent: Parent | None) -> Record:
    """Write the parts of a version that its parent does not have, and its record, into ``fresh``.

    Raises:
        DataError: an adapter is not finite.
        BundleError: the parent's base is damaged, or the model is one that would not come back.
    """
    _check_model(bundle)
    encoder_fingerprint, fingerprint = bundle.encoder.fingerprint(), base_fingerprint(bundle.model)
    encoder = _encoder(bundle, fresh, number, parent, encoder_fingerprint)
    base = _base(bundle, fresh, number, parent, fingerprint)
    adapters, digests = _adapters(bundle, fresh, number, parent, fingerprint)
    optimizer = _optimizer(bundle, fresh, number, parent)
    parts = [encoder, *base, *adapters.values(), *([optimizer] if optimizer else [])]
    writers = {
        number_of(part, kind) for kind, names in (("base", base), ("adapters/", adapters.values())) for part in names
    }
    before = {} if parent is None else parent.record.fingerprints
    record = Record(
        version=number,
        parent=None if parent is None else parent.record.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        library_version=version_of("domlora"),
        model=_options(bundle),
        adapter=None if bundle.adapter is None else asdict(bundle.adapter),
        facts=bundle.facts,
        encoder=encoder,
        encoder_fingerprint=encoder_fingerprint,
        base=base,
        adapters=adapters,
        optimizer=optimizer,
        fingerprints={str(k): fingerprint if k == number else before[str(k)] for k in sorted(writers)},
        digests=digests,
        files=_files(fresh, parts, parent),
    )
    (fresh / VERSIONS).mkdir()
    (fresh / record_name(number)).write_text(record.to_json(), encoding="utf-8")
    return record


def _check_model(bundle: Bundle) -> None:
    """Whether reading would build the same."""
    others = {
        str(t.dtype) for t in bundle.model.state_dict().values() if t.is_floating_point() and t.dtype != torch.float32
    }
    if others:
        raise BundleError(
            "a bundle holds float32 weights", received=sorted(others), next_step="Call model.float() before it is saved"
        )
    if bundle.adapter is None and adapter_layers(bundle.model):
        raise BundleError(
            "adapters of a bundle must be attached to the model as a whole",
            received=sorted(adapter_layers(bundle.model)),
            next_step="Call attach_(model, ...) with include=[...] for the part that shall have some",
        )


def _options(bundle: Bundle) -> dict[str, Any]:
    """As a record has them, which knows no tuples."""
    return dict(json.loads(json.dumps(stored_options(bundle.model_options))))


def _encoder(bundle: Bundle, fresh: Path, number: int, parent: Parent | None, fingerprint: str) -> str:
    if parent is not None and parent.record.encoder_fingerprint == fingerprint:
        return parent.record.encoder
    part = f"encoder@{number}"
    (fresh / part).mkdir()
    bundle.encoder.save(fresh / part)
    return part


def _base(bundle: Bundle, fresh: Path, number: int, parent: Parent | None, fingerprint: str) -> list[str]:
    """Nothing if it is the parent's, a delta if one is much smaller than all of it, else all of it."""
    if parent is not None and parent.record.fingerprint == fingerprint:
        return parent.record.base
    part = f"base@{number}"
    (fresh / part).mkdir()
    state = unshared(base_state(bundle.model))
    delta = None if parent is None else _delta(bundle, parent)
    if parent is None or delta is None or 2 * delta.size_bytes > sum(tensor.nbytes for tensor in state.values()):
        save_file(state, fresh / part / WHOLE)
        return [part]
    write_delta(delta, fresh / part, old=parent.record.fingerprint, new=fingerprint)
    return [*parent.record.base, part]


def _delta(bundle: Bundle, parent: Parent) -> Delta | None:
    """From the parent's base, or None where there is none or the chain is long enough."""
    if parent.record.model != _options(bundle) or len(parent.record.base) > _MOST_DELTAS:
        return None
    check_files(parent.folder, parent.record, adapters=False)
    _, old = read_base(parent.folder, parent.record)
    return delta_of(base_state(old), base_state(bundle.model), pieces_of(old, bundle.model))


def _adapters(
    bundle: Bundle, fresh: Path, number: int, parent: Parent | None, fingerprint: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Part and digest of each domain; what the parent has with the same digest is not written."""
    if bundle.adapter is None:
        return {}, {}
    domains = bundle.encoder.schema.domains
    places, digests = adapter_folders(domains, number), dict(zip(domains, adapter_digests(bundle.model), strict=True))
    kept = {}
    if parent is not None:
        old = parent.record
        kept = {
            domain: part for domain, part in old.adapters.items() if old.digests.get(domain) == digests.get(domain, "")
        }
    for row, domain in enumerate(domains):
        if domain not in kept:
            (fresh / places[domain]).mkdir(parents=True)
            write_adapter(bundle.model, row, fresh / places[domain], base=fingerprint)
    return places | kept, digests


def _optimizer(bundle: Bundle, fresh: Path, number: int, parent: Parent | None) -> str | None:
    if not bundle.optimizer:
        return None
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in bundle.optimizer.items()})
    old = None if parent is None else parent.record.optimizer
    if parent is not None and old is not None and parent.record.files[f"{old}/{OPTIMIZER}"] == digest_of(content):
        return old
    part = f"optimizer@{number}"
    (fresh / part).mkdir()
    (fresh / part / OPTIMIZER).write_bytes(content)
    return part


def _files(fresh: Path, parts: Iterable[str], parent: Parent | None) -> dict[str, str]:
    """The sha256 of every file of these parts, of those that are the parent's as its record has them."""
    wanted = set(parts)
    old = {} if parent is None else parent.record.files
    files = {name: digest for name, digest in old.items() if name.rpartition("/")[0] in wanted}
    for part in wanted:
        if (fresh / part).is_dir():
            files |= {f"{part}/{path.name}": sha256_of(path) for path in (fresh / part).iterdir()}
    return files
