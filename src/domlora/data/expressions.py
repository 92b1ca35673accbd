"""The few table expressions that preparation is made of, written so that every engine behind Ibis computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ibis
import pyarrow as pa

from domlora.errors import SchemaError

__all__ = ["coded", "counts", "join", "joined", "number", "plain", "stored", "values"]

Code = Callable[[Any], int | None]


def plain(column: Any) -> Any:
    """A column whose equal values are one: NaN becomes null and -0.0 becomes 0.0, which engines group differently."""
    return ibis.ifelse(column.isnan(), None, column + 0.0) if column.type().is_floating() else column


def joined(texts: list[Any], separator: str) -> Any:
    """Texts one after another, with a separator between them."""
    result = texts[0]
    for text in texts[1:]:
        result = result + separator + text
    return result


def stored(rows: Any) -> Any:
    """The rows, computed once and kept in the engine."""
    # not rows.cache(): its clean-up fails with the newest releases of what Ibis itself depends on
    return rows.get_backend().create_table(ibis.util.gen_name("domlora"), rows, temp=True)


def number(scalar: Any) -> int:
    """The value of an integer expression."""
    return int(scalar.to_pyarrow().as_py())


def values(rows: Any, name: str) -> list[Any]:
    """The distinct values of a column."""
    return list(rows.select(name).distinct().to_pyarrow().column(name).to_pylist())


def counts(rows: Any, name: str) -> list[tuple[Any, int]]:
    """The distinct values of a column and how many rows have each."""
    table = rows.group_by(name).agg(__size=rows.count()).to_pyarrow()
    return list(zip(table.column(name).to_pylist(), table.column("__size").to_pylist(), strict=True))


def coded(rows: Any, name: str, code: str, function: Code, kind: pa.DataType, absent: int | None = None) -> Any:
    """Rows with one more column: a Python function of a column, called once for each of its distinct values.

    Args:
        rows: a table.
        name: the raw column.
        code: the new column.
        function: raw value → integer, or None for null.
        kind: integer type of the new column.
        absent: what a null raw value gets (a null equals nothing, so no join finds it).

    Raises:
        SchemaError: a value of the column is of a type that the function does not take.
    """
    keys = rows.select(name).distinct().to_pyarrow().column(name)
    try:
        numbers = pa.array(list(map(function, keys.to_pylist())), kind)
    except SchemaError as error:
        raise SchemaError(f"column {name!r} cannot be encoded: {str(error).removesuffix('.')}") from error
    rows = join(rows, ibis.memtable(pa.table({name: keys, code: numbers})), [name])
    return rows if absent is None else rows.mutate(**{code: rows[code].fill_null(absent)})


def join(rows: Any, table: Any, names: list[str]) -> Any:
    """A left join on columns of the same names, which the result holds once."""
    table = table.rename({f"__on_{name}": name for name in names})
    pairs = [rows[name] == table[f"__on_{name}"] for name in names]
    return rows.left_join(table, pairs).drop(*(f"__on_{name}" for name in names))
