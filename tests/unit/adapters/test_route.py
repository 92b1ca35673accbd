from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from domlora.adapters.route import DomainRoute, Segments, Ungrouped, grouped
from domlora.errors import ConfigError, UnknownDomainError


def spans(segments: Segments | Ungrouped) -> list[tuple[int, int, int]]:
    """Where each domain begins and ends among the sorted rows, and its number."""
    assert isinstance(segments, Segments)
    bounds = segments.bounds.tolist()
    return list(zip(bounds[:-1], bounds[1:], segments.names.tolist(), strict=True))


# grouping


@pytest.mark.parametrize("num_domains", [0, -1])
def test_a_route_needs_domains(num_domains: int) -> None:
    with pytest.raises(ConfigError, match="num_domains"):
        DomainRoute(num_domains)


@pytest.mark.parametrize("number", [3, -2, 10**9])
def test_unknown_domains_are_named(number: int) -> None:
    route = DomainRoute(3)
    with pytest.raises(UnknownDomainError, match=rf"0 to 2.*Received: {number}"):
        route.fill(torch.tensor([0, number, 1]))
    assert route.segments is None


@pytest.mark.parametrize(
    "domain",
    [torch.tensor([[0], [1]]), torch.tensor(1), torch.tensor([0.0, 1.0]), torch.tensor([True, False]), None, [0, 1]],
)
def test_what_is_not_a_vector_of_integers_is_refused(domain: Any) -> None:
    with pytest.raises(ConfigError, match="vector of integers"):
        grouped(domain, 3)


def test_sorted_rows_are_left_where_they_are() -> None:
    segments = grouped(torch.tensor([-1, 0, 0, 3]), 4)
    assert segments.order is None
    assert spans(segments) == [(1, 3, 0), (3, 4, 3)]
    assert segments.num_rows == 4
    assert segments.domains.tolist() == [0, 3]


def test_other_rows_are_sorted_and_equal_ones_keep_their_order() -> None:
    segments = grouped(torch.tensor([3, 0, -1, 0]), 4)
    assert segments.order is not None
    assert segments.order.tolist() == [2, 1, 3, 0]
    assert spans(segments) == [(1, 3, 0), (3, 4, 3)]


@pytest.mark.parametrize("domain", [[], [-1, -1]], ids=str)
def test_rows_of_no_domain_are_in_no_span(domain: list[int]) -> None:
    segments = grouped(torch.tensor(domain, dtype=torch.int64), 2)
    assert (segments.order, spans(segments), segments.num_rows) == (None, [], len(domain))
    assert segments.domains.shape == (0,)


@pytest.mark.parametrize("highest", [127, 32767, 32768, 70000])
def test_high_numbers_are_sorted_right(highest: int) -> None:
    """There are two ways to sort: numbers of 16 bits, and the rest."""
    domain = torch.tensor([highest, 0, -1, highest - 1, highest, 5, -1])
    segments = grouped(domain, highest + 1)
    assert segments.order is not None
    assert segments.order.tolist() == [2, 6, 1, 5, 3, 0, 4]
    assert segments.domains.tolist() == [0, 5, highest - 1, highest]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("numbers", [[2, 0, 1, 2], [0, 1, 1, 2]], ids=str)
def test_other_integer_types(dtype: torch.dtype, numbers: list[int]) -> None:
    found, expected = grouped(torch.tensor(numbers, dtype=dtype), 3), grouped(torch.tensor(numbers), 3)
    assert spans(found) == spans(expected)
    assert found.domains.dtype == torch.int64
    assert (found.order is None) == (expected.order is None)
    assert found.order is None or expected.order is None or torch.equal(found.order, expected.order)


def test_a_vector_with_strides_is_read_and_left_alone() -> None:
    wide = torch.tensor([[2, 9], [0, 9], [1, 9]])
    kept = wide.clone()
    segments = grouped(wide[:, 0], 3)
    assert segments.domains.tolist() == [0, 1, 2]
    assert torch.equal(wide, kept)


# batches of every kind


@st.composite
def counts_of_rows(draw: st.DrawFn) -> list[int]:
    """How many rows each domain of a batch has, in every regime."""
    regime = draw(st.sampled_from(["one", "few", "many", "even", "mixed"]))
    if regime == "one":
        return [draw(st.integers(1, 1500))]
    if regime == "few":
        return draw(st.lists(st.integers(100, 900), min_size=2, max_size=4))
    if regime == "many":
        return draw(st.lists(st.integers(1, 4), min_size=65, max_size=300))
    if regime == "even":
        return [draw(st.integers(1, 80))] * draw(st.integers(2, 150))
    return draw(st.lists(st.integers(1, 200), min_size=1, max_size=60))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """The domain of each row and the height of the bank: gaps between numbers, rows of no domain, any order."""
    counts = draw(counts_of_rows())
    gap = draw(st.sampled_from([1, 2, 97]))
    numbers = np.repeat(np.arange(len(counts)) * gap, counts)
    domain = np.concatenate([np.full(draw(st.integers(0, 20)), -1), numbers])
    if draw(st.booleans()):
        np.random.default_rng(draw(st.integers(0, 1000))).shuffle(domain)
    return torch.from_numpy(domain), len(counts) * gap + draw(st.integers(0, 3))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(batches())
def test_spans_are_what_counting_gives(batch: tuple[Tensor, int]) -> None:
    domain, num_domains = batch
    segments = grouped(domain, num_domains)
    present, counts = (domain + 1).unique(return_counts=True)
    expected = {int(d) - 1: int(n) for d, n in zip(present, counts, strict=True) if d}
    assert {d: stop - start for start, stop, d in spans(segments)} == expected
    assert segments.domains.tolist() == sorted(expected)
    rows = domain if segments.order is None else domain[segments.order]
    assert torch.equal(rows, domain.sort().values)
    assert segments.order is None or torch.equal(segments.order, domain.sort(stable=True).indices)
    ends = [int((domain < 0).sum()), *(stop for _, stop, _ in spans(segments))]
    assert [start for start, *_ in spans(segments)] == ends[:-1]
    assert ends[-1] == segments.num_rows == len(domain)


# the cell


def test_filling_and_forgetting() -> None:
    route = DomainRoute(3)
    assert route.segments is None
    route.fill(torch.tensor([0, 2]))
    assert route.segments is not None
    assert spans(route.segments) == [(0, 1, 0), (1, 2, 2)]
    route.clear()
    assert route.segments is None


def test_each_thread_has_its_own_batch() -> None:
    route = DomainRoute(3)
    route.fill(torch.tensor([1]))
    route.enabled, route.held = False, True
    seen: list[Any] = []

    def other() -> None:
        seen.extend([route.segments, route.enabled, route.held])
        route.fill(torch.tensor([0, 0]))
        route.enabled, route.held = True, False

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [None, True, False]
    assert route.segments is not None
    assert (route.segments.num_rows, route.enabled, route.held) == (1, False, True)


def test_a_copy_has_the_cell_and_not_the_batch() -> None:
    route = DomainRoute(3)
    route.options, route.read = {"rank": 2}, grouped
    route.fill(torch.tensor([1]))
    route.enabled, route.held = False, True
    other = copy.deepcopy(route)
    assert (other.num_domains, other.options, other.read) == (3, {"rank": 2}, grouped)
    assert (other.segments, other.enabled, other.held) == (None, True, False)
    other.fill(torch.tensor([0, 0]))
    assert route.segments is not None
    assert route.segments.num_rows == 1
