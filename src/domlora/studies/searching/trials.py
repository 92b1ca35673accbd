"""Trials of one search, in a database that outlives the process: the only place for Optuna.

What a trial tries depends on the seed, its number and the trials before it. A process that is killed leaves its trial
running; the next one marks it as failed and makes the same trial again, which does not count twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from domlora.errors import EngineError
from domlora.studies.searching.space import Range, Space
from domlora.training.fit import OnProgress, Progress

__all__ = ["Objective", "Outcome", "Trials", "Watch", "make_database"]

_DATABASE = "tuning.db"
_WAIT_S = 300
_WARM_UP = 3
"""Validations before a trial can be ended: learning rates that end well may begin slowly."""

Objective: TypeAlias = Callable[[dict[str, Any], OnProgress], float]
"""Options by dotted key, and whom to tell each validation -> the figure to make large."""


class Outcome(NamedTuple):
    """A trial that counts: its options, its figure (None if it was ended early), and the error that ended it, if one did."""

    options: dict[str, Any]
    value: float | None
    error: str


class Trials:
    """The trials of one search.

    Args:
        folder: of the study, where :func:`make_database` has been.
        name: of the search; the trials of an equal name go on.
        space: what is tried.
        seed: of the sampler, a tree-structured Parzen estimator (Bergstra et al. 2011) as Optuna has it.
        pruning: see :class:`domlora.studies.searching.space.Search`.

    Only one process at a time may hold the trials of a name.
    """

    def __init__(self, folder: Path, name: str, space: Space, *, seed: int, pruning: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = {key: _distribution(values) for key, values in space.items()}
        self._seed, self._prunes = seed, pruning != "none"
        self._study = optuna.create_study(
            storage=_storage(folder),
            study_name=name,
            direction="maximize",
            pruner=_pruner(pruning),
            load_if_exists=True,
        )
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)

    def outcomes(self) -> list[Outcome]:
        """The trials that count, in order: those that came to their end, and those that were ended early."""
        return [
            Outcome(
                _options(trial.params), trial.value if _is_whole(trial) else None, trial.user_attrs.get("error", "")
            )
            for trial in self._counted()
        ]

    def try_one(self, objective: Objective) -> None:
        """Make one trial. Options that were tried before get the figure that they had."""
        before = self._counted()
        self._study.sampler = TPESampler(seed=_mixed(self._seed, len(before)))
        trial = self._study.ask(self._space)
        twin = next((old for old in before if old.params == trial.params), None)
        watch = Watch(trial, prune=self._prunes and all(old.user_attrs.get("fits", 1) == 1 for old in before))
        try:
            value = objective(_options(trial.params), watch) if twin is None else _again(twin)
        except optuna.TrialPruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        except EngineError as error:  # a learning rate too large is a bad trial and not the end of a study
            trial.set_user_attr("error", str(error))
            self._study.tell(trial, state=TrialState.PRUNED)
        except BaseException:
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        else:
            trial.set_user_attr("fits", watch.fits)
            self._study.tell(trial, value)

    def _counted(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


class Watch:
    """Tells the pruner each validation of a training, and ends the training if the pruner says so.

    A method of several fits is only counted: figures of different models cannot be compared one by one.
    """

    def __init__(self, trial: optuna.Trial, *, prune: bool) -> None:
        self.trial, self.prune = trial, prune
        self.validations = self.epoch = 0
        self.fits = 1

    def __call__(self, at: Progress) -> None:
        self.fits += at.epoch < self.epoch
        self.epoch = at.epoch
        if not self.prune or self.fits > 1 or at.value is None or at.rows < at.total_rows:
            return
        self.trial.report(at.value, self.validations)
        self.validations += 1
        if self.trial.should_prune():
            raise optuna.TrialPruned


def make_database(folder: Path) -> None:
    """Make the tables, before several processes ask for them at once."""
    _storage(folder)


def _storage(folder: Path) -> RDBStorage:
    url = f"sqlite:///{(folder / _DATABASE).resolve()}"
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _WAIT_S}})  # how long a writer waits for others


def _distribution(values: Range | tuple[Any, ...]) -> BaseDistribution:
    """Choices travel as JSON, because a database holds no lists."""
    if isinstance(values, tuple):
        return CategoricalDistribution([json.dumps(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _pruner(pruning: str) -> BasePruner:
    if pruning == "median":
        return MedianPruner(n_warmup_steps=_WARM_UP)
    return SuccessiveHalvingPruner(min_resource=_WARM_UP) if pruning == "halving" else NopPruner()


def _again(twin: FrozenTrial) -> float:
    if twin.value is None or not _is_whole(twin):
        raise optuna.TrialPruned
    return twin.value


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a trial, choices as the values that they stand for."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in params.items()}


def _is_whole(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE


def _mixed(seed: int, number: int) -> int:
    """A seed for each trial, so that a search that goes on draws what an uninterrupted one draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4])
