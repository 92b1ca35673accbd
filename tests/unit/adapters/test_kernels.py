from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from domlora.adapters import accelerator, cpu, kernels
from domlora.adapters.kernels import Banks, add_corrections, corrected_linear
from domlora.adapters.route import grouped


@pytest.fixture(autouse=True, scope="module", params=[cpu, accelerator], ids=["cpu", "accelerator"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """What an accelerator does, a CPU can do as well, if slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels._BACKENDS, "cpu", request.param)
        yield


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
    sparse: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in zip(self._fields[:6], self[:6], strict=True) if value is not None}

    @property
    def banks(self) -> Banks:
        return Banks(self.bank_a, self.bank_b, self.bias, self.scale, self.sparse)


def case(
    domain: Any,
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
    domain = torch.as_tensor(domain, dtype=torch.int64)
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
        domain,
    )


# the formula twice: as it is written, and fast enough for many rows


def by_rows(c: Case) -> Tensor:
    """Row by row."""
    out = [c.x[:0] @ c.weight.T]
    for row, number in zip(c.x, c.domain.tolist(), strict=True):
        y = row @ c.weight.T
        y = y if c.shared_bias is None else y + c.shared_bias
        if number >= 0:
            y = y + c.scale * (row @ c.bank_a[number]) @ c.bank_b[number]
            y = y if c.bias is None else y + c.bias[number]
        out.append(y[None])
    return torch.cat(out)


def by_gathering(c: Case) -> Tensor:
    """A copy of its domain's adapter for each row."""
    row = (len(c.x), *(1,) * (c.x.dim() - 2))
    own = c.domain.clamp(min=0)
    change = c.scale * torch.einsum("b...i,bir,bro->b...o", c.x, c.bank_a[own], c.bank_b[own])
    if c.bias is not None:
        change = change + c.bias[own].view(*row, c.bias.shape[1])
    y = c.x @ c.weight.T if c.shared_bias is None else c.x @ c.weight.T + c.shared_bias
    return torch.where((c.domain >= 0).view(*row, 1), y + change, y)


def by_corrections(c: Case) -> Tensor:
    return corrected_linear(c.x, c.weight, c.shared_bias, c.banks, grouped(c.domain, len(c.bank_a)))


def by_adding(c: Case) -> Tensor:
    out = torch.nn.functional.linear(c.x, c.weight, c.shared_bias)
    return add_corrections(out, c.x, c.banks, grouped(c.domain, len(c.bank_a)))


Way = Callable[[Case], Tensor]
WAYS = [by_corrections, by_adding]


def upstream_of(out: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, dtype=torch.float64, generator=random).to(out.dtype)


def results(c: Case, way: Way, upstream: Callable[[Tensor], Tensor] = upstream_of) -> dict[str, Tensor]:
    """The output and the gradient of every tensor that wants one."""
    out = way(c)
    named = {name: tensor for name, tensor in c.tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(out, list(named.values()), upstream(out), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(named, found, strict=True))}


def sizes(c: Case) -> dict[str, Tensor]:
    """What every result would be if no term of its sum cancelled another: what rounding is measured against."""
    absolute = Case(*(None if t is None else t.detach().abs().requires_grad_() for t in c[:6]), *c[6:])  # type: ignore[arg-type]
    return results(absolute, by_gathering, lambda out: upstream_of(out).abs())


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float, against: Any = None) -> None:
    assert ours.keys() == theirs.keys()
    for name, right in theirs.items():
        left, size = ours[name], (against or theirs)[name]
        assert left.shape == right.shape, name
        if right.numel():
            size = size if against else size.abs().max()
            apart = ((left.double() - right.double()).abs() / size.double().clamp(min=1.0)).max()
            assert apart <= tolerance, (name, apart)


def in_float64(c: Case) -> Case:
    return Case(
        *(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in c[:6]),  # type: ignore[arg-type]
        *c[6:],
    )


def check(c: Case, way: Way, tolerance: float, reference: Way = by_gathering) -> None:
    close(results(c, way), results(in_float64(c), reference), tolerance)


# exactness


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "domain", [[0, 0, 1, 2], [2, 0, 1, 0], [-1, -1, 1], [1, -1, 0], [-1, -1], [2], [1, 1], []], ids=str
)
def test_float32(way: Way, middle: tuple[int, ...], domain: list[int]) -> None:
    check(case(domain, middle, dtype=torch.float32, scale=1.5), way, 1e-6, by_rows)


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    num_domains = draw(st.integers(1, 5))
    domain = draw(st.lists(st.integers(-1, num_domains - 1), max_size=12))
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


