"""Distinct values against Python's sets; and what a sample of them says when there are too many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.studies.describing import distinct as module
from domlora.studies.describing.distinct import Distinct, distinct, elsewhere, holds, in_common

GROUPS = 4
SOME = st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1)
ADDED = st.lists(st.lists(st.tuples(st.integers(0, GROUPS - 1), SOME), max_size=30), max_size=8)
SETS = st.lists(st.frozensets(st.integers(-4, 12)), min_size=1, max_size=5)


def array(values) -> np.ndarray:
    return np.array(list(values), np.int64)


@settings(deadline=None)
@given(added=ADDED, waiting=st.integers(1, 40))
def test_groups_hold_what_was_added(added: list[list[tuple[int, int]]], waiting: int) -> None:
    counted = Distinct(GROUPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WAITING", waiting)  # merges happen in the midst, too
        for rows in added:
            counted.add(array(group for group, _ in rows), array(value for _, value in rows))
    expected = [{value for rows in added for group, value in rows if group == mine} for mine in range(GROUPS)]
    assert [counted.of(group).tolist() for group in range(GROUPS)] == [sorted(values) for values in expected]
    assert counted.of(0, 2).tolist() == sorted(expected[0] | expected[2])
    assert counted.scale == 1


@given(sets=SETS)
def test_what_sets_have_in_common(sets: list[frozenset[int]]) -> None:
    arrays = [array(sorted(values)) for values in sets]
    assert in_common(arrays).tolist() == [[len(one & other) for other in sets] for one in sets]
    others = [set().union(*(other for place, other in enumerate(sets) if place != mine)) for mine in range(len(sets))]
    assert elsewhere(arrays) == [len(values & other) for values, other in zip(sets, others, strict=True)]
    assert distinct(arrays).tolist() == sorted(set().union(*sets))
    asked = array(range(-6, 14))
    assert holds(arrays[0], asked).tolist() == [value in sets[0] for value in asked.tolist()]


@pytest.mark.parametrize("values", [np.arange(60_000), np.random.default_rng(1).integers(0, 2**62, 60_000)])
def test_a_sample_stands_for_all(values: np.ndarray) -> None:
    """Ids in a row and hashes alike: counts and shares of a sample are near the true ones, the memory is kept."""
    counted = Distinct(2, limit=10_000)
    for start in range(0, 60_000, 5_000):
        counted.add(np.zeros(5_000, np.int64), values[start : start + 5_000])
        counted.add(np.ones(2_500, np.int64), values[start : start + 2_500])
    first, second, scale = counted.of(0), counted.of(1), counted.scale
    assert len(first) + len(second) <= 10_000
    assert scale in (16, 32)
    assert len(first) * scale == pytest.approx(60_000, rel=0.1)
    assert np.isin(second, first).all()  # one sample of values for all groups, so shares are those of all
    assert len(second) / len(first) == pytest.approx(0.5, abs=0.05)
    weights = counted.weights(values)
    assert set(weights.tolist()) == {0, scale}
    assert weights.sum() == len(first) * scale


def test_a_sample_does_not_hang_on_the_order() -> None:
    values = np.random.default_rng(2).integers(0, 2**62, 20_000)
    found = []
    for order in (values, values[::-1]):
        counted = Distinct(1, limit=1_000)
        for start in range(0, 20_000, 1_000):
            counted.add(np.zeros(1_000, np.int64), order[start : start + 1_000])
            counted.of(0)
        found.append((counted.scale, counted.of(0).tolist()))
    assert found[0] == found[1]


def test_no_limit_is_too_small() -> None:
    """One value in more groups than may be kept at all must end, whatever it says."""
    counted = Distinct(8, limit=2)
    counted.add(np.arange(8), np.full(8, 7))
    assert len(counted.of(*range(8))) <= 1
