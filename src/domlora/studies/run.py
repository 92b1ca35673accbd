"""Datasets x models x arms x seeds: one result line a run, interruptible and resumable.

A study folder holds ``results.jsonl``, the prepared ``data/``, the ``bases/`` that second stages start from,
``checkpoints/`` of runs that have not ended yet and, of a study that tunes, ``tuning.db`` and ``tuned.json``.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domlora.config import Config, load_plan
from domlora.data.dataset import Dataset
from domlora.data.prepare import prepare
from domlora.errors import EngineError
from domlora.evaluation.evaluate import Predictions, by_domain, predict
from domlora.files import told
from domlora.studies.parameters import build_on_meta, count_parameters, parameters_per_domain
from domlora.studies.processes import in_processes
from domlora.studies.reporting.tables import read_results
from domlora.studies.searching.space import Range
from domlora.studies.searching.tuning import Found, Tuned, check_optuna, tune
from domlora.studies.single import checkpoint, digest, keep_base, open_rows, train_once, what_matters
from domlora.studies.study import DatasetSpec, Study, write_facts
from domlora.training.device import device_named
from domlora.training.fit import Fit
from domlora.training.stages import with_vectors

__all__ = ["run_study"]

RESULTS = "results.jsonl"
_NAMES = ("dataset", "model", "method", "seed")


@dataclass(frozen=True, slots=True)
class _Arm:
    """An arm as it is run: its method, all its options, and whether a search chose some of them."""

    name: str
    kind: str
    config: Config
    tuned: bool


@dataclass(frozen=True, slots=True)
class _Task:
    """All arms of one dataset, model and seed: second stages need the base of the same seed."""

    study: str
    folder: Path
    dataset: str
    spec: DatasetSpec
    model: str
    arms: tuple[_Arm, ...]
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
    on_found: Callable[[Found], None] | None = None,
) -> Path:
    """Run what ``folder`` does not hold yet, the search of options first, and return the path of the results.

    Args:
        raw: where raw files lie, see ``domlora prepare``.
        jobs: processes, each with its share of torch's threads (``OMP_NUM_THREADS``, else the cores). Results depend on
            neither, up to float rounding.
        command: what was typed to get here; the report shows it.
        on_result: called with each result line, old ones first.
        on_found: called with what each search found, old ones too.

    Raises:
        ConfigError: an option of a model that it does not have, a device that is not there, or a search without Optuna.
    """
    if study.search is not None:
        check_optuna()
    if study.device:
        device_named(study.device)
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    specs = {name: _prepared(name, spec, folder, raw) for name, spec in study.datasets.items()}
    _check_models(study, specs)
    threads = max(torch.get_num_threads() // jobs, 1)  # before the search, which takes one thread a trial
    tuned = Tuned() if study.search is None else tune(study, specs, folder, jobs=jobs, on_found=on_found or _ignore)
    tasks = list(_tasks(study, specs, folder, tuned, threads=threads))
    write_facts(study, folder, command, _planned(tasks))
    failed = []
    for line in in_processes(_run, tasks, jobs):
        (on_result or _ignore)(line)
        failed += [line] if "failed" in line else []
    if failed:
        raise EngineError(
            "every run of a study must end well, and the others did",
            received=f"{len(failed)} that failed, first {' '.join(str(failed[0][key]) for key in _NAMES)}",
            next_step="Change the options of their arm, such as a smaller learning rate; what ended is kept",
        )
    return folder / RESULTS


def _prepared(name: str, spec: DatasetSpec, folder: Path, raw: Path | None) -> DatasetSpec:
    """The same dataset as a prepared folder inside the study's; prepared once."""
    if spec.source is None:
        return spec
    plan = load_plan(spec.source, spec.settings)
    own = [asdict(plan)] if plan.source.name is None else []  # a file of one's own may have changed since
    out = folder / "data" / f"{name}-{digest([spec.source, list(spec.settings), *own])}"
    if not out.exists():
        prepare(plan, out, folder=raw if plan.source.name is not None else Path(spec.source).parent)
    return replace(spec, source=None, settings=(), folder=str(out))


def _check_models(study: Study, specs: Mapping[str, DatasetSpec]) -> None:
    """Every model can be built as every arm wants it, and with the ends of its space, before the first one trains."""
    for name, spec in specs.items():
        data = Dataset.open(spec.folder) if spec.folder is not None else _one_row(spec)
        seen: set[str] = set()
        for model in study.models:
            for options in _model_options(study, name, model):
                if digest(options) not in seen:
                    seen.add(digest(options))
                    build_on_meta(with_vectors(options, data), data.schema)


def _one_row(spec: DatasetSpec) -> Dataset:
    """A world's dataset as far as a model's options ask for it."""
    assert spec.world is not None
    return spec.world.dataset(1, seed=0)[0]


def _model_options(study: Study, dataset: str, model: str) -> Iterator[dict[str, Any]]:
    for arm in study.arms_of(model):
        yield study.config_of(dataset, model, arm).model
    for arm in study.tuned_arms(model) if study.search is not None else ():
        for key, values in study.space_of(model, arm).items():
            ends = (values.low, values.high) if isinstance(values, Range) else values
            for value in ends if key.startswith("model.") else ():
                yield study.config_of(dataset, model, arm, tuned={key: value}).model


