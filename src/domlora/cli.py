"""The command line: one short function a verb, which parses, calls and prints.

Heavy imports happen inside the verbs, so that ``--help`` is instant.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.errors import ConfigError, DomloraError
from domlora.terminal import STDERR, STDOUT, bar, print_line, print_rows, print_table, training_bar

if TYPE_CHECKING:
    from domlora.data.dataset import Dataset
    from domlora.studies.searching.tuning import Found
    from domlora.training.fit import Fit

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
""",
)

Data = Annotated[Path, typer.Option("--data", help="Folder that `domlora prepare` wrote.")]
Raw = Annotated[
    Path | None, typer.Option("--raw", help="Folder of the raw files; else $DOMLORA_DATA, the cache, or a download.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; must not exist yet unless --overwrite is given.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
ConfigFile = Annotated[Path | None, typer.Argument(help="TOML file with [model] and [train]; defaults without one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Option on top of the file, such as model.dropout=0.2; repeatable."
    ),
]

Threads = Annotated[
    int, typer.Option("--threads", help="Cores to train on. One is fastest for towers of a few hundred units.")
]

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


@app.command()
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

    shortcuts = {"columns.domain": domain, "split.seed": seed}
    extra = [f"{key}={value}" for key, value in shortcuts.items() if value is not None]
    plan = load_plan(source, [*(settings or ()), *extra])
    folder = raw if plan.source.name is not None else Path(source).parent
    with bar() as shown:
        manifest = run(plan, out, folder=folder, engine=engine, grow=grow, overwrite=overwrite, progress=shown)
    print_rows(manifest)
    STDOUT.print(f"wrote {out}", highlight=False)


schema_app = typer.Typer(no_args_is_help=True, help="Describe the columns of your own log.")
app.add_typer(schema_app, name="schema")


@schema_app.command()
def infer(
    files: Annotated[list[Path], typer.Argument(help="Parquet, CSV or JSON lines files of one log.")],
    out: Annotated[Path | None, typer.Option("--out", help="TOML file to write; printed without it.")] = None,
) -> None:
    """Draft the TOML file that `domlora prepare` reads, with comments on what was found; then edit it."""
    from domlora.data.infer import draft

    text = draft(files)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError("the draft must not replace a file", received=str(out), next_step="Choose another --out")
    _write("--out", out, text)
    STDOUT.print(f"wrote {out}; look it over, then: domlora prepare {out} --out DIR", highlight=False, soft_wrap=True)


data_app = typer.Typer(no_args_is_help=True, help="Look into prepared data.")
app.add_typer(data_app, name="data")


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
        _write("--json", json_, json.dumps(found.to_dict(), indent=1))
    if html is not None:
        _write("--html", html, found.to_html())
        STDOUT.print(f"wrote {html}", highlight=False)


@app.command()
def pretrain(
    data: Data,
    out: Out,
    config: ConfigFile = None,
    method: Annotated[
        str,
        typer.Option(
            help="`base`; `joint` trains adapters along with the backbone; `separate`, `dn`, `mamdr`: see docs/methods.md."
        ),
    ] = "base",
    settings: Settings = None,
    threads: Threads = 1,
    overwrite: Overwrite = False,
) -> None:
    """Train a backbone on the rows of all domains and write it as a bundle.

    Killed and started again, it goes on where it was and ends with the same bits.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config
    from domlora.data.dataset import Dataset
    from domlora.training.methods import Job, train

    _refuse_existing(out, overwrite)
    _use_threads(threads)
    options = load_config(config, settings or ())
    rows = Dataset.open(data)
    with training_bar() as show:
        job = Job(rows, options.model, options.train, None, _checkpoint(out), show)
        model, made, found = train(method, job)
    Bundle(model, made, rows.encoder, _facts(method, rows, found)).save(out, overwrite=overwrite)
    _drop_checkpoint(out)
    STDOUT.print(
        f"best validation {found.best_value:.5f} after epoch {found.best_epoch:g}; wrote {out}", highlight=False
    )


@app.command()
def adapt(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle of a trained base.")],
    out: Out,
    config: ConfigFile = None,
    method: Annotated[
        str,
        typer.Option(
            help="`two_stage`; `auto` keeps an adapter only where it is better; `bias_only`, `finetune`, `dr`, `moe_mlora`: "
            "see docs/methods.md."
        ),
    ] = "two_stage",
    settings: Settings = None,
    threads: Threads = 1,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a trained base and train an adapter for each domain.

    The base without adapters is a candidate too: the result is never worse than it on the validation split.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config
    from domlora.data.dataset import Dataset
    from domlora.training.methods import Job, train

    _refuse_existing(out, overwrite)
    _use_threads(threads)
    options = load_config(config, settings or ()).train
    opened, rows = Bundle.open(bundle), Dataset.open(data)
    _check_same_encoder(opened, rows)
    with training_bar() as show:
        job = Job(rows, opened.model_options, options, opened.model, _checkpoint(out), show)
        model, made, found = train(method, job)
    facts = {**_facts(method, rows, found), "base": opened.facts}
    Bundle(model, made, opened.encoder, facts).save(out, overwrite=overwrite)
    _drop_checkpoint(out)
    start = found.history[0][options.adapt.fit.monitor]
    STDOUT.print(f"validation {start:.5f} -> {found.best_value:.5f}; wrote {out}", highlight=False)


@app.command()
def evaluate(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle to score with.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    base: Annotated[bool, typer.Option("--base", help="Switch the adapters off.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Score a split: AUC, log loss and calibration in each domain and over all."""
    from domlora.adapters.root import disabled
    from domlora.bundle import Bundle
    from domlora.data.dataset import Dataset
    from domlora.evaluation.evaluate import by_domain, predict

    opened, rows = Bundle.open(bundle), Dataset.open(data)
    _check_same_encoder(opened, rows)
    if base and opened.adapter is None:
        raise ConfigError("--base switches adapters off, and this bundle has none", received=str(bundle))
    with disabled(opened.model) if base else nullcontext():
        said = predict(opened.model, rows.batches(split, 16384))
    table = by_domain(said, rows.schema.domains)
    print_table(table)
    if json_ is not None:
        _write("--json", json_, json.dumps(table.to_dict(), indent=1))


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="TOML file of the study, such as studies/movielens_gen.toml.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; runs/NAME without it.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that train at the same time; 0 for one a core.")] = 0,
    raw: Raw = None,
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
    folder = out or Path("runs") / plan.name
    command = " ".join(["domlora study", config.as_posix(), *(f"--set '{setting}'" for setting in settings or ())])
    jobs = jobs or os.cpu_count() or 1
    results = run_study(plan, folder, raw=raw, jobs=jobs, command=command, on_result=print_line, on_found=_print_found)
    STDOUT.print(f"results in {results}\nmake the page with: domlora report {folder}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study's runs.")],
    out: Annotated[Path, typer.Option("--out", help="Page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Also write the tables as LaTeX with booktabs.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write one row a run as CSV.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Make the tables (mean and spread over seeds, paired differences with intervals) and one self-contained page."""
    try:
        from domlora.studies.report import write_report
    except ImportError as error:
        raise ConfigError(
            f"a report needs more libraries ({error})", next_step="Install them with: pip install 'domlora[report]'"
        ) from error
    from domlora.studies.reporting.arms import arms_of
    from domlora.studies.reporting.tables import read_results, tabulate
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
    tables = tabulate(results)
    STDOUT.print(to_markdown(tables, arms_of(facts, tables)), markup=False, highlight=False, soft_wrap=True)
    STDOUT.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _print_found(found: Found) -> None:
    """One search of a study."""
    where = f"{found.dataset:<20} {found.model:<10} {found.arm:<10} {found.trials} trials"
    STDOUT.print(f"{where}  best validation {found.best_value:.5f}", highlight=False)


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} must name a file that can be written ({error})", received=str(path)) from error


def _facts(method: str, rows: Dataset, found: Fit) -> dict[str, Any]:
    """What a bundle remembers of its training."""
    return {"method": method, "data": rows.fingerprint(), "valid": found.best_value, "epoch": found.best_epoch}


def _check_same_encoder(bundle: Any, rows: Any) -> None:
    ours, theirs = bundle.encoder.fingerprint(), rows.encoder.fingerprint()
    if ours != theirs:
        raise ConfigError(
            "bundle and data must have the same schema and vocabularies",
            received=f"bundle {ours[:12]}, data {theirs[:12]}",
            next_step="Score with data prepared the way the bundle's were",
        )


def _use_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ConfigError("--threads must be at least 1", received=threads)
    torch.set_num_threads(threads)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    """Say so before the training, not after it."""
    if out.exists() and not overwrite:
        raise ConfigError(
            "the output folder must not exist", received=str(out), next_step="Add --overwrite to replace it"
        )


def _checkpoint(out: Path) -> Path:
    return out.parent / f".{out.name}.checkpoint"


def _drop_checkpoint(out: Path) -> None:
    import shutil

    shutil.rmtree(_checkpoint(out), ignore_errors=True)
