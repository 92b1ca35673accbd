"""Putting adapters beside the linear layers of any model, and taking them off again.

attach_(model, num_domains=3)          # every nn.Linear that matches, in place
freeze_(model)                         # only adapters move from here on
load_rows_(model, 2, rows_of(model, 0))  # one domain = one row of every bank
merge_(model, 1)                       # one domain as a plain model
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from domlora.adapters.bank import adapter_layers, check_domain, is_adapter_parameter
from domlora.adapters.lowrank import DomainRoute, LowRankLinear, rank_for
from domlora.errors import ConfigError, nearest

__all__ = [
    "AdapterOptions",
    "attach_",
    "detach_",
    "disabled",
    "freeze_",
    "merge_",
    "options_of",
    "routed",
]

DomainOf = Callable[..., Tensor]
_ROUTE = "_domlora_route"


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """What :func:`attach_` is told, as a value that can be stored beside a model; see there for each option."""

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
        num_domains: rows of every bank.
        temperature: the rank of a layer is ``max(out_features // temperature, 1)``. Small is large: 4 gives rank 64 to 256
            units, 256 gives 1. Advice: 16, then choose on validation.
        rank: one rank for all layers instead; 0 trains a bias for each domain and nothing else.
        lora_alpha: scale ``lora_alpha / rank``; None for 1.
        bias: whether each domain has a bias in each layer.
        include, exclude: globs over module names (``tower.*``, ``*.query``). Each include must match a linear layer.
        domain: where a row's domain comes from: the name of an argument of ``model.forward``, a function that gets the
            arguments of the call and returns a tensor, or None if every call is wrapped in :func:`routed`.

    Returns:
        The same model.

    Raises:
        ConfigError: a glob matches no linear layer, the model has adapters already, or ``forward`` has no such argument.

    Example:
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
    if isinstance(model, nn.Linear):
        raise ConfigError(
            "adapters go beside layers inside a model, and this model is itself a Linear",
            next_step="Attach to nn.Sequential(model)",
        )
    options = AdapterOptions(temperature, rank, lora_alpha, bias, tuple(include), tuple(exclude))
    chosen = _chosen(model, include, exclude)
    route = DomainRoute(num_domains)
    route.options = options
    read = _reader(model, domain)
    adapted_of: dict[int, LowRankLinear] = {}  # a layer in two places gets one adapter
    for name, layer in chosen.items():
        if id(layer) in adapted_of:
            _replace(model, name, adapted_of[id(layer)])
            continue
        width = rank_for(layer.out_features, temperature) if rank is None else rank
        adapted = LowRankLinear(layer, route, width, lora_alpha=lora_alpha, bias=bias)
        adapted.train(layer.training)
        adapted_of[id(layer)] = adapted
        _replace(model, name, adapted)
    _open_route(model, route, read)
    return model


def detach_(model: nn.Module) -> nn.Module:
    """Take all adapters off again: what is left is the base, module for module."""
    for name, layer in adapter_layers(model).items():
        _replace(model, name, layer.base)
    return _close_route(model)


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
    merged = {id(layer): _merged(layer, domain) for layer in layers.values()}
    for name, layer in layers.items():
        _replace(model, name, merged[id(layer)])
    return _close_route(model)


def freeze_(model: nn.Module, *, except_: Sequence[str] = ()) -> nn.Module:
    """Freeze everything but the adapters and the parameters whose name matches a glob of ``except_``.

    Normalisation statistics of the frozen base stay still too: those modules run in evaluation mode from here on, whatever
    ``model.train()`` says.

    Raises:
        ConfigError: a glob matches no parameter.
    """
    names = dict(model.named_parameters())
    for glob in except_:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ConfigError("a glob must match a parameter", received=glob, next_step=nearest(glob, names))
    for name, parameter in names.items():
        kept = is_adapter_parameter(name) or any(fnmatchcase(name, glob) for glob in except_)
        parameter.requires_grad_(kept)
    for module in model.modules():
        if "running_mean" in dict(module.named_buffers(recurse=False)):
            _hold_statistics(module, not any(p.requires_grad for p in module.parameters(recurse=False)))
    return model


def options_of(model: nn.Module) -> AdapterOptions | None:
    """What :func:`attach_` was told, or None for a model without adapters."""
    route: DomainRoute | None = getattr(model, _ROUTE, None)
    options: AdapterOptions | None = None if route is None else route.options
    return options


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Score with the base alone inside the ``with`` block."""
    route = _route(model)
    before, route.enabled = route.enabled, False
    try:
        yield model
    finally:
        route.enabled = before


