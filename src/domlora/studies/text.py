"""The tables of a study as text: CSV for programs, Markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from domlora.studies.statistics import DASH, MINUS, interval_text, score_text, verdict
from domlora.studies.tables import BASE, COUNTS, TRUTH, Cell, DatasetTable, Line, Tables, method_order

__all__ = ["plain_markdown", "to_csv", "to_markdown"]

_COLUMNS = (
    *("dataset", "model", "method", "seed", "wauc", "macro_auc", "log_loss", "params_total", "params_adapters"),
    *("auc", "gauc", "normalized_entropy", "pcoc", "ece", "valid_wauc", "params_tables", "best_epoch", "config_hash"),
)


def to_csv(tables: Tables) -> str:
    """A line a run: metrics with six decimals, counts as whole numbers, what is not known left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_csv_cell(line, column) for column in _COLUMNS] for line in tables.runs)
    return out.getvalue()


def _csv_cell(line: Line, column: str) -> str:
    value = line.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if column in ("dataset", "model", "method", "config_hash"):
        return str(value)
    if column == "seed" or column in COUNTS:
        return str(int(value))
    return f"{float(value):.2f}" if column == "best_epoch" else f"{float(value):.6f}"


def to_markdown(tables: Tables) -> str:
    """The main table, then for each dataset its domains, then the parameters."""
    parts = ["## WAUC", _how_to_read(tables), _main_table(tables)]
    for dataset in tables.datasets:
        if dataset.domains:
            over = (
                f"mean over {len(dataset.models)} models" if dataset.mean else plain_markdown(dataset.models[0].model)
            )
            parts += [f"## Domains of {plain_markdown(dataset.name)}", f"AUC on the test split in points, {over}."]
            parts.append(_domain_table(dataset))
    return "\n\n".join([*parts, "## Parameters", _parameter_table(tables)]) + "\n"


def _how_to_read(tables: Tables) -> str:
    text = (
        "Test split, in points (AUC x 100): mean ± standard deviation over seeds. Differences to the base are paired by "
        'seed, with the 95 % interval of Student\'s t; where it holds zero the verdict is "no difference".'
    )
    single = [plain_markdown(dataset.name) for dataset in tables.datasets if len(dataset.seeds) == 1]
    return text + (f" {', '.join(single)}: one seed, no interval." if single else "")


def _main_table(tables: Tables) -> str:
    methods = sorted({method for dataset in tables.datasets for method in dataset.methods}, key=method_order)
    lines = []
    for dataset in tables.datasets:
        rows = [*dataset.models, *([dataset.mean] if dataset.mean else [])]
        lines += [[dataset.name, row.model, *_method_cells(row.cells, methods)] for row in rows]
        if dataset.truth.num_values:
            blank = [""] * (len(_method_head(methods)) - 1)
            lines.append([dataset.name, TRUTH, score_text(dataset.truth), *blank])
    return _pipe_table(["dataset", "model", *_method_head(methods)], lines, num_left=2)


def _domain_table(dataset: DatasetTable) -> str:
    lines = []
    for row in dataset.domains:
        cells = _method_cells(row.cells, dataset.methods)
        if row.status != "scored":
            cells = [row.status, *[""] * (len(cells) - 1)]
        rate = DASH if math.isnan(row.click_rate) else f"{100 * row.click_rate:.1f} %"
        lines.append([row.name, f"{row.rows:,}", rate, *cells])
    return _pipe_table(["domain", "rows", "click rate", *_method_head(dataset.methods)], lines)


def _parameter_table(tables: Tables) -> str:
    head = ["dataset", "model", "methods", "total", "tables", "dense", "adapters", "of total", "of dense"]
    lines = []
    for dataset in tables.datasets:
        for row in dataset.parameters:
            counts = [f"{count:,}" for count in (row.total, row.tables, row.dense, row.adapters)]
            shares = [f"{100 * row.adapters / whole:.1f} %" if whole else DASH for whole in (row.total, row.dense)]
            lines.append([dataset.name, row.model, ", ".join(row.methods), *counts, *shares])
    return _pipe_table(head, lines, num_left=3)


def _method_head(methods: Sequence[str]) -> list[str]:
    return [cell for method in methods for cell in ([method] if method == BASE else [method, f"{method} {MINUS} base"])]


def _method_cells(cells: Sequence[Cell], methods: Sequence[str]) -> list[str]:
    by_method = {cell.method: cell for cell in cells}
    texts = []
    for method in methods:
        cell = by_method.get(method)
        texts.append(score_text(cell.score) if cell else DASH)
        if method != BASE:
            known = cell is not None and cell.difference.num_pairs > 0
            texts.append(f"{interval_text(cell.difference)}, {verdict(cell.difference)}" if cell and known else DASH)
    return texts


def _pipe_table(head: Sequence[str], lines: Sequence[Sequence[str]], num_left: int = 1) -> str:
    rule = ["---"] * num_left + ["---:"] * (len(head) - num_left)
    rows = ([plain_markdown(cell) for cell in head], rule, *([plain_markdown(cell) for cell in line] for line in lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain_markdown(name: str) -> str:
    """A name that stays text in a Markdown table: one line, no cell border, no tag."""
    flat = " ".join(name.split())
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("&", "&amp;").replace("<", "&lt;")
