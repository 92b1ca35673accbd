"""Verbs that compare methods: ``study`` and ``report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from domlora.cli.options import Device, Raw, Settings
from domlora.errors import ConfigError, needing
from domlora.terminal import STDOUT, print_line

if TYPE_CHECKING:
    from domlora.studies.searching.tuning import Found

__all__ = ["report", "study"]


def study(
    config: Annotated[Path, typer.Argument(help="TOML file of the study, such as studies/movielens_gen.toml.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; runs/NAME without it.")] = None,
    jobs: Annotated[
        int, typer.Option(help="Processes that train at the same time, also on one GPU; 0 for one a core.")
    ] = 0,
    raw: Raw = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="NAME", help="Run it on this dataset alone; repeatable.")
    ] = None,
    device: Device = "",
    settings: Settings = None,
) -> None:
    """Run datasets x models x arms x seeds, after the search of options if the file has one.

    Interrupt it at will: the same command runs what is missing.
    """
    import os

    from domlora.config import parse, read_toml, with_settings
    from domlora.studies.run import run_study
    from domlora.studies.study import Study

    plan = parse(Study, with_settings(read_toml(config), settings or ()))
    plan = replace(plan.only(dataset or plan.datasets), device=device or plan.device)
    folder = out or Path("runs") / plan.name
    given = [f"--raw {raw}"] if raw else []
    given += [f"--dataset {name}" for name in dataset or ()] + [f"--set '{setting}'" for setting in settings or ()]
    command = " ".join(["domlora study", config.as_posix(), *given])
    jobs = jobs or os.cpu_count() or 1
    results = run_study(plan, folder, raw=raw, jobs=jobs, command=command, on_result=print_line, on_found=_print_found)
    STDOUT.print(f"results in {results}\nmake the page with: domlora report {folder}", highlight=False, soft_wrap=True)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study's runs.")],
    out: Annotated[Path, typer.Option("--out", help="Page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Also write the tables as LaTeX with booktabs.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write one row a run as CSV.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Make the tables (mean and spread over seeds, paired differences with intervals) and one self-contained page."""
    with needing("report", "a report"):
        from domlora.studies.report import study_tables, write_report
    from domlora.studies.reporting.arms import arms_of
    from domlora.studies.reporting.tables import read_results
    from domlora.studies.reporting.text import to_markdown
    from domlora.studies.study import read_facts

    results = read_results(folder / "results.jsonl")
    if not results:
        raise ConfigError("a report needs results", received=str(folder), next_step="Run: domlora study STUDY.toml")
    facts = read_facts(folder)
    heading = title or facts["title"]
    write_report(
        results,
        out,
        markdown=markdown,
        latex=latex,
        csv=csv,
        title=heading,
        command=facts["command"],
        facts=facts,
    )
    tables = study_tables(results, facts)
    STDOUT.print(to_markdown(tables, arms_of(facts, tables)), markup=False, highlight=False, soft_wrap=True)
    STDOUT.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _print_found(found: Found) -> None:
    """One search of a study."""
    where = f"{found.dataset:<20} {found.model:<10} {found.arm:<10} {found.trials} trials"
    STDOUT.print(f"{where}  best validation {found.best_value:.5f}", highlight=False)
