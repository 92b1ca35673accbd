"""The tables of a study as text: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
import math
import re

from domlora.studies.reporting.arms import Arms
from domlora.studies.reporting.cells import Line
from domlora.studies.reporting.sheets import Difference, Item, Sheet, sheets
from domlora.studies.reporting.statistics import Spread, interval_text, score_text, verdict
from domlora.studies.reporting.tables import COUNTS, Tables

__all__ = ["plain_markdown", "to_csv", "to_markdown"]

_COLUMNS = (
    *("dataset", "model", "method", "seed", "wauc", "macro_auc", "log_loss", "params_total", "params_adapters"),
    *("auc", "gauc", "normalized_entropy", "pcoc", "ece", "valid_wauc", "params_tables", "best_epoch", "config_hash"),
    *("kind", "params_per_domain", "seconds", "selected"),
)
_WORDS = ("dataset", "model", "method", "config_hash", "kind", "selected")
_WHOLE = ("seed", "params_per_domain", *COUNTS)
_ROUNDED = ("best_epoch", "seconds")


def to_csv(tables: Tables) -> str:
    """A line a run: metrics with six decimals, counts as whole numbers, what is not known left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_csv_cell(line, column) for column in _COLUMNS] for line in tables.runs)
    return out.getvalue()


def _csv_cell(line: Line, column: str) -> str:
    value = line.get(column, line["method"] if column == "kind" else None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if column in _WORDS:
        return str(value)
    if column in _WHOLE:
        return str(int(value))
    return f"{float(value):.2f}" if column in _ROUNDED else f"{float(value):.6f}"


def to_markdown(tables: Tables, arms: Arms | None = None) -> str:
    """All tables of a study.

    Args:
        arms: how the study wants its arms to be read.
    """
    return "\n\n".join(map(_markdown, sheets(tables, arms))) + "\n"


def _markdown(sheet: Sheet) -> str:
    rule = ["---"] * sheet.num_left + ["---:"] * (len(sheet.head) - sheet.num_left)
    rows = [[plain_markdown(name) for name in sheet.head], rule, *(list(map(_item, row)) for row in sheet.rows)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {plain_markdown(sheet.title)}\n\n{plain_markdown(sheet.note)}\n\n{table}"


def _item(item: Item) -> str:
    if isinstance(item, Difference):
        return f"{interval_text(item.interval)}, {verdict(item.interval)}{'†' * item.stays}"
    return score_text(item) if isinstance(item, Spread) else plain_markdown(item)


def plain_markdown(name: str) -> str:
    """A name that stays text in a Markdown table: one line, no cell border, no tag."""
    flat = " ".join(name.split())
    text = flat.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
