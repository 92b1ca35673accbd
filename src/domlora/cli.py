"""The command line: one short function a verb, which parses, calls and prints.

Heavy imports happen inside the verbs, so that ``--help`` is instant.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from domlora.errors import ConfigError, DomloraError

if TYPE_CHECKING:
    from domlora.data.dataset import Dataset
    from domlora.evaluation.evaluate import Table
    from domlora.training.fit import Fit, OnProgress, Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Many domains, one click model, a small low-rank adapter for each domain.

A first walk:

    domlora prepare movielens-100k --domain gender --out data/ml-100k

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
_out, _err = Console(), Console(stderr=True)


def main() -> None:
    """Run the command line; an error of the user's is one line and exit code 2."""
    try:
        app()
    except DomloraError as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            _err.print("interrupted; the same command goes on where it can", markup=False)
        raise


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="movielens-100k or movielens-1m.")],
    out: Out,
    domain: Annotated[
        str, typer.Option(help="Column whose values are the domains: gender, age or occupation.")
    ] = "gender",
    label: Annotated[str, typer.Option(help="What counts as a click: `rating==5` as in the paper, or `rating>=4`.")] = (
        "rating==5"
    ),
    split: Annotated[str, typer.Option(help="`random` (60/20/20 in each domain and label) or `time`.")] = "random",
    seed: Annotated[int, typer.Option(help="Of the split and the order of rows.")] = 0,
    raw: Raw = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn raw files into a prepared dataset: encoded Parquet shards, vocabularies, schema and manifest."""
    from domlora.data.prepare import prepare as run

    with _bar() as bar:
        manifest = run(
            source,
            out,
            domain=domain,
            label_rule=label,
            split=split,  # type: ignore[arg-type]  # checked inside, with a message
            seed=seed,
            raw=raw,
            overwrite=overwrite,
            progress=bar,
        )
    for name, facts in manifest["splits"].items():
        _out.print(f"{name:>6} {facts['rows']:>12,} rows", highlight=False)
    for rule, count in manifest["dropped"].items():
        if count:
            _out.print(f"{count:>19,} rows dropped: {rule}", highlight=False)
    _out.print(f"wrote {out}", highlight=False)


@app.command()
def pretrain(
    data: Data,
    out: Out,
    config: ConfigFile = None,
    method: Annotated[str, typer.Option(help="`base`, or `joint` to train adapters along with the backbone.")] = "base",
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
    from domlora.training.stages import pretrain as run

    _refuse_existing(out, overwrite)
    _use_threads(threads)
    options = load_config(config, settings or ())
    rows = Dataset.open(data)
    with _training_bar() as show:
        model, found = run(
            rows, options.model, options.train, method=method, checkpoint=_checkpoint(out), on_progress=show
        )
    Bundle(model, options.model, rows.encoder, _facts(method, rows, found)).save(out, overwrite=overwrite)
    _drop_checkpoint(out)
    _out.print(f"best validation {found.best_value:.5f} after epoch {found.best_epoch:g}; wrote {out}", highlight=False)


@app.command()
def adapt(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle of a trained base.")],
    out: Out,
    config: ConfigFile = None,
    method: Annotated[str, typer.Option(help="`two_stage`, or `bias_only` as a control.")] = "two_stage",
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
    from domlora.training.stages import adapt as run

    _refuse_existing(out, overwrite)
    _use_threads(threads)
    options = load_config(config, settings or ()).train
    opened, rows = Bundle.open(bundle), Dataset.open(data)
    _check_same_encoder(opened, rows)
    with _training_bar() as show:
        found = run(opened.model, rows, options, method=method, checkpoint=_checkpoint(out), on_progress=show)
    facts = {**_facts(method, rows, found), "base": opened.facts}
    adapted = Bundle(opened.model, opened.model_options, opened.encoder, facts)
    adapted.save(out, overwrite=overwrite)
    _drop_checkpoint(out)
    start = found.history[0][options.adapt.fit.monitor]
    _out.print(f"validation {start:.5f} -> {found.best_value:.5f}; wrote {out}", highlight=False)


@app.command()
def evaluate(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle to score with.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    base: Annotated[bool, typer.Option("--base", help="Switch the adapters off.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Score a split: AUC, log loss and calibration in each domain and over all."""
    import json

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
    _print_table(table)
    if json_ is not None:
        try:
            json_.write_text(json.dumps(table.to_dict(), indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json must name a file that can be written ({error})", received=str(json_)) from error


@app.command()
def study(
    config: Annotated[Path, typer.Argument(help="TOML file of the study, such as studies/movielens_gen.toml.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; runs/NAME without it.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that train at the same time; 0 for one a core.")] = 0,
    raw: Raw = None,
    settings: Settings = None,
) -> None:
    """Run datasets x models x methods x seeds. Interrupt it at will: the same command runs what is missing."""
    import os

    from domlora.config import parse, read_toml, with_settings
    from domlora.studies.study import Study, run_study

    plan = parse(Study, with_settings(read_toml(config), settings or ()))
    folder = out or Path("runs") / plan.name
    command = " ".join(["domlora study", config.as_posix(), *(f"--set '{setting}'" for setting in settings or ())])
    results = run_study(plan, folder, raw=raw, jobs=jobs or os.cpu_count() or 1, command=command, on_result=_print_line)
    _out.print(f"results in {results}\nmake the page with: domlora report {folder}", highlight=False, soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study's runs.")],
    out: Annotated[Path, typer.Option("--out", help="Page to write.")] = Path("report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write one row a run as CSV.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Make the table (mean and spread over seeds, paired differences with intervals) and one self-contained page."""
    try:
        from domlora.studies.report import write_report
    except ImportError as error:
        raise ConfigError(
            f"a report needs more libraries ({error})", next_step="Install them with: pip install 'domlora[report]'"
        ) from error
    from domlora.studies.study import read_facts
    from domlora.studies.tables import read_results, tabulate
    from domlora.studies.text import to_markdown

    results = read_results(folder / "results.jsonl")
    if not results:
        raise ConfigError("a report needs results", received=str(folder), next_step="Run: domlora study STUDY.toml")
    facts = read_facts(folder)
    heading = title or facts["title"]
    write_report(results, out, markdown=markdown, csv=csv, title=heading, command=facts["command"])
    _out.print(to_markdown(tabulate(results)), markup=False, highlight=False, soft_wrap=True)
    _out.print(f"wrote {out}", highlight=False, soft_wrap=True)


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


def _print_table(table: Table) -> None:
    _out.print(table.to_markdown(), markup=False, highlight=False, soft_wrap=True)


def _print_line(line: dict[str, Any]) -> None:
    wauc = "   -  " if line["wauc"] is None else f"{100 * line['wauc']:6.2f}"
    where = f"{line['dataset']:<20} {line['model']:<10} {line['method']:<10} seed {line['seed']}"
    _out.print(f"{where}  test WAUC {wauc}", highlight=False)


def _bar() -> Any:
    from rich.progress import Progress

    return Progress(console=_err, disable=not _err.is_terminal, transient=True)


@contextmanager
def _training_bar() -> Iterator[OnProgress]:
    """A bar with rows/s and the validation figure; a plain line an epoch when nobody watches."""
    if not _err.is_terminal:
        last = [-1]

        def line(at: Progress) -> None:
            if at.rows == at.total_rows and at.value is not None and at.epoch != last[0]:
                last[0] = at.epoch
                _err.print(_said(at), highlight=False)

        yield line
        return
    with _bar() as bar:
        task = bar.add_task("train", total=None)

        def show(at: Progress) -> None:
            bar.update(task, total=at.total_rows, completed=at.rows, description=_said(at))

        yield show


def _said(at: Progress) -> str:
    value = "-" if at.value is None else f"{at.value:.5f}"
    if math.isnan(at.loss):  # the starting point, before any step
        return f"start    valid {value}"
    return f"epoch {at.epoch}  loss {at.loss:.5f}  valid {value}  {at.rows_per_second:,.0f} rows/s"
