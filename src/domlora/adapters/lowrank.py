"""The computation: one bank of low-rank corrections for all domains beside an ``nn.Linear``.

Rows are grouped by domain once a batch (:class:`DomainRoute`, shared by all layers); a layer then computes the corrections
of only the domains that occur, one contiguous segment of rows each.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from domlora.adapters.kernels import Segments, add_corrections, merged_linear, merging_pays
from domlora.errors import ConfigError, UnknownDomainError

__all__ = ["DomainRoute", "LowRankLinear", "rank_for"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class DomainRoute:
    """The cell through which the domain of each row reaches layers that are buried in a model.

    A hook on the model's root fills it before the forward pass; every :class:`LowRankLinear` reads it. It belongs to one
    model and is not for threads: serve with an exported program, or give each thread its own copy of the model.
    """

    def __init__(self, num_domains: int) -> None:
        if num_domains < 1:
            raise ConfigError("adapters need num_domains of at least 1", received=num_domains)
        self.num_domains = num_domains
        self.segments: Segments | None = None
        self.enabled = True
        self.options: Any = None  # what attach_ was told, for whoever stores the model
        self.held = False  # filled by hand for the length of a with block
        self.handles: tuple[RemovableHandle, ...] = ()

    def fill(self, domain: Tensor) -> None:
        """Group rows by domain.

        **Shape**: ``domain (B,)`` integers in [-1, num_domains); -1 is a row of no domain, which gets no correction.

        Raises:
            UnknownDomainError: a number outside that range.
        """
        if not isinstance(domain, Tensor) or domain.dim() != 1 or domain.dtype not in _INTEGERS:
            kind = f"{domain.dtype} of shape {tuple(domain.shape)}" if isinstance(domain, Tensor) else domain
            raise ConfigError("the domain of each row must be a vector of integers", received=kind)
        order = None
        present, counts = _runs(domain)
        if any(second <= first for first, second in pairwise(present)):
            domain, order = torch.sort(domain, stable=True)
            present, counts = _runs(domain)
        spans, start = [], 0
        for name, count in zip(present, counts, strict=True):
            if not -1 <= name < self.num_domains:
                raise UnknownDomainError(
                    f"domains must be numbers from 0 to {self.num_domains - 1}, or -1 for none",
                    received=name,
                    next_step="Encode unknown domains as -1 to score them with the base",
                )
            if name >= 0:
                spans.append((start, start + count, name))
            start += count
        self.segments = Segments(order, tuple(spans), start)

    def clear(self) -> None:
        """Forget the batch."""
        self.segments = None


def _is_plain(base: nn.Linear) -> bool:
    """Whether a layer is ``x W + b`` and nobody watches it."""
    return type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks


def _in_one_type(x: Tensor, bank: Tensor) -> bool:
    return x.dtype == bank.dtype and not torch.is_autocast_enabled(x.device.type)


def _runs(domain: Tensor) -> tuple[list[int], list[int]]:
    """The domain and the length of each run of equal neighbours."""
    present, counts = torch.unique_consecutive(domain, return_counts=True)
    return present.tolist(), counts.tolist()


class _ReadNotCalledError(ConfigError, AttributeError):
    """Also an AttributeError, so that ``hasattr`` and the like go on working."""


def rank_for(out_features: int, temperature: float) -> int:
    """``max(out_features // temperature, 1)``.

    ``temperature`` is the paper's alpha, the *divisor* of the width; LoRA's alpha, the numerator of a scale, is
    called ``lora_alpha`` here.

    **Source**: MLoRA (RecSys'24), temperature coefficient; the authors' code truncates likewise.

    >>> [rank_for(units, 16) for units in (256, 128, 64, 1)]
    [16, 8, 4, 1]
    """
    if not temperature > 0:
        raise ConfigError("temperature must be above 0", received=temperature)
    return max(int(out_features // temperature), 1)


class LowRankLinear(nn.Module):
    """A linear layer with a low-rank correction and a bias for each domain.

    ``y = x W + b + s (x A_d) B_d + c_d`` with ``d`` the row's own domain. At the start ``A`` is Gaussian with the fans of
    one domain's matrix, ``B`` and ``c`` are zero, so that a fresh adapter equals its base bit for bit.

    **Shape**: ``x (B, ..., in_features)`` to ``(B, ..., out_features)``; ``lora_A (D, in, R)``, ``lora_B (D, R, out)``,
    ``lora_bias (D, out)``.

    Args:
        base: the layer to correct; it is kept, not copied.
        route: the cell that holds the batch's domains; its ``num_domains`` is the height of the bank.
        rank: R; 0 leaves the bias alone.
        lora_alpha: the scale is ``s = lora_alpha / rank``; None for 1, as in MLoRA. Not the paper's alpha: that one is
            the temperature, see :func:`rank_for`.
        bias: whether each domain has a bias of its own.

    Raises:
        ConfigError: neither a rank nor a bias, or numbers out of range.

    **Source**: MLoRA (RecSys'24), h = act(W x + B A x + b). Differences from the authors' code: every row uses its own
    domain, not the domain of the batch's first row; ``A`` is not shrunk by 1/sqrt(D), which TensorFlow's initialiser did
    by counting the domain axis as fan; dropout is left to the layer around, so that base and adapted model have the same.
    """

    def __init__(
        self,
        base: nn.Linear,
        route: DomainRoute,
        rank: int,
        *,
        lora_alpha: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if rank < 0 or (rank == 0 and not bias):
            raise ConfigError("an adapter needs a rank of at least 1, or 0 and a bias", received=(rank, bias))
        if lora_alpha is not None and not (lora_alpha > 0 and math.isfinite(lora_alpha)):
            raise ConfigError("lora_alpha must be a number above 0, or None for a scale of 1", received=lora_alpha)
        num_domains = route.num_domains
        self.base = base
        self.route = route
        self.rank = rank
        self.scale = 1.0 if lora_alpha is None or rank == 0 else lora_alpha / rank
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(num_domains, base.in_features, rank, **like))
        self.lora_B = nn.Parameter(torch.empty(num_domains, rank, base.out_features, **like))
        self.lora_bias = nn.Parameter(torch.empty(num_domains, base.out_features, **like)) if bias else None
        self.reset_adapter()

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)

    def reset_adapter(self) -> None:
        """``A`` ~ N(0, 2 / (in + R)), ``B = 0``, ``c = 0``."""
        nn.init.normal_(self.lora_A, std=math.sqrt(2.0 / (self.in_features + max(self.rank, 1))))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def correction(self, domain: int) -> tuple[Tensor, Tensor | None]:
        """What one domain adds to the weight ``(out, in)`` and to the bias ``(out,)``, for merging."""
        weight = (self.lora_A[domain] @ self.lora_B[domain]).T * self.scale
        return weight, None if self.lora_bias is None else self.lora_bias[domain]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # a module that reads it instead of calling the layer would never see the adapter
            raise _ReadNotCalledError(
                "an adapted layer must be called; this model reads its weight instead, as nn.MultiheadAttention does",
                next_step="Exclude the layer from attach_, or turn the module's fast path off",
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        if not self.route.enabled:
            plain: Tensor = base(x)
            return plain
        segments = self._segments(x)
        banks: tuple[Tensor, Tensor, Tensor | None] = (self.lora_A, self.lora_B, self.lora_bias)
        owned = _is_plain(base)
        # merging is for training alone: its products have fewer rows each, which moves the last bits
        if self.training and owned and _in_one_type(x, banks[0]) and merging_pays(segments, x, base.out_features):
            return merged_linear(x, base.weight, base.bias, *banks, self.scale, segments)
        out: Tensor = base(x)
        if not segments.spans:
            return out
        if not owned or out._is_view():  # somebody else may hold what would be changed in place
            out = out.clone()
        if out.dtype != banks[0].dtype or out.dtype != x.dtype:  # autocast: the type that the base computes in
            bank_a, bank_b, bias = banks
            banks = bank_a.to(out.dtype), bank_b.to(out.dtype), None if bias is None else bias.to(out.dtype)
            x = x.to(out.dtype)
        return add_corrections(out, x, *banks, self.scale, segments)

    def _segments(self, x: Tensor) -> Segments:
        segments = self.route.segments
        if segments is None:
            raise ConfigError(
                "an adapted layer was called outside its model's forward",
                next_step="Call the model that attach_ was given, or wrap the call in routed(model, domain)",
            )
        if x.dim() < 2 or segments.num_rows != x.shape[0]:
            raise ConfigError(
                "an adapted layer needs one domain for each row of its input",
                received={"input": tuple(x.shape), "domains": segments.num_rows},
            )
        return segments

    def extra_repr(self) -> str:
        return f"num_domains={self.route.num_domains}, rank={self.rank}, bias={self.lora_bias is not None}"
