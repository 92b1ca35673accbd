"""One bank of low-rank corrections for all domains beside an ``nn.Linear``.

Rows are grouped by domain once a batch (:class:`DomainRoute`, shared by all layers); a layer then computes the corrections
of only the domains that occur.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from domlora.adapters.kernels import Banks, add_corrections, corrected_linear
from domlora.adapters.route import DomainRoute, Segments, Ungrouped
from domlora.adapters.traced import corrections
from domlora.errors import ConfigError

__all__ = ["LowRankLinear", "rank_for"]


def _is_plain(base: nn.Linear) -> bool:
    """Whether a layer is ``x W + b`` and nobody watches it."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return type(base) is nn.Linear and not any(hooks) and "forward" not in base.__dict__


def _in_one_type(x: Tensor, bank: Tensor) -> bool:
    return x.dtype == bank.dtype and not torch.is_autocast_enabled(x.device.type)


@torch.compiler.disable(reason="a compiled model has dense bank gradients: train its adapters by adam or adamw")  # type: ignore
def _refuse_sparse() -> None:
    raise ConfigError(
        "a compiled model has dense bank gradients",
        next_step="Train its adapters by adam or adamw, or without torch.compile",
    )


class _Unread(Tensor):
    """The weight of an adapted layer: whoever computes with it instead of calling the layer would miss the adapter.

    Its type, shape and device may be asked. That it overrides torch's functions makes nn.TransformerEncoderLayer leave its
    fast path, which reads weights.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise ConfigError(
            "an adapted layer must be called; this model computes with its weight instead",
            next_step="Exclude the layer from attach_",
        )


_ASKED = {
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "requires_grad", "layout", "is_meta", "is_cuda")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.is_contiguous),
}


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
    ``lora_bias (D, out)``. With ``sparse`` set to true the banks get sparse gradients that hold the domains of the batch
    alone, for an optimizer that moves only those; a dense one costs as much as the bank is high.

    Args:
        base: the layer to correct; it is kept, not copied.
        route: the cell that holds the batch's domains; its ``num_domains`` is the height of the bank.
        rank: R; 0 leaves the bias alone.
        lora_alpha: the scale is ``s = lora_alpha / rank``; None for 1, as in MLoRA. Not the paper's alpha: that one is
            the temperature, see :func:`rank_for`.
        bias: whether each domain has a bias of its own; never where the base has none, so that merging keeps its keys.

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
        bias = bias and base.bias is not None
        if rank == 0 and not bias:
            raise ConfigError("rank 0 leaves a bias alone, and this layer has none", received=str(base))
        self.base = base
        self.route = route
        self.rank = rank
        self.scale = 1.0 if lora_alpha is None or rank == 0 else lora_alpha / rank
        self.sparse = False
        rows = self.fresh_rows(route.num_domains)
        self.lora_A = nn.Parameter(rows["lora_A"])
        self.lora_B = nn.Parameter(rows["lora_B"])
        self.lora_bias = nn.Parameter(rows["lora_bias"]) if bias else None

    @property
    def in_features(self) -> int:
        return int(self.base.in_features)

    @property
    def out_features(self) -> int:
        return int(self.base.out_features)

    def fresh_rows(self, num_domains: int) -> dict[str, Tensor]:
        """Banks of untrained adapters by name: ``A`` ~ N(0, 2 / (in + R)), ``B = 0``, ``c = 0``."""
        weight = self.base.weight
        std = math.sqrt(2.0 / (self.in_features + max(self.rank, 1)))
        return {
            "lora_A": weight.new_empty(num_domains, self.in_features, self.rank).normal_(std=std),
            "lora_B": weight.new_zeros(num_domains, self.rank, self.out_features),
            "lora_bias": weight.new_zeros(num_domains, self.out_features),
        }

    def reset_adapter(self) -> None:
        """Forget what all domains have learned."""
        with torch.no_grad():
            for name, rows in self.fresh_rows(self.route.num_domains).items():
                bank = getattr(self, name)
                if bank is not None:
                    bank.copy_(rows)

    def correction(self, domain: int) -> tuple[Tensor, Tensor | None]:
        """What one domain adds to the weight ``(out, in)`` and to the bias ``(out,)``, for merging."""
        weight = (self.lora_A[domain] @ self.lora_B[domain]).T * self.scale
        return weight, None if self.lora_bias is None else self.lora_bias[domain]

    @property
    def weight(self) -> Tensor:
        """The base's, to be asked for its shape and type."""
        return self.base.weight.detach().as_subclass(_Unread)

    @property
    def bias(self) -> Tensor | None:
        """The base's, as :attr:`weight`."""
        return None if self.base.bias is None else self.base.bias.detach().as_subclass(_Unread)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        if not self.route.enabled:
            plain: Tensor = base(x)
            return plain
        segments = self._segments(x)
        banks = Banks(self.lora_A, self.lora_B, self.lora_bias, self.scale, self.sparse)
        if not isinstance(segments, Segments) or torch.compiler.is_compiling():
            return self._traced(x, banks, segments.domain)
        if _is_plain(base) and _in_one_type(x, banks.a):
            return corrected_linear(x, base.weight, base.bias, banks, segments)
        out: Tensor = base(x)
        if not _is_plain(base) or out._is_view() or not out.is_contiguous():
            out = out.clone(memory_format=torch.contiguous_format)  # somebody else may hold what would change in place
        return add_corrections(out, x.to(out.dtype), banks, segments)  # autocast: the type that the base computes in

    def _traced(self, x: Tensor, banks: Banks, domain: Tensor) -> Tensor:
        if banks.sparse and torch.is_grad_enabled():
            _refuse_sparse()
        out: Tensor = self.base(x)
        return out + corrections(x.to(out.dtype), banks, domain)

    def _segments(self, x: Tensor) -> Segments | Ungrouped:
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
