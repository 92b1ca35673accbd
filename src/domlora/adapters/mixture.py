"""Low-rank experts that all domains share, and a gate that mixes them by domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, chosen_layers, with_layer
from domlora.adapters.lowrank import rank_for
from domlora.adapters.root import find_reader, find_route, open_route
from domlora.adapters.route import DomainRoute
from domlora.errors import ConfigError

__all__ = ["Gate", "MixtureLinear", "alone", "attach_mixture_", "expert_parameters", "gate_of", "mixture_layers"]


class Gate(nn.Module):
    """How much each expert counts in each domain: ``g(d) = softmax(W e_d + b)``.

    ``embedding (D, dim)`` starts standard normal, ``kernel`` at zero, so that all experts count alike. Rows of domain -1 get
    zeros: the base answers alone.

    **Shape**: ``domain (B,)`` to ``(B, E)``, or ``(B, 1)`` while one expert stands alone.
    """

    def __init__(self, num_domains: int, num_experts: int, dim: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_domains, dim))
        self.kernel = nn.Linear(dim, num_experts)
        nn.init.zeros_(self.kernel.weight)
        nn.init.zeros_(self.kernel.bias)
        self.only: int | None = None

    def forward(self, domain: Tensor) -> Tensor:
        known = (domain >= 0).unsqueeze(1)
        if self.only is not None:
            return known.to(self.embedding.dtype)
        logits: Tensor = self.kernel(self.embedding[domain.clamp(min=0)])
        return logits.softmax(1) * known


class MixtureLinear(nn.Module):
    """A linear layer with low-rank experts: ``y = x W + b + sum_e g_e(d) (s (x A_e) B_e + c_e)``.

    Two plain products for all experts, ``(x A) (E R)`` and ``(...) B``, with the gate in between. At the start ``A`` is
    Gaussian with the fans of one expert's matrix, ``B`` and ``c`` are zero, so that fresh experts equal the base.

    **Shape**: ``x (B, ..., in_features)`` to ``(B, ..., out_features)``; for each expert ``expert_A (in, R)``,
    ``expert_B (R, out)``, ``expert_bias (out,)``.

    Args:
        base: the layer to correct; it is kept, not copied.
        route: the cell that holds the batch's domains.
        gate: one for all layers, each of which names it.
        num_experts: ``E``.
        rank: ``R``; 0 leaves the bias alone.
        lora_alpha: the scale is ``s = lora_alpha / rank``; None for 1.
        bias: whether each expert has a bias; never where the base has none.

    **Source**: MoE-MLoRA (Yaggel et al. 2025). The experts are separate parameters, so that one can be trained while no
    bit of another moves.
    """

    def __init__(
        self,
        base: nn.Linear,
        route: DomainRoute,
        gate: Gate,
        num_experts: int,
        rank: int,
        *,
        lora_alpha: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.base, self.route, self.gate, self.rank = base, route, gate, rank
        self.scale = 1.0 if lora_alpha is None or rank == 0 else lora_alpha / rank
        new, fan_in, fan_out = base.weight.new_zeros, base.in_features, base.out_features
        std, experts = math.sqrt(2.0 / (fan_in + max(rank, 1))), range(num_experts)
        self.expert_A = nn.ParameterList(new(fan_in, rank).normal_(std=std) for _ in experts)
        self.expert_B = nn.ParameterList(new(rank, fan_out) for _ in experts)
        self.expert_bias = nn.ParameterList(new(fan_out) for _ in experts if bias and base.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if not self.route.enabled:
            return out
        share: Tensor = self.gate(self._domain(x))  # (B, E)
        middle = [1] * (x.dim() - 2)
        if self.rank:
            a, b = torch.cat(self._experts(self.expert_A), 1), torch.cat(self._experts(self.expert_B))
            hidden = (x.to(out.dtype) @ a).view(*x.shape[:-1], -1, self.rank)  # (B, ..., E, R)
            out = out + self.scale * ((hidden * share.view(x.shape[0], *middle, -1, 1)).flatten(-2) @ b)
        if len(self.expert_bias):
            bias = share @ torch.stack(self._experts(self.expert_bias))  # (B, out)
            out = out + bias.view(x.shape[0], *middle, -1)
        return out

    def _experts(self, banks: nn.ParameterList) -> list[Tensor]:
        """Those that count: all, or the one that stands alone."""
        return list(banks) if self.gate.only is None else [banks[self.gate.only]]

    def _domain(self, x: Tensor) -> Tensor:
        segments = self.route.segments
        if segments is None or segments.num_rows != x.shape[0]:
            raise ConfigError(
                "a layer with experts needs one domain for each row of its input",
                received=None if segments is None else {"input": tuple(x.shape), "domains": segments.num_rows},
                next_step="Call the model that attach_mixture_ was given",
            )
        return segments.domain

    def extra_repr(self) -> str:
        return f"num_experts={len(self.expert_A)}, rank={self.rank}, bias={bool(self.expert_bias)}"


def attach_mixture_(
    model: nn.Module,
    num_domains: int,
    *,
    num_experts: int,
    gate_dim: int = 4,
    temperature: float = 16.0,
    rank: int | None = None,
    lora_alpha: float | None = None,
    bias: bool = True,
    include: Sequence[str] = ("tower.*",),
    exclude: Sequence[str] = (),
    domain: str = "domain",
) -> nn.Module:
    """Give chosen ``nn.Linear`` layers of ``model`` low-rank experts and one gate, in place.

    The output does not change until an expert is trained.

    Args:
        num_domains: rows of the gate's embedding.
        num_experts: how many, shared by all domains.
        gate_dim: width of the gate's embedding of a domain.
        temperature, rank, lora_alpha, bias, include, exclude: of each expert as of an adapter, see
            :func:`domlora.adapters.attach.attach_`.
        domain: the argument of ``model.forward`` that holds the domains.

    Raises:
        ConfigError: a size below 1, a glob matches no linear layer, or the model has adapters or experts already.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tower = nn.ModuleList([nn.Linear(4, 8)])
        ...     def forward(self, x, domain):
        ...         return self.tower[0](x)
        >>> net = attach_mixture_(Net(), num_domains=3, num_experts=5)
        >>> net(torch.ones(2, 4), torch.tensor([2, -1])).shape
        torch.Size([2, 8])
    """
    if min(num_domains, num_experts, gate_dim) < 1:
        raise ConfigError("experts need sizes of at least 1", received=(num_domains, num_experts, gate_dim))
    if find_route(model) is not None:
        raise ConfigError("the model has adapters or experts already", received=type(model).__name__)
    AdapterOptions(temperature, rank, lora_alpha, bias)  # checks them
    chosen = chosen_layers(model, include, exclude, rank)
    route = DomainRoute(num_domains)
    route.read = find_reader(model, domain)
    gate = Gate(num_domains, num_experts, gate_dim).to(next(model.parameters()))
    open_route(model, route)
    made: dict[int, nn.Module] = {}  # a layer in two places gets its experts once
    for name, layer in chosen.items():
        if id(layer) not in made:
            width = rank_for(layer.out_features, temperature) if rank is None else rank
            made[id(layer)] = MixtureLinear(
                layer, route, gate, num_experts, width, lora_alpha=lora_alpha, bias=bias
            ).train(layer.training)
        with_layer(model, name, made[id(layer)])
    return model


def mixture_layers(model: nn.Module) -> dict[str, MixtureLinear]:
    """The layers with experts by name, each once.

    Raises:
        ConfigError: there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}
    if not layers:
        raise ConfigError("the model has no experts", next_step="Call attach_mixture_(model, ...) first")
    return layers


def gate_of(model: nn.Module) -> Gate:
    """The gate that all layers name."""
    return next(iter(mixture_layers(model).values())).gate


def expert_parameters(model: nn.Module, expert: int) -> list[nn.Parameter]:
    """All that one expert is made of."""
    banks = [bank for m in mixture_layers(model).values() for bank in (m.expert_A, m.expert_B, m.expert_bias)]
    return [cast(nn.Parameter, bank[expert]) for bank in banks if len(bank)]


@contextmanager
def alone(model: nn.Module, expert: int) -> Iterator[nn.Module]:
    """Inside the ``with`` block all known domains get one expert, in full."""
    gate = gate_of(model)
    before, gate.only = gate.only, expert
    try:
        yield model
    finally:
        gate.only = before
