"""The same adapted tower, computed in the ways that people write it.

All share one base and one set of banks, ``A (D, in, R)``, ``B (D, R, out)``, ``c (D, out)`` a layer, and give the same
numbers: ``y = relu(x W + b + (x A_d) B_d + c_d)`` with ``d`` the row's own domain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import adapter_layers

__all__ = [
    "BASELINES",
    "UNITS",
    "Forward",
    "Rows",
    "Tower",
    "adapted_tower",
    "gather",
    "loop",
    "mask",
    "ours",
    "peft_tower",
]

UNITS, TEMPERATURE = (384, 256, 128, 64), 16.0


class Rows(NamedTuple):
    """Some rows: the tower's input, the domain of each, and the domains as PEFT wants them."""

    x: Tensor
    domain: Tensor
    names: list[str]


Forward = Callable[[Rows], Tensor]


class Tower(nn.Module):
    """Linear and relu, three times; knows no domains."""

    def __init__(self, units: tuple[int, ...] = UNITS) -> None:
        super().__init__()
        layers = [layer for pair in pairwise(units) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:  # noqa: ARG002 - the adapters read it
        out: Tensor = self.layers(x)
        return out


def adapted_tower(num_domains: int) -> Tower:
    """A tower with adapters that are not fresh: every bank holds small random numbers."""
    model = Tower()
    attach_(model, num_domains, temperature=TEMPERATURE)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.normal_(0.0, 0.1)
            if layer.lora_bias is not None:
                layer.lora_bias.normal_(0.0, 0.1)
    return model


def ours(model: nn.Module) -> Forward:
    """What a user of the library writes."""
    return lambda rows: model(rows.x, rows.domain)


def _layers(model: Tower) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    parts = []
    for layer in adapter_layers(model).values():
        assert layer.lora_bias is not None
        parts.append((layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B, layer.lora_bias))
    return parts


def gather(model: Tower) -> Forward:
    """Each row fetches its own matrices."""
    layers = _layers(model)

    def forward(rows: Rows) -> Tensor:
        x, domain = rows.x, rows.domain
        for weight, bias, bank_a, bank_b, bank_c in layers:
            low = torch.bmm(x.unsqueeze(1), bank_a[domain])  # (B, 1, R)
            x = torch.relu(F.linear(x, weight, bias) + torch.bmm(low, bank_b[domain]).squeeze(1) + bank_c[domain])
        return x

    return forward


def mask(model: Tower) -> Forward:
    """All domains for all rows in two dense products, with a one-hot mask between them."""
    layers = _layers(model)

    def forward(rows: Rows) -> Tensor:
        x, domain = rows.x, rows.domain
        chosen = F.one_hot(domain, layers[0][2].shape[0]).to(x.dtype)  # (B, D)
        for weight, bias, bank_a, bank_b, bank_c in layers:
            num_domains, width, rank = bank_a.shape
            low = x @ bank_a.permute(1, 0, 2).reshape(width, num_domains * rank)  # (B, D * R)
            low = (low.view(-1, num_domains, rank) * chosen.unsqueeze(2)).flatten(1)
            x = torch.relu(F.linear(x, weight, bias) + low @ bank_b.flatten(0, 1) + chosen @ bank_c)
        return x

    return forward


def loop(model: Tower) -> Forward:
    """One domain after the other: pick its rows, run the tower on them, put them back."""
    layers = _layers(model)

    def forward(rows: Rows) -> Tensor:
        places, parts = [], []
        for name in rows.domain.unique().tolist():
            chosen = (rows.domain == name).nonzero().squeeze(1)
            h = rows.x[chosen]
            for weight, bias, bank_a, bank_b, bank_c in layers:
                h = torch.relu(F.linear(h, weight, bias) + (h @ bank_a[name]) @ bank_b[name] + bank_c[name])
            places.append(chosen)
            parts.append(h)
        out = rows.x.new_zeros(rows.x.shape[0], layers[-1][0].shape[0])
        return out.index_copy(0, torch.cat(places), torch.cat(parts))

    return forward


BASELINES: dict[str, Callable[[Tower], Forward]] = {"gather": gather, "mask": mask, "loop": loop}


def peft_tower(model: Tower) -> tuple[Forward, float]:
    """The same tower in PEFT, for mixed batches, and the seconds it took to add its adapters.

    Adapter ``str(d)`` is domain ``d``; ranks by name, the scale 1, the bias of a domain as PEFT's ``lora_bias``.
    """
    from peft import LoraConfig, get_peft_model

    layers = adapter_layers(model)
    ranks = {name: layer.rank for name, layer in layers.items()}
    num_domains = next(iter(layers.values())).lora_A.shape[0]

    def config() -> Any:
        return LoraConfig(
            r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=list(ranks), lora_bias=True
        )

    plain = Tower()
    plain.load_state_dict(
        {name.replace(".base.", "."): p for name, p in model.state_dict().items() if "lora_" not in name}
    )
    start = time.perf_counter()
    wrapped = get_peft_model(plain, config(), adapter_name="0")
    for number in range(1, num_domains):
        wrapped.add_adapter(str(number), config())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = wrapped.base_model.model.get_submodule(name)
            for number in range(num_domains):
                theirs.lora_A[str(number)].weight.copy_(layer.lora_A[number].T)
                theirs.lora_B[str(number)].weight.copy_(layer.lora_B[number].T)
                theirs.lora_B[str(number)].bias.copy_(layer.lora_bias[number])  # type: ignore[index]
    wrapped.eval()  # it refuses mixed batches in training
    return lambda rows: wrapped(rows.x, adapter_names=rows.names), seconds