@contextmanager
def routed(model: nn.Module, domain: Tensor) -> Iterator[nn.Module]:
    """Every call of ``model`` inside the ``with`` block scores rows of these domains.

    **Shape**: ``domain (B,)`` integers, -1 for a row of no domain.
    """
    route = _route(model)
    before = route.held, route.segments
    route.fill(domain)
    route.held = True
    try:
        yield model
    finally:
        route.held, route.segments = before


def _chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, nn.Linear]:
    modules = list(model.named_modules(remove_duplicate=False))
    read_not_called = {id(m.out_proj) for _, m in modules if isinstance(m, nn.MultiheadAttention)}
    linears = {name: m for name, m in modules if isinstance(m, nn.Linear) and name and id(m) not in read_not_called}
    chosen: dict[str, nn.Linear] = {}
    for glob in include:
        matched = {id(layer) for name, layer in linears.items() if fnmatchcase(name, glob)}
        hits = {name: layer for name, layer in linears.items() if id(layer) in matched}  # all places of a shared layer
        if not hits:
            raise ConfigError("a glob must match a linear layer", received=glob, next_step=nearest(glob, linears))
        chosen |= hits
    kept = {n: m for n, m in chosen.items() if not any(fnmatchcase(n, glob) for glob in exclude)}
    if not kept:
        raise ConfigError("exclude must leave a linear layer to adapt", received=list(exclude))
    return kept


def _reader(model: nn.Module, domain: str | DomainOf | None) -> DomainOf | None:
    if domain is None or callable(domain):
        return domain
    parameters = inspect.signature(model.forward).parameters
    if domain not in parameters:
        raise ConfigError(
            f"forward of {type(model).__name__} has no argument of that name to read domains from",
            received=domain,
            next_step=f"{nearest(domain, parameters)} Or pass a function, or None and use routed(model, domain)",
        )
    position = list(parameters).index(domain)

    def read(*args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, args[position] if position < len(args) else kwargs.get(domain))

    return read


def _open_route(model: nn.Module, route: DomainRoute, read: DomainOf | None) -> None:
    """Hooks find the route through the module they are called with, so that a deep copy of the model has its own."""

    def fill(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = _route(module)
        if route.enabled and not route.held and read is not None:
            route.fill(read(*args, **kwargs))

    def clear(module: nn.Module, *_: object) -> None:
        route = _route(module)
        if not route.held:
            route.clear()

    object.__setattr__(model, _ROUTE, route)
    route.handles = (
        model.register_forward_pre_hook(fill, with_kwargs=True),
        model.register_forward_hook(clear, always_call=True),
    )


def _close_route(model: nn.Module) -> nn.Module:
    for handle in _route(model).handles:
        handle.remove()
    object.__delattr__(model, _ROUTE)
    return model


def _route(model: nn.Module) -> DomainRoute:
    route: DomainRoute | None = getattr(model, _ROUTE, None)
    if route is None:
        raise ConfigError("the model has no adapters", next_step="Call attach_(model, num_domains=...) first")
    return route


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _merged(layer: LowRankLinear, domain: int) -> nn.Linear:
    """The base with the correction inside, in a module of its own."""
    weight, bias = layer.correction(domain)
    merged = _plain(layer.base, domain)
    with torch.no_grad():
        merged.weight.add_(weight)
        if bias is not None and merged.bias is None:
            merged.bias = nn.Parameter(bias.detach().clone(), requires_grad=merged.weight.requires_grad)
        elif bias is not None:
            merged.bias.add_(bias)
    return merged


def _plain(base: nn.Linear, domain: int) -> nn.Linear:
    """What ``base`` is for one domain, as a layer that computes ``x W + b`` and nothing else."""
    plain: Callable[[int], nn.Linear] | None = getattr(base, "plain", None)
    if plain is not None:
        return plain(domain)
    if type(base).forward is not nn.Linear.forward or is_parametrized(base):
        raise ConfigError(
            "only layers that compute x W + b from weights of their own can be merged",
            received=type(base).__name__,
            next_step="Give the class a method plain(domain) that returns an nn.Linear, or remove the parametrisation",
        )
    return copy.deepcopy(base)


def _hold_statistics(module: nn.Module, hold: bool) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _evaluating:
            del module._forward_pre_hooks[key]
    if hold:
        module.register_forward_pre_hook(_evaluating)


def _evaluating(module: nn.Module, _: object) -> None:
    module.eval()
