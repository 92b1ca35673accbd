"""What a study compares: datasets, models, arms and seeds, as its TOML file says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from domlora.config import Config, merged, parse
from domlora.data.synthetic import World
from domlora.errors import ConfigError, nearest
from domlora.files import told
from domlora.models.build import MODELS
from domlora.studies.searching.space import Options, Range, Search, Space, dotted, nested, read_space, space_of
from domlora.training.methods import METHODS
from domlora.training.stages import placed

__all__ = ["Arm", "DatasetSpec", "Selection", "Study", "read_facts", "write_facts"]

_FACTS = "study.json"
_BASE, _TRUTH = "base", "truth"


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Rows to train on: exactly one of ``source``, ``folder`` and ``world``.

    Args:
        source, settings: what ``domlora prepare`` is given: a name or a TOML file, and each ``--set``.
        folder: a prepared dataset.
        world: a synthetic world; each seed of the study is a world of its own, and ``num_rows`` are drawn from it.
        config: options of all models on this dataset, on top of the study's.
        seeds: instead of the study's, such as more of them where a dataset is noisy.
    """

    source: str | None = None
    settings: tuple[str, ...] = ()
    folder: str | None = None
    world: World | None = None
    num_rows: int = 400_000
    config: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if sum(choice is not None for choice in (self.source, self.folder, self.world)) != 1:
            raise ConfigError("a dataset needs exactly one of source, folder and world", received=self)


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with options of its own, such as one point of a temperature curve.

    Args:
        method: a key of ``METHODS``.
        config: its options, on top of all others.
        title: what the report calls it.
        models: which models it is run on, as far as the study has them; none means all.
        tuned_as: another arm whose tuned options it takes, below its own, instead of a search for itself.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    models: tuple[str, ...] = ()
    tuned_as: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """An arm of the report alone: in each seed the candidate that validation prefers in the other seeds.

    Args:
        of: the candidates; the first of equal ones is taken.
        title: what the report calls it.
    """

    of: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared.

    Args:
        name: of the folder and of the result files.
        datasets: by name.
        models: keys of ``MODELS``.
        methods: of ``METHODS`` or ``arms``; ``base`` is always run, because the others are compared with it.
        seeds: of weights, order of rows and dropout.
        title: heading of the report.
        config: options of all models, as for ``domlora pretrain``.
        overrides: options of single models on top.
        arms: by name; those that ``methods`` names are run.
        select: arms that the report derives from others, by name; see :mod:`domlora.studies.reporting.selection`.
        search: what is tuned, and how; nothing without it.
        device: where all trainings run, such as ``cuda``; without it where ``config`` says. No run is made anew for it.
        reference, steps: how the report's part about switches reads the arms: which one they are compared with there, and an
            order in which each adds one thing to the one before. All else is compared with ``base``.

    Raises:
        ConfigError: an unknown name, key or option. All are checked here and not after hours, but for options of models,
            which need a schema: see :func:`domlora.studies.run.run_study`.
    """

    name: str
    datasets: dict[str, DatasetSpec]
    models: tuple[str, ...]
    methods: tuple[str, ...] = ("base", "joint", "two_stage")
    seeds: tuple[int, ...] = (1,)
    title: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    arms: dict[str, Arm] = field(default_factory=dict)
    select: dict[str, Selection] = field(default_factory=dict)
    search: Search | None = None
    device: str = ""
    reference: str = _BASE
    steps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.datasets and self.models and self.seeds):
            raise ConfigError("a study needs a dataset, a model and a seed", received=self.name)
        for seeds in (self.seeds, *(dataset.seeds for dataset in self.datasets.values())):
            if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
                raise ConfigError("a study needs seeds of at least 0 that differ", received=list(seeds))
        _check_names("model", self.models, MODELS)
        _check_names("overrides of a model", self.overrides, MODELS)
        self._check_arms()
        _check_names("method", self.methods, [*METHODS, *self.arms])
        self._check_selections()
        _check_names("arm as reference or step", (self.reference, *self.steps), [_BASE, *self.methods])
        for dataset in self.datasets:
            for model in self.models:
                for arm in self.arms_of(model):
                    self.config_of(dataset, model, arm)
        if self.search is not None:
            self._check_search(self.search)

    def only(self, datasets: Iterable[str]) -> Study:
        """The same study on some of its datasets.

        Raises:
            ConfigError: one that it does not have.
        """
        names = tuple(datasets)
        _check_names("dataset", names, self.datasets)
        return replace(self, datasets={name: spec for name, spec in self.datasets.items() if name in names})

    def arm(self, name: str) -> Arm:
        """An arm by its name; a method is an arm without options of its own."""
        return self.arms.get(name) or Arm(name)

    def arms_of(self, model: str) -> tuple[str, ...]:
        """The arms that one model is run with, the base first."""
        names = dict.fromkeys((_BASE, *self.methods))
        return tuple(name for name in names if model in (self.arm(name).models or self.models))

    def seeds_of(self, dataset: str) -> tuple[int, ...]:
        """The seeds that a dataset is run with."""
        return self.datasets[dataset].seeds or self.seeds

    def config_of(
        self, dataset: str, model: str, arm: str = _BASE, *, below: Options | None = None, tuned: Options | None = None
    ) -> Config:
        """The options of one arm of one model on one dataset.

        The study's, then the dataset's, the model's, ``below``, the arm's own, ``tuned``: the later wins, key by key.

        Args:
            below: tuned options that the arm takes over: of the base that it starts from, of the arm it is ``tuned_as``.
            tuned: of a search for this arm.
        """
        overrides, own = self.overrides.get(model, {}), self.arm(arm).config
        table = self.config
        for more in (self.datasets[dataset].config, overrides, nested(below or {}), own, nested(tuned or {})):
            table = merged(table, more)
        if "name" in table.get("model", {}):
            rule = "models names the models of a study, so that config must not hold model.name"
            raise ConfigError(rule, received=table["model"]["name"])
        config = _parsed(json.dumps(table, sort_keys=True, default=str))
        recipe = placed(config.train, self.device) if self.device else config.train
        return replace(config, model={"name": model, **table.get("model", {})}, train=recipe)

    def space_of(self, model: str, arm: str) -> Space:
        """What a search tunes in one arm of one model.

        Raises:
            ConfigError: nothing to tune, or no search.
        """
        if self.search is None:
            raise ConfigError("a study without [search] tunes nothing", received=arm)
        own = self.arm(arm)
        return space_of(self.search, model, own.method, arm, dotted(own.config))

    def tuned_arms(self, model: str) -> tuple[str, ...]:
        """The arms that a search tunes on one model: all but those that take over what another one found."""
        return tuple(name for name in self.arms_of(model) if not self.arm(name).tuned_as)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings of a trial: none of ``seeds``, unless the search names them."""
        given = () if self.search is None else self.search.seeds
        used = {seed for dataset in self.datasets for seed in self.seeds_of(dataset)}
        return given or ((0,) if 0 not in used else (max(used) + 1,))

    def _check_arms(self) -> None:
        for name, arm in self.arms.items():
            is_method = name != _BASE and arm == Arm(name, title=arm.title, models=arm.models)
            if not name or (name in (*METHODS, *MODELS, _TRUTH) and not is_method):
                rule = (
                    "an arm needs a name that no model has, and no method unless it only restricts the method to models"
                )
                raise ConfigError(rule, received=name)
            _check_names(f"method of arm {name!r}", [arm.method], METHODS)
            _check_names(f"model of arm {name!r}", arm.models, MODELS)
            if arm.tuned_as:
                _check_names(f"tuned_as of arm {name!r}", [arm.tuned_as], [_BASE, *self.methods])
                self._check_tuned_as(name, arm, self.arm(arm.tuned_as))

    def _check_tuned_as(self, name: str, arm: Arm, other: Arm) -> None:
        missing = other.models and set(arm.models or self.models) - set(other.models)
        if other.method != arm.method or other.tuned_as or missing:
            raise ConfigError(
                f"arm {name!r} can take over the options of an arm of the same method and models, with a search of its own",
                received=arm.tuned_as,
            )

    def _check_selections(self) -> None:
        for name, selection in self.select.items():
            if not name or name in (*METHODS, *MODELS, *self.arms, _TRUTH):
                rule = "a selection needs a name that no method, no model and no arm has"
                raise ConfigError(rule, received=name)
            _check_names(f"candidate of selection {name!r}", selection.of, [_BASE, *self.methods])
            if len(set(selection.of)) < max(len(selection.of), 2):
                raise ConfigError(f"selection {name!r} needs two candidates that differ", received=selection.of)

    def _check_search(self, search: Search) -> None:
        """Every arm has something to tune, every option is known, and every value is one that it may have."""
        _check_names("model, method or arm in search.of", search.of, [*MODELS, *METHODS, *self.arms])
        first = next(iter(self.datasets)), self.models[0]
        for table in (search.space, *search.of.values()):
            for key, values in read_space(table).items():
                for value in _ends(values):
                    self.config_of(*first, tuned={key: value})
        for model in self.models:
            for arm in self.tuned_arms(model):
                self.space_of(model, arm)


