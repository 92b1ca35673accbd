"""The trainer's side of a store: a domain's adapter to push, and a bundle's version as an exported folder. Needs torch.

``python -m domlora.serving.pack BUNDLE VERSION FOLDER`` exports a version, so that a server need not load torch itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from domlora.adapters.file import base_fingerprint
from domlora.bundle import Bundle
from domlora.errors import ConfigError, DomloraError, UnknownDomainError, nearest
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.serving.export import Exported, banks_of, export
from domlora.serving.payload import Payload, write_payload

__all__ = ["adapter_payload", "export_version", "main", "random_rows"]

_ROWS = 512


def adapter_payload(bundle: Bundle, domain: str, *, version: str | None = None) -> bytes:
    """A domain's adapter as one file that a server takes: ``PUT /v1/adapters/DOMAIN``.

    It fits every export of a version that has the same base, so that a domain that was onboarded needs no new export.

    Args:
        bundle: that has the domain.
        domain: its name.
        version: what to call this adapter; the bundle's version without.

    Raises:
        UnknownDomainError: no such domain.
        ConfigError: a model without adapters, or a bundle without a version and none given.
    """
    domains = bundle.encoder.schema.domains
    if domain not in domains:
        raise UnknownDomainError("no such domain", received=domain, next_step=nearest(domain, domains))
    if bundle.adapter is None:
        raise ConfigError("a bundle must have adapters for one to be pushed", next_step="Write it with: domlora adapt")
    label = str(bundle.version) if version is None and bundle.version else version
    if label is None:
        raise ConfigError("a bundle that was never saved has no version", next_step="Save it, or pass one")
    banks = banks_of(bundle.model, domains.index(domain))
    return write_payload(Payload(domain, base_fingerprint(bundle.model), label, banks))


def random_rows(schema: Schema, num_rows: int = _ROWS, seed: int = 0) -> Batch:
    """Rows whose ids and numbers are drawn at random: to compare an export with its model where no data is at hand.

    **Shape**: ``ids (B, S)`` within each feature, ``dense (B, G)`` standard normal, ``domain (B,)`` in [-1, D).
    """
    random = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(0, feature.num_ids, (num_rows, feature.max_length), generator=random)
        for feature in schema.categorical
    ]
    dense = torch.randn(num_rows, schema.num_dense, generator=random)
    domain = torch.randint(-1, schema.num_domains, (num_rows,), generator=random)
    label = torch.zeros(num_rows)
    return Batch(torch.cat(ids, 1) if ids else torch.zeros(num_rows, 0, dtype=torch.int64), dense, domain, label)


def export_version(bundle: Path, version: int | None, folder: Path) -> Exported:
    """Export a version of the bundle at a path, compared with the model on random rows.

    Raises:
        BundleError: the bundle is damaged, or the graphs do not give the model's logits.
        DataError: the folder exists.
    """
    opened = Bundle.open(bundle, version=version)
    return export(opened, folder, [random_rows(opened.encoder.schema)])


def main(bundle: str, version: str, folder: str) -> int:
    """Run :func:`export_version`; an error is one line on standard error, and exit code 2."""
    try:
        export_version(Path(bundle), int(version), Path(folder))
    except DomloraError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
