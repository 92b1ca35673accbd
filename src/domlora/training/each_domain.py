"""A second stage in which each domain stops by itself, and keeps its adapter only where validation says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from domlora.adapters.attach import attach_, freeze_
from domlora.adapters.bank import is_adapter_parameter
from domlora.adapters.root import disabled
from domlora.errors import ConfigError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.metrics import auc_by_group
from domlora.evaluation.paired import auc_differences
from domlora.evaluation.rows import Bools
from domlora.training.fit import Fit, OnProgress, Rows, Run
from domlora.training.stages import Recipe
from domlora.training.validation import say

__all__ = ["adapt_each"]


def adapt_each(
    model: nn.Module,
    data: Rows,
    recipe: Recipe,
    *,
    stepped: Callable[[nn.Module], nn.Module] | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Fit:
    """Train adapters on a frozen base, as ``two_stage``; every domain takes the validation that was best for it.

    On a frozen base the rows of a bank are independent of each other: what one domain learns changes no other domain's
    logit. So each domain keeps the row with which its own validation AUC was highest, whenever that was, and a row of
    zeros, the base, where no validation was ``min_gain`` standard errors above the base. Training stops after ``patience``
    validations in which no domain got better.

    ``Fit.history`` tells the figures of what is kept so far, not of the weights of the moment.

    Args:
        model: a model without adapters; changed in place.
        recipe: its ``adapter``, ``adapt`` and ``auto``.
        stepped: makes of the adapted and frozen model what the steps run, if not the model itself; its rows, too, must be
            independent of each other, and its adapters the model's.

    Raises:
        ConfigError: ``recipe.adapt.moving`` is not empty: domains would not be independent.
    """
    stage = recipe.adapt
    if stage.moving:
        raise ConfigError("domains stop one by one only on a base that stands still", received=stage.moving)
    torch.manual_seed(stage.fit.seed)
    attach_(model, data.schema.num_domains, **asdict(recipe.adapter))
    freeze_(model)
    moved = None if stepped is None else stepped(model)
    run = _EachDomain(model, data, stage.fit, stage.optimizer, on_progress, checkpoint, stepped=moved)
    run.min_gain = recipe.auto.min_gain
    run.identity |= {"min_gain": repr(run.min_gain)} if run.identity else {}
    return run.go(start_is_candidate=True)


class _EachDomain(Run):
    """``base`` and ``kept`` are what the base says about the validation rows, and what the rows kept so far say."""

    min_gain: float
    base: Predictions | None = None
    kept: Predictions
    better: Bools

    def say(self, model: nn.Module) -> Predictions:
        if self.base is None:
            self.look_back(model)
        said = say(model, self.data)
        self.better = self.who_is_better(said)
        chosen = self.better[said.domain] & (said.domain >= 0)
        self.kept = said._replace(probability=np.where(chosen, said.probability, self.kept.probability))
        return self.kept

    def remember(self, model: nn.Module) -> None:
        if not self.best:
            return super().remember(model)
        rows = torch.from_numpy(np.flatnonzero(self.better))
        for name, bank in model.named_parameters(remove_duplicate=False):  # a layer in two places has two names
            if is_adapter_parameter(name):
                self.best[name][rows] = bank.detach()[rows].to(self.best[name].device)
        return None

    def look_back(self, model: nn.Module) -> None:
        """Score the validation rows with the base and, where a run goes on, with what it keeps."""
        with disabled(model):
            self.base = self.kept = say(model, self.data)
        if self.best:
            kept = copy.deepcopy(model)
            kept.load_state_dict(self.best)
            self.kept = say(kept, self.data)

    def who_is_better(self, said: Predictions) -> Bools:
        """``(D,)`` which domains are better than what they keep, and enough better than the base."""
        assert self.base is not None
        known = said.domain >= 0
        label, domain, num_domains = said.label[known], said.domain[known], self.data.schema.num_domains
        weight = None if said.weight is None else said.weight[known]
        now, before = (
            auc_by_group(label, one.probability[known], domain, num_domains, weight) for one in (said, self.kept)
        )
        base = self.base.probability[known]
        gain = auc_differences(label, said.probability[known], base, domain, num_domains)
        chance = self.min_gain * gain.standard_error if self.min_gain else 0.0  # nobody knows it for one click
        found: Bools = (now > before) & (gain.value > chance)
        return found