def _tasks(study: Study, specs: Mapping[str, DatasetSpec], folder: Path, tuned: Tuned, threads: int) -> Iterator[_Task]:
    for name, spec in specs.items():
        for seed in study.seeds_of(name):
            for model in study.models:
                arms = tuple(_arm(study, name, model, arm, tuned) for arm in study.arms_of(model))
                yield _Task(study.name, folder, name, spec, model, arms, seed, threads)


def _arm(study: Study, dataset: str, model: str, name: str, tuned: Tuned) -> _Arm:
    config = tuned.config_of(study, dataset, model, name)
    return _Arm(name, study.arm(name).method, config, study.search is not None)


def _planned(tasks: Sequence[_Task]) -> dict[str, Any]:
    """What the study asks for now: seeds, and the options of each model's arms, by dataset."""
    found: dict[str, Any] = {}
    for task in tasks:
        asked = found.setdefault(task.dataset, {"seeds": [], "arms": []})
        arms = [[task.model, arm.name, digest(what_matters(arm.config, arm.kind))] for arm in task.arms]
        asked["seeds"] += [task.seed] if task.seed not in asked["seeds"] else []
        asked["arms"] += [arm for arm in arms if arm not in asked["arms"]]
    return found


def _ignore(_: Any) -> None:
    """What to do with results when nobody watches."""


def _run(task: _Task) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(task.threads)
    data, truth = open_rows(task.spec, task.seed)
    old = read_results(task.folder / RESULTS)
    done, alike = {line["key"]: line for line in old}, {_run_of(line): line for line in old}
    facts = {
        "study": task.study,
        "dataset": task.dataset,
        "seed": task.seed,
        "data_fingerprint": data.fingerprint(),
        "num_domains": data.schema.num_domains,
    }
    if truth is not None:
        line = {**facts, "model": "truth", "method": "truth", "key": digest([facts, "truth"]), "config_hash": ""}
        yield done.get(line["key"]) or alike.get(_run_of(line)) or _keep(task, {**line, **_scores(data, truth)})
    for arm in task.arms:
        matters = what_matters(arm.config, arm.kind)
        line = {**facts, "model": task.model, "method": arm.name, "config_hash": digest(matters)}
        key = digest([line, matters])
        line |= {"key": key, "kind": arm.kind, "tuned": arm.tuned, "config": matters}
        known = done.get(key) or alike.get(_run_of(line))
        if known is None:
            try:
                known = _keep(task, {**line, **_train(task, data, arm, key)})
            except EngineError as error:
                yield {**line, "failed": str(error)}
                continue
        elif any(known.get(name) != line[name] for name in ("key", "kind", "tuned")):
            known = _keep(task, {**known, **line})  # the same run under another name
        alike[_run_of(line)] = known
        yield known


def _run_of(line: Mapping[str, Any]) -> str:
    """What two lines share if one training stands behind both, whatever their arms are called and wherever it was made."""
    return digest([line.get(key) for key in ("dataset", "data_fingerprint", "seed", "config_hash")])


def _train(task: _Task, data: Dataset, arm: _Arm, key: str) -> dict[str, Any]:
    """Train, score the test split, and leave a base behind for second stages."""
    with checkpoint(task.folder, key) as state:
        made = train_once(task.folder, data, arm.kind, arm.config, task.seed, checkpoint=state)
        if arm.kind == "base":
            keep_base(task.folder, data, arm.config, task.seed, made)
        said = predict(made.model, data.batches("test", 16384))  # a run killed here has its training left
    sizes = count_parameters(made.model)
    more = parameters_per_domain(made.model, made.model_options, data.schema)
    return {**_summary(said, data), **_training(made.fit), **sizes, "params_per_domain": more}


def _scores(data: Dataset, truth: Tensor) -> dict[str, Any]:
    rows = data.read("test")
    said = Predictions(rows.label.numpy(), truth.numpy(), rows.domain.numpy())
    sizes = dict.fromkeys(("params_total", "params_tables", "params_adapters", "params_per_domain"), 0)
    return {**_summary(said, data), **sizes, "history": []}


def _summary(said: Predictions, data: Dataset) -> dict[str, Any]:
    table = by_domain(said, data.schema.domains)
    return {**table.summary, "domains": table.to_dict()["domains"]}


def _training(found: Fit) -> dict[str, Any]:
    return {
        "valid_wauc": next((entry["wauc"] for entry in found.history if entry["epoch"] == found.best_epoch), None),
        "best_epoch": found.best_epoch,
        "seconds": found.seconds,
        "rows_per_second": found.rows_per_second,
        "history": found.history,
    }


def _keep(task: _Task, line: dict[str, Any]) -> dict[str, Any]:
    """Append one line, with the versions that made it; several processes may do so at once."""
    line = {"versions": {"domlora": version("domlora"), "torch": torch.__version__}, **line}
    text = json.dumps(_without_nan(line), ensure_ascii=False)
    with told(task.folder / RESULTS), (task.folder / RESULTS).open("a+b") as file:
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
