"""From result lines to what people read: one self-contained HTML page, a Markdown file, a CSV file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from domlora.studies import plots
from domlora.studies.statistics import DASH, MINUS, Interval, Verdict, interval_text, score_text, verdict
from domlora.studies.tables import (
    BASE,
    TRUTH,
    Cell,
    DatasetTable,
    DomainRow,
    Line,
    Tables,
    method_order,
    tabulate,
)
from domlora.studies.text import plain_markdown, to_csv, to_markdown

__all__ = ["Finding", "findings", "write_report"]

_SPOKEN = {
    "joint": "adapters trained with the base (joint)",
    "two_stage": "adapters (two_stage)",
    "bias_only": "biases alone (bias_only)",
}
_HOLLOW = "Filled: the interval lies on one side of zero. Hollow: it holds zero, or there is none."
_HEADLINES = ("two_stage", "joint", "bias_only")


class Finding(NamedTuple):
    """What one method does on one dataset: in a sentence, as numbers, in a word."""

    method: str
    sentence: str
    difference: Interval
    verdict: Verdict


class _Plot(NamedTuple):
    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class _Section:
    """A dataset as the page shows it."""

    anchor: str
    table: DatasetTable
    findings: tuple[Finding, ...]
    figures: tuple[tuple[str, str], ...]
    num_intervals: int
    model_plot: _Plot | None
    domain_plots: tuple[_Plot, ...]
    curves: tuple[_Plot, ...]
    parameters: _Plot | None
    made: tuple[tuple[str, tuple[str, ...]], ...]

    def place(self, value: float) -> str:
        """Where a difference lies between the ends of this dataset's scale, in percent."""
        ends = [end for finding in self.findings for end in finding.difference[:3] if not math.isnan(end)]
        low, high = min(0.0, *ends), max(0.0, *ends)
        margin = 0.08 * (high - low) or 1.0
        return f"{100 * (value - low + margin) / (high - low + 2 * margin):.2f}"


def write_report(
    results: Iterable[Line],
    out_html: Path,
    *,
    markdown: Path | None = None,
    csv: Path | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    command: str = "",
) -> None:
    """Write the page of a study and, where asked for, its tables. Same results, same bytes.

    Everything is made before anything is written, and a file is replaced whole or not at all.

    Args:
        results: result lines, as ``read_results`` reads them.
        out_html: the page; its folder is made.
        markdown, csv: the tables, one line a run in the CSV.
        title: heading of the page; by default the names of the studies.
        notes: paragraphs that stand below the findings, as plain text.
        command: the command line that makes these results.

    Raises:
        DataError: no run of a model.
    """
    tables = tabulate(results)
    heading = title or f"Study {', '.join(_distinct(tables.runs, 'study')) or 'without a name'}"
    outputs = [(out_html, _page(tables, heading, notes, command))]
    if markdown is not None:
        outputs.append((markdown, _markdown(tables, heading, notes, command)))
    if csv is not None:
        outputs.append((csv, to_csv(tables)))
    for path, text in outputs:
        _write(path, text)


def findings(dataset: DatasetTable) -> tuple[Finding, ...]:
    """What every method that has pairs with the base does to WAUC; the one to lead with first."""
    cells = [cell for cell in dataset.overall.cells if cell.difference.num_pairs]
    cells.sort(key=lambda cell: (cell.method not in _HEADLINES, _rank(cell.method)))
    return tuple(Finding(cell.method, _sentence(cell), cell.difference, verdict(cell.difference)) for cell in cells)


def _rank(method: str) -> tuple[int, str]:
    return (_HEADLINES.index(method), method) if method in _HEADLINES else method_order(method)


