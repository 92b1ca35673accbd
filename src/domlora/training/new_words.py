"""Rows of embedding tables that only the words of a new domain have: they may learn where all others stand still."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from domlora.models.growth import pieces_of

__all__ = ["NewWords"]


class NewWords:
    """The rows that a grown model has and the one before had not, of tables that learn.

    Args:
        before: the model as it was.
        model: what :func:`domlora.models.growth.grown` made of it.

    Attributes:
        rows: by parameter, which rows of it.
    """

    def __init__(self, before: nn.Module, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self.rows: dict[str, Tensor] = {}
        for name, pieces in pieces_of(before, model).items():
            new = torch.ones(len(parameters[name]), dtype=torch.bool)
            for piece in pieces:
                new[piece.new : piece.new + piece.length] = False
            if parameters[name].requires_grad and bool(new.any()):
                self.rows[name] = new.nonzero().flatten()
        self.start = self.of(model)

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """These rows, copied, by parameter."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach()[rows] for name, rows in self.rows.items()}

    def load_(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Write what :meth:`of` gave."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name][self.rows[name]] = value.to(parameters[name].device)

    def release_(self, model: nn.Module) -> list[nn.Module]:
        """Let these rows of a frozen model learn, and no other; gives the tables.

        An optimizer must move only rows that have a gradient, as the lazy rules do.
        """
        tables = {f"{name}.weight": part for name, part in model.named_modules()}
        for name, rows in self.rows.items():
            weight = tables[name].weight
            assert isinstance(weight, nn.Parameter)
            new = torch.zeros(len(weight), dtype=torch.bool)
            new[rows] = True
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(partial(_keep, new))  # type: ignore[no-untyped-call]
        return [tables[name] for name in self.rows]


def _keep(new: Tensor, weight: Tensor) -> None:
    """Of a gradient only the new rows."""
    grad = weight.grad
    assert grad is not None
    if grad.is_sparse:
        rows, values = grad._indices()[0], grad._values()
    else:
        rows, values = torch.arange(len(grad), device=grad.device), grad
    kept = new.to(rows.device)[rows]
    weight.grad = torch.sparse_coo_tensor(rows[kept][None], values[kept], grad.shape, check_invariants=False)
