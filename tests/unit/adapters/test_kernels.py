from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from domlora.adapters.kernels import Segments, add_corrections, merged_linear, merging_pays
from domlora.adapters.lowrank import DomainRoute


class Case(NamedTuple):
    """Everything that one call needs; the tensors are leaves that want gradients."""

    x: Tensor
    weight: Tensor
    shared_bias: Tensor | None
    bank_a: Tensor
    bank_b: Tensor
    bias: Tensor | None
    scale: float
    domain: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self[:6] if isinstance(value, Tensor)]

    @property
    def segments(self) -> Segments:
        route = DomainRoute(self.bank_a.shape[0])
        route.fill(self.domain)
        assert route.segments is not None
        return route.segments


def case(
    domain: list[int],
    middle: tuple[int, ...] = (),
    *,
    num_domains: int = 3,
    width: tuple[int, int] = (4, 5),
    rank: int = 2,
    bias: bool = True,
    shared: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    random = torch.Generator().manual_seed(len(domain) + 10 * rank)

    def normal(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).requires_grad_()

    inner, outer = width
    return Case(
        normal(len(domain), *middle, inner),
        normal(outer, inner),
        normal(outer) if shared else None,
        normal(num_domains, inner, rank),
        normal(num_domains, rank, outer),
        normal(num_domains, outer) if bias else None,
        scale,
        torch.tensor(domain, dtype=torch.int64),
    )


def by_rows(c: Case) -> Tensor:
    """The formula, row by row."""
    out = []
    for row, number in zip(c.x, c.domain.tolist(), strict=True):
        y = row @ c.weight.T
        y = y if c.shared_bias is None else y + c.shared_bias
        if number >= 0:
            y = y + c.scale * (row @ c.bank_a[number]) @ c.bank_b[number]
            y = y if c.bias is None else y + c.bias[number]
        out.append(y)
    return torch.stack(out)


def by_corrections(c: Case) -> Tensor:
    out = torch.nn.functional.linear(c.x, c.weight, c.shared_bias)
    return add_corrections(out, c.x, c.bank_a, c.bank_b, c.bias, c.scale, c.segments)


def by_merging(c: Case) -> Tensor:
    return merged_linear(c.x, c.weight, c.shared_bias, c.bank_a, c.bank_b, c.bias, c.scale, c.segments)


WAYS = [by_corrections, by_merging]


def compare(c: Case, way: object, tolerance: float) -> None:
    ours, theirs = way(c), by_rows(c)  # type: ignore[operator]
    upstream = torch.randn(theirs.shape, dtype=theirs.dtype, generator=torch.Generator().manual_seed(1))
    wanted = {"allow_unused": True, "materialize_grads": True}
    mine = torch.autograd.grad(ours, c.tensors, upstream, **wanted)  # type: ignore[arg-type]
    yours = torch.autograd.grad(theirs, c.tensors, upstream, **wanted)  # type: ignore[arg-type]
    for left, right in zip([ours, *mine], [theirs, *yours], strict=True):
        assert left.shape == right.shape
        if right.numel():
            assert (left - right).abs().max() <= tolerance * max(1.0, float(right.detach().abs().max()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "domain", [[0, 0, 1, 2], [2, 0, 1, 0], [-1, -1, 1], [1, -1, 0], [-1, -1], [2], [1, 1]], ids=str
)
def test_float32(way: object, middle: tuple[int, ...], domain: list[int]) -> None:
    compare(case(domain, middle, dtype=torch.float32, scale=1.5), way, 1e-6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_domains = draw(st.integers(1, 5))
    domain = draw(st.lists(st.integers(-1, num_domains - 1), min_size=1, max_size=12))
    return case(
        sorted(domain) if draw(st.booleans()) else domain,
        tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        num_domains=num_domains,
        width=(draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        rank=draw(st.integers(0, 4)),
        bias=draw(st.booleans()),
        shared=draw(st.booleans()),
        scale=draw(st.floats(0.1, 4)),
    )


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(c=cases())
def test_any_case(way: object, c: Case) -> None:
    compare(c, way, 1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way: object) -> None:
    c = case([2, 0, -1, 2], (2,), scale=2.0)

    def call(*tensors: Tensor) -> Tensor:
        result: Tensor = way(Case(*tensors, c.scale, c.domain))  # type: ignore[operator,arg-type]
        return result

    assert torch.autograd.gradcheck(call, c[:6])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", range(6))
def test_what_is_frozen_gets_none_and_the_rest_does_not_change(way: object, frozen: int) -> None:
    c = case([2, 0, 0, 1])
    names = [name for number, name in enumerate(Case._fields[:6]) if number != frozen]
    rest = [getattr(c, name) for name in names]
    expected = torch.autograd.grad(by_rows(c).square().sum(), rest)
    still = c._replace(**{Case._fields[frozen]: c[frozen].detach()})
    out: Tensor = way(still)  # type: ignore[operator]
    out.square().sum().backward()
    assert still[frozen].grad is None
    for tensor, gradient in zip(rest, expected, strict=True):
        assert tensor.grad is not None
        assert torch.allclose(tensor.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_absent_domains_get_exactly_zero(way: object) -> None:
    c = case([3, 1, -1, 3], num_domains=5)
    out: Tensor = way(c)  # type: ignore[operator]
    out.square().sum().backward()
    for bank in (c.bank_a, c.bank_b, c.bias):
        assert bank is not None
        assert bank.grad is not None
        assert not bank.grad[[0, 2, 4]].any()
        assert bank.grad[[1, 3]].flatten(1).any(1).all()


@pytest.mark.parametrize("way", WAYS)
def test_inputs_keep_their_values(way: object) -> None:
    c = case([2, 0, 1])
    before = [tensor.detach().clone() for tensor in c.tensors]
    out: Tensor = way(c)  # type: ignore[operator]
    out.sum().backward()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(c.tensors, before, strict=True))


@pytest.mark.parametrize(("order", "in_place"), [([0, 0, 1], True), ([1, 0, 0], True)])
def test_corrections_are_added_in_place(order: list[int], in_place: bool) -> None:
    c = case(order)
    with torch.no_grad():
        out = torch.nn.functional.linear(c.x, c.weight, c.shared_bias)
        found = add_corrections(out, c.x, c.bank_a, c.bank_b, c.bias, c.scale, c.segments)
    assert (found.data_ptr() == out.data_ptr()) == in_place


def test_merging_pays_when_rows_are_many_and_domains_few() -> None:
    def pays(rows: int, domains: int, middle: tuple[int, ...] = ()) -> bool:
        spans = tuple((0, 1, number) for number in range(domains))
        return merging_pays(Segments(None, spans, rows), torch.empty(rows, *middle, 24), 256)

    assert pays(4096, 2)
    assert not pays(40, 2)
    assert not pays(4096, 1000)
    assert pays(40, 2, (8,))  # rows of a middle axis are rows too
    assert not pays(0, 0)
