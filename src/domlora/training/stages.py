"""Stages: which parameters move, on what, from where.

========== =================================================================================================
base       the backbone on all domains
joint      backbone and adapters together from the start (what the authors' code does for most backbones)
two_stage  the backbone on all domains, then frozen; adapters alone afterwards (what the paper says)
bias_only  as two_stage, but a domain may only shift each layer's bias: a control for what is low-rank at all
========== =================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, freeze_, movable
from domlora.errors import ConfigError, nearest
from domlora.evaluation.gate import Limits
from domlora.models.build import build_model
from domlora.training.fit import Fit, FitOptions, OnProgress, Rows, Run, fit
from domlora.training.optimizers import FUSED, OptimizerOptions, Rule
from domlora.training.quirks import LegacyOptions

__all__ = [
    "FIRST_STAGES",
    "SECOND_STAGES",
    "Auto",
    "CrossFit",
    "Mixture",
    "Negotiation",
    "Onboarding",
    "Recipe",
    "Stage",
    "Start",
    "Updating",
    "adapt",
    "adapter_options_of",
    "placed",
    "pretrain",
    "seeded",
    "with_vectors",
]

FIRST_STAGES, SECOND_STAGES = ("base", "joint"), ("two_stage", "bias_only")

OptimizerState = Literal["fresh", "carry"]
Start = Literal["zero", "mean", "nearest", "mix"]


@dataclass(frozen=True, slots=True)
class Stage:
    """How one stage trains.

    Args:
        fit: how long, on what, when to stop.
        optimizer: rules for tables, dense layers and adapters.
        moving: globs over parameter names that move beside the adapters in a second stage, such as ``embedding.*``; none
            means that only adapters move. A first stage moves everything.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    moving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Negotiation:
    """How ``dn``, ``dr`` and ``mamdr`` train, see :mod:`domlora.training.negotiation`. An epoch is one outer pass.

    Args:
        fit: as in a stage; validates after each outer pass, and ``average_decay`` is 0, because the outer step averages.
        optimizer: rules of the inner steps; their moments live on from pass to pass.
        outer_lr: how far an outer step goes towards where its inner steps led, in (0, 1]; 1 takes their result. The authors'
            code has 0.1, which wants ten times as many outer passes.
        num_helpers: other domains that help each one in ``dr`` and ``mamdr``; fewer if there are not as many.
        inner_steps: batches of a domain in an inner pass at the most; 0 for all its rows, as the authors' configurations.
        target_steps: batches of the domain itself after those of a helper at the most; 0 for all its rows.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    outer_lr: float = 0.1
    num_helpers: int = 5
    inner_steps: int = 0
    target_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.outer_lr <= 1 or min(self.num_helpers, self.inner_steps, self.target_steps) < 0:
            raise ConfigError("negotiation needs outer_lr in (0, 1] and counts of at least 0", received=self)
        if self.fit.evaluations_per_epoch != 1 or self.fit.average_decay:
            raise ConfigError(
                "negotiation validates after each outer pass and keeps no average", received=self.fit.average_decay
            )


@dataclass(frozen=True, slots=True)
class Mixture:
    """How ``moe_mlora`` trains, see :mod:`domlora.training.mixture`.

    Args:
        num_experts: at least as many as domains; None for one a domain. Expert ``i`` learns from domain ``i mod D``.
        gate_dim: width of the gate's embedding of a domain.
        experts, gate: how each expert and then the gate trains. All of it is ``dense`` to the optimizer. A gate is small and
            starts as a plain mean: it wants a larger learning rate than a network.
    """

    num_experts: int | None = None
    gate_dim: int = 4
    experts: Stage = field(default_factory=Stage)
    gate: Stage = field(default_factory=lambda: Stage(optimizer=OptimizerOptions(dense=Rule(lr=1e-2))))

    def __post_init__(self) -> None:
        if min(1 if self.num_experts is None else self.num_experts, self.gate_dim) < 1:
            raise ConfigError("a mixture needs sizes of at least 1", received=self)


@dataclass(frozen=True, slots=True)
class Auto:
    """When ``auto`` uses a domain's adapter (:mod:`domlora.training.each_domain`; it trains as ``adapt`` says), and
    ``joint_or_base`` the joint model (:mod:`domlora.training.choice`).

    Args:
        min_gain: how many standard errors of the paired difference (DeLong, on the validation rows) they must be above the
            base; 0 takes any gain, 1 about one in six that are noise, 2 one in forty.
    """

    min_gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain < math.inf:
            raise ConfigError("min_gain must be at least 0", received=self.min_gain)


@dataclass(frozen=True, slots=True)
class CrossFit:
    """How ``crossfit`` cuts the rows and trains the tables of each fold, see :mod:`domlora.training.crossfit`.

    Args:
        folds: how many, from 2 to 2**20. Each takes about as long as a base, and learns from ``1 - 1 / folds`` of the rows.
        tables: how tables train; give it what ``pretrain`` has, whose tables they stand for. ``moving`` is not read.
    """

    folds: int = 3
    tables: Stage = field(default_factory=Stage)

    def __post_init__(self) -> None:
        if not 2 <= self.folds <= 1 << 20:
            raise ConfigError(f"folds must be from 2 to {1 << 20}", received=self.folds)


@dataclass(frozen=True, slots=True)
class Onboarding:
    """How ``onboard`` finds the adapter of a new domain, see :mod:`domlora.training.onboard`.

    Args:
        fit: as in a stage. Where rows are few, batches become smaller, see ``min_steps``.
        optimizer: its ``adapters`` is read, and ``tables`` for new words, as ``lazy_adam`` if that is not a lazy rule. Decay
            of adapters is not needed: ``prior_rows`` draws to the start.
        starts: what is trained from, one training each: ``zero`` (the base), ``mean`` of the other domains' adapters,
            ``nearest`` (the domain whose adapter says most about the rows), ``mix`` (the best convex mix of all).
        prior_rows: how many rows the start is worth: each step draws the adapter to it by ``lr * prior_rows / rows``; 0 for
            no such pull.
        min_steps: steps an epoch has at the least, down to batches of 32 rows.
        calibrate: set the mean of a start's logits by one number, learned from the training rows.
        max_scored_rows: training rows that the other domains' adapters are asked about at the most, and fewer where there
            are hundreds of domains.
        max_valid_rows: validation rows that candidates are scored on at the most, drawn at random.
        min_gain: how many standard errors of the paired difference on the validation rows (DeLong for AUC) a less simple
            adapter must be above a simpler one; 0 takes any gain.
        new_words: give words that the bundle does not know rows of the embedding tables, and train these rows with the
            adapter; all other rows keep their bits. Without it a version is one small file more, and they stay unknown.
    """

    fit: FitOptions = field(default_factory=lambda: FitOptions(max_epochs=100, patience=2))
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    starts: tuple[Start, ...] = ("mix",)
    prior_rows: float = 10_000.0
    min_steps: int = 10
    calibrate: bool = True
    max_scored_rows: int = 4096
    max_valid_rows: int = 65_536
    min_gain: float = 1.0
    new_words: bool = True

    def __post_init__(self) -> None:
        for start in self.starts:
            if start not in get_args(Start):
                raise ConfigError("unknown start of onboard", received=start, next_step=nearest(start, get_args(Start)))
        if not (0 <= self.prior_rows < math.inf and 0 <= self.min_gain < math.inf):
            raise ConfigError("onboard needs prior_rows and min_gain of at least 0", received=self)
        if min(self.min_steps, self.max_scored_rows, self.max_valid_rows) < 1:
            raise ConfigError(
                "onboard needs min_steps, max_scored_rows and max_valid_rows of at least 1", received=self
            )


@dataclass(frozen=True, slots=True)
class Updating:
    """How ``update`` learns a new day, see :mod:`domlora.training.update`.

    Args:
        fit, optimizer: as in a stage. Lazy rules leave rows that the day does not touch as they are, so that little changes
            on disk.
        moving: globs of parameters that move beside tables and adapters, such as ``["tower.*"]``, by the rule for ``dense``;
            by default the dense backbone stands still.
        replay_share: share of each batch that comes from earlier rows, where there are some, in [0, 1).
        optimizer_state: ``fresh``, or ``carry`` to go on with the moments of the last update.
        gate: when the result may become the default version.
    """

    fit: FitOptions = field(default_factory=lambda: FitOptions(max_epochs=1))
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(tables=Rule("lazy_adam"), adapters=Rule("lazy_adam"))
    )
    moving: tuple[str, ...] = ()
    replay_share: float = 0.5
    optimizer_state: OptimizerState = "fresh"
    gate: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.replay_share < 1:
            raise ConfigError("replay_share must be in [0, 1)", received=self.replay_share)
        if self.optimizer_state not in get_args(OptimizerState):
            rule, known = "unknown option of update", get_args(OptimizerState)
            raise ConfigError(rule, received=self.optimizer_state, next_step=nearest(self.optimizer_state, known))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained: where adapters go, and one stage for each way of training."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    pretrain: Stage = field(default_factory=Stage)
    joint: Stage = field(default_factory=Stage)
    adapt: Stage = field(default_factory=Stage)
    auto: Auto = field(default_factory=Auto)
    crossfit: CrossFit = field(default_factory=CrossFit)
    onboard: Onboarding = field(default_factory=Onboarding)
    update: Updating = field(default_factory=Updating)
    separate: Stage = field(default_factory=Stage)
    finetune: Stage = field(default_factory=Stage)
    negotiation: Negotiation = field(default_factory=Negotiation)
    mixture: Mixture = field(default_factory=Mixture)
    legacy: LegacyOptions = field(default_factory=LegacyOptions)


def pretrain(
    data: Rows,
    model_options: Mapping[str, Any],
    recipe: Recipe,
    *,
    method: str = "base",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, Fit]:
    """Build a model and train every parameter of it on the rows of all domains.

    Args:
        model_options: what ``build_model`` is given: ``name`` and options; pretrained vectors that the data come with are
            added, see :func:`with_vectors`.
        method: ``base``, or ``joint`` to train adapters along with the backbone.

    Raises:
        ConfigError: another method.
    """
    if method not in FIRST_STAGES:
        raise ConfigError("pretraining knows two methods", received=method, next_step=nearest(method, FIRST_STAGES))
    if "name" not in model_options:
        raise ConfigError("a model needs a name", received=dict(model_options), next_step="Set model.name")
    stage = recipe.pretrain if method == "base" else recipe.joint
    kind = _kind_of(stage.optimizer)
    torch.manual_seed(stage.fit.seed)
    with kind.building():
        model = build_model(schema=data.schema, **with_vectors(model_options, data))
    if method == "joint":
        attach_(model, data.schema.num_domains, **asdict(recipe.adapter))
    found = fit(model, data, stage.fit, stage.optimizer, checkpoint=checkpoint, on_progress=on_progress, kind=kind)
    return model, found


def adapt(
    model: nn.Module,
    data: Rows,
    recipe: Recipe,
    *,
    method: str = "two_stage",
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Fit:
    """Attach adapters to a trained model, freeze it and train them; never worse than the base on the validation split.

    Args:
        model: a model without adapters; changed in place.
        method: ``two_stage`` or ``bias_only``.

    Raises:
        ConfigError: another method, or the model has adapters already.
    """
    if method not in SECOND_STAGES:
        raise ConfigError("adapting knows two methods", received=method, next_step=nearest(method, SECOND_STAGES))
    stage = recipe.adapt
    torch.manual_seed(stage.fit.seed)
    attach_(model, data.schema.num_domains, **asdict(adapter_options_of(method, recipe)))
    freeze_(model, except_=movable(model, stage.moving))
    return fit(
        model,
        data,
        stage.fit,
        stage.optimizer,
        start_is_candidate=True,
        checkpoint=checkpoint,
        on_progress=on_progress,
        kind=_kind_of(stage.optimizer),
    )


def _kind_of(rules: OptimizerOptions) -> type[Run]:
    if rules.tables.name != FUSED:
        return Run
    from domlora.training.distributed.fused import FusedRun  # not everybody has what it needs

    return FusedRun


def with_vectors(model_options: Mapping[str, Any], data: Rows) -> dict[str, Any]:
    """Options of a model with the pretrained vectors that its data come with, unless the options give vectors themselves.

    Options that a bundle stores give no more of them than their width; vectors of the data that have it take its place.

    Example:
        >>> from domlora.data.synthetic import World
        >>> with_vectors({"name": "mlp"}, World().dataset(100, seed=1)[0])
        {'name': 'mlp'}
    """
    vectors: Mapping[str, Any] = getattr(data, "vectors", {})
    if not vectors:
        return dict(model_options)
    if "pretrained" not in model_options:
        learned: frozenset[str] = getattr(data, "trainable_vectors", frozenset())
        freeze = {name: name not in learned for name in vectors}
        return {**model_options, "pretrained": dict(vectors), "freeze_pretrained": freeze}
    given = model_options["pretrained"]
    widths = {name: value for name, value in given.items() if isinstance(value, int)} if given else {}
    stored = {name: vectors[name] for name in widths.keys() & vectors.keys() if vectors[name].shape[1] == widths[name]}
    return {**model_options, "pretrained": {**given, **stored}} if stored else dict(model_options)


def adapter_options_of(method: str, recipe: Recipe) -> AdapterOptions:
    """The adapters that a method trains."""
    with_adapters = (*FIRST_STAGES[1:], *SECOND_STAGES)
    if method not in with_adapters:
        raise ConfigError("no adapters in this method", received=method, next_step=nearest(method, with_adapters))
    return replace(recipe.adapter, rank=0, bias=True) if method == "bias_only" else recipe.adapter


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with one seed in all its stages."""
    whole: Recipe = _everywhere(recipe, "seed", seed)
    return whole


def placed(recipe: Recipe, device: str) -> Recipe:
    """The recipe with one device for all its stages."""
    whole: Recipe = _everywhere(recipe, "device", device)
    return whole


def _everywhere(options: Any, name: str, value: Any) -> Any:
    """Options with another value of that name, and all options within them."""
    inner = {each.name: getattr(options, each.name) for each in fields(options)}
    changed = {key: _everywhere(part, name, value) for key, part in inner.items() if is_dataclass(part)}
    return replace(options, **changed, **({name: value} if name in inner else {}))
