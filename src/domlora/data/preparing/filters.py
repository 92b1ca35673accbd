"""Rows that do not count: repeated ones, rare users and items, small domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ibis
import pyarrow as pa

from domlora.data.engine import Engine
from domlora.data.expressions import cells, in_order, size
from domlora.data.plan import Filters
from domlora.errors import DataError

__all__ = ["core", "filtered"]


def filtered(engine: Engine, rows: Any, filters: Filters, *, time: str | None = None) -> tuple[Any, dict[str, int]]:
    """The rows that pass, and how many did not, by rule.

    1. ``unique``: of the rows that are equal in the named columns (absent equals absent) the first stays, by time, absent
       times last, then by ``__hash``.
    2. ``k_core``: see :func:`core`.
    3. ``min_domain_rows``: domains with fewer rows go; users and items of the core may then have fewer than ``k``.

    Args:
        engine: where the rows are.
        rows: with ``__hash``, ``__domain`` and, for a core, ``__user_text`` and ``__item_text``.
        filters: the rules.
        time: the column that orders rows in time.

    Returns:
        The rows, and for each rule that dropped some how many those were.

    Raises:
        DataError: a rule leaves no row.
    """
    dropped: dict[str, int] = {}
    left = size(rows) if filters != Filters() else 0
    for rule, passed in _rules(engine, filters, time):
        rows = engine.stored(passed(rows))
        before, left = left, size(rows)
        if before > left:
            dropped[rule] = before - left
        if not left:
            raise DataError("the filters leave no row", received=dropped, next_step="Ask less of [filters]")
    return rows, dropped


def _rules(engine: Engine, filters: Filters, time: str | None) -> list[tuple[str, Any]]:
    rules: list[tuple[str, Any]] = []
    if filters.unique:
        rules.append(
            (f"not unique in {', '.join(filters.unique)}", lambda rows: _first_of_each(rows, filters.unique, time))
        )
    if filters.k_core > 1:
        rules.append((f"outside the {filters.k_core}-core", lambda rows: core(engine, rows, filters.k_core)[0]))
    if filters.min_domain_rows > 1:
        least = filters.min_domain_rows
        rules.append((f"domain below {least} rows", lambda rows: _in_large_domains(rows, least)))
    return rules


def core(engine: Engine, rows: Any, k: int) -> tuple[Any, int]:
    """The largest part of the rows in which every user and every item has ``k`` rows, over all domains.

    Users and items with fewer go, again and again until none is left to go; a row without a user or an item is in no core.
    A round sees only how often each pair occurs, and what it leaves is kept in files.

    Args:
        engine: where the rows are.
        rows: with ``__user_text`` and ``__item_text``.
        k: rows that each must have.

    Returns:
        The rows, and the number of rounds.
    """
    pair = ["__user_text", "__item_text"]
    pairs = rows.group_by(pair).agg(__rows=rows.count())
    pairs = engine.stored(pairs.filter(*(pairs[name].fill_null("") != "" for name in pair)))
    left, rounds, before = size(pairs), 0, -1
    while left != before:
        for name in pair:
            counts = pairs.group_by(name).agg(__all=pairs["__rows"].sum())
            pairs = pairs.semi_join(counts.filter(counts["__all"] >= k), name)
        pairs = engine.stored(pairs)
        before, left, rounds = left, size(pairs), rounds + 1
    return rows.semi_join(pairs, pair), rounds


def _first_of_each(rows: Any, names: Sequence[str], time: str | None) -> Any:
    first = [name for name in (time, "__hash") if name is not None]
    number = ibis.row_number().over(group_by=list(names), order_by=in_order(rows, *first))
    rows = rows.mutate(__number=number)
    return rows.filter(rows["__number"] == 0).drop("__number")


def _in_large_domains(rows: Any, least: int) -> Any:
    large = [cell["__domain"] for cell in cells(rows, ["__domain"]).to_pylist() if cell["__size"] >= least]
    kind = rows.schema()["__domain"].to_pyarrow()
    return rows.semi_join(ibis.memtable(pa.table({"__domain": pa.array(large, kind)})), "__domain")
