from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domlora.errors import EngineError
from domlora.training.rowwise import LazyAdam, RowWiseAdagrad, Summing

BOTH = pytest.mark.parametrize("kind", [LazyAdam, RowWiseAdagrad])
ADAM = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
ADAGRAD = {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.2}


def table(num_rows: int, *width: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(num_rows, *width, generator=torch.Generator().manual_seed(seed)))


def look_up_(parameter: nn.Parameter, ids: list[int], seed: int = 0) -> Tensor:
    """Give a table ``(N, W)`` the sparse gradient of a look-up; what came back to each id."""
    grad = torch.randn(len(ids), parameter.shape[1], generator=torch.Generator().manual_seed(seed))
    parameter.grad = None
    rows = F.embedding(torch.tensor(ids, dtype=torch.int64), parameter, sparse=True)
    rows.backward(grad)
    assert parameter.grad is not None
    assert parameter.grad.is_sparse
    return grad


def sparse(parameter: Tensor, rows: list[int], values: Tensor, *, coalesced: bool = True) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows], dtype=torch.int64),
        values,
        parameter.shape,
        is_coalesced=coalesced,
        check_invariants=False,
    )


def adam_by_hand(
    w: list[float], grads: list[list[float] | None], lr: float, betas: Any, eps: float, decay: float
) -> Any:
    """One row in plain Python; None for a step that does not touch it."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(grad or []):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            step = m[i] / (1 - betas[0] ** t) / (math.sqrt(v[i] / (1 - betas[1] ** t)) + eps)
            w[i] = (1 - lr * decay) * w[i] - lr * step
    return w


def adagrad_by_hand(w: list[float], grads: list[list[float] | None], lr: float, eps: float, decay: float) -> Any:
    total = 0.0
    for grad in grads:
        if grad is not None:
            total += sum(g * g for g in grad) / len(grad)
            w = [(1 - lr * decay) * x - lr * g / (math.sqrt(total) + eps) for x, g in zip(w, grad, strict=True)]
    return w


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=5),
    width=st.integers(1, 5),
    adam=st.booleans(),
)
def test_each_row_follows_the_formula(batches: list[list[int]], width: int, adam: bool) -> None:
    """In float64, for ids that repeat or not, batches without a row, rows that no batch has."""
    parameter = nn.Parameter(table(7, width).detach().double())
    before = parameter.detach().clone()
    optimizer = LazyAdam([parameter], **ADAM) if adam else RowWiseAdagrad([parameter], **ADAGRAD)
    seen: list[list[list[float] | None]] = [[] for _ in range(7)]
    for number, ids in enumerate(batches):
        grad = torch.randn(len(ids), width, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        parameter.grad = sparse(parameter, ids, grad, coalesced=False)
        optimizer.step()
        for row in range(7):
            mine = [grad[place] for place, other in enumerate(ids) if other == row]
            seen[row].append(sum(mine[1:], mine[0]).tolist() if mine else None)
    for row, grads in enumerate(seen):
        start = before[row].tolist()
        if adam:
            expected = adam_by_hand(start, grads, ADAM["lr"], ADAM["betas"], ADAM["eps"], ADAM["weight_decay"])
        else:
            expected = adagrad_by_hand(start, grads, ADAGRAD["lr"], ADAGRAD["eps"], ADAGRAD["weight_decay"])
        assert parameter[row].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("width", [(3,), (1,), (2, 3)])
def test_lazy_adam_is_adam_where_every_batch_has_every_row(decay: float, width: tuple[int, ...]) -> None:
    """Bit for bit, through a dense gradient and through a sparse one."""
    adamw = torch.optim.AdamW([reference := table(5, *width)], lr=0.01, weight_decay=decay, fused=True)
    dense, rows = table(5, *width), table(5, *width)
    ours = [LazyAdam([parameter], lr=0.01, weight_decay=decay) for parameter in (dense, rows)]
    for number in range(4):
        grad = torch.randn(5, *width, generator=torch.Generator().manual_seed(number))
        reference.grad, dense.grad = grad.clone(), grad.clone()
        order = torch.randperm(5).tolist()
        rows.grad = sparse(rows, order, grad[order], coalesced=False)
        for optimizer in (adamw, *ours):
            optimizer.step()
    assert torch.equal(dense, reference)
    assert torch.equal(rows, reference)


def test_lazy_adam_is_torchs_sparse_adam() -> None:
    """But for where eps is added."""
    ours, theirs = table(9, 4), table(9, 4)
    optimizers = LazyAdam([ours], lr=0.01, eps=1e-12), torch.optim.SparseAdam([theirs], lr=0.01, eps=1e-12)
    for number in range(6):
        ids = torch.randint(0, 9, (5,), generator=torch.Generator().manual_seed(number)).tolist()
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            look_up_(parameter, ids, number)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_row_wise_adagrad_is_fbgemms() -> None:
    """Numbers of fbgemm-gpu-cpu 1.8.0: a table on the host, EXACT_ROWWISE_ADAGRAD, DECOUPLE, no pooling, the same ids."""
    parameter = nn.Parameter(torch.arange(16.0).view(4, 4) / 16)
    optimizer = RowWiseAdagrad([parameter], lr=0.1, weight_decay=0.5)
    for ids in ([2, 0, 2], [3, 2, 2]):
        parameter.grad = sparse(parameter, ids, torch.arange(12.0).view(3, 4) - 3, coalesced=False)
        optimizer.step()
    expected = [
        [-0.03651483729481697, -0.013654675334692001, 0.00920548290014267, 0.03206564858555794],
        [0.25, 0.3125, 0.375, 0.4375],
        [0.36085227131843567, 0.3639999032020569, 0.3671475350856781, 0.3702951669692993],
        [0.8728567361831665, 0.8787794709205627, 0.884702205657959, 0.890625],
    ]
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert optimizer.state[parameter]["sum"].tolist() == [7.5, 0.0, 116.0, 3.5]


@BOTH
def test_other_rows_rest_with_their_state(kind: Any) -> None:
    parameter = table(6, 3)
    optimizer = kind([parameter], lr=0.1, weight_decay=0.5)
    look_up_(parameter, [0, 1, 2, 3, 4, 5])
    optimizer.step()
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    look_up_(parameter, [4, 1, 4])
    optimizer.step()
    resting = [0, 2, 3, 5]
    assert torch.equal(parameter[resting], before[resting])
    assert (parameter[[1, 4]] != before[[1, 4]]).all()
    for name, old in state.items():
        if old.dim():
            assert torch.equal(optimizer.state[parameter][name][resting], old[resting])


def test_decay_of_a_row_is_as_often_as_it_is_seen() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = RowWiseAdagrad([parameter], lr=0.1, weight_decay=1.0)
    for ids in ([0, 0, 1], [0], []):
        parameter.grad = sparse(parameter, ids, torch.zeros(len(ids), 2), coalesced=False)
        optimizer.step()
    torch.testing.assert_close(parameter[:, 0].detach(), torch.tensor([0.81, 0.9, 1.0]))


# sums


def test_sums_are_those_of_a_dense_gradient() -> None:
    parameter = table(20, 16)
    ids = torch.randint(0, 20, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    grad = look_up_(parameter, ids)
    rows = Summing()(parameter)
    assert rows.ids is None or rows.ids.tolist() == sorted(set(ids))
    expected = torch.zeros(20, 16).index_add_(0, torch.tensor(ids), grad)
    torch.testing.assert_close(rows.grad, expected if rows.ids is None else expected[rows.ids], rtol=1e-6, atol=1e-6)
    again = Summing()(parameter)
    assert torch.equal(rows.grad, again.grad)


def test_ids_come_once_and_in_order() -> None:
    parameter = table(9, 2)
    grad = look_up_(parameter, [7, 2, 7, 0])
    rows = Summing()(parameter)
    assert rows.ids is not None
    assert rows.ids.tolist() == [0, 2, 7]
    assert torch.equal(rows.grad, torch.stack([grad[3], grad[1], grad[0] + grad[2]]))


def test_a_coalesced_gradient_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, values = table(5, 2, 3), torch.randn(2, 2, 3)
    parameter.grad = sparse(parameter, [1, 4], values)
    monkeypatch.setattr(torch, "sort", None)
    rows = Summing()(parameter)
    assert rows.ids is not None
    assert rows.ids.tolist() == [1, 4]
    assert rows.grad.data_ptr() == parameter.grad._values().data_ptr()


@pytest.mark.parametrize(("others", "sorts"), [([3, 1, 3], 1), ([3, 3, 1], 2)])
def test_tables_of_the_same_ids_share_one_sort(monkeypatch: pytest.MonkeyPatch, others: list[int], sorts: int) -> None:
    calls, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *args, **named: calls.append(1) or sort(*args, **named))
    wide, narrow = table(5, 4), table(5, 1)
    optimizer = LazyAdam([wide, narrow])
    look_up_(wide, [3, 1, 3])
    look_up_(narrow, others)
    optimizer.step()
    assert len(calls) == sorts


def test_sharing_a_sort_changes_nothing() -> None:
    ids = [3, 1, 3, 0]
    together, apart = [table(5, 4), table(5, 1)], [table(5, 4), table(5, 1)]
    optimizers = [LazyAdam(together), *(LazyAdam([parameter]) for parameter in apart)]
    for parameter in (*together, *apart):
        look_up_(parameter, ids)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))


# shapes and settings


@BOTH
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 3)])
@pytest.mark.parametrize("rows", [[2], [0, 5], [], list(range(6))])
def test_a_bank_of_any_shape_is_a_table_of_its_rows(kind: Any, shape: tuple[int, ...], rows: list[int]) -> None:
    bank, flat = table(*shape), nn.Parameter(table(*shape).detach().reshape(6, -1))
    optimizers = [kind([parameter], lr=0.1, weight_decay=0.1) for parameter in (bank, flat)]
    for number in range(3):
        values = torch.randn(len(rows), *shape[1:], generator=torch.Generator().manual_seed(number))
        bank.grad = sparse(bank, rows, values)
        flat.grad = sparse(flat, rows, values.reshape(len(rows), flat.shape[1]))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(bank.reshape(6, -1), flat)
    moved = (bank != table(*shape)).reshape(6, -1).any(1)
    assert moved.nonzero().flatten().tolist() == rows


@BOTH
def test_no_rows_at_all(kind: Any) -> None:
    empty, whole = table(0, 4), table(3, 4)
    before = whole.detach().clone()
    optimizer = kind([empty, whole])
    for _ in range(2):
        look_up_(empty, [])
        look_up_(whole, [])
        optimizer.step()
        empty.grad = torch.zeros(0, 4)
        optimizer.step()
    assert torch.equal(whole, before)


@BOTH
def test_a_parameter_without_a_gradient_has_no_state(kind: Any) -> None:
    used, idle = table(3, 2), table(3, 2)
    before = idle.detach().clone()
    optimizer = kind([used, idle], weight_decay=0.5)
    look_up_(used, [1])
    optimizer.step()
    assert torch.equal(idle, before)
    assert idle not in optimizer.state


@BOTH
def test_groups_have_their_own_settings(kind: Any) -> None:
    slow, fast = table(3, 2), table(3, 2)
    optimizer = kind([{"params": [slow], "lr": 0.0}, {"params": [fast]}], lr=0.1)
    for parameter in (slow, fast):
        look_up_(parameter, [0, 1])
    optimizer.step()
    assert torch.equal(slow, table(3, 2))
    assert not torch.equal(fast, table(3, 2))


@BOTH
def test_a_closure_gives_the_loss(kind: Any) -> None:
    parameter = table(3, 2)
    optimizer = kind([parameter])

    def closure() -> float:
        loss = F.embedding(torch.tensor([1]), parameter, sparse=True).square().sum()
        loss.backward()
        return loss.item()

    expected = parameter[1].square().sum().item()
    assert optimizer.step(closure) == expected
    assert not torch.equal(parameter, table(3, 2))


@BOTH
def test_a_table_read_twice_in_one_batch(kind: Any) -> None:
    twice, once = table(6, 2), table(6, 2)
    F.embedding(torch.tensor([1, 4]), twice, sparse=True).sum().backward()
    F.embedding(torch.tensor([4, 5]), twice, sparse=True).sum().backward()
    F.embedding(torch.tensor([1, 4, 4, 5]), once, sparse=True).sum().backward()
    for parameter in (twice, once):
        kind([parameter]).step()
    assert torch.equal(twice, once)


@BOTH
def test_state_goes_on_bit_for_bit(kind: Any) -> None:
    straight, resumed = table(6, 3), table(6, 3)
    first, second = kind([straight], lr=0.1), kind([resumed], lr=0.1)
    for number, ids in enumerate(([0, 1], [1, 5, 1], [2])):
        look_up_(straight, ids, number)
        first.step()
    with torch.no_grad():
        resumed.copy_(straight)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares what it is given
    for number, ids in enumerate(([1, 2], [3, 1])):
        for parameter, optimizer in ((straight, first), (resumed, second)):
            look_up_(parameter, ids, number)
            optimizer.step()
    assert torch.equal(straight, resumed)


@BOTH
def test_a_gradient_that_is_sparse_in_numbers_is_refused(kind: Any) -> None:
    parameter = table(3, 2)
    parameter.grad = torch.randn(3, 2).to_sparse()
    with pytest.raises(EngineError, match="first axis alone"):
        kind([parameter]).step()


@BOTH
@pytest.mark.parametrize("parameter", [nn.Parameter(torch.zeros(3, 2).t()), nn.Parameter(torch.zeros(()))])
def test_a_parameter_without_rows_in_memory_is_refused(kind: Any, parameter: nn.Parameter) -> None:
    with pytest.raises(EngineError, match="contiguous rows"):
        kind([parameter])
