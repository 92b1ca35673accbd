"""What a model is worth on the validation split while it trains."""

from __future__ import annotations

import math

from torch import nn

from domlora.errors import DataError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.metrics import log_loss, macro_auc, wauc
from domlora.training.engine import engine
from domlora.training.rows import Rows

__all__ = ["figures_of", "say", "scores_of"]


def scores_of(model: nn.Module, data: Rows) -> dict[str, float]:
    """:func:`figures_of` what a model says about the validation split."""
    return figures_of(say(model, data))


def say(model: nn.Module, data: Rows) -> Predictions:
    """What a model says about the validation split."""
    return engine().say(model, data)


def figures_of(said: Predictions) -> dict[str, float]:
    """``wauc``, ``macro_auc`` and ``log_loss``.

    Raises:
        DataError: no domain has two classes.
    """
    scores = {
        "wauc": wauc(said.label, said.probability, said.domain, said.weight),
        "macro_auc": macro_auc(said.label, said.probability, said.domain, said.weight),
        "log_loss": log_loss(said.label, said.probability, said.weight),
    }
    if math.isnan(scores["wauc"]):
        raise DataError("a domain of the validation split must hold both classes", received=scores["wauc"])
    return scores
