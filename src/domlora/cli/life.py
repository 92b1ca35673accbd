"""Verbs of a bundle that lives: ``onboard``, ``update``, ``export``, ``merge``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.cli.options import (
    ConfigFile,
    Data,
    Out,
    Overwrite,
    Settings,
    Threads,
    Version,
    check_same_encoder,
    checkpoint_of,
    drop_checkpoint,
    refuse_existing,
    use_threads,
)
from domlora.cli.tracked import Track, TrackTo, tracked
from domlora.errors import ConfigError
from domlora.terminal import STDERR, STDOUT

if TYPE_CHECKING:
    from domlora.bundle import Bundle
    from domlora.data.dataset import Dataset
    from domlora.features.batch import Batch

__all__ = ["export", "merge", "onboard", "update"]

_STOPPED_BY_GATE = 3

Living = Annotated[Path, typer.Option("--bundle", help="Bundle; a version is added to it.")]
Read = Annotated[Path, typer.Option("--bundle", help="Bundle to read.")]
Candidate = Annotated[bool, typer.Option("--candidate", help="Leave the default version as it is.")]


def onboard(
    bundle: Living,
    data: Data,
    domain: Annotated[str, typer.Option("--domain", help="The new domain, by its name in the data.")],
    config: ConfigFile = None,
    settings: Settings = None,
    threads: Threads = 1,
    track: Track = "",
    track_to: TrackTo = "",
    candidate: Candidate = False,
) -> None:
    """Give a trained model one domain more: an adapter on the frozen base, and rows of tables for words that are new.

    Prepare its rows with `domlora prepare ... --grow BUNDLE`. All other domains keep every bit of their scores.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config
    from domlora.data.dataset import Dataset
    from domlora.files import only_one
    from domlora.training.onboard import onboard as run

    use_threads(threads)
    recipe = load_config(config, settings or ()).train
    with only_one(bundle):
        opened, rows = Bundle.open(bundle), Dataset.open(data)
        place = checkpoint_of(bundle, opened.version)
        options = partial(dict[str, Any], domain=domain, onboard=asdict(recipe.onboard))
        with tracked(track, track_to, bundle.name, rows.schema.domains, options) as told:
            grown, found = run(opened, rows, domain, recipe, checkpoint=place, on_progress=told.show)
            number = grown.publish(bundle, default=not candidate)
            told.wrote(bundle, number, default=not candidate)
        drop_checkpoint(bundle)
    STDOUT.print(str(found), markup=False, highlight=False, soft_wrap=True)
    _say_published(bundle, number, default=not candidate)


def update(
    bundle: Living,
    data: Data,
    config: ConfigFile = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Earlier prepared data, for train.update.replay_share of each batch."),
    ] = None,
    settings: Settings = None,
    threads: Threads = 1,
    track: Track = "",
    track_to: TrackTo = "",
    candidate: Candidate = False,
) -> None:
    """Learn a new day: embeddings and adapters move, the dense backbone stands still.

    Prepare its rows with `domlora prepare ... --grow BUNDLE`. The result becomes the default version if no domain falls by
    more than its limit on the test split. Otherwise it is kept as a candidate, domains are named, and the exit code is 3.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config
    from domlora.data.dataset import Dataset
    from domlora.files import only_one
    from domlora.training.update import gate
    from domlora.training.update import update as run

    use_threads(threads)
    recipe = load_config(config, settings or ()).train
    with only_one(bundle):
        live, rows = Bundle.open(bundle), Dataset.open(data)
        earlier, place = None if replay is None else Dataset.open(replay), checkpoint_of(bundle, live.version)
        _refuse_learned(live, rows)
        options = partial(dict[str, Any], update=asdict(recipe.update))
        with tracked(track, track_to, bundle.name, rows.schema.domains, options) as told:
            updated, found = run(live, rows, recipe, replay=earlier, checkpoint=place, on_progress=told.show)
            updated, verdict = gate(live, updated, rows, recipe.update)
            updated.facts |= {"method": "update", "data": rows.fingerprint(), "valid": found.best_value}
            default = verdict.passed and not candidate
            number = updated.publish(bundle, default=default)
            told.wrote(bundle, number, default=default)
        drop_checkpoint(bundle)
    STDOUT.print(verdict.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    for reason in verdict.reasons:
        STDERR.print(f"stopped by {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    _say_published(bundle, number, default=default)
    if not verdict.passed:
        raise typer.Exit(_STOPPED_BY_GATE)


def export(
    bundle: Read,
    data: Data,
    out: Out,
    version: Version = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the validation split to compare on.")] = 1000,
    remote_tables: Annotated[
        list[str] | None,
        typer.Option(
            "--remote-tables",
            metavar="PATTERN",
            help="Leave tables out, such as 'embedding.*': their rows go to OUT.rows, see `domlora store rows`; repeatable.",
        ),
    ] = None,
    remote_from_bytes: Annotated[
        int | None, typer.Option("--remote-from-bytes", help="Leave out tables of this size and more.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a bundle as ONNX: tables as memory-mapped data, adapters as inputs that are swapped without a new export.

    Both graphs are compared with the model on rows of every domain before anything is written.
    """
    from domlora.bundle import Bundle
    from domlora.data.dataset import Dataset
    from domlora.serving.export import export as run

    refuse_existing(out, overwrite)
    opened, prepared = Bundle.open(bundle, version=version), Dataset.open(data)
    check_same_encoder(opened, prepared)
    made = run(
        opened,
        out,
        _samples(prepared, rows),
        overwrite=overwrite,
        remote_tables=remote_tables or (),
        remote_from_bytes=remote_from_bytes,
    )
    STDOUT.print(f"{made}\nwrote {out}", markup=False, highlight=False, soft_wrap=True)


def merge(
    bundle: Read,
    domain: Annotated[str, typer.Option("--domain", help="Whose adapter.")],
    out: Out,
    version: Version = None,
    overwrite: Overwrite = False,
) -> None:
    """Fold one domain's adapter into the base: a plain model for that domain alone, as a bundle of its own."""
    from domlora.bundle import Bundle
    from domlora.serving.merge import merge as run

    refuse_existing(out, overwrite)
    run(Bundle.open(bundle, version=version), domain).save(out, overwrite=overwrite)
    STDOUT.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _refuse_learned(live: Bundle, rows: Dataset) -> None:
    """A day is not learned twice, such as after a kill between publishing and saying so."""
    if live.facts.get("method") == "update" and live.facts.get("data") == rows.fingerprint():
        raise ConfigError(
            f"version {live.version} of the bundle has learned this day", received=rows.fingerprint()[:12]
        )


def _samples(data: Dataset, rows: int) -> list[Batch]:
    batches, found = data.batches("valid", min(rows, 4096)), []
    for batch in batches:
        found.append(batch)
        rows -= batch.num_rows
        if rows <= 0:
            break
    return found


def _say_published(bundle: Path, number: int, *, default: bool) -> None:
    what = "now the default" if default else f"a candidate: domlora bundle set-default {bundle} {number}"
    STDOUT.print(f"wrote version {number} of {bundle}, {what}", markup=False, highlight=False, soft_wrap=True)
