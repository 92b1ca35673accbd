"""Which parameter goes to which optimizer: tables, dense layers and adapters each have settings of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from domlora.adapters.bank import is_adapter_parameter
from domlora.errors import ConfigError, nearest
from domlora.layers.embedding import EmbeddingTable

__all__ = ["Optimizer", "OptimizerOptions", "Rule", "parameter_groups"]

RuleName = Literal["adam", "adamw"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one group of parameters moves.

    Args:
        name: ``adam`` adds ``weight_decay * w`` to the gradient, which is an L2 penalty of half that weight in the loss
            and, on a table, draws the rows that a batch does not touch towards zero; ``adamw`` shrinks weights by
            ``lr * weight_decay`` a step, whatever their gradient.
        lr: learning rate.
        weight_decay: see ``name``.
    """

    name: RuleName = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(RuleName):
            raise ConfigError(
                "an optimizer has an unknown name",
                received=self.name,
                next_step=nearest(str(self.name), get_args(RuleName)),
            )
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError("an optimizer needs lr above 0 and weight_decay of at least 0", received=self)


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """A rule for embedding tables, one for adapters and one for everything else."""

    tables: Rule = field(default_factory=Rule)
    dense: Rule = field(default_factory=Rule)
    adapters: Rule = field(default_factory=Rule)


def parameter_groups(model: nn.Module, *, frozen: bool = False) -> dict[str, list[nn.Parameter]]:
    """The parameters that move, with ``frozen`` those that do not too, as ``tables``, ``dense`` and ``adapters``."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, EmbeddingTable | nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, list[nn.Parameter]] = {"tables": [], "dense": [], "adapters": []}
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or frozen):
            continue
        kind = "adapters" if is_adapter_parameter(name) else "tables" if id(parameter) in tables else "dense"
        groups[kind].append(parameter)
    return groups


class Optimizer:
    """One fused torch optimizer for each rule name, with a parameter group for each rule.

    Args:
        model: its parameters that require a gradient when this is built are the ones that move.
        options: the rules.

    Raises:
        ConfigError: no parameter moves.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        rules = {"tables": options.tables, "dense": options.dense, "adapters": options.adapters}
        by_rule: dict[Rule, list[nn.Parameter]] = {}  # equal rules share a group: one fused call instead of three
        for kind, parameters in parameter_groups(model).items():
            if parameters:
                by_rule.setdefault(rules[kind], []).extend(parameters)
        by_name: dict[str, list[dict[str, Any]]] = {}
        for rule, parameters in by_rule.items():
            group = {"params": parameters, "lr": rule.lr, "weight_decay": rule.weight_decay}
            by_name.setdefault(rule.name, []).append(group)
        if not by_name:
            raise ConfigError("a model needs a parameter that moves", next_step="Call attach_ before freeze_")
        classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self._parts = {name: classes[name](groups, fused=True) for name, groups in by_name.items()}
        self._lrs = [group["lr"] for group in self._groups()]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=True)

    def step(self, lr_factor: float = 1.0) -> None:
        """Move every parameter once, at ``lr_factor`` times its learning rate."""
        for group, lr in zip(self._groups(), self._lrs, strict=True):
            group["lr"] = lr * lr_factor
        for part in self._parts.values():
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as flat tensors, for a checkpoint."""
        return {
            f"{name}.{number}.{key}": value
            for name, part in self._parts.items()
            for number, entry in part.state_dict()["state"].items()
            for key, value in entry.items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        for name, part in self._parts.items():
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                owner, number, what = key.split(".")
                if owner == name:
                    entries.setdefault(int(number), {})[what] = value
            part.load_state_dict({"state": entries, "param_groups": part.state_dict()["param_groups"]})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts.values() for group in part.param_groups]
