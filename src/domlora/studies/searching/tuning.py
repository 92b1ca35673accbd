"""The search of options: as many trials for every arm, by Optuna, chosen on the validation split alone.

Every trial is kept in ``tuning.db`` of the study folder, so that a killed search goes on with the trial that was cut short.
One arm of one model on one dataset is searched by one process, a trial after the other, each on one core: what is tried
depends on the seed and on the trials before, and on neither the number of processes nor on interruptions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from domlora.config import Config
from domlora.data.dataset import Dataset
from domlora.errors import EngineError, needing
from domlora.studies.processes import alone, in_processes
from domlora.studies.searching.space import Options, Range, Search, Space
from domlora.studies.single import digest, open_rows, train_once, what_matters
from domlora.studies.study import DatasetSpec, Study
from domlora.training.fit import OnProgress
from domlora.training.methods import METHODS

if TYPE_CHECKING:
    from domlora.studies.searching.trials import Outcome

__all__ = ["Found", "Tuned", "check_optuna", "tune"]

_TUNED = "tuned.json"


class Found(NamedTuple):
    """What the search for one arm found.

    Args:
        trials, pruned: how many trials were made, and how many of them were ended early.
        best_value: the best trial's figure on validation, the mean over its seeds.
        best: the options of that trial, by dotted key.
        start: those of the best among the trials that count as an arm's base: all, or the first half of ``equal = "total"``.
        values: the figure of each trial in order; None if it was ended early.
    """

    dataset: str
    model: str
    arm: str
    kind: str
    trials: int
    pruned: int
    best_value: float
    best: dict[str, Any]
    start: dict[str, Any]
    values: list[float | None]


@dataclass(slots=True)
class Tuned:
    """What was found, by dataset, model and arm; empty where nothing is tuned."""

    found: dict[tuple[str, str, str], Found] = field(default_factory=dict)

    def config_of(self, study: Study, dataset: str, model: str, arm: str) -> Config:
        """All options of an arm, with what was found for it."""
        own = study.arm(arm)
        taken = self.found.get((dataset, model, own.tuned_as)) if own.tuned_as else None
        below = {**self.start_of(dataset, model, own.method), **({} if taken is None else taken.best)}
        found = self.found.get((dataset, model, arm))
        return study.config_of(dataset, model, arm, below=below, tuned={} if found is None else found.best)

    def start_of(self, dataset: str, model: str, method: str) -> Options:
        """The tuned options of the base that a method starts from, if it starts from one."""
        found = self.found.get((dataset, model, "base")) if METHODS[method].from_base else None
        return {} if found is None else found.start

    def save(self, path: Path, study: Study) -> None:
        """Write ``dataset -> model -> arm -> what was found``, whole or not at all."""
        table: dict[str, Any] = {}
        for (dataset, model, arm), found in sorted(self.found.items()):
            facts = {
                key: value for key, value in found._asdict().items() if key not in ("dataset", "model", "arm", "start")
            }
            options = what_matters(self.config_of(study, dataset, model, arm), found.kind)
            table.setdefault(dataset, {}).setdefault(model, {})[arm] = {**facts, "config": options}
        whole = {"search": None if study.search is None else asdict(study.search), "seeds": study.tuning_seeds}
        fresh = path.with_name(f".{path.name}.tmp")
        fresh.write_text(json.dumps({**whole, "tuned": table}, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(fresh, path)


@dataclass(frozen=True, slots=True)
class _Task:
    """The search for one arm of one model on one dataset."""

    study: Study
    folder: Path
    dataset: str
    spec: DatasetSpec
    model: str
    arm: str
    start: Options
    trials: int

    @property
    def method(self) -> str:
        return self.study.arm(self.arm).method

    @property
    def space(self) -> Space:
        return self.study.space_of(self.model, self.arm)

    def config_of(self, tuned: Options) -> Config:
        return self.study.config_of(self.dataset, self.model, self.arm, below=self.start, tuned=tuned)


def check_optuna() -> None:
    """Say so before anything runs, if there is no Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    with needing("study", "a study with [search]"):
        import domlora.studies.searching.trials  # noqa: F401


