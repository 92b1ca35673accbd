"""Methods by name: what ``study`` compares and what ``pretrain`` and ``adapt`` are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from domlora.errors import ConfigError, nearest
from domlora.training.choice import joint_or_base
from domlora.training.crossfit import crossfit
from domlora.training.each_domain import adapt_each
from domlora.training.engine import engine
from domlora.training.fit import Fit, OnProgress, Rows
from domlora.training.legacy import fit_legacy
from domlora.training.mixture import mix
from domlora.training.negotiation import negotiate, regularise
from domlora.training.per_domain import finetune, separate
from domlora.training.stages import FIRST_STAGES, SECOND_STAGES, Recipe, adapt, pretrain, with_vectors

__all__ = ["METHODS", "Job", "Method", "Trained", "method_named", "train"]


@dataclass(frozen=True, slots=True)
class Job:
    """What there is to train with.

    Args:
        data: rows with the splits ``train`` and ``valid``.
        model_options: what ``build_model`` is given: ``name`` and options.
        recipe: how each stage trains.
        base: the trained base, for methods that start from one; it is changed or not, and not to be used afterwards.
        checkpoint, on_progress: as in :func:`domlora.training.fit.fit`.
    """

    data: Rows
    model_options: Mapping[str, Any]
    recipe: Recipe
    base: nn.Module | None = None
    checkpoint: Path | None = None
    on_progress: OnProgress | None = None

    @property
    def start(self) -> nn.Module:
        """The base, for methods that start from one."""
        assert self.base is not None  # train saw to it
        return self.base

    @property
    def watched(self) -> dict[str, Any]:
        """What every method is told beside what it trains."""
        return {"checkpoint": self.checkpoint, "on_progress": self.on_progress}


class Trained(NamedTuple):
    """A model, what ``build_model`` must be given to make its like, and how it was found."""

    model: nn.Module
    model_options: dict[str, Any]
    fit: Fit


@dataclass(frozen=True, slots=True)
class Method:
    """One way to come to a model.

    Args:
        text: what it is, in a line.
        run: does it.
        parts: fields of ``Recipe`` that it reads; a study runs it again only if one of them changes.
        from_base: whether it starts from a trained base.
    """

    text: str
    run: Callable[[Job], Trained]
    parts: tuple[str, ...]
    from_base: bool = False


def method_named(name: str) -> Method:
    """One of ``METHODS``.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError("no method has this name", received=name, next_step=nearest(name, METHODS))
    return METHODS[name]


def train(method: str, job: Job) -> Trained:
    """Train by a method.

    Raises:
        ConfigError: no such method, one that ranks cannot share, or it starts from a base and none is given, or the other
            way round.
    """
    from_base, given = method_named(method).from_base, job.base is not None
    if from_base != given:
        start, verb = ("a trained base", "adapt --bundle BASE") if from_base else ("nothing", "pretrain")
        raise ConfigError(
            f"method {method!r} starts from {start}",
            received="a base" if given else "no base",
            next_step=f"Train with: domlora {verb} --method {method}",
        )
    if engine().size > 1 and method not in _ON_RANKS:
        raise ConfigError(
            f"method {method!r} trains in one process",
            received=f"{engine().size} ranks",
            next_step=f"Start it without torchrun, or take one of {', '.join(_ON_RANKS)}",
        )
    return METHODS[method].run(job)


def _first(method: str) -> Callable[[Job], Trained]:
    def run(job: Job) -> Trained:
        options = with_vectors(job.model_options, job.data)
        model, found = pretrain(job.data, options, job.recipe, method=method, **job.watched)
        return Trained(model, options, found)

    return run


def _in_place(adapters: Callable[[Job], Fit]) -> Callable[[Job], Trained]:
    """Methods that give the base adapters and leave the options it was built with."""
    return lambda job: Trained(job.start, dict(job.model_options), adapters(job))


def _second(method: str) -> Callable[[Job], Trained]:
    return _in_place(lambda job: adapt(job.start, job.data, job.recipe, method=method, **job.watched))


def _legacy(adapted: bool) -> Callable[[Job], Trained]:
    def run(job: Job) -> Trained:
        options, recipe = with_vectors(job.model_options, job.data), job.recipe
        return Trained(
            *fit_legacy(job.data, options, recipe.legacy, recipe.adapter if adapted else None, **job.watched)
        )

    return run


