"""One domain is one row of every bank: reading it, writing it, and telling banks from the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from domlora.adapters.lowrank import LowRankLinear
from domlora.errors import BundleError, ConfigError, UnknownDomainError

__all__ = [
    "adapter_layers",
    "adapter_parameters",
    "base_state",
    "check_domain",
    "is_adapter_parameter",
    "load_rows_",
    "rows_of",
]

_BANKS = ("lora_A", "lora_B", "lora_bias")


def adapter_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name; a layer in two places has two names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, LowRankLinear)}


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter's bank."""
    return name.rpartition(".")[2] in _BANKS


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every bank."""
    return ((name, p) for name, p in model.named_parameters() if is_adapter_parameter(name))


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base, by the names it has without adapters."""
    renamed = {f"{name}.base.": f"{name}." for name in adapter_layers(model)}
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
