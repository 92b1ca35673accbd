"""The command line as a whole: which verbs there are, and how an error ends it."""

from __future__ import annotations

import sys

import typer

from domlora.cli.evidence import report, study
from domlora.cli.experiments import ab_app
from domlora.cli.launch import launch
from domlora.cli.life import export, merge, onboard, update
from domlora.cli.models import adapt, evaluate, pretrain
from domlora.cli.parallel import adapt_each
from domlora.cli.rows import data_app, prepare, schema_app
from domlora.cli.serve import serve
from domlora.cli.simulate import simulate
from domlora.cli.store import store_app
from domlora.cli.stored_rows import rows_app
from domlora.cli.traffic import loadtest
from domlora.cli.versions import bundle_app
from domlora.errors import DomloraError
from domlora.terminal import STDERR

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Many domains, one click model, a small low-rank adapter for each domain.

A first walk:

    domlora prepare movielens-100k --out data/ml-100k

    domlora pretrain --data data/ml-100k --out runs/base --set model.name=deepfm

    domlora adapt --data data/ml-100k --bundle runs/base --out runs/adapted

    domlora evaluate --data data/ml-100k --bundle runs/adapted

    domlora serve --bundle runs/adapted
""",
)

app.command()(prepare)
app.add_typer(schema_app, name="schema")
app.add_typer(data_app, name="data")
app.add_typer(bundle_app, name="bundle")
store_app.add_typer(rows_app, name="rows")
app.add_typer(store_app, name="store")
app.add_typer(ab_app, name="ab")
for verb in (
    pretrain,
    adapt,
    adapt_each,
    evaluate,
    onboard,
    update,
    export,
    serve,
    loadtest,
    simulate,
    merge,
    study,
    report,
):
    app.command()(verb)
app.command(context_settings={"allow_interspersed_args": False})(launch)  # what follows the verb is its own

_INTERRUPTED = 130  # what Typer exits with after Ctrl-C


def main() -> None:
    """Run the command line; an error of the user's is one line and exit code 2."""
    try:
        app()
    except DomloraError as error:
        STDERR.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            STDERR.print("interrupted; the same command goes on where it can", markup=False)
        raise