@pytest.mark.parametrize("way", [*WAYS, by_gathering])
@settings(deadline=None, max_examples=40, derandomize=True)
@given(c=small_cases())
def test_any_small_case(way: Way, c: Case) -> None:
    check(c, way, 1e-12, by_rows)


class Regime(NamedTuple):
    """A batch of so many domains, each with so many rows."""

    num_domains: int
    present: int
    least: int
    most: int


REGIMES = {
    "one domain": Regime(20, 1, 1, 600),
    "few domains": Regime(3, 3, 100, 400),
    "equal large domains": Regime(3, 3, 520, 520),
    "many domains": Regime(150, 140, 1, 4),
    "equal tiles": Regime(200, 200, 3, 3),
    "tiles with pads": Regime(20, 17, 7, 9),
    "uneven": Regime(20, 17, 1, 40),
    "large bank": Regime(3000, 7, 1, 12),
}


@st.composite
def regime_cases(draw: st.DrawFn, regime: str, dtype: torch.dtype) -> Case:
    """Batches that are grouped in different ways: tiles of one domain, of several, with and without rows to fill up."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    num_domains, present, least, most = REGIMES[regime]
    counts = random.integers(least, most, size=present, endpoint=True)
    domain = np.repeat(np.sort(random.choice(num_domains, size=present, replace=False)), counts)
    domain[random.random(len(domain)) < draw(st.sampled_from([0, 0.2]))] = -1
    random.shuffle(domain) if draw(st.booleans()) else domain.sort()
    return case(
        domain,
        draw(st.sampled_from([(), (2,), (2, 1)])),
        num_domains=num_domains,
        width=(draw(st.integers(1, 8)), draw(st.integers(1, 8))),
        rank=draw(st.integers(0, 4)),
        bias=draw(st.booleans()),
        shared=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.25, 3.0])),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(data=st.data())
def test_every_regime(regime: str, dtype: torch.dtype, data: st.DataObject) -> None:
    c = data.draw(regime_cases(regime, dtype))
    exact = in_float64(c)
    expected, against = results(exact, by_gathering), sizes(exact)
    for way in WAYS:
        close(results(c, way), expected, 1e-14 if dtype == torch.float64 else 1e-6, against)


@pytest.mark.parametrize("regime", REGIMES)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(data=st.data())
def test_permuting_rows_permutes_output_and_gradient(regime: str, data: st.DataObject) -> None:
    c = data.draw(regime_cases(regime, torch.float64))
    order = torch.randperm(len(c.x), generator=torch.Generator().manual_seed(3))
    moved = c._replace(x=c.x.detach()[order].requires_grad_(), domain=c.domain[order])
    for way in WAYS:
        plain, shuffled = way(c), way(moved)
        weights = torch.linspace(-1, 1, plain.numel(), dtype=torch.float64).view(plain.shape)
        ours = torch.autograd.grad(shuffled, list(moved.tensors.values()), weights[order], allow_unused=True)
        theirs = torch.autograd.grad(plain, list(c.tensors.values()), weights, allow_unused=True)
        close({"out": shuffled.detach()}, {"out": plain.detach()[order]}, 1e-12)
        close({"x": ours[0]}, {"x": theirs[0][order]}, 1e-12)
        for mine, yours in zip(ours[1:], theirs[1:], strict=True):
            close({"": mine}, {"": yours}, 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[2, 0, -1, 2], [0, 1, 2, 2]], ids=str)
def test_gradcheck(way: Way, domain: list[int]) -> None:
    c = case(domain, (2,), scale=2.0)
    assert torch.autograd.gradcheck(lambda *tensors: way(Case(*tensors, c.scale, c.domain)), c[:6])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 60])
def test_bfloat16_loosely(way: Way, rows: int) -> None:
    c = case([2, 0, -1, 1] * rows, (2,), dtype=torch.bfloat16)
    check(c, way, 0.05)


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("sparse", [False, True])
def test_banks_of_another_type_than_what_is_computed_in(rows: int, sparse: bool) -> None:
    """Under autocast the base gives bfloat16; banks stay float32 and get float32 gradients."""
    c = case([2, 0, -1, 1] * rows, dtype=torch.float32)._replace(sparse=sparse)
    half = c._replace(
        **{name: getattr(c, name).detach().bfloat16().requires_grad_() for name in ("x", "weight", "shared_bias")}
    )
    found = results(half, by_adding)
    assert {name: found[name].dtype for name in ("out", "x", "bank_a", "bank_b", "bias")} == {
        "out": torch.bfloat16,
        "x": torch.bfloat16,
        "bank_a": torch.float32,
        "bank_b": torch.float32,
        "bias": torch.float32,
    }
    close({name: t.to_dense() for name, t in found.items()}, results(in_float64(c), by_rows), 0.05)


# inputs as they come


def strided(tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    return tensor.detach().mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("middle", [(), (3,)], ids=str)
@pytest.mark.parametrize("domain", [[0, 0, 1, 2], [2, 0, -1, 0], [1, 0, 2, 1] * 30, sorted([1, 0, 2, 1] * 30)], ids=len)
@pytest.mark.parametrize("name", ["x", "weight", "bank_a", "bank_b"])
def test_strides_do_not_matter(way: Way, name: str, domain: list[int], middle: tuple[int, ...]) -> None:
    c = case(domain, middle)
    other = c._replace(**{name: strided(getattr(c, name))})
    assert not getattr(other, name).is_contiguous()
    check(other, way, 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[0, 0, 1, 2], [2, 0, 1, 0]], ids=str)
def test_expanded_inputs_and_upstream_gradients(way: Way, domain: list[int]) -> None:
    c = case(domain, (2,))
    one = c.x[:1].detach()
    check(c._replace(x=one.expand(4, 2, 4).requires_grad_()), way, 1e-12)
    ours = torch.autograd.grad(way(c).sum(), list(c.tensors.values()))
    theirs = torch.autograd.grad(by_rows(c).sum(), list(c.tensors.values()))
    close(dict(zip(c.tensors, ours, strict=True)), dict(zip(c.tensors, theirs, strict=True)), 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[0, 1, 2, 0], [0, 0, 1, 2], [-1, -1], [2, 0, 1] * 8 + [0, 1]], ids=str)
def test_a_middle_axis_of_no_length(way: Way, domain: list[int]) -> None:
    """As a sequence of which nothing is left; nn.Linear takes it."""
    found = results(case(domain, (0,)), way)
    assert found["out"].shape == (len(domain), 0, 5)
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[2, 0, 0, 1], [0, 0, 1, 2], [2, 0, 0, 1] * 40], ids=len)
@pytest.mark.parametrize("frozen", Case._fields[:6])
@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_frozen_gets_none_and_the_rest_does_not_change(
    way: Way, domain: list[int], frozen: str, sparse: bool
) -> None:
    c = case(domain)
    still = c._replace(**{frozen: getattr(c, frozen).detach()}, sparse=sparse)
    expected = {name: gradient for name, gradient in results(c, by_rows).items() if name != frozen}
    close({name: tensor.to_dense() for name, tensor in results(still, way).items()}, expected, 1e-12)
    way(still).sum().backward()
    assert getattr(still, frozen).grad is None


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_learn_needs_no_graph(way: Way) -> None:
    c = case([2, 0, 0, 1])
    expected = way(c)
    still = c._replace(**{name: tensor.detach() for name, tensor in c.tensors.items()})
    out = way(still)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(way(c), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[3, 1, -1, 3], [1, 3], [1, 3] * 60], ids=str)
def test_absent_domains_get_exactly_zero(way: Way, domain: list[int]) -> None:
    c = case(domain, num_domains=5)
    found = results(c, way)
    for name in ("bank_a", "bank_b", "bias"):
        assert not found[name][[0, 2, 4]].any()
        assert found[name][[1, 3]].flatten(1).any(1).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copies", [1, 50])
def test_inputs_keep_their_values(way: Way, copies: int) -> None:
    c = case([2, 0, 1, -1] * copies, scale=2.0)
    before = [*(tensor.detach().clone() for tensor in c.tensors.values()), c.domain.clone()]
    upstream = torch.ones(4 * copies, 5, dtype=torch.float64)
    way(c).backward(upstream)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip([*c.tensors.values(), c.domain], before, strict=True))
    assert (upstream == 1).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("copies", [1, 50])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_graph_that_is_kept_gives_the_same_twice(way: Way, copies: int, sparse: bool) -> None:
    c = case([2, 0, 1, -1] * copies, scale=2.0)._replace(sparse=sparse)
    out, tensors = way(c), list(c.tensors.values())
    upstream = torch.randn_like(out)
    first = [g.to_dense().clone() for g in torch.autograd.grad(out, tensors, upstream, retain_graph=True)]
    results(case([0, 1, 2] * 70), way)  # memory is used for something else in between
    again = torch.autograd.grad(out, tensors, upstream)
    assert all(torch.equal(left, right.to_dense()) for left, right in zip(first, again, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[2, 0, 1, -1], [0, 1, 2, 2]], ids=str)
def test_what_follows_may_write_into_the_output(way: Way, domain: list[int]) -> None:
    c = case(domain, (2,))
    ours = torch.autograd.grad(torch.relu_(way(c)).square().sum(), list(c.tensors.values()))
    theirs = torch.autograd.grad(torch.relu(by_rows(c)).square().sum(), list(c.tensors.values()))
    close(dict(zip(c.tensors, ours, strict=True)), dict(zip(c.tensors, theirs, strict=True)), 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[2, 0, 1, -1], [0, 1, 2, 2], [0, 1]], ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "bank_a", "bank_b"])
def test_what_is_written_over_before_the_backward_pass_is_noticed_or_right(
    way: Way, name: str, domain: list[int]
) -> None:
    """Autograd's own rule: no gradient of other numbers."""
    c = case(domain)
    tensors, out = list(c.tensors.values()), way(c)
    expected = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    with torch.no_grad():
        getattr(c, name).add_(1.0)
    try:
        found = torch.autograd.grad(out.sum(), tensors)
    except RuntimeError as error:
        assert "modified" in str(error)  # noqa: PT017 - either is right
    else:
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("domain", [[0, 0, 1], [1, 0, 0], [0, 1, 2]], ids=str)
def test_corrections_are_added_in_place(domain: list[int]) -> None:
    c = case(domain)
    with torch.no_grad():
        out = torch.nn.functional.linear(c.x, c.weight, c.shared_bias)
        found = add_corrections(out, c.x, c.banks, grouped(c.domain, 3))
    assert found.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[0, 1, 2, 1, 0, -1], [-1, 0, 0, 1, 1, 2], [0, 1, 2, 1, 0, -1] * 40], ids=len)
