"""Options that several verbs have, and what they do with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from domlora.data.dataset import Dataset
    from domlora.training.fit import Fit

__all__ = [
    "ConfigFile",
    "Data",
    "Device",
    "Out",
    "Overwrite",
    "Raw",
    "Settings",
    "Threads",
    "Version",
    "check_same_encoder",
    "checkpoint_of",
    "drop_checkpoint",
    "facts_of",
    "refuse_existing",
    "use_threads",
    "write_text",
]

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

Version = Annotated[int | None, typer.Option("--version", help="Which version of the bundle; the default one without.")]
Threads = Annotated[
    int, typer.Option("--threads", help="Cores to train on. One is fastest for towers of a few hundred units.")
]
Device = Annotated[str, typer.Option("--device", help="Where to train, such as cuda; the CPU without.")]


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file that an option names.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} must name a file that can be written ({error})", received=str(path)) from error


def facts_of(method: str, rows: Dataset, model: nn.Module, found: Fit) -> dict[str, Any]:
    """What a bundle remembers of its training; the AUC of each domain is for the gate of its first update."""
    from domlora.evaluation.gate import remember
    from domlora.training.validation import say

    aucs = remember(say(model, rows), rows.schema.domains)
    figures = {"valid": found.best_value, "epoch": found.best_epoch, "auc": aucs}
    return {"method": method, "data": rows.fingerprint(), **figures}


def check_same_encoder(bundle: Any, rows: Any) -> None:
    """Refuse data whose ids mean something else to the bundle.

    Raises:
        ConfigError: both fingerprints.
    """
    ours, theirs = bundle.encoder.fingerprint(), rows.encoder.fingerprint()
    if ours != theirs:
        raise ConfigError(
            "bundle and data must have the same schema and vocabularies",
            received=f"bundle {ours[:12]}, data {theirs[:12]}",
            next_step="Score with data prepared the way the bundle's were",
        )


def use_threads(threads: int) -> None:
    """How many cores torch uses."""
    import torch

    if threads < 1:
        raise ConfigError("--threads must be at least 1", received=threads)
    torch.set_num_threads(threads)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Say so before the training, not after it."""
    if out.exists() and not overwrite:
        raise ConfigError(
            "the output folder must not exist", received=str(out), next_step="Add --overwrite to replace it"
        )


def checkpoint_of(out: Path, version: int | None = None) -> Path:
    """Where the run that will write ``out``, or a version that follows one of it, keeps what it has so far."""
    return out.parent / (f".{out.name}.checkpoint" if version is None else f".{out.name}@{version}.checkpoint")


def drop_checkpoint(out: Path) -> None:
    """The run has ended well: what it kept goes, and what one left that was killed when all was written."""
    import glob
    import shutil

    versioned = out.parent.glob(f".{glob.escape(out.name)}@*.checkpoint")
    for folder in (checkpoint_of(out), *versioned):
        shutil.rmtree(folder, ignore_errors=True)
