"""The tables of a study for a paper: LaTeX with booktabs, every name escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from domlora.studies.reporting.arms import Arms
from domlora.studies.reporting.sheets import Difference, Item, Sheet, sheets
from domlora.studies.reporting.statistics import Spread, interval_text, score_text, verdict
from domlora.studies.reporting.tables import Tables

__all__ = ["plain_latex", "to_latex"]

_MOST_COLUMNS = 3
_MOST_ROWS = 45  # of one table: what a page holds
_WIDE = 7  # columns from which on letters are smaller
_LONG = 40  # letters of a cell from which on it may break
_HEAD = r"""% Tables of a study. Put \usepackage{booktabs} into the preamble and \input this file.
% Names outside of Latin letters need XeLaTeX or LuaLaTeX."""
_MARKS = r" $\ast$ the interval excludes zero."
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "\u2212": "$-$",
    "\u2013": "--",
    "\u00b1": r"$\pm$",
    "\u2020": r"$\dagger$",
    "\u00d7": r"$\times$",
}


def to_latex(tables: Tables, arms: Arms | None = None) -> str:
    """All tables of a study, those of several datasets one a dataset; each is a ``table`` with a caption and a label.

    Args:
        arms: how the study wants its arms to be read.
    """
    parts = [_HEAD]
    for sheet in sheets(tables, arms, most_columns=_MOST_COLUMNS):
        parts += [_table(part) for part in _by_dataset(sheet)]
    return "\n\n".join(parts) + "\n"


def plain_latex(name: str) -> str:
    """A name that stays text: one line, no command, no comment.

    >>> plain_latex("two_stage & 5 %")
    'two\\\\_stage \\\\& 5 \\\\%'
    """
    flat = " ".join(name.split())
    return "".join(_ESCAPES.get(letter, letter) for letter in flat if letter.isprintable())


def _by_dataset(sheet: Sheet) -> Iterator[Sheet]:
    """A sheet a dataset, where rows name one, and a page."""
    if sheet.head[0] != "dataset":
        yield from _by_page(sheet)
        return
    for name, rows in groupby(sheet.rows, key=lambda row: row[0]):
        title, own = f"{sheet.title}, {name}", tuple(row[1:] for row in rows)
        yield from _by_page(Sheet(title, sheet.note, sheet.head[1:], own, sheet.num_left - 1))


def _by_page(sheet: Sheet) -> Iterator[Sheet]:
    yield replace(sheet, rows=sheet.rows[:_MOST_ROWS])
    for page, start in enumerate(range(_MOST_ROWS, len(sheet.rows), _MOST_ROWS), 2):
        yield replace(sheet, title=f"{sheet.title}, part {page}", note="", rows=sheet.rows[start : start + _MOST_ROWS])


def _table(sheet: Sheet) -> str:
    label = re.sub(r"[^a-z0-9]+", "-", sheet.title.lower()).strip("-")
    columns = "".join(_column(sheet, place) for place in range(len(sheet.head)))
    head = " & ".join(map(plain_latex, sheet.head))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering" + (r"\footnotesize" if len(sheet.head) > _WIDE else r"\small"),
            rf"\caption{{{plain_latex(sheet.title)}. {plain_latex(sheet.note)}{_MARKS * _has_marks(sheet)}}}",
            rf"\label{{tab:{label}}}",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *_lines(sheet),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _column(sheet: Sheet, place: int) -> str:
    """Words to the left, figures to the right, and lists of names on several lines."""
    if any(isinstance(row[place], str) and len(str(row[place])) > _LONG for row in sheet.rows):
        return r"p{5cm}"
    return "l" if place < sheet.num_left else "r"


def _has_marks(sheet: Sheet) -> bool:
    return any(isinstance(item, Difference) for row in sheet.rows for item in row)


def _lines(sheet: Sheet) -> Iterator[str]:
    """Rows; a name that stands in several rows is written once, and its rows are set apart."""
    last: Item = ""
    together = len({row[0] for row in sheet.rows}) < len(sheet.rows)
    for number, row in enumerate(sheet.rows):
        again = number > 0 and row[0] == last
        if together and number and not again:
            yield r"\addlinespace"
        yield " & ".join(["" if again else _item(row[0]), *map(_item, row[1:])]).strip() + r" \\"
        last = row[0]


def _item(item: Item) -> str:
    if isinstance(item, Difference):
        sure = verdict(item.interval) in ("gain", "loss")
        marks = r"\ast" * sure + r"\dagger" * item.stays
        return _maths(interval_text(item.interval)) + (f"$^{{{marks}}}$" if marks else "")
    return _maths(score_text(item)) if isinstance(item, Spread) else plain_latex(item)


def _maths(figures: str) -> str:
    """Figures of ours in math mode, so that signs are set as signs.

    >>> _maths("+0.12 [−0.05, +0.29]")
    '$+0.12$ [$-0.05$, $+0.29$]'
    """
    ascii_signs = figures.replace("\u2212", "-").replace("\u00b1", r"$\pm$").replace("\u2013", "--")
    return re.sub(r"(?<![\d.])[+-]?\d+\.\d+", lambda number: f"${number.group()}$", ascii_signs)
