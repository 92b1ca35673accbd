"""One domain is one row of every bank: reading it, writing it, and telling banks from the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.route import DomainRoute
from domlora.errors import BundleError, ConfigError, UnknownDomainError

__all__ = [
    "TrainableReport",
    "adapter_layers",
    "adapter_parameters",
    "add_domain_",
    "base_state",
    "check_domain",
    "distinct_layers",
    "is_adapter_parameter",
    "load_rows_",
    "remove_domain_",
    "rows_of",
    "trainable_report",
]

_BANKS = ("lora_A", "lora_B", "lora_bias")


def adapter_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name; a layer in two places has two names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, LowRankLinear)}


def distinct_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Each adapted layer once, by the first of its names, as ``named_parameters`` counts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter's bank."""
    return name.rpartition(".")[2] in _BANKS


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every bank."""
    return ((name, p) for name, p in model.named_parameters() if is_adapter_parameter(name))


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base, by the names it has without adapters."""
    renamed = {f"{name}.base.".lstrip("."): f"{name}.".lstrip(".") for name in adapter_layers(model)}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if is_adapter_parameter(name):
            continue
        prefix = next((old for old in renamed if name.startswith(old)), "")
        state[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return state


def rows_of(model: nn.Module, domain: int) -> dict[str, Tensor]:
    """One domain's adapter: its row of every bank, copied.

    Raises:
        UnknownDomainError: no such row in the bank.
    """
    check_domain(model, domain)
    return {name: bank.detach()[domain].clone() for name, bank in adapter_parameters(model)}


def load_rows_(model: nn.Module, domain: int, rows: Mapping[str, Tensor]) -> nn.Module:
    """Write one domain's adapter into its row of every bank; other rows keep their bits.

    Raises:
        UnknownDomainError: no such row in the bank.
        BundleError: names or shapes differ from those of the model; nothing is written then.
    """
    banks = dict(adapter_parameters(model))
    check_domain(model, domain)
    want = {name: tuple(bank.shape[1:]) for name, bank in banks.items()}
    got = {name: tuple(row.shape) for name, row in rows.items()}
    if want != got:
        differing = {
            name: (want.get(name), got.get(name))
            for name in want.keys() | got.keys()
            if want.get(name) != got.get(name)
        }
        raise BundleError(
            "an adapter must have the names and shapes of the model's banks",
            received={name: differing[name] for name in sorted(differing)[:3]},
            next_step="Use an adapter that was trained on this base, with the same rank",
        )
    with torch.no_grad():
        for name, row in rows.items():
            banks[name][domain].copy_(row)
    return model


def add_domain_(model: nn.Module, like: int | None = None) -> int:
    """Give every bank one more row, in place, and return its number; other rows keep their bits.

    Optimizers hold the old banks: build them anew.

    Args:
        like: start as a copy of this domain's adapter; None for a fresh one, which scores as the base does.

    Raises:
        ConfigError: the model has no adapters.
        UnknownDomainError: no domain ``like``.
    """
    check_domain(model, 0 if like is None else like)
    layers, route = _layers_of_one_route(model)
    for layer in layers:
        fresh = layer.fresh_rows(1)
        for name in _banks_of(layer):
            bank = getattr(layer, name).detach()
            _set_bank(layer, name, torch.cat([bank, fresh[name].to(bank) if like is None else bank[like : like + 1]]))
    route.num_domains += 1
    return route.num_domains - 1


def remove_domain_(model: nn.Module, domain: int) -> nn.Module:
    """Take one row out of every bank, in place; the domains above it move down by one number.

    Optimizers hold the old banks: build them anew.

    Raises:
        ConfigError: the model has no adapters, or only one domain.
        UnknownDomainError: no such domain.
    """
    check_domain(model, domain)
    layers, route = _layers_of_one_route(model)
    if route.num_domains == 1:
        raise ConfigError("a bank needs at least one domain", received=domain, next_step="Call detach_(model) instead")
    for layer in layers:
        for name in _banks_of(layer):
            bank = getattr(layer, name).detach()
            _set_bank(layer, name, torch.cat([bank[:domain], bank[domain + 1 :]]))
    route.num_domains -= 1
    return model


def _layers_of_one_route(model: nn.Module) -> tuple[list[LowRankLinear], DomainRoute]:
    layers = list(distinct_layers(model).values())
    route = layers[0].route
    if any(layer.route is not route for layer in layers):
        raise ConfigError(
            "parts of this model were given adapters of their own", next_step="Call it with each of those parts"
        )
    return layers, route


def _set_bank(layer: LowRankLinear, name: str, values: Tensor) -> None:
    moves = getattr(layer, name).requires_grad
    setattr(layer, name, nn.Parameter(values, requires_grad=moves))


def _banks_of(layer: LowRankLinear) -> list[str]:
    return [name for name in _BANKS if getattr(layer, name) is not None]


@dataclass(frozen=True, slots=True)
class TrainableReport:
    """How many numbers of a model are what, and which of them move.

    ``per_domain`` is what one domain adds; ``base`` counts tables and dense layers alike.
    """

    base: int
    base_trainable: int
    adapters: int
    adapters_trainable: int
    num_domains: int
    layers: Mapping[str, int]

    @property
    def per_domain(self) -> int:
        """Numbers that one domain adds."""
        return self.adapters // max(self.num_domains, 1)

    def __str__(self) -> str:
        moves, total = self.base_trainable + self.adapters_trainable, self.base + self.adapters
        return (
            f"trainable {moves:,} of {total:,} ({moves / max(total, 1):.2%}): "
            f"base {self.base_trainable:,} of {self.base:,}, adapters {self.adapters_trainable:,} of {self.adapters:,} "
            f"({self.num_domains} domains x {self.per_domain:,} in {len(self.layers)} layers)"
        )


def trainable_report(model: nn.Module) -> TrainableReport:
    """Count parameters: of the base, of adapters, and those that move; ``print`` it.

    Example:
        >>> from domlora.adapters.attach import attach_, freeze_
        >>> net = freeze_(attach_(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), 5, domain=None))
        >>> print(trainable_report(net))
        trainable 730 of 1,051 (69.46%): base 0 of 321, adapters 730 of 730 (5 domains x 146 in 2 layers)
    """
    layers = distinct_layers(model)
    sizes = {"base": 0, "base_trainable": 0, "adapters": 0, "adapters_trainable": 0}
    for name, parameter in model.named_parameters():
        kind = "adapters" if is_adapter_parameter(name) else "base"
        sizes[kind] += parameter.numel()
        sizes[f"{kind}_trainable"] += parameter.numel() if parameter.requires_grad else 0
    num_domains = next(iter(layers.values())).route.num_domains if layers else 0
    per_layer = {
        name: sum(getattr(layer, bank)[0].numel() for bank in _banks_of(layer)) for name, layer in layers.items()
    }
    return TrainableReport(**sizes, num_domains=num_domains, layers=per_layer)


def check_domain(model: nn.Module, domain: int) -> None:
    """Refuse a number that no bank of the model has a row for.

    Raises:
        ConfigError: the model has no adapters.
        UnknownDomainError: no such row.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ConfigError("the model has no adapters", next_step="Call attach_(model, num_domains=...) first")
    num_domains = next(iter(layers.values())).route.num_domains
    if not 0 <= domain < num_domains:
        raise UnknownDomainError(f"domains must be numbers from 0 to {num_domains - 1}", received=domain)