@pytest.mark.parametrize("spoiled", [0, 1, -1])
def test_a_row_that_is_no_number_spoils_its_own_domain_alone(way: Way, domain: list[int], spoiled: int) -> None:
    c = case(domain)
    row = domain.index(spoiled)
    with torch.no_grad():
        c.x[row] = torch.nan
    found, rest = results(c, way), [number for number in range(3) if number != spoiled]
    others = torch.arange(len(domain)) != row
    assert found["out"][row].isnan().all()
    assert not found["out"][others].isnan().any()
    assert not found["x"].isnan().any()
    if kernels._BACKENDS["cpu"] is cpu:  # an accelerator multiplies few domains' rows with all their banks at once
        assert not any(found[name][rest].isnan().any() for name in ("bank_a", "bank_b", "bias"))


@pytest.mark.parametrize("way", [by_corrections, by_adding])
@pytest.mark.parametrize("domain", [[0, 1, 2, -1], [2, 0, -1, 1], [2, 0, -1, 1] * 100], ids=len)
def test_fresh_adapters_change_no_bit(way: Way, domain: list[int]) -> None:
    c = case(domain, width=(24, 16), dtype=torch.float32)
    fresh = c._replace(bank_b=torch.zeros_like(c.bank_b), bias=torch.zeros(3, 16))
    assert torch.equal(way(fresh), torch.nn.functional.linear(c.x, c.weight, c.shared_bias))


