"""Verbs from raw files to a prepared dataset: ``prepare``, ``schema infer``, ``data describe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from domlora.cli.options import Out, Overwrite, Raw, write_text
from domlora.errors import ConfigError
from domlora.terminal import STDOUT, bar, print_rows

__all__ = ["data_app", "describe", "infer", "prepare", "schema_app"]

schema_app = typer.Typer(no_args_is_help=True, help="Describe the columns of your own log.")
data_app = typer.Typer(no_args_is_help=True, help="Look into prepared data.")


def prepare(
    source: Annotated[str, typer.Argument(help="A published data set by its name, or a TOML file of your own log.")],
    out: Out,
    domain: Annotated[
        str | None, typer.Option(help="Column whose values are the domains, if not the plan's. Same as columns.domain.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split and the order of rows. Same as split.seed.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the plan, such as split.kind=time; repeatable."),
    ] = None,
    raw: Raw = None,
    engine: Annotated[
        str, typer.Option(help="`duckdb` on this machine, or `spark`: the same rows and ids.")
    ] = "duckdb",
    grow: Annotated[
        Path | None, typer.Option(help="An earlier prepared folder or bundle: its ids stay, new values get new ones.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a log into a prepared dataset: encoded Parquet shards, vocabularies, schema and manifest.

    Draft the TOML file of your own log with `domlora schema infer`.
    """
    from domlora.config import load_plan
    from domlora.data.prepare import prepare as run

    # A column may be called by a number, which is no number here; several are a list, as in the file.
    named = json.dumps(domain) if domain is not None and not domain.startswith("[") else domain
    shortcuts = {"columns.domain": named, "split.seed": seed}
    extra = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    plan = load_plan(source, [*(settings or ()), *extra])
    folder = raw if plan.source.name is not None else raw or Path(source).parent
    with bar() as shown:
        manifest = run(plan, out, folder=folder, engine=engine, grow=grow, overwrite=overwrite, progress=shown)
    print_rows(manifest)
    STDOUT.print(f"wrote {out}", highlight=False)


@schema_app.command()
def infer(
    files: Annotated[list[Path], typer.Argument(help="Parquet, CSV or JSON lines files of one log.")],
    out: Annotated[Path | None, typer.Option("--out", help="TOML file to write; printed without it.")] = None,
) -> None:
    """Draft the TOML file that `domlora prepare` reads, with comments on what was found; then edit it."""
    from domlora.data.infer import draft

    text = draft(files, folder=Path() if out is None else out.parent)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError("the draft must not replace a file", received=str(out), next_step="Choose another --out")
    write_text("--out", out, text)
    STDOUT.print(f"wrote {out}; look it over, then: domlora prepare {out} --out DIR", highlight=False, soft_wrap=True)


@data_app.command()
def describe(
    data: Annotated[Path, typer.Argument(help="Folder that `domlora prepare` wrote.")],
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with plots.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Rows, click rate, users, items, coverage and overlap of each domain."""
    from domlora.data.dataset import Dataset
    from domlora.studies.describe import describe as run

    found = run(Dataset.open(data))
    STDOUT.print(found.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    if json_ is not None:
        write_text("--json", json_, json.dumps(found.to_dict(), indent=1))
    if html is not None:
        write_text("--html", html, found.to_html())
        STDOUT.print(f"wrote {html}", highlight=False)
