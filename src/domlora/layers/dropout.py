"""Dropout that costs less than the network it regularises.

``torch.nn.Dropout`` draws one double-precision random number a unit on a CPU, which takes longer than the matrix products
around it. Here a unit needs a few random *bits*: 64 Bernoulli draws come out of each machine word.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import ConfigError

__all__ = ["Dropout", "keep_mask", "relu_dropout"]

_PLANES = 8
_LEVELS = 1 << _PLANES


class Dropout(nn.Module):
    """Drop-in for ``nn.Dropout``: ``y = x * keep / P(keep)`` in training, ``y = x`` in evaluation.

    The probability to keep is rounded to a multiple of 1/256 (0.5 is exact) and the scale uses the rounded value, so
    the expectation is exact. Draws follow ``torch.manual_seed``. On an accelerator, in half precision and under
    ``torch.compile`` it is ``torch.nn.functional.dropout``.

    **Shape**: any to the same.

    Args:
        p: probability to drop a unit, in [0, 1).

    Raises:
        ConfigError: ``p`` is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError("dropout must be a probability in [0, 1)", received=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if not _cheap(x):
            return F.dropout(x, self.p, True)
        mask, scale = keep_mask(x.shape, self.p)
        return x * mask.mul_(scale)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``dropout(relu(x), p)`` in three passes over memory; the backward pass needs the output alone.

    **Shape**: any to the same.
    """
    if not training or p == 0.0:
        return torch.relu(x)
    if not _cheap(x):
        return F.dropout(torch.relu(x), p, True)
    mask, scale = keep_mask(x.shape, p)
    out: Tensor = _ReluDropout.apply(x, mask, scale)  # type: ignore[no-untyped-call]
    return out


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """A float32 mask of independent zeros and ones with P(1) = 1 - p (to 1/256), and the scale 1 / P(1).

    ``P(1) = 0.b1 b2 ... b8`` in binary: going from the last set bit to the first, ``r = r | w`` for a one and ``r & w``
    for a zero, ``w`` being fresh random words, leaves each bit of ``r`` set with just that probability.
    """
    keep = min(max(round((1.0 - p) * _LEVELS), 1), _LEVELS)
    if keep == _LEVELS:
        return torch.ones(shape), 1.0
    size = shape.numel()
    num_words = (size + 63) // 64
    bits = [(keep >> i) & 1 for i in range(_PLANES)]  # least significant first
    first = bits.index(1)
    # the range must be spelled out: random_() alone leaves the top bit of every word at zero
    planes = torch.empty(_PLANES - first, num_words, dtype=torch.int64).random_(-(2**63), None).numpy()
    words = planes[0]
    for plane, bit in zip(planes[1:], bits[first + 1 :], strict=True):
        (np.bitwise_or if bit else np.bitwise_and)(words, plane, out=words)
    mask = np.unpackbits(words.view(np.uint8), count=size)
    return torch.from_numpy(mask).to(torch.float32).view(shape), _LEVELS / keep


def _cheap(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        out = torch.relu(x).mul_(mask.mul_(scale))
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (out,) = ctx.saved_tensors
        # the output is positive exactly where the unit was kept and active
        return torch.ops.aten.threshold_backward(grad, out, 0.0).mul_(ctx.scale), None, None
