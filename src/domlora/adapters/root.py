"""The root of an adapted model: where the domain of each row comes in."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from domlora.adapters.route import DomainRoute
from domlora.errors import ConfigError, nearest

__all__ = ["DomainOf", "close_route", "disabled", "find_reader", "find_route", "open_route", "route_of", "routed"]

DomainOf = Callable[..., Tensor]
_ROUTE = "_domlora_route"


def find_route(model: nn.Module) -> DomainRoute | None:
    """The cell of a model, or None for one without adapters."""
    route: DomainRoute | None = getattr(model, _ROUTE, None)
    return route


def route_of(model: nn.Module) -> DomainRoute:
    """The cell of an adapted model.

    Raises:
        ConfigError: the model has no adapters.
    """
    route = find_route(model)
    if route is None:
        raise ConfigError("the model has no adapters", next_step="Call attach_(model, num_domains=...) first")
    return route


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Score with the base alone inside the ``with`` block, in this thread."""
    route = route_of(model)
    before, route.enabled = route.enabled, False
    try:
        yield model
    finally:
        route.enabled = before


@contextmanager
def routed(model: nn.Module, domain: Tensor) -> Iterator[nn.Module]:
    """Every call of ``model`` inside the ``with`` block, in this thread, scores rows of these domains.

    With activation checkpointing the backward pass calls the layers again: keep it inside the block.

    **Shape**: ``domain (B,)`` integers, -1 for a row of no domain.
    """
    route = route_of(model)
    before = route.held, route.segments
    route.fill(domain)
    route.held = True
    try:
        yield model
    finally:
        route.held, route.segments = before


def find_reader(model: nn.Module, domain: str | DomainOf | None) -> DomainOf | None:
    """What finds the domains among the arguments of a call of ``model``, see ``attach_``.

    Raises:
        ConfigError: ``forward`` has no argument of that name.
    """
    if domain is None or callable(domain):
        return domain
    parameters = inspect.signature(model.forward).parameters
    if domain not in parameters:
        raise ConfigError(
            f"forward of {type(model).__name__} has no argument of that name to read domains from",
            received=domain,
            next_step=f"{nearest(domain, parameters)} Or pass a function, or None and use routed(model, domain)",
        )
    by_place = parameters[domain].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return _Argument(domain, list(parameters).index(domain) if by_place else None)


class _Argument:
    """Reads one argument of a call; a class, so that a model that holds it can be copied and stored."""

    def __init__(self, name: str, position: int | None) -> None:
        self.name, self.position = name, position

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.position is not None and self.position < len(args):
            return cast(Tensor, args[self.position])
        return cast(Tensor, kwargs.get(self.name))


def open_route(model: nn.Module, route: DomainRoute) -> None:
    """Swap the root's class for one whose ``forward`` fills the route first, as torch's own parametrisations swap classes.

    Not hooks: training loops exist that call ``model.forward(batch)``, where hooks do not run.

    Raises:
        ConfigError: something replaced ``forward`` on the instance.
    """
    if "forward" in model.__dict__:
        raise ConfigError(
            "forward of this model was replaced on the instance, where adapters cannot see its arguments",
            next_step="Call attach_ before whatever wraps the model",
        )
    object.__setattr__(model, _ROUTE, route)
    model.__class__ = _routed_class(type(model))


def close_route(model: nn.Module) -> nn.Module:
    """Give the root its own class again.

    Raises:
        ConfigError: the model has no adapters.
    """
    route_of(model)
    if type(model) not in _ROUTED.values():  # parametrisations swap classes too
        raise ConfigError(
            "the class of this model was swapped after attach_",
            received=[each.__name__ for each in type(model).__mro__[:2]],
            next_step="Take off what swapped it first",
        )
    model.__class__ = type(model).__mro__[1]
    object.__delattr__(model, _ROUTE)
    return model


_ROUTED: dict[type[nn.Module], type[nn.Module]] = {}


def _routed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The same class to everyone who asks, but for what is called and how it is copied."""
    if plain in _ROUTED:
        return _ROUTED[plain]

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        route = route_of(self)
        if route.held or route.read is None or not route.enabled:
            return plain.forward(self, *args, **kwargs)
        before = route.segments  # a model may call itself
        route.fill(route.read(*args, **kwargs))
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            route.segments = before

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, *state = cast(tuple[Any, ...], plain.__reduce_ex__(self, protocol))
        return (_empty, (plain,), *state)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    _ROUTED[plain] = type(plain.__name__, (plain,), {"forward": forward, "__reduce_ex__": reduce, **names})
    return _ROUTED[plain]


def _empty(plain: type[nn.Module]) -> nn.Module:
    routed_class = _routed_class(plain)
    return routed_class.__new__(routed_class)
