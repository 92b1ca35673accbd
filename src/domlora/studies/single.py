"""One training of a study: the options it depends on, its rows, the base it starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor, nn

from domlora.bundle import Bundle
from domlora.config import Config
from domlora.data.dataset import Dataset
from domlora.studies.processes import alone
from domlora.studies.study import DatasetSpec
from domlora.training.fit import OnProgress
from domlora.training.methods import METHODS, Job, Trained, method_named, train
from domlora.training.stages import seeded

__all__ = [
    "checkpoint",
    "digest",
    "keep_base",
    "open_rows",
    "train_once",
    "what_matters",
]


def what_matters(config: Config, method: str) -> dict[str, Any]:
    """The options that a run of a method depends on: changing the others, or the device, does not make it run again."""
    recipe = _without_device(asdict(config.train))
    return {"model": config.model, "method": method, **{name: recipe[name] for name in method_named(method).parts}}


def _without_device(options: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if name != "device"}
    return {name: _without_device(value) if isinstance(value, dict) else value for name, value in kept.items()}


def digest(value: Any) -> str:
    """A short name for anything that is JSON; equal things have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def open_rows(spec: DatasetSpec, seed: int) -> tuple[Dataset, Tensor | None]:
    """The rows of one seed; of a world, also the true probabilities of the test split."""
    if spec.world is None:
        return Dataset.open(str(spec.folder)), None
    return replace(spec.world, seed=spec.world.seed + seed).dataset(spec.num_rows, seed=seed)


def train_once(
    folder: Path,
    data: Dataset,
    method: str,
    config: Config,
    seed: int,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train by a method; one that starts from a base gets the base of the same options and seed, which is trained once.

    Args:
        folder: of the study; bases are kept there.
    """
    start = _base(folder, data, config, seed) if METHODS[method].from_base else None
    return train(method, Job(data, config.model, seeded(config.train, seed), start, checkpoint, on_progress))


def keep_base(folder: Path, data: Dataset, config: Config, seed: int, made: Trained) -> None:
    """Leave a trained base behind for the methods that start from one."""
    place = _place(folder, data, config, seed)
    with alone(folder / "locks" / place.name):
        Bundle(made.model, made.model_options, data.encoder).save(place, overwrite=place.exists())


@contextmanager
def checkpoint(folder: Path, key: str) -> Iterator[Path]:
    """Where a run keeps its state until it ends well."""
    place = folder / "checkpoints" / key
    yield place
    rmtree(place, ignore_errors=True)


def _base(folder: Path, data: Dataset, config: Config, seed: int) -> nn.Module:
    place = _place(folder, data, config, seed)
    with alone(folder / "locks" / f"{place.name}-training"):
        if not place.exists():
            with checkpoint(folder, f"base-{place.name}") as state:
                keep_base(folder, data, config, seed, train_once(folder, data, "base", config, seed, checkpoint=state))
    return Bundle.open(place).model


def _place(folder: Path, data: Dataset, config: Config, seed: int) -> Path:
    return folder / "bases" / digest([data.fingerprint(), what_matters(config, "base"), seed])
