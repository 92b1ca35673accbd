"""Which parameter goes to which optimizer: tables, dense layers and adapters each have settings of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from domlora.adapters.bank import adapter_layers, is_adapter_parameter
from domlora.errors import ConfigError, nearest
from domlora.layers.embedding import EmbeddingTable
from domlora.training.rowwise import LazyAdam, RowWiseAdagrad

__all__ = ["FUSED", "Optimizer", "OptimizerOptions", "Rule", "parameter_groups"]

RuleName = Literal["adam", "adamw", "lazy_adam", "rowwise_adagrad", "fused_rowwise_adagrad"]

DENSE_RULES, LAZY_RULES = ("adam", "adamw"), ("lazy_adam", "rowwise_adagrad")
FUSED = "fused_rowwise_adagrad"
MANY_ROWS = 1_000_000

_TABLES = (EmbeddingTable, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one group of parameters moves.

    ``adam`` and ``adamw`` move every number in every step, as the papers do. ``lazy_adam`` and ``rowwise_adagrad`` move the
    rows of the batch alone (:mod:`domlora.training.rowwise` says how they differ), so a step costs as much as the batch
    has ids, however long a table or a bank of adapters is; they are for ``tables`` and ``adapters``. A DeepFM of 8 features
    of 16 numbers took (batches of 4,096 rows with uniform ids, one thread) as long with ``adam`` as with ``lazy_adam`` at
    1e4 values a feature, 1.7 times as long at 1e5 and 9 times as long at 1e6. ``fused_rowwise_adagrad`` is
    ``rowwise_adagrad`` for ``tables`` that FBGEMM keeps and ranks share (:mod:`domlora.training.distributed.tables`).

    Args:
        name: ``adam`` adds ``weight_decay * w`` to the gradient, which is an L2 penalty of half that weight in the loss
            and, on a table, draws the rows that a batch does not touch towards zero; ``adamw`` shrinks weights by
            ``lr * weight_decay`` a step, whatever their gradient; the lazy two do that to the rows of the batch alone.
        lr: learning rate. ``rowwise_adagrad`` wants more than Adam, 0.01 to 0.1.
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

    def __post_init__(self) -> None:
        if self.dense.name not in DENSE_RULES:
            raise ConfigError(
                "every batch touches all of a dense layer, so its rule cannot be a lazy one",
                received=self.dense.name,
                next_step=f"Set dense.name to one of {', '.join(map(repr, DENSE_RULES))}",
            )
        if self.adapters.name == FUSED:
            raise ConfigError(
                "fused rules are for tables alone",
                received=self.adapters.name,
                next_step="Set adapters.name to 'rowwise_adagrad', which has the same formula",
            )


def parameter_groups(model: nn.Module, *, frozen: bool = False) -> dict[str, list[nn.Parameter]]:
    """The parameters that move, with ``frozen`` those that do not too, as ``tables``, ``dense`` and ``adapters``."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _TABLES)
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
    """One torch optimizer for each rule name, with a parameter group for each rule.

    Under a lazy rule tables and adapted layers give sparse gradients from here on, under a dense one dense gradients.

    Args:
        model: its parameters that require a gradient when this is built are the ones that move.
        options: the rules.

    Attributes:
        lazy: the parameters under a lazy rule.

    Raises:
        ConfigError: no parameter moves, or fused tables where nothing keeps them.
    """

    def __init__(self, model: nn.Module, options: OptimizerOptions) -> None:
        rules = {"tables": options.tables, "dense": options.dense, "adapters": options.adapters}
        parameters_of = parameter_groups(model)
        by_rule: dict[Rule, list[nn.Parameter]] = {}  # equal rules share a group: one fused call instead of three
        for kind, parameters in parameters_of.items():
            if parameters:
                by_rule.setdefault(rules[kind], []).extend(parameters)
        by_name: dict[str, list[dict[str, Any]]] = {}
        for rule, parameters in by_rule.items():
            group = {"params": parameters, "lr": rule.lr, "weight_decay": rule.weight_decay}
            by_name.setdefault(rule.name, []).append(group)
        if not by_name:
            raise ConfigError("a model needs a parameter that moves", next_step="Call attach_ before freeze_")
        if FUSED in by_name:
            raise ConfigError(
                "fused tables are for methods base, joint, two_stage and bias_only",
                received=FUSED,
                next_step="Set tables.name to 'rowwise_adagrad', which has the same formula",
            )
        self._parts = {name: _KINDS[name](groups) for name, groups in by_name.items()}
        self._lrs = [group["lr"] for group in self._groups()]
        lazy = [part for name, part in self._parts.items() if name in LAZY_RULES]
        self.lazy = [p for part in lazy for group in part.param_groups for p in group["params"]]
        _set_sparse_(model, options)
        _warn_of_many_rows(parameters_of["tables"], options.tables)

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

    def named_state(self, model: nn.Module) -> dict[str, Tensor]:
        """As :meth:`state`, but by the names of the parameters: ``RULE/PARAMETER/KEY``."""
        names, found = self._names(model), {}
        for key, value in self.state().items():
            rule, number, what = key.split(".")
            found[f"{rule}/{names[rule][int(number)]}/{what}"] = value
        return found

    def load_named_state(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`named_state` gave, as far as rules and parameters are the same; others start anew."""
        numbers = {(rule, name): n for rule, names in self._names(model).items() for n, name in enumerate(names)}
        found = {}
        for key, value in tensors.items():
            rule, name, what = key.split("/")
            if (rule, name) in numbers:
                found[f"{rule}.{numbers[rule, name]}.{what}"] = value
        self.load_state(found)

    def _names(self, model: nn.Module) -> dict[str, list[str]]:
        """The parameters of each rule, in the order of its state."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            rule: [names[id(p)] for group in part.param_groups for p in group["params"]]
            for rule, part in self._parts.items()
        }

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts.values() for group in part.param_groups]


_KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "lazy_adam": LazyAdam,
    "rowwise_adagrad": RowWiseAdagrad,
}


def _set_sparse_(model: nn.Module, options: OptimizerOptions) -> None:
    """Sparse gradients where a lazy rule reads them, dense ones elsewhere."""
    lazy = options.tables.name in LAZY_RULES
    for module in model.modules():
        if isinstance(module, _TABLES):
            # torch has no sparse gradient of a maximum; the lazy rules take the dense one
            setattr(module, "sparse", lazy and getattr(module, "mode", "") != "max")  # noqa: B010 - of three types
    for layer in adapter_layers(model).values():
        layer.sparse = options.adapters.name in LAZY_RULES


def _warn_of_many_rows(tables: list[nn.Parameter], rule: Rule) -> None:
    num_rows = sum(len(table) for table in tables)
    if num_rows > MANY_ROWS and rule.name in DENSE_RULES:
        warnings.warn(
            f"{rule.name!r} moves all {num_rows:,} rows of the tables in every step; 'lazy_adam' and 'rowwise_adagrad' move "
            "those of the batch alone, with which a DeepFM of 8 million rows trained 9 times as fast. Set tables.name",
            stacklevel=3,
        )
