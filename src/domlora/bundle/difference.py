"""What differs between two versions of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from domlora.adapters.bank import base_state
from domlora.bundle.delta import Delta, delta_of
from domlora.bundle.reading import check_files, read_base
from domlora.bundle.records import Record, read_manifest, read_record
from domlora.features.encode import Encoder
from domlora.models.growth import pieces_of

__all__ = ["Diff", "TableDiff", "diff"]


@dataclass(frozen=True, slots=True)
class TableDiff:
    """Rows of a table in one version and in the other, and how many of those are new or have other bits."""

    rows: tuple[int, int]
    changed: int


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs; what is not named is the same in both.

    Args:
        domains_added, domains_removed: names.
        adapters: domains of both whose adapter differs.
        num_ids: by feature, in one and in the other; 0 for none.
        tables: by name, those that ids have rows in.
        dense: every other tensor of the base, with the largest absolute difference; None where shapes differ or one
            has none.
        model: options, in one and in the other.
        facts: by key, in one and in the other.
    """

    domains_added: tuple[str, ...]
    domains_removed: tuple[str, ...]
    adapters: tuple[str, ...]
    num_ids: dict[str, tuple[int, int]]
    tables: dict[str, TableDiff]
    dense: dict[str, float | None]
    model: dict[str, tuple[Any, Any]]
    facts: dict[str, tuple[Any, Any]]


def diff(folder: Path, a: int, b: int) -> Diff:
    """Compare version ``b`` with version ``a``.

    Raises:
        BundleError: no bundle, no such version, or a damaged one.
    """
    manifest = read_manifest(folder)
    one, two = (read_record(folder, manifest, number) for number in (a, b))
    old_encoder, old = _base(folder, one)
    new_encoder, new = _base(folder, two)
    before, after = old_encoder.schema.domains, new_encoder.schema.domains
    both = [domain for domain in after if domain in one.adapters and domain in two.adapters]
    sizes = [{f.name: f.num_ids for f in encoder.schema.features} for encoder in (old_encoder, new_encoder)]
    tables, dense = _tensors(old, new, same_model=one.model == two.model)
    return Diff(
        domains_added=tuple(domain for domain in after if domain not in before),
        domains_removed=tuple(domain for domain in before if domain not in after),
        adapters=tuple(domain for domain in both if one.digests.get(domain) != two.digests.get(domain)),
        num_ids=_differing(sizes[0], sizes[1], absent=0),
        tables=tables,
        dense=dense,
        model=_differing(one.model, two.model),
        facts=_differing(one.facts, two.facts),
    )


def _base(folder: Path, record: Record) -> tuple[Encoder, nn.Module]:
    check_files(folder, record, adapters=False)
    return read_base(folder, record)


def _tensors(
    one: nn.Module, two: nn.Module, *, same_model: bool
) -> tuple[dict[str, TableDiff], dict[str, float | None]]:
    old, new = base_state(one), base_state(two)
    both = [name for name in new if name in old]
    pieces = pieces_of(one, two) if same_model and old.keys() == new.keys() else {}
    delta = delta_of({name: old[name] for name in both}, {name: new[name] for name in both}, pieces)
    assert delta is not None  # of the same names
    tables = {name: _table(name, delta, len(old[name])) for name in delta.tables}
    whole = [name for name in both if name in delta.tensors]
    dense = {name: _largest(old[name], new[name]) for name in whole}
    return tables, dense | dict.fromkeys(old.keys() ^ new.keys())


def _table(name: str, delta: Delta, rows: int) -> TableDiff:
    return TableDiff((rows, delta.tables[name][0]), len(delta.tensors[f"{name}/ids"]))


def _largest(one: Tensor, two: Tensor) -> float | None:
    return float((one.double() - two.double()).abs().max()) if one.shape == two.shape else None


def _differing(one: Mapping[str, Any], two: Mapping[str, Any], absent: Any = None) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (one.get(key, absent), two.get(key, absent)) for key in dict.fromkeys([*one, *two])}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
