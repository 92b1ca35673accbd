"""Which rows train, validate and test; exact to the row, and equal on every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ibis
import pyarrow as pa

from domlora.data.dataset import SPLITS
from domlora.data.engine import HASH_BITS, Engine
from domlora.data.expressions import cells, coded, join
from domlora.data.plan import Split
from domlora.errors import ConfigError, DataError, nearest
from domlora.features.text import canonical_text

__all__ = ["with_split"]

_CUTS = ("__cut_1", "__cut_2")
_BUCKET_BITS = 10


def with_split(engine: Engine, rows: Any, split: Split, time: str | None = None) -> tuple[Any, int]:
    """The rows with ``__split``: 0, 1 or 2.

    * ``random``: in each domain and label the first rows by hash train, the next validate, the last test.
    * ``time``: in each domain by time, equal times by hash.
    * ``user``: a user's hash decides for all of its rows, so sizes are those of the fractions on average.
    * ``column``: what the column says.

    Args:
        engine: where the rows are.
        rows: with ``__order`` (the number that a row's hash begins with), ``__domain``, ``__label`` and, for user splits,
            ``__user_text``.
        split: how.
        time: the column of a time split.

    Returns:
        The rows, and how many were left out because the column of a ``column`` split names no split.

    Raises:
        DataError: no row trains.
    """
    if split.kind == "random":
        found, left_out = _ranked(engine, rows, split, ["__domain", "__label"], ["__order"]), 0
    elif split.kind == "time":
        found, left_out = _ranked(engine, rows, split, ["__domain"], [str(time), "__order"]), 0
    elif split.kind == "user":
        found, left_out = _by_user(engine, rows, split), 0
    else:
        found, left_out = _by_column(rows, split)
    found = engine.stored(found)
    sizes = {cell["__split"]: cell["__size"] for cell in cells(found, ["__split"]).to_pylist()}
    if not sizes.get(0):
        named = {SPLITS[number]: size for number, size in sorted(sizes.items())}
        raise DataError("no row trains", received=named, next_step="Use more rows or a larger first fraction")
    return found, left_out


def _ranked(engine: Engine, rows: Any, split: Split, stratum: list[str], order: list[str]) -> Any:
    """Ranks are computed on the few columns that they hang on; a row is then compared with the rows at the two cuts."""
    narrow = engine.stored(rows.select(*stratum, *order))
    sizes = cells(narrow, stratum)
    found = _at_cuts(narrow, _cuts(sizes, stratum, split.fractions), stratum, order).to_pyarrow().to_pylist()
    bounds: dict[str, pa.Array] = {name: sizes.column(name) for name in stratum}
    for cut in _CUTS:
        here = {tuple(row[name] for name in stratum): row for row in found if row["__rank"] == row[cut]}
        # no row at the cut: every row comes before it
        keyed = [here.get(tuple(cell[name] for name in stratum)) for cell in sizes.to_pylist()]
        for name in order:
            kind = narrow.schema()[name].to_pyarrow()
            bounds[f"{cut}_{name}"] = pa.array([None if row is None else row[name] for row in keyed], kind)
    rows = join(rows, ibis.memtable(pa.table(bounds)), stratum)
    passed = [_reaches(rows, order, cut).fill_null(False).cast("int32") for cut in _CUTS]
    return rows.mutate(__split=passed[0] + passed[1]).drop(*(name for name in bounds if name not in stratum))


def _at_cuts(rows: Any, cuts: pa.Table, stratum: list[str], order: list[str]) -> Any:
    """The rows at the cuts with their ``__rank``; only rows that share a cut's bucket are sorted for it."""
    bucket = rows[order[0]] if len(order) > 1 else rows[order[0]] >> (HASH_BITS - _BUCKET_BITS)
    rows = rows.mutate(__bucket=bucket)
    groups = [*stratum, "__bucket"]
    buckets = rows.group_by(groups).agg(__size=rows.count())
    until = buckets["__size"].sum().over(group_by=stratum, order_by="__bucket", rows=(None, 0))
    buckets = join(buckets.mutate(__until=until), ibis.memtable(cuts), stratum)
    before = buckets["__until"] - buckets["__size"]
    holds = [(before <= buckets[cut]) & (buckets[cut] < buckets["__until"]) for cut in _CUTS]
    buckets = buckets.mutate(__before=before).filter(holds[0] | holds[1]).drop("__size", "__until")
    rows = rows.join(buckets, groups)
    rows = rows.mutate(__place=ibis.row_number().over(group_by=groups, order_by=order))
    rows = rows.mutate(__rank=rows["__before"] + rows["__place"])
    return rows.filter((rows["__rank"] == rows["__cut_1"]) | (rows["__rank"] == rows["__cut_2"]))


def _reaches(rows: Any, order: Sequence[str], cut: str) -> Any:
    """Whether a row lies at a cut or after it."""
    last = rows[order[-1]] >= rows[f"{cut}_{order[-1]}"]
    if len(order) == 1:
        return last
    first, bound = rows[order[0]], rows[f"{cut}_{order[0]}"]
    return (first > bound) | ((first == bound) & last)


def _cuts(sizes: pa.Table, stratum: list[str], fractions: tuple[float, float, float]) -> pa.Table:
    """For each stratum the ranks at which valid and test begin; integers, so that no engine rounds by itself."""
    train, valid, _ = fractions
    columns = {name: sizes.column(name) for name in stratum}
    for cut, share in zip(_CUTS, (train, train + valid), strict=True):
        columns[cut] = pa.array(
            [math.floor(size * share + 0.5) for size in sizes.column("__size").to_pylist()], pa.int64()
        )
    return pa.table(columns)


def _by_user(engine: Engine, rows: Any, split: Split) -> Any:
    train, valid, _ = split.fractions
    number = engine.number(ibis.literal(f"{split.seed}:") + rows["__user_text"])
    cuts = [ibis.literal(round(share * 2**HASH_BITS), "int64") for share in (train, train + valid)]
    return rows.mutate(__split=sum((number >= cut).cast("int32") for cut in cuts))


def _by_column(rows: Any, split: Split) -> tuple[Any, int]:
    column = str(split.column)
    for name in split.values:
        if name not in SPLITS:
            raise ConfigError("split.values must name splits", received=name, next_step=nearest(name, SPLITS))
    wanted = split.values or {name: (name,) for name in SPLITS}
    number = {canonical_text(value): SPLITS.index(name) for name, values in wanted.items() for value in values}
    groups = cells(rows, [column])
    left_out = sum(cell["__size"] for cell in groups.to_pylist() if canonical_text(cell[column]) not in number)
    rows = coded(rows, groups, column, "__split", lambda value: number.get(canonical_text(value)), pa.int32())
    return rows.filter(rows["__split"].notnull()), left_out
