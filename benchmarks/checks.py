"""That arms compute the same before they are timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from arms import BASELINES, Forward, Rows, Tower, gather, ours
from torch import Tensor, nn

__all__ = ["require_equal", "require_equal_gradients"]

TOLERANCE = KINK = 1e-5


def require_equal(name: str, what: str, found: Tensor, expected: Tensor) -> None:
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE:
        raise SystemExit(f"{name} gives other {what}: {gap:.1e} of the largest")


def clear_of_kinks(model: Tower, rows: Rows) -> Rows:
    """The rows with no unit so near to zero that rounding turns it on or off: there a gradient has two right values."""
    margins: list[Tensor] = []
    units = [layer for layer in model.layers if isinstance(layer, nn.ReLU)]
    hooks = [unit.register_forward_pre_hook(lambda _, args: margins.append(args[0].abs().amin(1))) for unit in units]
    with torch.no_grad():
        model(rows.x, rows.domain)
    for hook in hooks:
        hook.remove()
    kept = torch.stack(margins).amin(0) > KINK
    return rows._replace(x=rows.x[kept], domain=rows.domain[kept])


def require_equal_gradients(model: Tower, rows: Rows, names: Sequence[str]) -> None:
    rows = clear_of_kinks(model, rows)
    expected = gradients(model, gather(model), rows)
    for name in names:
        forward = ours(model) if name == "domlora" else BASELINES[name](model)
        for parameter, found in gradients(model, forward, rows).items():
            require_equal(f"{name}, {parameter}", "gradients", found, expected[parameter])


def gradients(model: Tower, forward: Forward, rows: Rows) -> dict[str, Tensor]:
    model.zero_grad()
    forward(rows).square().mean().backward()
    found = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
