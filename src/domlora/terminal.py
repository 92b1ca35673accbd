"""What the command line shows: lines, tables and bars."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from domlora.evaluation.evaluate import Table
    from domlora.training.fit import OnProgress, Progress

__all__ = ["STDERR", "STDOUT", "bar", "print_json", "print_line", "print_rows", "print_table", "training_bar"]

STDOUT, STDERR = Console(), Console(stderr=True)


def print_rows(manifest: dict[str, Any]) -> None:
    """Every row accounted for."""
    rows = manifest["rows"]
    for count, what in (
        (rows["in"], "read"),
        *((count, f"quarantined: {reason}") for reason, count in rows["quarantined"].items()),
        *((count, f"dropped: {rule}") for rule, count in rows["dropped"].items()),
        (rows["sampled"], "sampled non-clicks"),
        *((facts["rows"], name) for name, facts in manifest["splits"].items()),
    ):
        if count:
            STDOUT.print(f"{count:>14,} rows {what}", highlight=False)


def print_table(table: Table) -> None:
    """A table as Markdown, however wide."""
    STDOUT.print(table.to_markdown(), markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Anything that is JSON, for programs and people alike."""
    STDOUT.print(json.dumps(value, indent=1), markup=False, highlight=False, soft_wrap=True)


def print_line(line: dict[str, Any]) -> None:
    """One result of a study."""
    where = f"{line['dataset']:<20} {line['model']:<10} {line['method']:<10} seed {line['seed']}"
    if "failed" in line:
        STDOUT.print(f"{where}  failed: {line['failed']}", markup=False, highlight=False, soft_wrap=True)
        return
    wauc = "   -  " if line["wauc"] is None else f"{100 * line['wauc']:6.2f}"
    STDOUT.print(f"{where}  test WAUC {wauc}", highlight=False)


def bar() -> Any:
    """A bar that shows where somebody watches, and goes when it is done."""
    from rich.progress import Progress

    return Progress(console=STDERR, disable=not STDERR.is_terminal, transient=True)


@contextmanager
def training_bar() -> Iterator[OnProgress]:
    """A bar with rows/s and the validation figure; a plain line an epoch when nobody watches."""
    if not STDERR.is_terminal:
        last = [-1]

        def line(at: Progress) -> None:
            if at.rows == at.total_rows and at.value is not None and at.epoch != last[0]:
                last[0] = at.epoch
                STDERR.print(_said(at), highlight=False)

        yield line
        return
    with bar() as shown:
        task = shown.add_task("train", total=None)

        def show(at: Progress) -> None:
            shown.update(task, total=at.total_rows, completed=at.rows, description=_said(at))

        yield show


def _said(at: Progress) -> str:
    value = "-" if at.value is None else f"{at.value:.5f}"
    if math.isnan(at.loss):  # the starting point, before any step
        return f"start    valid {value}"
    return f"epoch {at.epoch}  loss {at.loss:.5f}  valid {value}  {at.rows_per_second:,.0f} rows/s"
