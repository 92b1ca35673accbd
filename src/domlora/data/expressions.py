"""The few table expressions that preparation is made of, written so that every engine behind Ibis computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ibis
import pyarrow as pa

__all__ = ["cells", "coded", "coded_together", "in_order", "join", "joined", "plain", "size"]

Code = Callable[[Any], int | str | None]


def plain(column: Any) -> Any:
    """A column without NaN (null instead) and -0.0 (0.0 instead), so that no engine's own idea of equality matters."""
    return ibis.ifelse(column.isnan(), None, column + 0.0) if column.type().is_floating() else column


def joined(texts: list[Any], separator: str) -> Any:
    """Texts one after another, with a separator between them."""
    result = texts[0]
    for text in texts[1:]:
        result = result + separator + text
    return result


def cells(rows: Any, names: list[str], chosen: Any = None) -> pa.Table:
    """The distinct combinations of some columns, the rows that have each, and how many of those are chosen.

    Args:
        rows: a table.
        names: the columns.
        chosen: a boolean expression over the rows; all by default.

    Returns:
        The columns, ``__size`` and ``__chosen``.
    """
    chosen = rows.count() if chosen is None else chosen.cast("int64").sum()
    return rows.group_by(names).agg(__size=rows.count(), __chosen=chosen).to_pyarrow()


def coded(rows: Any, keys: pa.Table, name: str, code: str, function: Code, kind: pa.DataType) -> Any:
    """Rows with one more column: a Python function of a column, called once for each of its distinct values.

    Args:
        rows: a table.
        keys: holds every value of the column.
        name: the raw column.
        code: the new column; null where the raw column is null (a null equals nothing, so no join finds it).
        function: raw value → integer, or None for null.
        kind: integer type of the new column.
    """
    distinct = keys.column(name).unique()
    numbers = pa.array(list(map(function, distinct.to_pylist())), kind)
    return join(rows, ibis.memtable(pa.table({name: distinct, code: numbers})), [name])


def coded_together(
    rows: Any,
    keys: pa.Table,
    names: list[str],
    code: str,
    function: Callable[[list[Any]], int | None],
    kind: pa.DataType,
) -> Any:
    """As :func:`coded`, of several columns at once; null where one of them is null."""
    distinct = keys.select(names).to_pylist()
    numbers = pa.array([function([row[name] for name in names]) for row in distinct], kind)
    return join(rows, ibis.memtable(keys.select(names).append_column(code, numbers)), names)


def join(rows: Any, table: Any, names: list[str]) -> Any:
    """A left join on columns of the same names, which the result holds once."""
    table = table.rename({f"__on_{name}": name for name in names})
    pairs = [rows[name] == table[f"__on_{name}"] for name in names]
    return rows.left_join(table, pairs).drop(*(f"__on_{name}" for name in names))


def in_order(rows: Any, *first: str, among: Sequence[str] | None = None) -> list[Any]:
    """What to sort by: some columns, then the others, nulls last; so that rows that tie are alike.

    Args:
        rows: a table.
        first: the columns that matter; the others only tell rows apart that are equal in these.
        among: the others; all by default. Lists and other nested ones are left out.
    """
    kinds = rows.schema()
    rest = [name for name in sorted(among or rows.columns) if name not in first and not kinds[name].is_nested()]
    return [rows[name].asc(nulls_first=False) for name in (*first, *rest)]


def size(rows: Any) -> int:
    """How many rows there are."""
    return int(rows.count().to_pyarrow().as_py())
