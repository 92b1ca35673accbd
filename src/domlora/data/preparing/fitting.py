"""An encoder from the rows of the training split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from domlora.data.engine import HASH_BITS, Engine
from domlora.data.expressions import cells
from domlora.data.plan import FeaturePlan, Plan
from domlora.data.preparing.columns import floats_of
from domlora.errors import SchemaError
from domlora.features.encode import Encoder, fit_vocabulary
from domlora.features.numeric import fit_boundaries, fit_numbers
from domlora.features.schema import FIRST_ID, Feature, Schema

__all__ = ["fit_encoder"]

SAMPLE_ROWS = 1 << 20
"""Training rows that numeric features are fitted on; the first ones by hash, where there are more."""


def fit_encoder(
    engine: Engine, rows: Any, plan: Plan, domains: tuple[str, ...], label: str, known: Encoder | None, num_rows: int
) -> Encoder:
    """Vocabularies, boundaries, means and deviations.

    Args:
        engine: where the rows are.
        rows: of the training split, with ``__order`` and the raw columns of the features.
        plan: names the features.
        domains: names of the domains, in the order of their numbers.
        label: what the schema calls the label.
        known: an encoder whose ids stay as they are: its words keep their places and new ones follow, its numbers keep
            mean, deviation and boundaries.
        num_rows: how many training rows there are.
    """
    numbers = _numbers(engine, rows, plan, num_rows)
    old = {} if known is None else {feature.name: feature for feature in known.schema.features}
    words: dict[str, list[str]] = {}
    features: dict[str, Feature] = {}
    for name, spec in plan.features.items():
        if spec.share is not None:
            continue
        if spec.kind in ("numeric", "bucketed"):
            features[name] = _number_feature(name, spec, numbers[name], old.get(name))
        elif spec.hash_buckets:
            features[name] = _feature(name, spec, FIRST_ID + spec.hash_buckets)
        else:
            kept = () if known is None else known.vocabularies.get(name, ())
            words[name] = fit_vocabulary(name, _counts(rows, name, spec), min_count=spec.min_count, known=kept)
            features[name] = _feature(name, spec, FIRST_ID + len(words[name]))
    for name, spec in plan.features.items():
        if spec.share is not None:
            owner = features[spec.share]
            features[name] = _feature(name, spec, owner.num_ids, owner.hash_buckets)
    columns = plan.columns
    schema = Schema(
        tuple(features[name] for name in plan.features),
        domains,
        domain="/".join(columns.domains),
        label=label,
        unknown_domain=columns.unknown_domain,
        user=columns.user,
        time=columns.time,
        weight=columns.weight,
    )
    return Encoder(schema, words)


def _feature(name: str, spec: FeaturePlan, num_ids: int, hash_buckets: int | None = None) -> Feature:
    return Feature(
        name,
        spec.kind,
        spec.columns,
        num_ids=num_ids,
        hash_buckets=spec.hash_buckets if hash_buckets is None else hash_buckets,
        share=spec.share,
        max_length=spec.max_length if spec.kind == "sequence" else 1,
        separator=spec.separator,
        pooling=spec.pooling,
    )


def _number_feature(name: str, spec: FeaturePlan, numbers: NDArray[np.float64], old: Feature | None) -> Feature:
    if old is not None and (old.kind != spec.kind or (spec.kind == "numeric" and old.transform != spec.transform)):
        raise SchemaError(
            f"feature {name!r} of a grown folder must keep its kind and transform",
            received=f"{spec.kind}, {spec.transform}; it was {old.kind}, {old.transform}",
            next_step="Give the changed feature another name, or prepare without --grow",
        )
    if spec.kind == "bucketed":
        boundaries = fit_boundaries(numbers, spec.buckets) if old is None else old.boundaries
        return Feature(name, "bucketed", spec.columns, num_ids=FIRST_ID + len(boundaries) + 1, boundaries=boundaries)
    mean, std = fit_numbers(numbers, spec.transform) if old is None else (old.mean, old.std)
    return Feature(name, "numeric", spec.columns, transform=spec.transform, mean=mean, std=std, missing=spec.missing)


def _numbers(engine: Engine, rows: Any, plan: Plan, num_rows: int) -> Mapping[str, NDArray[np.float64]]:
    """The training numbers of each numeric or bucketed feature."""
    specs = {name: spec for name, spec in plan.features.items() if spec.kind in ("numeric", "bucketed")}
    if not specs:
        return {}
    columns = {name: spec.sources(name)[0] for name, spec in specs.items()}
    if num_rows > SAMPLE_ROWS:
        most = ibis.literal((SAMPLE_ROWS << HASH_BITS) // num_rows, "int64")
        rows = rows.filter(rows["__order"] < most)
    table = pa.Table.from_batches(list(engine.batches(rows.select(*dict.fromkeys(columns.values())))))
    return {name: floats_of(table.column(column).combine_chunks()) for name, column in columns.items()}


def _counts(rows: Any, name: str, spec: FeaturePlan) -> list[tuple[Any, int]]:
    """The values of a feature, and the training rows that have each."""
    columns = list(spec.sources(name))
    if len(columns) > 1:
        found = cells(rows, columns).to_pylist()
        return [(tuple(cell[column] for column in columns), cell["__size"]) for cell in found]
    column = rows[columns[0]]
    splits = spec.separator is not None and column.type().is_string()
    if spec.kind == "sequence" and (column.type().is_array() or splits):
        lists = column.split(spec.separator) if splits else column
        rows = rows.select(**{columns[0]: lists.unnest()})
    found = cells(rows, columns)
    return list(zip(found.column(columns[0]).to_pylist(), found.column("__size").to_pylist(), strict=True))
