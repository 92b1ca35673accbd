"""Putting adapters beside the linear layers of any model, and taking them off again.

attach_(model, num_domains=3)          # every nn.Linear that matches, in place
freeze_(model)                         # only adapters move from here on
load_rows_(model, 2, rows_of(model, 0))  # one domain = one row of every bank
merge_(model, 1)                       # one domain as a plain model
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from domlora.adapters.bank import adapter_layers, check_domain, distinct_layers, is_adapter_parameter
from domlora.adapters.lowrank import LowRankLinear, rank_for
from domlora.adapters.root import DomainOf, close_route, find_reader, find_route, open_route
from domlora.adapters.route import DomainRoute
from domlora.errors import ConfigError, nearest

__all__ = [
    "AdapterOptions",
    "attach_",
    "chosen_layers",
    "detach_",
    "freeze_",
    "merge_",
    "movable",
    "options_of",
    "with_layer",
]


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """What :func:`attach_` is told, as a value that can be stored beside a model; see there for each option.

    ``include`` names the paper's layers, the tower of this library's models; ``attach_`` by itself takes every linear layer.
    """

    temperature: float = 16.0
    rank: int | None = None
    lora_alpha: float | None = None
    bias: bool = True
    include: tuple[str, ...] = ("tower.*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError("temperature must be above 0", received=self.temperature)
        if self.rank is not None and (self.rank < 0 or (self.rank == 0 and not self.bias)):
            raise ConfigError("rank must be at least 1, or 0 and a bias", received=(self.rank, self.bias))
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ConfigError("lora_alpha must be above 0", received=self.lora_alpha)


def attach_(
    model: nn.Module,
    num_domains: int,
    *,
    temperature: float = 16.0,
    rank: int | None = None,
    lora_alpha: float | None = None,
    bias: bool = True,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    domain: str | DomainOf | None = "domain",
) -> nn.Module:
    """Give chosen ``nn.Linear`` layers of ``model`` a low-rank correction for each domain, in place.

    The output does not change until an adapter is trained.

    Args:
        num_domains: rows of every bank; :func:`domlora.adapters.bank.add_domain_` adds more.
        temperature: the rank of a layer is ``max(out_features // temperature, 1)``. Small is large: 4 gives rank 64 to 256
            units, 256 gives 1. Advice: 16, then choose on validation.
        rank: one rank for all layers instead; 0 trains a bias for each domain and nothing else.
        lora_alpha: scale ``lora_alpha / rank``; None for 1.
        bias: whether each domain has a bias in each layer that has one.
        include, exclude: globs over module names (``tower.*``, ``*.query``). Each include must match a linear layer.
        domain: where a row's domain comes from: the name of an argument of ``model.forward``, a function that gets the
            arguments of the call and returns a tensor, or None if every call is wrapped in :func:`routed`.

    Returns:
        The same model; for a bare ``nn.Linear`` the layer that now stands for it.

    Raises:
        ConfigError: a glob matches no linear layer, the model has adapters already, or ``forward`` has no such argument.

    Example:
        >>> from domlora.adapters.root import routed
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = attach_(net, num_domains=3, include=["0"], domain=None)
        >>> with routed(net, torch.tensor([0, 2])):
        ...     net(torch.ones(2, 4)).shape
        torch.Size([2, 1])
    """
    if adapter_layers(model):
        raise ConfigError(
            "the model has adapters already", next_step="Call detach_(model) or merge_(model, domain) first"
        )
    if find_route(model) is not None:
        raise ConfigError("the model knows domains by experts already", received=type(model).__name__)
    options = AdapterOptions(temperature, rank, lora_alpha, bias, tuple(include), tuple(exclude))
    chosen = chosen_layers(model, include, exclude, rank)
    route = DomainRoute(num_domains)
    route.options, route.read = options, find_reader(model, domain)
    adapted: dict[int, nn.Module] = {}  # a layer in two places gets one adapter
    for layer in {id(layer): layer for layer in chosen.values()}.values():
        width = rank_for(layer.out_features, temperature) if rank is None else rank
        adapted[id(layer)] = LowRankLinear(layer, route, width, lora_alpha=lora_alpha, bias=bias).train(layer.training)
    open_route(adapted.get(id(model), model), route)  # first: it may refuse
    for name, layer in chosen.items():
        model = with_layer(model, name, adapted[id(layer)])
    return model


def detach_(model: nn.Module) -> nn.Module:
    """Take all adapters off again: what is left is the base, module for module."""
    close_route(model)
    for name, layer in adapter_layers(model).items():
        model = with_layer(model, name, layer.base)
    return _let_learn(model)


def merge_(model: nn.Module, domain: int) -> nn.Module:
    """Fold one domain's adapter into the weights: a plain model with the original types and state-dict keys.

    A subclass of ``nn.Linear`` with a forward of its own says what it is for one domain by a method ``plain(domain)`` that
    returns an ``nn.Linear``, as ``StarLinear`` does.

    Raises:
        UnknownDomainError: no such row in the bank.
        ConfigError: a layer whose weight is computed (parametrised), or whose forward is its own and that has no
            ``plain``; nothing is changed then.
    """
    check_domain(model, domain)
    layers = adapter_layers(model)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    tied = {id(layer): any(owners[id(p)] > 1 for p in layer.base.parameters()) for layer in layers.values()}
    plain = {id(layer): _plain(layer.base, domain, tied=tied[id(layer)]) for layer in layers.values()}
    close_route(model)  # before anything changes: it may refuse
    with torch.no_grad():
        for layer in distinct_layers(model).values():
            weight, bias = layer.correction(domain)
            plain[id(layer)].weight.add_(weight)
            if bias is not None:
                plain[id(layer)].bias.add_(bias)
    for name, layer in layers.items():
        model = with_layer(model, name, plain[id(layer)])
    return _let_learn(model)


def freeze_(model: nn.Module, *, except_: Sequence[str] = ()) -> nn.Module:
    """Freeze everything but the adapters and the parameters whose name matches a glob of ``except_``.

    Normalisation statistics of the frozen base stay still too: those modules run in evaluation mode from here on, whatever
    ``model.train()`` says.

    Raises:
        ConfigError: a glob matches no parameter.
    """
    names = dict(model.named_parameters())
    _check_globs(names, except_)
    for name, parameter in names.items():
        kept = is_adapter_parameter(name) or any(fnmatchcase(name, glob) for glob in except_)
        parameter.requires_grad_(kept)
    for module in model.modules():
        if "running_mean" in dict(module.named_buffers(recurse=False)):
            _hold_statistics(module, not any(p.requires_grad for p in module.parameters(recurse=False)))
    return model


def movable(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Globs for the parameters that match and learn now: what stands still already, such as given vectors, is none of them.

    Raises:
        ConfigError: a glob matches no parameter.
    """
    names = dict(model.named_parameters())
    _check_globs(names, globs)
    learning = (name for name, parameter in names.items() if parameter.requires_grad)
    return [escape(name) for name in learning if any(fnmatchcase(name, glob) for glob in globs)]


def _check_globs(names: Mapping[str, object], globs: Sequence[str]) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ConfigError("a glob must match a parameter", received=glob, next_step=nearest(glob, names))


def options_of(model: nn.Module) -> AdapterOptions | None:
    """What :func:`attach_` was told, or None for a model without adapters."""
    route = find_route(model)
    options: AdapterOptions | None = None if route is None else route.options
    return options


def chosen_layers(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], rank: int | None
) -> dict[str, nn.Linear]:
    """The layers that globs choose, by name; one in two places under both.

    Raises:
        ConfigError: an include that matches no linear layer, or one that cannot be adapted.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    attention = {f"{n}.out_proj".lstrip("."): m.out_proj for n, m in modules if isinstance(m, nn.MultiheadAttention)}
    read_not_called = {id(layer) for layer in attention.values()}
    linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and id(m) not in read_not_called}
    chosen: dict[str, nn.Linear] = {}
    for glob in include:
        matched = {id(layer) for name, layer in linears.items() if fnmatchcase(name, glob)}
        hits = {name: layer for name, layer in linears.items() if id(layer) in matched}  # all places of a shared layer
        if not hits and any(fnmatchcase(name, glob) for name in attention):
            raise ConfigError(
                "nn.MultiheadAttention reads its weights instead of calling layers, so that its parts cannot be adapted",
                received=glob,
                next_step="Adapt the layers around it, or write query, key, value and output as nn.Linear",
            )
        if not hits:
            raise ConfigError("a glob must match a linear layer", received=glob, next_step=nearest(glob, linears))
        chosen |= hits
    kept = {n: m for n, m in chosen.items() if not any(fnmatchcase(n, glob) for glob in exclude)}
    if rank == 0:  # a bias alone, where there is one
        kept = {n: m for n, m in kept.items() if m.bias is not None}
    if not kept:
        raise ConfigError("exclude must leave a linear layer to adapt", received=list(exclude))
    for name, layer in kept.items():
        if isinstance(layer.weight, UninitializedParameter):
            raise ConfigError(
                "a lazy layer must have its shape before it gets adapters",
                received=name,
                next_step="Run the model on one batch first",
            )
    return kept


def with_layer(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module at ``name``, which is the root itself if the name is empty."""
    if not name:
        return module
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return model


def _plain(base: nn.Linear, domain: int, *, tied: bool) -> nn.Linear:
    """What ``base`` is for one domain, as a layer that computes ``x W + b`` and nothing else."""
    plain: Callable[[int], nn.Linear] | None = getattr(base, "plain", None)
    if plain is not None:
        return plain(domain)
    replaced = type(base).forward is not nn.Linear.forward or "forward" in base.__dict__
    if replaced or "weight" not in base._parameters:
        raise ConfigError(
            "only layers that compute x W + b from weights of their own can be merged",
            received=type(base).__name__,
            next_step="Give the class a method plain(domain) that returns an nn.Linear, or remove the parametrisation",
        )
    return copy.deepcopy(base) if tied else base  # others hold its parameters: optimizers, regularisers


def _hold_statistics(module: nn.Module, hold: bool) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _evaluating:
            del module._forward_pre_hooks[key]
    if hold:
        module.register_forward_pre_hook(_evaluating)


def _let_learn(model: nn.Module) -> nn.Module:
    """Statistics that :func:`freeze_` holds are the model's own again; which parameters move stays as it is."""
    for module in model.modules():
        _hold_statistics(module, hold=False)
    return model


def _evaluating(module: nn.Module, _: object) -> None:
    module.eval()
