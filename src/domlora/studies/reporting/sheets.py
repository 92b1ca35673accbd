"""The tables of a study as rows of cells, before they become Markdown or LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from domlora.studies.reporting.arms import Arms, OptionCurve, Switches, domain_count_curves, option_curves, switches
from domlora.studies.reporting.cells import BASE, TRUTH, Cell
from domlora.studies.reporting.findings import families, percent, share_text
from domlora.studies.reporting.selection import candidates
from domlora.studies.reporting.standings import STANDINGS, Standing, standings
from domlora.studies.reporting.statistics import DASH, MINUS, Interval, Spread, p_text, p_value
from domlora.studies.reporting.tables import DatasetTable, ModelRow, ParameterRow, Tables, shown_domains

__all__ = ["MANY_METHODS", "SELECTED", "Difference", "Item", "Sheet", "parameter_counts", "sheets"]

MANY_METHODS = 5
"""A table with more methods than this has a line a method, not a column."""

SELECTED = (
    "Nothing is trained for these arms: each seed takes the candidate with the best mean validation WAUC over the other "
    "seeds, so that no seed chooses for itself and the test split decides nothing."
)


class Difference(NamedTuple):
    """A difference to be shown with its verdict; ``stays`` where it is one after Holm's correction."""

    interval: Interval
    stays: bool