def write_facts(study: Study, folder: Path, command: str, runs: Mapping[str, Any]) -> None:
    """Leave beside the results what the report says of a study as a whole.

    Args:
        runs: which of the results are the study's now: by dataset its ``seeds``, and ``arms`` as model, name and hash of the
            options.
    """
    facts = {
        "title": study.title or study.name,
        "command": command,
        "reference": study.reference,
        "steps": study.steps,
        "titles": {name: arm.title for name, arm in (study.arms | study.select).items() if arm.title},
        "select": {name: {"of": selection.of} for name, selection in study.select.items()},
        "runs": runs,
    }
    with told(folder / _FACTS):
        (folder / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What :func:`write_facts` left in a folder; the folder's name stands in for the title if nothing is there."""
    try:
        return {**json.loads((folder / _FACTS).read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"title": folder.name, "command": ""}


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    listed = list(known)
    for name in names:
        if name not in listed:
            raise ConfigError(f"unknown {what} in a study", received=name, next_step=nearest(name, listed))


def _ends(values: Range | tuple[Any, ...]) -> tuple[Any, ...]:
    """Values that stand for all: if these are valid, the others are."""
    return (values.low, values.high) if isinstance(values, Range) else values


@lru_cache(maxsize=256)
def _parsed(table: str) -> Config:
    """One check for equal options: a study has few, and many arms that share them."""
    read: Mapping[str, Any] = json.loads(table)
    return parse(Config, read)