def tune(
    study: Study, specs: Mapping[str, DatasetSpec], folder: Path, *, jobs: int, on_found: Callable[[Found], None]
) -> Tuned:
    """Search what is not searched yet, first the arms that start from nothing, then those that start from the tuned base.

    Args:
        specs: the datasets, prepared.
        folder: of the study.
        jobs: processes; an arm of a model on a dataset is one piece of work.
        on_found: called with what each search found.

    Raises:
        EngineError: an arm of which no trial came to its end.
    """
    from domlora.studies.searching.trials import make_database

    make_database(folder)
    tuned = Tuned()
    for from_base in (False, True):
        for found in in_processes(_search, list(_tasks(study, specs, folder, tuned, from_base)), jobs):
            tuned.found[found.dataset, found.model, found.arm] = found
            tuned.save(folder / _TUNED, study)
            on_found(found)
    return tuned


def _tasks(
    study: Study, specs: Mapping[str, DatasetSpec], folder: Path, tuned: Tuned, from_base: bool
) -> Iterator[_Task]:
    for name, spec in specs.items():
        for model in study.models:
            for arm in study.tuned_arms(model):
                method = study.arm(arm).method
                if METHODS[method].from_base == from_base:
                    start = tuned.start_of(name, model, method)
                    yield _Task(study, folder, name, spec, model, arm, start, _num_trials(study, model, from_base))


def _num_trials(study: Study, model: str, from_base: bool) -> int:
    """Under ``total`` arms that start from nothing get what the others have behind them with their base."""
    assert study.search is not None
    with_base = any(METHODS[study.arm(arm).method].from_base for arm in study.tuned_arms(model))
    doubled = study.search.equal == "total" and with_base and not from_base
    return study.search.trials * (2 if doubled else 1)


def _search(task: _Task) -> Iterator[Found]:
    """Make the trials that are missing; only one process at a time makes those of one arm."""
    from domlora.studies.searching.trials import Trials

    search = task.study.search
    assert search is not None
    torch.set_num_threads(1)
    rows = _rows(task)
    name = _name(task, search, rows)
    with alone(task.folder / "locks" / digest(name)):
        trials = Trials(task.folder, name, task.space, seed=search.seed, pruning=search.pruning)
        while len(trials.outcomes()) < task.trials:
            trials.try_one(partial(_value, task, rows))
        outcomes = trials.outcomes()[: task.trials]
    yield _found(task, search, outcomes)


def _rows(task: _Task) -> dict[int, Dataset]:
    """The rows of each tuning seed; prepared ones are the same for all."""
    seeds = task.study.tuning_seeds
    if task.spec.world is not None:
        return {seed: open_rows(task.spec, seed)[0] for seed in seeds}
    return dict.fromkeys(seeds, open_rows(task.spec, seeds[0])[0])


def _name(task: _Task, search: Search, rows: Mapping[int, Dataset]) -> str:
    """Of the trials in the database: equal if and only if the same would be tried on the same rows."""
    space = {key: asdict(values) if isinstance(values, Range) else values for key, values in task.space.items()}
    prints = {seed: data.fingerprint() for seed, data in rows.items()}
    what = [what_matters(task.config_of({}), task.method), space, prints, search.seed, search.pruning]
    return f"{task.dataset}/{task.model}/{task.arm}/{digest(what)}"


def _value(task: _Task, rows: Mapping[int, Dataset], options: Options, watch: OnProgress) -> float:
    """The best figure on validation, as the options' ``monitor`` says, a mean over the seeds; the first one is watched."""
    config = task.config_of(options)
    values: list[float] = []
    for seed, data in rows.items():
        shown = None if values else watch
        made = train_once(task.folder, data, task.method, config, seed, on_progress=shown)
        values.append(made.fit.best_value)
    return math.fsum(values) / len(values)


def _found(task: _Task, search: Search, outcomes: list[Outcome]) -> Found:
    best, start = _best(task, outcomes), _best(task, outcomes[: search.trials])
    assert best.value is not None
    values = [outcome.value for outcome in outcomes]
    pruned = values.count(None)
    name = (task.dataset, task.model, task.arm, task.method)
    return Found(*name, len(values), pruned, best.value, best.options, start.options, values)


def _best(task: _Task, outcomes: list[Outcome]) -> Outcome:
    """The trial of the largest figure, of equal ones the first."""
    whole = [outcome for outcome in outcomes if outcome.value is not None]
    if not whole:
        raise EngineError(
            f"no trial of {task.arm!r} came to its end for model {task.model!r} on {task.dataset!r}",
            received=outcomes[-1].error or f"{len(outcomes)} trials",
            next_step="Narrow its space, or lower its learning rates",
        )
    return max(whole, key=lambda outcome: outcome.value or 0.0)