# threads


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("domain", [[0, 1, 2, 1, 0, -1] * 9, [1] * 40, [2, 0] + [1] * 60, []], ids=len)
@pytest.mark.parametrize("sparse", [False, True])
def test_no_bit_depends_on_threads(
    threads: int, domain: list[int], sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case(domain, (2,), num_domains=5, dtype=torch.float32)._replace(sparse=sparse)
    alone = results(c, by_corrections)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "_WORTH", 1)
    together = results(c, by_corrections)
    assert all(torch.equal(alone[name].to_dense(), together[name].to_dense()) for name in alone)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking a process that has threads, which is the point
def test_a_forked_process_has_helpers_of_its_own() -> None:
    calls = [lambda: None] * 3
    cpu._each(iter(calls))
    child = multiprocessing.get_context("fork").Process(target=cpu._each, args=(iter(calls),))
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_what_a_helper_raises_is_raised() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cpu._each(iter([lambda: None, fails]))


# sparse gradients


@pytest.mark.parametrize("regime", REGIMES)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(data=st.data())
def test_sparse_gradients_are_the_rows_of_dense_ones(regime: str, data: st.DataObject) -> None:
    c = data.draw(regime_cases(regime, torch.float64))
    present = c.domain[c.domain >= 0].unique()
    expected = results(c, by_gathering)
    for way in WAYS:
        dense, sparse = results(c, way), results(c._replace(sparse=True), way)
        for name in ("bank_a", "bank_b", "bias")[: 3 if c.bias is not None else 2]:
            gradient = sparse[name]
            assert gradient.layout == torch.sparse_coo
            assert gradient.is_coalesced()
            assert gradient.shape == dense[name].shape
            assert torch.equal(gradient.indices(), present[None])
            assert torch.equal(gradient.values(), dense[name][present])
            torch.sparse_coo_tensor(gradient.indices(), gradient.values(), gradient.shape, check_invariants=True)
        close({name: tensor.to_dense() for name, tensor in sparse.items()}, expected, 1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("domain", [[], [-1, -1]], ids=str)
def test_no_domain_gives_a_sparse_gradient_of_no_rows(way: Way, domain: list[int]) -> None:
    found = results(case(domain)._replace(sparse=True), way)
    for name in ("bank_a", "bank_b", "bias"):
        assert found[name].layout == torch.sparse_coo
        assert found[name].values().shape[0] == 0


@pytest.mark.parametrize("way", WAYS)
def test_sparse_gradients_of_several_uses_add_up(way: Way) -> None:
    """Two calls in one graph, and two backward passes: the sum need not be coalesced, it must be right."""
    c = case([2, 0, 1, -1, 2], num_domains=4)._replace(sparse=True)
    other = c._replace(domain=torch.tensor([3, 3, 0, 0, -1]))
    total = 2 * (by_rows(c).square().sum() + by_rows(other).square().sum())
    expected = torch.autograd.grad(total, list(c.tensors.values()))
    for _ in range(2):
        (way(c).square().sum() + way(other).square().sum()).backward()
    found = {name: tensor.grad.to_dense() for name, tensor in c.tensors.items() if tensor.grad is not None}
    close(found, dict(zip(c.tensors, expected, strict=True)), 1e-12)


# cost


class Made(TorchDispatchMode):
    """Memory in bytes that operators make while this is on; it is held, so that none is counted twice."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.made[storage.data_ptr()] = storage
        return result

    @property
    def sizes(self) -> list[int]:
        return [storage.nbytes() for storage in self.made.values()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_cost_follows_the_domains_in_the_batch_and_not_the_bank(way: Way, shuffled: bool) -> None:
    """All memory of a step together, for 30 of 10,000 domains, is less than a tenth of a copy of the bank."""
    random = np.random.default_rng(0)
    domain = np.sort(np.repeat(random.choice(10_000, size=30, replace=False), 3))
    if shuffled:
        random.shuffle(domain)
    c = case(domain, num_domains=10_000, width=(32, 16), rank=8, dtype=torch.float32)._replace(sparse=True)
    with Made([*c.tensors.values(), c.domain]) as made:
        way(c).sum().backward()
    rows = max(90, 30 * 8) * 32  # activations, A of each domain
    assert 4 * 90 * 16 <= max(made.sizes) <= 4 * rows
    assert sum(made.sizes) < 4 * c.bank_a.numel() / 10
    for bank, width in ((c.bank_a, 32 * 8), (c.bank_b, 8 * 16), (c.bias, 16)):
        assert bank is not None
        assert bank.grad is not None
        assert bank.grad.values().numel() == 30 * width
