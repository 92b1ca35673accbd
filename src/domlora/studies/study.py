"""Datasets x models x methods x seeds: one result line a run, interruptible and resumable.

A study folder holds ``results.jsonl``, the prepared ``data/``, the ``bases/`` that second stages start from, and
``checkpoints/`` of runs that have not ended yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from domlora.bundle import Bundle
from domlora.config import Config, load_plan, merged, parse
from domlora.data.dataset import Dataset
from domlora.data.prepare import prepare
from domlora.data.synthetic import World
from domlora.errors import ConfigError, nearest
from domlora.evaluation.evaluate import Predictions, by_domain, predict
from domlora.models.build import MODELS
from domlora.studies.tables import read_results
from domlora.training.fit import Fit
from domlora.training.methods import METHODS, Job, train
from domlora.training.optimizers import parameter_groups
from domlora.training.stages import seeded

__all__ = ["DatasetSpec", "Study", "count_parameters", "read_facts", "run_study"]

RESULTS, FACTS = "results.jsonl", "study.json"


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Rows to train on: exactly one of ``source``, ``folder`` and ``world``.

    Args:
        source, settings: what ``domlora prepare`` is given: a name or a TOML file, and each ``--set``.
        folder: a prepared dataset.
        world: a synthetic world; each seed of the study is a world of its own, and ``num_rows`` are drawn from it.
    """

    source: str | None = None
    settings: tuple[str, ...] = ()
    folder: str | None = None
    world: World | None = None
    num_rows: int = 400_000

    def __post_init__(self) -> None:
        if sum(choice is not None for choice in (self.source, self.folder, self.world)) != 1:
            raise ConfigError("a dataset needs exactly one of source, folder and world", received=self)


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Args:
        name: of the folder and of the result files.
        datasets: by name.
        models: keys of ``MODELS``.
        methods: of ``METHODS``; ``base`` is always run, because the others are compared with it.
        seeds: of weights, order of rows and dropout.
        title: heading of the report.
        config: options of all models, as for ``domlora pretrain``.
        overrides: options of single models on top.
    """

    name: str
    datasets: dict[str, DatasetSpec]
    models: tuple[str, ...]
    methods: tuple[str, ...] = ("base", "joint", "two_stage")
    seeds: tuple[int, ...] = (1,)
    title: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names, known in (
            ("model", self.models, MODELS),
            ("method", self.methods, METHODS),
            ("overrides of a model", self.overrides, self.models),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"unknown {what} in a study", received=name, next_step=nearest(name, known))
        if not (self.datasets and self.models and self.seeds):
            raise ConfigError("a study needs a dataset, a model and a seed", received=self.name)
        for model in self.models:
            self.config_of(model)

    def config_of(self, model: str) -> Config:
        """The configuration of one model; its options are checked when the study is read, not after hours."""
        table = merged(self.config, self.overrides.get(model, {}))
        return parse(Config, merged(table, {"model": {"name": model}}))


@dataclass(frozen=True, slots=True)
class _Task:
    """All methods of one dataset, model and seed: second stages need the base of the same seed."""

    study: str
    folder: Path
    dataset: str
    spec: DatasetSpec
    config: Config
    methods: tuple[str, ...]
    seed: int
    threads: int


def run_study(
    study: Study,
    folder: Path,
    *,
    raw: Path | None = None,
    jobs: int = 1,
    command: str = "",
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Run what ``folder`` does not hold yet, and return the path of the results.

    Args:
        raw: where raw files lie, see ``domlora prepare``.
        jobs: processes, each with its share of the cores. Results depend on neither, up to float rounding.
        command: what was typed to get here; the report shows it.
        on_result: called with each result line, old ones first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).write_text(json.dumps({"title": study.title or study.name, "command": command}), encoding="utf-8")
    tasks = list(_tasks(study, folder, raw, threads=max((os.cpu_count() or 1) // jobs, 1)))
    show = on_result or _ignore
    if jobs == 1:
        for task in tasks:
            for line in _run(task):
                show(line)
        return folder / RESULTS
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run_all, task) for task in tasks]
        try:
            for future in as_completed(futures):
                for line in future.result():
                    show(line)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return folder / RESULTS


def read_facts(folder: Path) -> dict[str, str]:
    """``title`` and ``command`` of the study that ran in a folder; the folder's name stands in for what is missing."""
    try:
        return {**json.loads((folder / FACTS).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"title": folder.name, "command": ""}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``params_total``, ``params_tables`` and ``params_adapters``, frozen ones counted too."""
    groups = parameter_groups(model, frozen=True)
    sizes = {kind: sum(p.numel() for p in group) for kind, group in groups.items()}
    return {
        "params_total": sum(sizes.values()),
        "params_tables": sizes["tables"],
        "params_adapters": sizes["adapters"],
    }


def _tasks(study: Study, folder: Path, raw: Path | None, threads: int) -> Iterator[_Task]:
    methods = tuple(dict.fromkeys(("base", *study.methods)))
    for name, spec in study.datasets.items():
        if spec.source is not None:
            spec = _prepared(name, spec, folder, raw)
        for seed in study.seeds:
            for model in study.models:
                yield _Task(study.name, folder, name, spec, study.config_of(model), methods, seed, threads)


def _prepared(name: str, spec: DatasetSpec, folder: Path, raw: Path | None) -> DatasetSpec:
    """The same dataset as a prepared folder inside the study's; prepared once."""
    assert spec.source is not None
    plan = load_plan(spec.source, spec.settings)
    out = folder / "data" / f"{name}-{_hash([spec.source, list(spec.settings)])}"
    if not out.exists():
        prepare(plan, out, folder=raw if plan.source.name is not None else Path(spec.source).parent)
    return DatasetSpec(folder=str(out))


def _ignore(_: dict[str, Any]) -> None:
    """What to do with results when nobody watches."""


def _run_all(task: _Task) -> list[dict[str, Any]]:
    return list(_run(task))


def _run(task: _Task) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(task.threads)
    data, truth = _open(task)
    done = {line["key"]: line for line in read_results(task.folder / RESULTS)}
    facts = {
        "study": task.study,
        "dataset": task.dataset,
        "seed": task.seed,
        "data_fingerprint": data.fingerprint(),
        "num_domains": data.schema.num_domains,
        "versions": {"domlora": version("domlora"), "torch": torch.__version__},
    }
    if truth is not None:
        line = {**facts, "model": "truth", "method": "truth", "key": _hash([facts, "truth"]), "config_hash": ""}
        yield done.get(line["key"]) or _keep(task, {**line, **_scores(data, truth)})
    for method in task.methods:
        config = _what_matters(task.config, method)
        line = {**facts, "model": task.config.model["name"], "method": method, "config_hash": _hash(config)}
        key = _hash([line, config])
        yield done.get(key) or _keep(task, {**line, "key": key, **_train(task, data, method, key)})


def _what_matters(config: Config, method: str) -> dict[str, Any]:
    """The options that a run of this method depends on: changing the others does not make it run again."""
    recipe = asdict(config.train)
    return {"model": config.model, "method": method, **{name: recipe[name] for name in METHODS[method].parts}}


def _open(task: _Task) -> tuple[Dataset, Tensor | None]:
    if task.spec.world is None:
        return Dataset.open(str(task.spec.folder)), None
    world = replace(task.spec.world, seed=task.spec.world.seed + task.seed)
    return world.dataset(task.spec.num_rows, seed=task.seed)


def _train(task: _Task, data: Dataset, method: str, key: str) -> dict[str, Any]:
    """Train, score the test split, and leave a base behind for second stages."""
    recipe = seeded(task.config.train, task.seed)
    checkpoint = task.folder / "checkpoints" / key
    base = task.folder / "bases" / _hash([data.fingerprint(), _what_matters(task.config, "base"), task.seed])
    start = Bundle.open(base).model if METHODS[method].from_base else None
    model, options, found = train(method, Job(data, task.config.model, recipe, start, checkpoint))
    if method == "base":
        Bundle(model, options, data.encoder).save(base, overwrite=base.exists())
    rmtree(checkpoint, ignore_errors=True)
    said = predict(model, data.batches("test", 16384))
    return {**_summary(said, data), **_training(found), **count_parameters(model)}


def _scores(data: Dataset, truth: Tensor) -> dict[str, Any]:
    rows = data.read("test")
    said = Predictions(rows.label.numpy(), truth.numpy(), rows.domain.numpy())
    return {**_summary(said, data), "params_total": 0, "params_tables": 0, "params_adapters": 0, "history": []}


def _summary(said: Predictions, data: Dataset) -> dict[str, Any]:
    table = by_domain(said, data.schema.domains)
    return {**table.summary, "domains": table.to_dict()["domains"]}


def _training(found: Fit) -> dict[str, Any]:
    return {
        "valid_wauc": next(entry["wauc"] for entry in found.history if entry["epoch"] == found.best_epoch),
        "best_epoch": found.best_epoch,
        "seconds": found.seconds,
        "rows_per_second": found.rows_per_second,
        "history": found.history,
    }


def _keep(task: _Task, line: dict[str, Any]) -> dict[str, Any]:
    """Append one line; several processes may do so at once."""
    text = json.dumps(_without_nan(line), ensure_ascii=False)
    with (task.folder / RESULTS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed run left half a line; end it, so that it spoils no other
                file.write(b"\n")
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float | np.floating) and not math.isfinite(value) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
