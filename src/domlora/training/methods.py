"""Methods by name: what ``study`` compares and what ``pretrain`` and ``adapt`` are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from domlora.errors import ConfigError, nearest
from domlora.training.fit import Fit, OnProgress, Rows
from domlora.training.stages import FIRST_STAGES, SECOND_STAGES, Recipe, adapt, pretrain, with_vectors

__all__ = ["METHODS", "Job", "Method", "Trained", "train"]


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


def train(method: str, job: Job) -> Trained:
    """Train by a method.

    Raises:
        ConfigError: no such method, or it starts from a base and none is given.
    """
    if method not in METHODS:
        raise ConfigError("no method has this name", received=method, next_step=nearest(method, METHODS))
    if METHODS[method].from_base and job.base is None:
        raise ConfigError(f"method {method!r} starts from a trained base", received=None)
    return METHODS[method].run(job)


def _first(method: str) -> Callable[[Job], Trained]:
    def run(job: Job) -> Trained:
        options = with_vectors(job.model_options, job.data)
        model, found = pretrain(
            job.data, options, job.recipe, method=method, checkpoint=job.checkpoint, on_progress=job.on_progress
        )
        return Trained(model, options, found)

    return run


def _second(method: str) -> Callable[[Job], Trained]:
    def run(job: Job) -> Trained:
        assert job.base is not None
        found = adapt(
            job.base, job.data, job.recipe, method=method, checkpoint=job.checkpoint, on_progress=job.on_progress
        )
        return Trained(job.base, dict(job.model_options), found)

    return run


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
}
"""Every method by its exact key."""
