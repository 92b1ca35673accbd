"""Rows that cannot be used: counted by reason, kept in a file, and too many of them stop everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.engine import Engine
from domlora.data.expressions import cells, size
from domlora.data.raw import RawTable
from domlora.errors import DataError

__all__ = ["NUMBER", "Quarantine"]

NUMBER = r"^\s*([+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf|nan)?\s*$"
"""A text that is blank or reads as a number, once in lower case, for the regular expressions of every engine."""
REASON = "__reason"


class Quarantine:
    """Reasons why rows of a table cannot be used.

    Args:
        raw: the source.
        most: share of unusable rows above which preparing stops.
        folder: where the files go; it is made only if there is something to keep.
    """

    def __init__(self, raw: RawTable, most: float, folder: Path) -> None:
        self.raw, self.most, self.folder = raw, most, folder
        self.counts: dict[str, int] = {}
        self._reasons: list[tuple[Any, str]] = []

    def refuse(self, condition: Any, reason: str) -> None:
        """Rows for which a condition holds are out; a row is counted under the first of its reasons."""
        self._reasons.append((condition, reason))

    def kept(self, engine: Engine, rows: Any) -> tuple[Any, int]:
        """The usable rows, and how many rows there were, lines that could not be read included.

        Raises:
            DataError: too many cannot be used, or none can.
        """
        if self._reasons:
            told = ibis.cases(*((condition.fill_null(False), reason) for condition, reason in self._reasons), else_="")
            rows = engine.stored(rows.mutate(**{REASON: told}))
            sizes = {cell[REASON]: cell["__size"] for cell in cells(rows, [REASON]).to_pylist()}
        else:
            sizes = {"": size(rows)}
        usable = sizes.pop("", 0)
        total = usable + sum(sizes.values()) + self.raw.rejected_rows
        self.counts = {reason: sizes[reason] for _, reason in self._reasons if sizes.get(reason)}
        if self.raw.rejected_rows:
            self.counts["line cannot be read"] = self.raw.rejected_rows
        self._judge(rows, usable, total)
        self._keep(rows)
        if not self._reasons:
            return rows, total
        return rows.filter(rows[REASON] == "").drop(REASON), total

    def _judge(self, rows: Any, usable: int, total: int) -> None:
        bad = total - usable
        if bad <= self.most * total and usable:
            return
        rule = f"at most {100 * self.most:g} % of the rows of {self.raw.name} may be unusable, and {bad:,} of {total:,} are"
        raise DataError(
            rule if total else f"{self.raw.name} must have rows",
            received=self.counts,
            next_step=self._example(rows) or "Check the files and what the plan says of their columns",
        )

    def _keep(self, rows: Any) -> None:
        if not self.counts:
            return
        self.folder.mkdir()
        if any(reason in self.counts for _, reason in self._reasons):
            pq.write_table(_sorted(self._bad(rows).to_pyarrow()), self.folder / "rows.parquet")
        if self.raw.rejected is not None:
            pq.write_table(pq.read_table(self.raw.rejected), self.folder / "lines.parquet")

    def _bad(self, rows: Any) -> Any:
        bad = rows.filter(rows[REASON] != "").rename(reason=REASON)
        return bad.select("reason", *(name for name in bad.columns if not name.startswith("__") and name != "reason"))

    def _example(self, rows: Any) -> str:
        """One bad row; on purpose the same one each time."""
        if any(reason in self.counts for _, reason in self._reasons):
            bad = self._bad(rows)
            found = bad.order_by(bad.columns[:2]).limit(1).to_pyarrow()
        elif self.raw.rejected is not None:
            found = pq.read_table(self.raw.rejected).slice(0, 1)
        else:
            return ""
        shown = {key: value for key, value in found.to_pylist()[0].items() if value is not None}
        return f"For example {str(shown)[:300]}. Raise max_quarantine if that is as it should be"


def _sorted(table: pa.Table) -> pa.Table:
    """The rows in an order that hangs on nothing but themselves."""
    rows = sorted(table.to_pylist(), key=repr)
    kinds = {f.name: pa.list_(f.type.value_type) if pa.types.is_list(f.type) else f.type for f in table.schema}
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()})
