"""Training one row of a bank on a base that stands still, drawn back to where it started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, detach_, freeze_, options_of
from domlora.adapters.bank import distinct_layers
from domlora.errors import ConfigError
from domlora.evaluation.metrics import log_loss, macro_auc, wauc
from domlora.training.fit import FitOptions, OnProgress, Rows, Run
from domlora.training.optimizers import Optimizer, OptimizerOptions

__all__ = ["Adapters", "OneRow", "alone"]


def alone(model: nn.Module) -> nn.Module:
    """Turn an adapted model into one with a bank of a single fresh row, which every row of data has, and freeze its base.

    The base is still told each row's own domain.
    """
    options = options_of(model)
    if options is None:
        raise ConfigError("the model has no adapters", next_step="Call attach_(model, num_domains=...) first")
    chosen = {name: getattr(options, name) for name in options.__dataclass_fields__}
    return freeze_(attach_(detach_(model), 1, **chosen, domain=_row_0))


def _row_0(ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG001 - the arguments of every model
    return torch.zeros_like(domain)


class Adapters(nn.Module):
    """A model that counts as its adapted layers alone, so that best weights and checkpoints do not hold its tables.

    Args:
        model: frozen but for its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(distinct_layers(model).values())
        self._whole = (model,)  # in a tuple torch does not count it

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        return cast(Tensor, self._whole[0](ids, dense, domain))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapters:
        """What ``to`` calls: the whole model moves."""
        self._whole[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Adapters:
        """As of the whole model: its dropout is alive while the adapters learn."""
        super().train(mode)
        self._whole[0].train(mode)
        return self


class OneRow(Run):
    """A run that moves adapters, each step followed by ``w <- w0 + (w - w0) / (1 + lr * pull)`` with ``w0`` the start.

    That is the proximal step of ``pull / 2 |w - w0|^2``: decoupled, as the weight decay of AdamW, and stable for any pull.

    Args:
        base: what else the run depends on; a checkpoint of another is refused.
        by_loss: the log loss of the validation rows decides, because they are of one class.

    **Source**: a Gaussian prior around the start (L2-SP, Li et al. 2018), decoupled as Loshchilov and Hutter 2019.
    """

    def __init__(
        self,
        model: Adapters,
        data: Rows,
        options: FitOptions,
        rules: OptimizerOptions,
        pull: float,
        *,
        base: str = "",
        by_loss: bool = False,
        checkpoint: Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.pull, self.base, self.by_loss = pull, base, by_loss
        super().__init__(model, data, options, rules, on_progress, checkpoint)
        self.optimizer = _Pulled(model, rules, pull)

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        """The base too: a checkpoint of adapters does not hold it."""
        return {**super().identify(rules), "base": self.base, "pull": repr(self.pull)}

    @property
    def monitor(self) -> str:
        return "likelihood" if self.by_loss else self.options.monitor

    def scores(self, model: nn.Module) -> dict[str, float]:
        label, probability, domain, weight, _ = self.say(model)
        loss = log_loss(label, probability, weight)
        found = {"log_loss": loss, "likelihood": -loss}
        aucs = {"wauc": wauc, "macro_auc": macro_auc}
        return {**{name: auc(label, probability, domain, weight) for name, auc in aucs.items()}, **found}


class _Pulled(Optimizer):
    """An optimizer that draws adapters back to where they were when it was built."""

    def __init__(self, model: nn.Module, options: OptimizerOptions, pull: float) -> None:
        super().__init__(model, options)
        self.strength = options.adapters.lr * pull
        self.starts = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def step(self, lr_factor: float = 1.0) -> None:
        """Move, then draw back."""
        super().step(lr_factor)
        strength = self.strength * lr_factor
        if strength:
            with torch.no_grad():
                for parameter, start in self.starts:
                    parameter.lerp_(start, strength / (1.0 + strength))