def _choose(job: Job) -> Trained:
    model, found = joint_or_base(job.start, job.data, job.model_options, job.recipe, **job.watched)
    return Trained(model, dict(job.model_options), found)


def _separate(job: Job) -> Trained:
    return Trained(*separate(job.data, job.model_options, job.recipe.separate, **job.watched))


def _finetune(job: Job) -> Trained:
    return Trained(*finetune(job.start, job.data, job.model_options, job.recipe.finetune, **job.watched))


def _negotiate(regularised: bool) -> Callable[[Job], Trained]:
    def run(job: Job) -> Trained:
        rules = job.recipe.negotiation
        return Trained(*negotiate(job.data, job.model_options, rules, regularised=regularised, **job.watched))

    return run


def _regularise(job: Job) -> Trained:
    return Trained(*regularise(job.start, job.data, job.model_options, job.recipe.negotiation, **job.watched))


def _mix(job: Job) -> Trained:
    recipe = job.recipe
    return Trained(
        job.start, *mix(job.start, job.data, job.model_options, recipe.adapter, recipe.mixture, **job.watched)
    )


_ON_RANKS = (*FIRST_STAGES, *SECOND_STAGES, "auto", "joint_or_base")
"""What several processes can train together; the other methods have steps of their own."""

_BASE, _JOINT = FIRST_STAGES
_TWO_STAGE, _BIAS_ONLY = SECOND_STAGES

METHODS: dict[str, Method] = {
    _BASE: Method("the backbone on all domains", _first(_BASE), ("pretrain",)),
    _JOINT: Method("backbone and adapters together from the start", _first(_JOINT), ("joint", "adapter")),
    _TWO_STAGE: Method(
        "the backbone, then frozen; adapters alone afterwards",
        _second(_TWO_STAGE),
        ("pretrain", "adapt", "adapter"),
        from_base=True,
    ),
    _BIAS_ONLY: Method(
        "as two_stage, but a domain may only shift each layer's bias",
        _second(_BIAS_ONLY),
        ("pretrain", "adapt", "adapter"),
        from_base=True,
    ),
    "auto": Method(
        "as two_stage, but each domain stops by itself and uses its adapter only where validation says so",
        _in_place(lambda job: adapt_each(job.start, job.data, job.recipe, **job.watched)),
        ("pretrain", "adapt", "adapter", "auto"),
        from_base=True,
    ),
    "joint_or_base": Method(
        "joint where it is better on validation by more than chance, otherwise the base",
        _choose,
        ("pretrain", "joint", "adapter", "auto"),
        from_base=True,
    ),
    "crossfit": Method(
        "as auto, but adapters learn from rows scored with embeddings that never saw their labels",
        _in_place(lambda job: crossfit(job.start, job.data, job.model_options, job.recipe, **job.watched)),
        ("pretrain", "crossfit", "adapt", "adapter", "auto"),
        from_base=True,
    ),
    "separate": Method("one model for each domain, each on its own rows alone", _separate, ("separate",)),
    "finetune": Method(
        "the backbone, then a copy for each domain, finetuned whole on its rows",
        _finetune,
        ("pretrain", "finetune"),
        from_base=True,
    ),
    "dn": Method(
        "domain negotiation: domains in turn, and a step towards where they led", _negotiate(False), ("negotiation",)
    ),
    "dr": Method(
        "the backbone, then what each domain adds to its weights, by domain regularisation",
        _regularise,
        ("pretrain", "negotiation"),
        from_base=True,
    ),
    "mamdr": Method("domain negotiation and domain regularisation together", _negotiate(True), ("negotiation",)),
    "moe_mlora": Method(
        "the backbone, then frozen; low-rank experts each on one domain, then a gate that mixes them",
        _mix,
        ("pretrain", "adapter", "mixture"),
        from_base=True,
    ),
    "legacy_base": Method("the backbone as the authors' released code trains it", _legacy(False), ("legacy",)),
    "legacy_mlora": Method(
        "backbone and adapters as the authors' released code trains them", _legacy(True), ("legacy", "adapter")
    ),
}
"""Every method by its exact key."""