Item: TypeAlias = str | Spread | Difference


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table.

    Args:
        title: what it shows.
        note: what its figures are, in sentences.
        head: names of columns; if the first is "dataset", rows of a dataset stand together.
        num_left: how many columns from the left hold words.
    """

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Item, ...], ...]
    num_left: int = 1


def sheets(tables: Tables, arms: Arms | None = None, *, most_columns: int = MANY_METHODS) -> tuple[Sheet, ...]:
    """The main table, its corrections and what was selected, what switches and options move, then domains and parameters.

    Args:
        arms: how the study wants its arms to be read.
        most_columns: with more methods than this, a table has a line a method.
    """
    found = [_main(tables, most_columns), *_corrections(tables), *_selections(tables), *_standings(tables)]
    for dataset in tables.datasets:
        found += _switches(dataset, arms or Arms())
        found += _curves(option_curves(dataset), f"Options on {dataset.name}")
    found += _curves(domain_count_curves(tables), "Number of domains")
    for dataset in tables.datasets:
        found += _domains(dataset, most_columns)
    return (*found, _parameters(tables))


# ------------------------------------------------------------------------------------------------------- main table


def _main(tables: Tables, most_columns: int) -> Sheet:
    long = len(tables.methods) > most_columns
    rows: list[tuple[Item, ...]] = []
    for dataset in tables.datasets:
        for row in (*dataset.models, *([dataset.mean] if dataset.mean else [])):
            rows += _long(dataset, row, tables.corrected) if long else [_wide(dataset, row, tables)]
        if dataset.truth.num_values:
            rows.append((dataset.name, TRUTH, *([TRUTH] if long else []), dataset.truth))
    many = ("method", "WAUC", f"{MINUS} base", "p", *(["p, Holm"] * tables.corrected))
    head = many if long else _method_head(tables.methods)
    return _filled(Sheet("WAUC", _how_to_read(tables), ("dataset", "model", *head), tuple(rows), 3 if long else 2))


def _wide(dataset: DatasetTable, row: ModelRow, tables: Tables) -> tuple[Item, ...]:
    return dataset.name, row.model, *_method_items(row.cells, tables.methods, tables.corrected)


def _long(dataset: DatasetTable, row: ModelRow, corrected: bool) -> Iterator[tuple[Item, ...]]:
    for cell in row.cells:
        if cell.score.num_values:
            p = p_text(p_value(cell.difference)), *([p_text(cell.p_holm)] * corrected)
            yield dataset.name, row.model, cell.method, cell.score, _difference(cell, corrected), *p


def _how_to_read(tables: Tables) -> str:
    text = (
        "Test split, in points (AUC x 100): mean ± standard deviation over seeds. Differences to the base are paired by "
        "seed, with the 95 % interval of Student's t; where it holds zero, that is called no difference."
    )
    if tables.corrected:
        text += (
            " † stays after Holm's correction over the models of a dataset, for each method; the mean is a test alone."
        )
    for dataset in tables.datasets:
        if dataset.mean and dataset.fewer:
            text += (
                f" In {dataset.name} the mean, and its difference, is over the models of each method: {dataset.fewer}."
            )
    single = [dataset.name for dataset in tables.datasets if len(dataset.seeds) == 1]
    return text + (f" {', '.join(single)}: one seed, no interval." if single else "")


def _corrections(tables: Tables) -> Iterator[Sheet]:
    rows = tuple(
        (
            dataset.name,
            family.method,
            *(str(number) for number in (family.num_models, len(family.gains), len(family.losses))),
            ", ".join(family.stays) or "none",
        )
        for dataset in tables.datasets
        for family in families(dataset)
    )
    if rows:
        note = "Holm's correction takes the models of a dataset together, method by method."
        yield Sheet("Over all models", note, ("dataset", "method", "models", "gain", "loss", "after Holm"), rows, 2)


def _selections(tables: Tables) -> Iterator[Sheet]:
    rows = tuple(
        (dataset.name, each.model, each.arm, each.name, each.valid, f"{each.taken} of {each.num_seeds} seeds")
        for dataset in tables.datasets
        for each in candidates(dataset.runs)
    )
    if rows:
        yield Sheet(
            "What was selected",
            SELECTED,
            ("dataset", "model", "arm", "candidate", "validation WAUC", "taken in"),
            rows,
            4,
        )


def _standings(tables: Tables) -> Iterator[Sheet]:
    rows = tuple(
        (dataset.name, each.model, each.method, each.score, *_against_best(each))
        for dataset in tables.datasets
        for each in standings(dataset)
    )
    if rows:
        head = ("dataset", "model", "arm", "WAUC", f"{MINUS} preferred", "p, Holm", "without tables")
        yield Sheet("All beside the preferred one", STANDINGS, head, rows, 3)


def _against_best(each: Standing) -> tuple[Item, ...]:
    size = DASH if each.without_tables is None else f"{each.without_tables:,}"
    if not each.difference.num_pairs:  # no seed in common, or the preferred one itself
        return DASH, "", size
    return Difference(each.difference, each.stays), p_text(each.p_holm), size


# ----------------------------------------------------------------------------------------------- switches and curves


def _switches(dataset: DatasetTable, arms: Arms) -> Iterator[Sheet]:
    found = switches(dataset, arms)
    if found and (found[0].chosen or found[0].reference != BASE):  # else the main table says it all
        steps, reference = found[0].steps, found[0].reference
        head = ("model", "arm", "WAUC", *([f"{MINUS} step before"] if steps else []), f"{MINUS} {reference}")
        rows = tuple(row for each in found for row in _switch_rows(each))
        yield Sheet(f"What each switch moves on {dataset.name}", "WAUC in points, test split.", head, rows, 2)


def _switch_rows(found: Switches) -> Iterator[tuple[Item, ...]]:
    yield found.model, found.reference, found.score, *([""] if found.steps else []), ""
    for row in found.rows:
        kinds = (row.step, row.difference) if found.steps else (row.difference,)
        yield found.model, row.title, row.score, *(_plain(kind) for kind in kinds)


def _curves(curves: Sequence[OptionCurve], title: str) -> Iterator[Sheet]:
    if not curves:
        return
    shares = any(not math.isnan(point.gap_closed.mean) for curve in curves for point in curve.points)
    rows = tuple(
        (
            *(curve.option, curve.kind, curve.model, f"{point.value:g}", point.score, _plain(point.difference)),
            *([share_text(point.gap_closed)] if shares else []),
        )
        for curve in curves
        for point in curve.points
    )
    more = ["of the gap to the truth"] if shares else []
    head = ("option", "method", "on", "value", "WAUC", f"{MINUS} base", *more)
    yield Sheet(title, "WAUC in points, test split, with paired 95 % intervals.", head, rows, 3)


def _plain(interval: Interval) -> Item:
    return Difference(interval, stays=False) if interval.num_pairs else DASH


# ------------------------------------------------------------------------------------------------------------ domains


def _domains(dataset: DatasetTable, most_columns: int) -> Iterator[Sheet]:
    if not dataset.domains:
        return
    shown, long = shown_domains(dataset.domains), len(dataset.methods) > most_columns
    note = f"AUC on the test split in points, {dataset.over}."
    if len(dataset.domains) > 1:
        note += " † stays after Holm's correction over all domains, for each method."
    if len(shown) < len(dataset.domains):
        note += f" Of {len(dataset.domains):,} domains the {len(shown) // 2} largest and the surest of the others."
    rows: list[tuple[Item, ...]] = []
    for row in shown:
        start = (row.name, f"{row.rows:,}", percent(row.click_rate, 1))
        if row.status != "scored":
            rows.append((*start, row.status))
        elif long:
            cells = [cell for cell in row.cells if cell.score.num_values]
            rows += [(*start, c.method, c.score, _difference(c, len(dataset.domains) > 1)) for c in cells]
        else:
            rows.append((*start, *_method_items(row.cells, dataset.methods, len(dataset.domains) > 1)))
    more = ("method", "AUC", f"{MINUS} base") if long else _method_head(dataset.methods)
    yield _filled(Sheet(f"Domains of {dataset.name}", note, ("domain", "rows", "click rate", *more), tuple(rows)))


# --------------------------------------------------------------------------------------------------------- parameters


def _parameters(tables: Tables) -> Sheet:
    head = ("dataset", "model", "methods", "total", "tables", "without tables", "adapters", "a domain's own")
    rows = tuple(
        (dataset.name, row.model, ", ".join(row.methods), *parameter_counts(row))
        for dataset in tables.datasets
        for row in dataset.parameters
    )
    note = (
        "Learned numbers, with and without embedding tables. A domain's own: what one domain more costs. Last, the shares "
        "of the adapters, of all and of what is neither table nor adapter."
    )
    return Sheet("Parameters", note, (*head, "of all", "of the backbone"), rows, 3)


def parameter_counts(row: ParameterRow) -> tuple[str, ...]:
    """Counts of a row, what one domain owns, and the adapters as a share of all and of what is neither they nor tables."""
    counts = (f"{count:,}" for count in (row.total, row.tables, row.without_tables, row.adapters))
    own = DASH if row.per_domain is None else f"{row.per_domain:,}"
    shares = (percent(row.adapters / whole, 1) if whole else DASH for whole in (row.total, row.dense))
    return *counts, own, *shares


# --------------------------------------------------------------------------------------------------------- the pieces


def _method_head(methods: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for m in methods for word in ([m] if m == BASE else [m, f"{m} {MINUS} base"]))


def _method_items(cells: Sequence[Cell], methods: Sequence[str], corrected: bool) -> tuple[Item, ...]:
    by_method = {cell.method: cell for cell in cells}
    items: list[Item] = []
    for method in methods:
        cell = by_method.get(method)
        items.append(cell.score if cell else DASH)
        if method != BASE:
            items.append(_difference(cell, corrected) if cell else DASH)
    return tuple(items)


def _difference(cell: Cell, corrected: bool) -> Item:
    return Difference(cell.difference, corrected and cell.stays) if cell.difference.num_pairs else DASH


def _filled(sheet: Sheet) -> Sheet:
    """The same with every row as long as the head."""
    rows = tuple((*row, *[""] * (len(sheet.head) - len(row))) for row in sheet.rows)
    return Sheet(sheet.title, sheet.note, sheet.head, rows, sheet.num_left)
