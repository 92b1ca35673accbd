"""From result lines to what people read: one self-contained HTML page; Markdown, LaTeX and CSV beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domlora.files import put_file, told
from domlora.studies.reporting.arms import Arms, arms_of
from domlora.studies.reporting.cells import Line
from domlora.studies.reporting.findings import families, findings
from domlora.studies.reporting.latex import to_latex
from domlora.studies.reporting.page import page
from domlora.studies.reporting.planned import planned
from domlora.studies.reporting.selection import selected
from domlora.studies.reporting.tables import DatasetTable, Tables, tabulate
from domlora.studies.reporting.text import plain_markdown, to_csv, to_markdown

__all__ = ["study_tables", "write_report"]


def write_report(
    results: Iterable[Line],
    out_html: Path,
    *,
    markdown: Path | None = None,
    latex: Path | None = None,
    csv: Path | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    command: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of a study and, where asked for, its tables. Same results, same bytes.

    Everything is made before anything is written, and a file is replaced whole or not at all.

    Args:
        results: result lines, as ``read_results`` reads them.
        out_html: the page; its folder is made.
        markdown, latex, csv: the tables, one line a run in the CSV.
        title: heading of the page; by default the names of the studies.
        notes: paragraphs that stand below the findings, as plain text.
        command: the command line that makes these results.
        facts: how the study's arms are to be read, see :func:`domlora.studies.reporting.arms.arms_of`, and which it derives,
            see :func:`domlora.studies.reporting.selection.selected`.

    Raises:
        DataError: no run of a model, or a file that cannot be written.
    """
    tables = study_tables(results, facts or {})
    arms = arms_of(facts or {}, tables)
    heading = title or f"Study {', '.join(_studies(tables)) or 'without a name'}"
    outputs = [(out_html, page(tables, arms, heading, notes, command))]
    if markdown is not None:
        outputs.append((markdown, _markdown(tables, arms, heading, notes, command)))
    if latex is not None:
        outputs.append((latex, to_latex(tables, arms)))
    if csv is not None:
        outputs.append((csv, to_csv(tables)))
    for path, text in outputs:
        _write(path, text)


def study_tables(results: Iterable[Line], facts: Mapping[str, Any]) -> Tables:
    """The tables of the lines that a study asks for and of the arms that it derives from them.

    Raises:
        DataError: no run of a model.
    """
    lines = list(results)
    kept = planned(lines, facts)
    tables = tabulate(selected(kept, facts))
    if len(kept) == len(lines):
        return tables
    more = f"{len(lines) - len(kept)} runs of other options, arms, models or seeds than the study has now are left out."
    return replace(tables, cautions=(more, *tables.cautions))


def _studies(tables: Tables) -> list[str]:
    return sorted({str(line["study"]) for line in tables.runs if line.get("study")})


def _markdown(tables: Tables, arms: Arms, title: str, notes: Sequence[str], command: str) -> str:
    parts = [f"# {plain_markdown(title)}"]
    parts += [_said(dataset) for dataset in tables.datasets]
    parts += [f"Caution: {plain_markdown(caution)}" for caution in tables.cautions]
    parts += [plain_markdown(note) for note in notes]
    parts.append(to_markdown(tables, arms).rstrip())
    if command:
        parts.append(f"Made with:\n\n    {' '.join(command.split())}")
    return "\n\n".join(parts) + "\n"


def _said(dataset: DatasetTable) -> str:
    """What came out on one dataset, a sentence a line."""
    sentences = [finding.sentence for finding in findings(dataset)] + [each.sentence for each in families(dataset)]
    lines = [f"- {plain_markdown(sentence)}" for sentence in sentences or ["Nothing to compare."]]
    return "\n".join([f"**{plain_markdown(dataset.name)}**", "", *lines])


def _write(path: Path, text: str) -> None:
    """Replace a file by another, whole or not at all."""
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    put_file(path, text.encode(), path.with_name(f".{path.name}.{os.getpid()}.tmp"))
