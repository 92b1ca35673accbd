"""Stages: which parameters move, on what, from where.

========== =================================================================================================
base       the backbone on all domains
joint      backbone and adapters together from the start (what the authors' code does for most backbones)
two_stage  the backbone on all domains, then frozen; adapters alone afterwards (what the paper says)
bias_only  as two_stage, but a domain may only shift each layer's bias: a control for what is low-rank at all
========== =================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, freeze_
from domlora.errors import ConfigError, nearest
from domlora.models.build import build_model
from domlora.training.fit import Fit, FitOptions, OnProgress, Rows, fit
from domlora.training.optimizers import OptimizerOptions

__all__ = [
    "FIRST_STAGES",
    "SECOND_STAGES",
    "Recipe",
    "Stage",
    "adapt",
    "adapter_options_of",
    "pretrain",
    "seeded",
    "with_vectors",
]

FIRST_STAGES, SECOND_STAGES = ("base", "joint"), ("two_stage", "bias_only")


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
class Recipe:
    """How a model is trained: where adapters go, and one stage for each way of training."""

    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    pretrain: Stage = field(default_factory=Stage)
    joint: Stage = field(default_factory=Stage)
    adapt: Stage = field(default_factory=Stage)


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
    torch.manual_seed(stage.fit.seed)
    model = build_model(schema=data.schema, **with_vectors(model_options, data))
    if method == "joint":
        attach_(model, data.schema.num_domains, **asdict(recipe.adapter))
    return model, fit(model, data, stage.fit, stage.optimizer, checkpoint=checkpoint, on_progress=on_progress)


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
    freeze_(model, except_=stage.moving)
    return fit(
        model,
        data,
        stage.fit,
        stage.optimizer,
        start_is_candidate=True,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


def with_vectors(model_options: Mapping[str, Any], data: Rows) -> dict[str, Any]:
    """Options of a model with the pretrained vectors that its data come with, unless the options give vectors themselves.

    Example:
        >>> from domlora.data.synthetic import World
        >>> with_vectors({"name": "mlp"}, World().dataset(100, seed=1)[0])
        {'name': 'mlp'}
    """
    vectors: Mapping[str, Any] = getattr(data, "vectors", {})
    if not vectors or "pretrained" in model_options:
        return dict(model_options)
    learned: frozenset[str] = getattr(data, "trainable_vectors", frozenset())
    freeze = {name: name not in learned for name in vectors}
    return {**model_options, "pretrained": dict(vectors), "freeze_pretrained": freeze}


def adapter_options_of(method: str, recipe: Recipe) -> AdapterOptions:
    """The adapters that a method trains."""
    with_adapters = (*FIRST_STAGES[1:], *SECOND_STAGES)
    if method not in with_adapters:
        raise ConfigError("no adapters in this method", received=method, next_step=nearest(method, with_adapters))
    return replace(recipe.adapter, rank=0, bias=True) if method == "bias_only" else recipe.adapter


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with one seed in all its stages."""

    def stage(old: Stage) -> Stage:
        return replace(old, fit=replace(old.fit, seed=seed))

    return replace(recipe, pretrain=stage(recipe.pretrain), joint=stage(recipe.joint), adapt=stage(recipe.adapt))
