"""``store rows``: rows of tables that lie in Redis or Valkey."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from domlora.terminal import STDOUT, print_json

__all__ = ["drop", "push", "rows_app", "show"]

rows_app = typer.Typer(no_args_is_help=True, help="Rows of tables that an export leaves out, in Redis or Valkey.")

Url = Annotated[str, typer.Argument(help="Redis or Valkey: `redis://HOST:PORT/0`, `rediss://`, `unix://PATH`.")]


@rows_app.command()
def push(
    export: Annotated[Path, typer.Argument(help="Folder that `domlora export --remote-tables` wrote, or its rows.")],
    url: Url,
    after: Annotated[
        Path | None,
        typer.Option("--after", help="Export of the version before, whose rows are there: send what changed."),
    ] = None,
) -> None:
    """Put the rows of an export's tables into Redis or Valkey. Stopped, it goes on where it was; twice is no change."""
    from domlora.serving.rows.folder import RowsFolder
    from domlora.serving.rows.push import push as run

    for each in run(RowsFolder.of(export), url, None if after is None else RowsFolder.of(after)):
        beside = f", the others are those of {each.after[:16]}" if each.after else ""
        _say(f"{each.name} {each.sha256[:16]}: sent {each.sent:,} of {each.num_rows:,} rows{beside}")


@rows_app.command("list")
def show(url: Url) -> None:
    """The tables in Redis or Valkey, as JSON."""
    from domlora.serving.rows.push import listed

    left_out = ("pieces",)
    print_json(
        {
            sha256: {name: value for name, value in told._asdict().items() if name not in left_out}
            for sha256, told in listed(url).items()
        }
    )


@rows_app.command()
def drop(sha256: Annotated[str, typer.Argument(help="First digits of the table, as listed.")], url: Url) -> None:
    """Remove the rows of a table that no server needs any more."""
    from domlora.serving.rows.push import drop as run

    _say(f"removed {run(sha256, url):,} rows")


def _say(text: str) -> None:
    STDOUT.print(text, markup=False, highlight=False, soft_wrap=True)
