"""A whole model for each domain, behind the signature of one."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from domlora.layers.domain_linear import DomainRows

__all__ = ["PerDomain", "Unknown"]

Unknown = Literal["mean", "base"]


class PerDomain(nn.Module):
    """One copy of a model for each domain: ``logit = copies[d](row)`` for a row of domain ``d``.

    Every copy starts as the given model. A batch may mix domains; each copy runs on its rows alone, so that the cost follows
    the rows, and rows come out in the batch's order. Rows of domain -1, and those of a domain whose ``own`` is false (it had
    nothing to learn from), get what ``unknown`` says:

    - ``mean``: the mean of the logits of all domains that have a copy of their own, so such a row costs as many rows;
    - ``base``: the logit of ``base``, one more copy that no domain owns.

    Memory is ``D`` times the model's, tables included. Only what is frozen when this is built, such as pretrained vectors,
    is held once: all copies share it, also in a state dict.

    Under ``torch.compile`` and ``torch.export`` all copies run on all rows and each row takes its own: exact, for any
    batch, but ``D`` times the work.

    Args:
        model: what to copy.
        num_domains: ``D``.
        unknown: who answers for unknown domains.

    **Shape**: as the model, ``ids (B, S)``, ``dense (B, G)``, ``domain (B,)`` to ``(B,)``; ``own (D,)`` bool.

    Example:
        >>> class Constant(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.level = nn.Parameter(torch.zeros(()))
        ...     def forward(self, ids, dense, domain):
        ...         return self.level.expand(len(ids))
        >>> model = PerDomain(Constant(), 2)
        >>> for domain, level in enumerate((1.0, 3.0)):
        ...     _ = nn.init.constant_(model.copies[domain].level, level)
        >>> model(torch.zeros(3, 1), torch.zeros(3, 0), torch.tensor([1, -1, 0])).tolist()
        [3.0, 2.0, 1.0]
    """

    own: Tensor

    def __init__(self, model: nn.Module, num_domains: int, unknown: Unknown = "mean") -> None:
        super().__init__()
        self.copies = nn.ModuleList(_copied(model) for _ in range(num_domains))
        self.base = model if unknown == "base" else None
        self.register_buffer("own", torch.ones(num_domains, dtype=torch.bool))
        self.register_state_dict_post_hook(_leave_repeats_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_repeats_in)  # type: ignore[no-untyped-call]

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        own = (domain >= 0) & self.own[domain.clamp(min=0)]
        if torch.compiler.is_compiling():
            return self._choose(ids, dense, domain, own)
        rows = DomainRows()
        rows.group_(torch.where(own, domain, -1))
        groups = [*([-1] if rows.unknown else []), *rows.places]
        parts = zip(*map(rows.split, (ids, dense, domain)), strict=True)
        return rows.join([self._answer(group, *part) for group, part in zip(groups, parts, strict=True)])

    def _answer(self, group: int, *row: Tensor) -> Tensor:
        """Logits of rows of one domain, or of unknown ones (-1)."""
        model = self.base if group < 0 else self.copies[group]
        if model is not None:
            logit: Tensor = model(*row)
            return logit
        trained = [model for model, own in zip(self.copies, self.own.tolist(), strict=True) if own]
        return torch.stack([model(*row) for model in trained]).mean(0)

    def _choose(self, ids: Tensor, dense: Tensor, domain: Tensor, own: Tensor) -> Tensor:
        every = torch.stack([model(ids, dense, domain) for model in self.copies])  # (D, B)
        mine = every.gather(0, domain.clamp(min=0).unsqueeze(0)).squeeze(0)
        if self.base is not None:
            return torch.where(own, mine, self.base(ids, dense, domain))
        share = self.own.to(every.dtype) / self.own.sum()
        return torch.where(own, mine, share @ every)

    def extra_repr(self) -> str:
        return f"unknown={'mean' if self.base is None else 'base'!r}"


def _copied(model: nn.Module) -> nn.Module:
    """A copy that shares what is frozen."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def _repeats(model: nn.Module) -> dict[str, str]:
    """Names of parameters that have another name too, and that one."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: other for name, other in found.items() if name != other}


def _leave_repeats_out(model: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for name in _repeats(model):
        del state[prefix + name]


def _put_repeats_in(model: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, other in _repeats(model).items():
        if prefix + other in state:
            state[prefix + name] = state[prefix + other]
