"""Adapters that were trained together with their backbone, or none: validation decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from domlora.evaluation.paired import wauc_difference
from domlora.training.fit import Fit, OnProgress, Rows
from domlora.training.stages import Recipe, pretrain
from domlora.training.validation import figures_of, say

__all__ = ["joint_or_base"]


def joint_or_base(
    base: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, Fit]:
    """Train ``joint``, and keep it where it is better than the base by more than chance.

    Joint training wins where domains differ and loses where they do not, and nobody knows beforehand which of the two it
    is. It is kept if its WAUC on the validation split is ``recipe.auto.min_gain`` standard errors of the paired difference
    (DeLong, summed over domains) above the base's; otherwise the base is returned as it came.

    Args:
        base: a trained model without adapters.
        recipe: its ``adapter``, ``joint`` and ``auto``.

    Returns:
        The one or the other, and its figures: validation ``epoch`` 0 is the base.
    """
    joint, found = pretrain(data, model_options, recipe, method="joint", checkpoint=checkpoint, on_progress=on_progress)
    before, after = say(base, data), say(joint, data)
    start = {"epoch": 0.0, "loss": float("nan"), **figures_of(before)}
    gain = wauc_difference(after.label, after.probability, before.probability, after.domain)
    if gain.value > recipe.auto.min_gain * gain.standard_error:
        return joint, replace(found, history=[start, *found.history])
    value = start[recipe.joint.fit.monitor]
    return base.eval(), replace(found, best_value=value, best_epoch=0.0, history=[start])