def _sentence(cell: Cell) -> str:
    """``Adapters (two_stage) change WAUC by +0.12 points [-0.05, +0.29] over 5 seeds: no difference.``"""
    subject = _SPOKEN.get(cell.method, f"runs of {cell.method}")
    if cell.num_models > 1:
        subject = f"averaged over {cell.num_models} models, {subject}"
    mean, _, interval = interval_text(cell.difference).partition(" ")
    start = f"{subject[0].upper()}{subject[1:]} change WAUC by {mean} points"
    if cell.difference.num_pairs == 1:
        return f"{start} with one seed: no interval, so nothing is proven."
    found = verdict(cell.difference)
    word = found if found == "no difference" else f"a {found}"
    share = _share_text(cell.gap_closed)
    tail = f" Share of the gap to the truth closed: {share}." if share else ""
    return f"{start} {interval} over {cell.difference.num_pairs} seeds: {word}.{tail}"


def _share_text(share: Interval) -> str:
    if math.isnan(share.mean):
        return ""
    ends = "" if math.isnan(share.low) else f" [{_percent(share.low)}, {_percent(share.high)}]"
    return f"{_percent(share.mean)}{ends}"


def _percent(share: float, digits: int = 0) -> str:
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f} %".replace("-", MINUS)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _distinct(runs: Iterable[Line], key: str) -> tuple[str, ...]:
    return tuple(sorted({str(line[key]) for line in runs if line.get(key)}))


# -------------------------------------------------------------------------------------------------------- Markdown


def _markdown(tables: Tables, title: str, notes: Sequence[str], command: str) -> str:
    parts = [f"# {plain_markdown(title)}"]
    for dataset in tables.datasets:
        sentences = [f"- {plain_markdown(finding.sentence)}" for finding in findings(dataset)]
        parts.append("\n".join([f"**{plain_markdown(dataset.name)}**", "", *(sentences or ["- Nothing to compare."])]))
    parts += [f"Caution: {plain_markdown(caution)}" for caution in tables.cautions]
    parts += [plain_markdown(note) for note in notes]
    parts.append(to_markdown(tables).rstrip())
    if command:
        parts.append(f"Made with:\n\n    {' '.join(command.split())}")
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------ page


def _page(tables: Tables, title: str, notes: Sequence[str], command: str) -> str:
    """The page as text; every name is escaped on its way in, only our own plots go in as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        interval_text=interval_text,
        score_text=score_text,
        share_text=_share_text,
        percent=_percent,
        count=_count,
        series=plots.series_number,
        verdict=verdict,
        isnan=math.isnan,
        base=BASE,
    )
    template = environment.from_string(files("domlora.studies").joinpath("report.html").read_text(encoding="utf-8"))
    runs = [line for line in tables.runs if line["method"] != TRUTH]
    return template.render(
        title=title,
        notes=notes,
        command=command,
        cautions=tables.cautions,
        sections=[_section(dataset, number) for number, dataset in enumerate(tables.datasets, 1)],
        methods=sorted({line["method"] for line in runs}, key=method_order),
        num_runs=len(runs),
        studies=_distinct(tables.runs, "study"),
        versions=_versions(tables.runs),
        seconds=math.fsum(line.get("seconds") or 0.0 for line in runs),
    )


def _section(dataset: DatasetTable, number: int) -> _Section:
    found = findings(dataset)
    scored = [cell for row in dataset.domains for cell in row.cells if cell.difference.num_pairs > 1]
    return _Section(
        anchor=f"dataset-{number}",
        table=dataset,
        findings=found,
        figures=tuple(_key_figures(dataset, found)),
        num_intervals=len(scored),
        model_plot=_model_plot(dataset),
        domain_plots=tuple(_domain_plots(dataset)),
        curves=tuple(_curve_plots(dataset)),
        parameters=_parameter_plot(dataset),
        made=tuple(_made(dataset)),
    )


def _key_figures(dataset: DatasetTable, found: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Name and value of each, for the method that leads."""
    cells = {cell.method: cell for cell in dataset.overall.cells}
    leading = found[0].method if found else ""
    for method in (BASE, leading):
        if method in cells:
            yield f"{method}: WAUC", score_text(cells[method].score)
    if dataset.truth.num_values:
        yield "truth: WAUC", score_text(dataset.truth)
    if leading and dataset.domains:
        yield f"{leading}: domains", _domain_counts(dataset.domains, leading)
    shares = [row.adapters / row.total for row in dataset.parameters if leading in row.methods and row.total]
    if shares:
        low, high = _percent(min(shares)), _percent(max(shares))
        yield f"{leading}: adapters' share of all parameters", low if low == high else f"{low} to {high}"
    yield "runs", f"{_count(len(dataset.models), 'model')}, {_count(len(dataset.seeds), 'seed')}"


