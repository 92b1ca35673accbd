"""Optimizers that move only the rows a batch touched: embedding tables and banks of adapters, however long they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import EngineError

__all__ = ["LazyAdam", "RowWiseAdagrad", "Rows", "Summing"]


class Rows(NamedTuple):
    """A gradient, row by row: ``grad (P, W)`` belongs to the rows ``ids (P,)`` of a parameter, or to all if None."""

    ids: Tensor | None
    grad: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """These rows of ``whole (N, W)``, copied; ``whole`` itself if they are all."""
        if self.ids is None:
            return whole
        if whole.shape[1] == 1:  # numbers are read in half the time of rows of one number
            return whole.view(-1).index_select(0, self.ids).unsqueeze(1)
        return whole.index_select(0, self.ids)

    def put_(self, whole: Tensor, part: Tensor) -> None:
        """Write back what :meth:`of` gave."""
        if self.ids is not None:
            whole.index_copy_(0, self.ids, part)


class Summing:
    """Gradients as :class:`Rows`: an id that occurs many times in a batch has one row, the sum of its gradients.

    Sums are taken in the order of the batch, so equal batches give equal bits, those of a dense gradient. A coalesced
    gradient is taken as it is. Parameters that were read with the same ids share one sort, as a table of vectors and one of
    first-order weights do; for that, use one object for all parameters of a step.

    Sorting 32-bit ids and adding up neighbours as bags of an embedding takes a quarter to a half of what
    ``Tensor.coalesce`` takes (32,768 ids, one thread), and less than ``unique`` with ``index_add_`` or ``scatter_add_``.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._sorted: tuple[Tensor, Tensor, Tensor]

    def __call__(self, parameter: Tensor) -> Rows:
        """The gradient of a parameter ``(N, ...)``, which must have one.

        Raises:
            EngineError: a gradient that is sparse in more than its first axis.
        """
        grad, num_rows = parameter.grad, parameter.shape[0]
        assert grad is not None
        if not grad.is_sparse:
            return Rows(None, _by_row(grad.contiguous()))
        if grad.sparse_dim() != 1:
            raise EngineError("a gradient must be sparse in its first axis alone", received=tuple(grad.shape))
        index, values = grad._indices()[0], _by_row(grad._values().contiguous())
        # autograd drops the mark of a coalesced gradient, so the ids themselves are asked
        if not grad.is_coalesced() and not bool((index[1:] > index[:-1]).all()):
            index, order, starts = self._sort(index, num_rows)
            values = F.embedding_bag(order, values, starts, mode="sum")
        # distinct and ascending: as many as there are rows, are all rows
        return Rows(None if len(index) == num_rows else index, values)

    def _sort(self, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct ids (P,), the order that sorts them all, and where in it each of the P begins."""
        if self._ids is None or not torch.equal(ids, self._ids):
            short = ids.int() if num_rows <= 2**31 else ids  # half the time
            ascending, order = torch.sort(short, stable=True)
            distinct, counts = torch.unique_consecutive(ascending, return_counts=True)
            self._ids, self._sorted = ids, (distinct.long(), order, counts.cumsum(0) - counts)
        return self._sorted


class _RowWise(torch.optim.Optimizer):
    """What both have: a step over those parameters of each group that have a gradient."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() == 0 or not parameter.is_contiguous():
                raise EngineError("a row-wise optimizer needs contiguous rows", received=tuple(parameter.shape))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the rows that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows_of = Summing()
        for group in self.param_groups:
            moving = [(p, rows_of(p)) for p in group["params"] if p.grad is not None]
            if moving:
                self._move([p for p, _ in moving], [rows for _, rows in moving], group)
        return loss

    def _move(self, parameters: list[nn.Parameter], rows: list[Rows], group: dict[str, Any]) -> None:
        raise NotImplementedError


class LazyAdam(_RowWise):
    """Adam on the rows of the batch; the others rest, and so do their moments.

    ``m = β₁ m + (1 - β₁) g``, ``v = β₂ v + (1 - β₂) g²``,
    ``w = (1 - lr λ) w - lr (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + eps)`` for each row with a gradient. Moments start at
    zero. ``t`` counts the steps of the parameter and not those of a row: a row that is first seen late moves
    ``(1 - β₁) / sqrt(1 - β₂)``, about three, learning rates.

    Where each batch touches each row these are the bits of ``torch.optim.AdamW(fused=True)``. Elsewhere they are not: Adam
    goes on moving a row by its momentum, and lets its moments fade, in steps that do not touch it. Per step that costs as
    much as the table is long, and this as much as the batch has ids.

    Args:
        params: parameters ``(N, ...)``; gradients dense, or sparse in the first axis. A dense one moves all rows.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: keeps the division finite.
        weight_decay: ``λ``, decoupled, and for the rows of the batch alone: a row shrinks as often as it is seen.

    **Source**: Kingma and Ba 2015; ``torch.optim.SparseAdam``, which has the same moments and the same ``t``, no weight
    decay, adds ``eps`` before the correction of ``v`` instead of after it, and takes two and a half times as long (32,768
    ids, rows of 16 and of 1, one thread). Decoupled decay is Loshchilov and Hutter 2019; decay of the rows of a batch
    alone is the mini-batch aware regularization of Zhou et al. 2018, "Deep Interest Network", without its division by
    an id's number of occurrences.

    **Example**:
        >>> table = nn.Embedding(5, 2, sparse=True)
        >>> before, optimizer = table.weight.detach().clone(), LazyAdam(table.parameters(), lr=0.1)
        >>> table(torch.tensor([3, 1, 3])).sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(1).tolist()
        [False, True, False, True, False]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # "fused": load_state_dict then puts the step counts where the weights are
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True})

    def _move(self, parameters: list[nn.Parameter], rows: list[Rows], group: dict[str, Any]) -> None:
        wholes = [self._tensors(p) for p in parameters]
        parts = [[r.of(whole) for whole in tensors] for r, tensors in zip(rows, wholes, strict=True)]
        steps = [self.state[p]["step"].add_(1) for p in parameters]
        weights, firsts, seconds = map(list, zip(*parts, strict=True))
        torch._fused_adamw_(
            weights,
            [r.grad for r in rows],
            firsts,
            seconds,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for r, tensors, mine in zip(rows, wholes, parts, strict=True):
            for whole, part in zip(tensors, mine, strict=True):
                r.put_(whole, part)

    def _tensors(self, parameter: nn.Parameter) -> list[Tensor]:
        """Weight and moments, each as (N, W)."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return [_by_row(tensor) for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])]


class RowWiseAdagrad(_RowWise):
    """Adagrad with one accumulator a row.

    ``a = a + mean(g²)``, ``w = (1 - lr λ) w - lr g / (sqrt(a) + eps)`` for each row with a gradient; ``a`` starts at zero. A
    row of ``W`` numbers keeps one number of state, where Adam keeps ``2 W``.

    Args:
        params: parameters ``(N, ...)``; gradients dense, or sparse in the first axis. A dense one moves all rows.
        lr: learning rate, larger than Adam's: steps get shorter as ``a`` grows.
        eps: keeps the division finite.
        weight_decay: ``λ``, decoupled, and for the rows of the batch alone: a row shrinks as often as it is seen.

    **Source**: Duchi et al. 2011; one accumulator a row as FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` has it with
    ``WeightDecayMode.DECOUPLE``, which torchrec trains with: the same ``eps`` and the same place for it.

    **Example**:
        >>> bank = nn.Parameter(torch.zeros(3, 2, 2))
        >>> rows, values = torch.tensor([[1]]), torch.ones(1, 2, 2)
        >>> bank.grad = torch.sparse_coo_tensor(rows, values, (3, 2, 2), is_coalesced=True, check_invariants=False)
        >>> RowWiseAdagrad([bank], lr=0.5).step()
        >>> bank.flatten(1).tolist()
        [[0.0, 0.0, 0.0, 0.0], [-0.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _move(self, parameters: list[nn.Parameter], rows: list[Rows], group: dict[str, Any]) -> None:
        for parameter, touched in zip(parameters, rows, strict=True):
            state = self.state[parameter]
            if not state:
                state["sum"] = parameter.new_zeros(len(parameter))
            sums, weight, grad = _by_row(state["sum"]), _by_row(parameter.detach()), touched.grad
            a, w = touched.of(sums), touched.of(weight)  # (P, 1), (P, W)
            a.add_(torch.linalg.vecdot(grad, grad).div_(grad.shape[1]).unsqueeze(1))
            if group["weight_decay"]:
                w.mul_(1 - group["lr"] * group["weight_decay"])
            w.addcdiv_(grad, a.sqrt().add_(group["eps"]), value=-group["lr"])
            touched.put_(sums, a)
            touched.put_(weight, w)


def _by_row(tensor: Tensor) -> Tensor:
    """(N, ...) as (N, W), the same memory."""
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:]))
