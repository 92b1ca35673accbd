"""A model for each domain: ``separate`` ones, or copies of a shared base that are finetuned.

Each domain stops early by its own validation rows. One without training rows, or without validation rows of both classes,
keeps what it starts from: the base, or among separate models what unknown domains get.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from domlora.adapters.attach import freeze_, movable
from domlora.adapters.root import find_route
from domlora.errors import ConfigError, DataError
from domlora.models.build import build_model
from domlora.models.per_domain import PerDomain
from domlora.training.fit import Fit, OnProgress, Rows, fit
from domlora.training.rows import OneDomain
from domlora.training.stages import Stage, with_vectors
from domlora.training.validation import scores_of

__all__ = ["Part", "copies_of", "finetune", "fit_part", "separate", "summed"]


def separate(
    data: Rows,
    model_options: Mapping[str, Any],
    stage: Stage,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[PerDomain, dict[str, Any], Fit]:
    """One model for each domain, each trained on its own rows alone; all start from the same random weights.

    What a domain's model becomes is, bit for bit, what ``pretrain`` makes of its rows. Unknown domains get the mean of
    the logits of all.

    Returns:
        The models as one, what ``build_model`` must be given to make its like, and the fit of the whole: its only figures
        are those of all domains at the end; ``best_epoch`` is the mean over rows of the domains' own.

    Raises:
        DataError: no domain can be trained by itself.
    """
    options = {**with_vectors(model_options, data), "per_domain": True, "unknown_domains": "mean"}
    torch.manual_seed(stage.fit.seed)
    model = cast(PerDomain, build_model(schema=data.schema, **options))
    parts = _fit_copies(model, data, stage, start_is_candidate=False, checkpoint=checkpoint, on_progress=on_progress)
    if not parts:
        raise DataError("a domain must have training rows, and validation rows of both classes", received="none has")
    found = summed(parts, data.num_rows("train"))
    _conclude(found, parts, scores_of(model, data), stage)
    return model.eval(), options, found


def finetune(
    base: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    stage: Stage,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[PerDomain, dict[str, Any], Fit]:
    """A copy of a trained base for each domain, finetuned whole on the domain's rows; unknown domains get the base.

    The base is a candidate in each domain, so none ends worse than it on the validation split.

    Args:
        base: as ``build_model`` makes it of ``model_options``.
        stage: ``moving`` names what moves; nothing named means everything.
    """
    model, options = copies_of(base, data, model_options)
    start = scores_of(model, data)
    if stage.moving:
        for each in model.copies:
            freeze_(each, except_=movable(each, stage.moving))
    parts = _fit_copies(model, data, stage, start_is_candidate=True, checkpoint=checkpoint, on_progress=on_progress)
    found = summed(parts, data.num_rows("train"))
    found.history.append({"epoch": 0.0, "loss": math.nan, **start})
    found.best_value = start[stage.fit.monitor]
    if found.best_epoch:
        _conclude(found, parts, scores_of(model, data), stage)
    if found.best_value < start[stage.fit.monitor]:  # a gain so small that rounding in other batches undoes it
        _start_again_(model, base)
        found.best_value, found.best_epoch = start[stage.fit.monitor], 0.0
    return model.eval(), options, found


def copies_of(base: nn.Module, data: Rows, model_options: Mapping[str, Any]) -> tuple[PerDomain, dict[str, Any]]:
    """A trained base once for each domain and once for unknown ones, and the options that build the like.

    Raises:
        ConfigError: the base has adapters, or is one for each domain already.
    """
    if find_route(base) is not None or isinstance(base, PerDomain):
        raise ConfigError(
            "a base must be one model without adapters",
            received=type(base).__name__,
            next_step="Start from what method 'base' made",
        )
    options = {**with_vectors(model_options, data), "per_domain": True, "unknown_domains": "base"}
    model = cast(PerDomain, build_model(schema=data.schema, **options))
    _start_again_(model, base)
    return model, options


def _start_again_(model: PerDomain, base: nn.Module) -> None:
    weights = base.state_dict()
    for copy in (*model.copies, cast(nn.Module, model.base)):
        copy.load_state_dict(weights)


class Part(NamedTuple):
    """A fit on some of the rows, and how many."""

    num_rows: int
    fit: Fit


def fit_part(
    model: nn.Module,
    rows: OneDomain,
    stage: Stage,
    *,
    start_is_candidate: bool,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Part:
    """Fit on the rows of one domain, which may be too few to validate as often as the stage says."""
    num_rows = rows.num_rows("train")
    most = math.ceil(num_rows / stage.fit.batch_size)
    options = replace(stage.fit, evaluations_per_epoch=min(stage.fit.evaluations_per_epoch, most))
    found = fit(
        model,
        rows,
        options,
        stage.optimizer,
        start_is_candidate=start_is_candidate,
        checkpoint=checkpoint,
        on_progress=on_progress,
    )
    return Part(num_rows, found)


def summed(parts: Sequence[Part], num_rows: int) -> Fit:
    """What several fits took together; ``best_epoch`` counts passes over ``num_rows`` rows. Without figures as yet."""
    seconds = sum(part.fit.seconds for part in parts)
    trained = sum(part.num_rows * part.fit.history[-1]["epoch"] for part in parts)
    best = sum(part.num_rows * part.fit.best_epoch for part in parts)
    return Fit(best_epoch=best / num_rows, seconds=seconds, rows_per_second=trained / seconds if seconds else 0.0)


def _fit_copies(
    model: PerDomain,
    data: Rows,
    stage: Stage,
    *,
    start_is_candidate: bool,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> list[Part]:
    parts = []
    for domain, copy in enumerate(model.copies):
        rows = OneDomain(data, domain)
        if not rows.can_be_trained:
            model.own[domain] = False
            continue
        folder = None if checkpoint is None else checkpoint / f"domain-{domain}"
        parts.append(
            fit_part(
                copy,
                rows,
                stage,
                start_is_candidate=start_is_candidate,
                checkpoint=folder,
                on_progress=on_progress,
            )
        )
    return parts


def _conclude(found: Fit, parts: Sequence[Part], scores: dict[str, float], stage: Stage) -> None:
    """Add the figures of all domains at the end."""
    losses = [(part.num_rows, _loss_at_best(part.fit)) for part in parts]
    known = [(rows, loss) for rows, loss in losses if not math.isnan(loss)]
    loss = sum(rows * loss for rows, loss in known) / sum(rows for rows, _ in known)
    found.history.append({"epoch": found.best_epoch, "loss": loss, **scores})
    found.best_value = scores[stage.fit.monitor]


def _loss_at_best(found: Fit) -> float:
    return next(entry["loss"] for entry in found.history if entry["epoch"] == found.best_epoch)