def _domain_counts(rows: Iterable[DomainRow], method: str) -> str:
    words = [
        row.status if row.status != "scored" else verdict(cell.difference)
        for row in rows
        for cell in row.cells
        if cell.method == method
    ]
    counts = Counter(words)
    order = ("gain", "loss", "no difference", "one run", "one class", "no rows")
    return ", ".join(f"{word} in {counts[word]}" for word in order if counts[word])


def _model_plot(dataset: DatasetTable) -> _Plot | None:
    rows = [(row.model, row.cells) for row in (*dataset.models, *([dataset.mean] if dataset.mean else []))]
    if not _has_pairs(rows):
        return None
    svg = plots.differences(rows, f"WAUC against the base, {dataset.name}")
    return _Plot(Markup(svg), f"{dataset.name}: difference to the base. {_HOLLOW}")


def _domain_plots(dataset: DatasetTable) -> Iterator[_Plot]:
    over = f"mean over {len(dataset.models)} models" if dataset.mean else dataset.models[0].model
    rows = [(row.name, row.cells) for row in dataset.domains]
    if _has_pairs(rows):
        svg = plots.differences(rows, f"AUC against the base by domain, {dataset.name}", metric="AUC")
        yield _Plot(Markup(svg), f"Difference to the base by domain, {over}. {_HOLLOW}")
    if any(cell.score.num_values for _, cells in rows for cell in cells):
        svg = plots.domain_auc(dataset.domains, f"AUC by domain, {dataset.name}")
        ranges = ", with the range over seeds" if len(dataset.seeds) > 1 else ""
        yield _Plot(Markup(svg), f"AUC by domain{ranges}, {over}.")


def _has_pairs(rows: Iterable[tuple[str, Sequence[Cell]]]) -> bool:
    return any(cell.difference.num_pairs for _, cells in rows for cell in cells)


def _curve_plots(dataset: DatasetTable) -> Iterator[_Plot]:
    for model, curves in dataset.curves.items():
        if any(curve.epochs for curve in curves):
            yield _Plot(Markup(plots.learning_curves(curves, f"Learning curves of {model}, {dataset.name}")), model)


def _parameter_plot(dataset: DatasetTable) -> _Plot | None:
    if not dataset.parameters:
        return None
    svg = plots.parameter_counts(dataset.parameters, f"Parameters, {dataset.name}")
    return _Plot(Markup(svg), f"Parameters on {dataset.name}, with and without the embedding tables.")


def _made(dataset: DatasetTable) -> Iterator[tuple[str, tuple[str, ...]]]:
    runs = [line for line in dataset.runs if line["method"] != TRUTH]
    yield "Seeds", tuple(map(str, dataset.seeds))
    yield "Data fingerprint", _distinct(runs, "data_fingerprint")
    for row in dataset.models:
        hashes = _distinct([line for line in runs if line["model"] == row.model], "config_hash")
        yield f"Configuration of {row.model}", hashes


def _versions(runs: Iterable[Line]) -> tuple[str, ...]:
    found = {f"{name} {number}" for line in runs for name, number in (line.get("versions") or {}).items()}
    return tuple(sorted(found))


def _write(path: Path, text: str) -> None:
    """Replace a file by another, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
