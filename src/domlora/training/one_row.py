"""Training one row of a bank on a base that stands still, drawn back to where it started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, detach_, freeze_, options_of
from domlora.adapters.bank import distinct_layers
from domlora.errors import ConfigError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.metrics import log_loss, macro_auc, wauc
from domlora.training.fit import FitOptions, OnProgress, Rows, Run
from domlora.training.new_words import NewWords
from domlora.training.optimizers import Optimizer, OptimizerOptions, parameter_groups

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
        words: rows of its tables that learn too; of these tables only they are held.
    """

    def __init__(self, model: nn.Module, words: NewWords | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(distinct_layers(model).values())
        self.tables = nn.ModuleList([] if words is None else words.release_(model))
        self.words = words
        self._whole = (model,)  # in a tuple torch does not count it

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the adapted layers, and the rows that learn."""
        state = {name: value for name, value in super().state_dict(*args, **kwargs).items() if name[:6] != "tables"}
        rows = {} if self.words is None else self.words.of(self._whole[0])
        return {**state, **{f"words.{name}": value for name, value in rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What :meth:`state_dict` gave."""
        words = {name.removeprefix("words."): value for name, value in state.items() if name.startswith("words.")}
        if self.words is not None:
            self.words.load_(self._whole[0], words)
        return self.layers.load_state_dict(
            {name.removeprefix("layers."): v for name, v in state.items() if name.startswith("layers.")}, strict, assign
        )

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
        start: what the model says about the validation rows before the first step, if that is known.

    Attributes:
        said: what the best one says about them; None for a run that had ended before.

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
        start: Predictions | None = None,
        checkpoint: Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.pull, self.base, self.by_loss, self.start = pull, base, by_loss, start
        self.last: Predictions | None = None
        self.said: Predictions | None = None
        super().__init__(model, data, options, rules, on_progress, checkpoint)
        self.optimizer = _Pulled(model, rules, pull)

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        """The base too: a checkpoint of adapters does not hold it."""
        return {**super().identify(rules), "base": self.base, "pull": repr(self.pull)}

    @property
    def monitor(self) -> str:
        return "likelihood" if self.by_loss else self.options.monitor

    def say(self, model: nn.Module) -> Predictions:
        fresh = not self.result.history and self.start is not None
        self.last = cast(Predictions, self.start) if fresh else super().say(model)
        return self.last

    def remember(self, model: nn.Module) -> None:
        super().remember(model)
        self.said = self.last

    def scores(self, model: nn.Module) -> dict[str, float]:
        label, probability, domain, weight, _ = self.say(model)
        loss = log_loss(label, probability, weight)
        found = {"log_loss": loss, "likelihood": -loss}
        aucs = {"wauc": wauc, "macro_auc": macro_auc}
        return {**{name: auc(label, probability, domain, weight) for name, auc in aucs.items()}, **found}


class _Pulled(Optimizer):
    """An optimizer that draws adapters back to where they were when it was built; rows of tables are free."""

    def __init__(self, model: nn.Module, options: OptimizerOptions, pull: float) -> None:
        super().__init__(model, options)
        self.strength = options.adapters.lr * pull
        moving = parameter_groups(model)["adapters"]
        self.starts = [(p, p.detach().clone()) for p in moving]

    def step(self, lr_factor: float = 1.0) -> None:
        """Move, then draw back."""
        super().step(lr_factor)
        strength = self.strength * lr_factor
        if strength:
            with torch.no_grad():
                for parameter, start in self.starts:
                    parameter.lerp_(start, strength / (1.0 + strength))
