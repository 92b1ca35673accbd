"""Verbs from a prepared dataset to a judged bundle: ``pretrain``, ``adapt``, ``evaluate``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.cli.options import (
    ConfigFile,
    Data,
    Device,
    Out,
    Overwrite,
    Settings,
    Threads,
    Version,
    check_same_encoder,
    checkpoint_of,
    drop_checkpoint,
    facts_of,
    refuse_existing,
    use_threads,
    write_text,
)
from domlora.cli.tracked import Track, TrackTo, silent, tracked
from domlora.errors import ConfigError
from domlora.terminal import STDOUT, print_table

if TYPE_CHECKING:
    from domlora.bundle import Bundle
    from domlora.config import Config
    from domlora.data.dataset import Dataset
    from domlora.training.fit import Fit

__all__ = ["adapt", "evaluate", "pretrain"]


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
    device: Device = "",
    track: Track = "",
    track_to: TrackTo = "",
    overwrite: Overwrite = False,
) -> None:
    """Train a backbone on the rows of all domains and write it as a bundle.

    Killed and started again, it goes on where it was and ends with the same bits.
    """
    from domlora.config import load_config
    from domlora.data.dataset import Dataset

    refuse_existing(out, overwrite)
    use_threads(threads)
    options, rows = load_config(config, settings or ()), Dataset.open(data)
    found = _train(method, options, rows, None, device, out, overwrite, track, track_to)
    STDOUT.print(
        f"best validation {found.best_value:.5f} after epoch {found.best_epoch:g}; wrote {out}", highlight=False
    )


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
    device: Device = "",
    track: Track = "",
    track_to: TrackTo = "",
    overwrite: Overwrite = False,
) -> None:
    """Freeze a trained base and train an adapter for each domain.

    The base without adapters is a candidate too: the result is never worse than it on the validation split.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config, with_settings
    from domlora.data.dataset import Dataset

    refuse_existing(out, overwrite)
    use_threads(threads)
    opened, rows = Bundle.open(bundle), Dataset.open(data)
    _check_same_model(opened.model_options, with_settings({}, settings or ()).get("model", {}))
    options = replace(load_config(config, settings or ()), model=opened.model_options)
    check_same_encoder(opened, rows)
    found = _train(method, options, rows, opened, device, out, overwrite, track, track_to)
    start = found.history[0][options.train.adapt.fit.monitor]
    STDOUT.print(f"validation {start:.5f} -> {found.best_value:.5f}; wrote {out}", highlight=False)


def _check_same_model(has: dict[str, Any], told: dict[str, Any]) -> None:
    """A model that is there already keeps its options; saying them again is no mistake."""
    for key, value in told.items():
        if key in has and json.dumps(has[key]) == json.dumps(value):
            continue
        raise ConfigError(
            "adapt takes the model from the bundle, so --set must not change it",
            received=f"model.{key}={value}; the bundle has {has.get(key, 'no such option')}",
            next_step="Run domlora pretrain with it",
        )


def _train(
    method: str,
    options: Config,
    rows: Dataset,
    start: Bundle | None,
    device: str,
    out: Path,
    overwrite: bool,
    track: str,
    track_to: str,
) -> Fit:
    """Train and write the bundle; where ranks train together, the first one tells and writes, and the others end here."""
    from domlora.bundle import Bundle
    from domlora.files import only_one
    from domlora.studies.single import what_matters
    from domlora.training.distributed.ranks import joined
    from domlora.training.methods import Job, train
    from domlora.training.stages import placed

    base, encoder, origin = (None, rows.encoder, {}) if start is None else (start.model, start.encoder, start.facts)
    told = partial(what_matters, options, method)
    with joined() as ranks, nullcontext() if ranks.rank else only_one(out):
        with silent() if ranks.rank else tracked(track, track_to, out.name, rows.schema.domains, told) as run:
            recipe = placed(options.train, device) if device else options.train
            model, made, found = train(method, Job(rows, options.model, recipe, base, checkpoint_of(out), run.show))
            facts = facts_of(method, rows, model, found)
            if ranks.rank:
                raise typer.Exit
            whole = {**facts, "base": origin} if start else facts
            Bundle(model, made, encoder, whole).save(out, overwrite=overwrite)
            run.wrote(out)
        drop_checkpoint(out)
    return found


def evaluate(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle to score with.")],
    version: Version = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    base: Annotated[bool, typer.Option("--base", help="Switch the adapters off.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Score a split: AUC, log loss and calibration in each domain and over all."""
    from domlora.adapters.root import disabled
    from domlora.bundle import Bundle
    from domlora.data.dataset import Dataset
    from domlora.evaluation.evaluate import by_domain, predict

    opened, rows = Bundle.open(bundle, version=version), Dataset.open(data)
    check_same_encoder(opened, rows)
    if base and opened.adapter is None:
        raise ConfigError("--base switches adapters off, and this bundle has none", received=str(bundle))
    with disabled(opened.model) if base else nullcontext():
        said = predict(opened.model, rows.batches(split, 16384))
    table = by_domain(said, rows.schema.domains)
    print_table(table)
    if json_ is not None:
        write_text("--json", json_, json.dumps(table.to_dict(), indent=1))
