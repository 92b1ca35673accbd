"""Paired intervals against numbers made by hand and against scipy's own t interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from domlora.errors import DataError
from domlora.studies.reporting.statistics import (
    LEVEL,
    Interval,
    gap_closed,
    holm,
    interval_text,
    p_text,
    p_value,
    paired,
    score_text,
    signed,
    spread,
    verdict,
)


def test_interval_by_hand():
    # mean 2, std 1, t(0.975, 2 degrees) = 4.30265 from a printed table: half width 4.30265 / sqrt(3) = 2.48414
    mean, low, high, num_pairs = paired([1.0, 2.0, 3.0])
    assert (mean, num_pairs) == (2.0, 3)
    assert low == pytest.approx(2 - 2.48414, abs=2e-5)
    assert high == pytest.approx(2 + 2.48414, abs=2e-5)


def test_interval_of_two_by_hand():
    # t(0.975, 1 degree) = 12.7062; mean 0.001, std 0.001 * sqrt(2), half width 12.7062 * 0.001
    interval = paired([0.0, 0.002])
    assert interval.low == pytest.approx(0.001 - 0.0127062, abs=1e-8)
    assert interval.high == pytest.approx(0.001 + 0.0127062, abs=1e-8)


@pytest.mark.parametrize("num", [2, 3, 5, 30])
def test_interval_is_scipys(num):
    differences = np.random.default_rng(num).normal(0.001, 0.002, num)
    interval = paired(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), rel=1e-10)


def test_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(7).normal(0.0, 1.0, (2000, 5))
    missed = sum(verdict(paired(row)) != "no difference" for row in draws)
    assert 70 <= missed <= 130  # 5 % of 2000, plus and minus three standard deviations


@pytest.mark.parametrize("differences", [[], [math.nan], [0.5], [0.5, math.nan]])
def test_fewer_than_two_pairs_have_no_interval(differences):
    interval = paired(differences)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.num_pairs == sum(not math.isnan(value) for value in differences)
    assert verdict(interval) == "one run"


def test_nan_is_left_out_and_not_counted():
    assert paired([1.0, math.nan, 3.0]) == paired([1.0, 3.0])


def test_equal_differences_leave_no_width():
    assert paired([0.0, 0.0, 0.0]) == Interval(0.0, 0.0, 0.0, 3)
    assert verdict(paired([0.0, 0.0])) == "no difference"
    assert verdict(paired([0.25, 0.25])) == "gain"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.01, 0.02, "gain"),
        (-0.02, -0.01, "loss"),
        (-0.01, 0.5, "no difference"),
        (0.0, 0.5, "no difference"),
        (-0.5, 0.0, "no difference"),
    ],
)
def test_verdict(low, high, word):
    assert verdict(Interval((low + high) / 2, low, high, 5)) == word


def test_spread():
    assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 1.0, 6.0, 3)
    assert math.isnan(spread([1.0]).std)
    assert spread([]).num_values == 0


def test_gap_closed_is_paired_by_seed():
    share = gap_closed([0.5, 0.6], [0.6, 0.65], [0.7, 0.8])  # shares 0.5 and 0.25
    assert share.mean == pytest.approx(0.375)
    assert share == pytest.approx(paired([0.5, 0.25]))


def test_gap_closed_can_be_negative():
    assert gap_closed([0.5], [0.25], [0.75]).mean == -1.0


def test_no_share_of_a_gap_that_is_not_there():
    share = gap_closed([0.5, 0.8], [0.6, 0.85], [0.7, 0.8])
    assert math.isnan(share.mean)
    assert share.num_pairs == 2


def test_gap_closed_needs_one_value_a_seed():
    with pytest.raises(DataError, match="one value a seed"):
        gap_closed([0.5], [0.6, 0.7], [0.8])


def test_texts():
    assert signed(-0.0012) == "\u22120.12"
    assert signed(0.0) == "0.00"
    assert signed(0.00001) == "+0.00"
    assert signed(math.nan) == "\u2013"
    assert score_text(spread([0.7912])) == "79.12"
    assert score_text(spread([])) == "\u2013"
    assert interval_text(Interval(0.0012, -0.0005, 0.0029, 5)) == "+0.12 [\u22120.05, +0.29]"
    assert interval_text(Interval(0.0012, math.nan, math.nan, 1)) == "+0.12"


# ---------------------------------------------------------------------------------------------------- several tests

P = st.one_of(st.floats(0.0, 1.0), st.just(math.nan))


@pytest.mark.parametrize("num", [2, 3, 5, 30])
def test_p_value_is_scipys(num):
    differences = np.random.default_rng(num).normal(0.001, 0.002, num)
    assert p_value(paired(differences)) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)


@given(st.lists(st.floats(-1.0, 1.0).map(lambda value: round(value, 4)), min_size=2, max_size=8))
def test_p_value_and_interval_say_the_same(differences):
    interval = paired(differences)
    sure = verdict(interval) in ("gain", "loss")
    assert sure == (p_value(interval) < LEVEL)


def test_p_value_without_width():
    assert p_value(paired([0.25, 0.25])) == 0.0
    assert p_value(paired([0.0, 0.0])) == 1.0
    assert math.isnan(p_value(paired([])))


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; never smaller than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


def test_holm_of_one_or_none_is_the_same():
    assert holm([0.03]) == (0.03,)
    assert holm([]) == ()


@given(st.lists(P, max_size=12), st.floats(0.001, 0.999))
def test_holm_is_its_step_down_procedure(p_values, level):
    """From the smallest on, reject while p <= level / (tests that are left), then stop: by the book, for any level."""
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    rejected = set()
    for rank, (p, place) in enumerate(known):
        if p * (len(known) - rank) > level:
            break
        rejected.add(place)
    adjusted = holm(p_values)
    assert {place for place, p in enumerate(adjusted) if p <= level} == rejected
    assert [math.isnan(p) for p in adjusted] == [math.isnan(p) for p in p_values]
    assert all(new >= old for new, old in zip(adjusted, p_values, strict=True) if not math.isnan(old))


def test_holm_keeps_the_chance_of_any_false_finding():
    """Ten models without any difference, 1,000 studies: five percent of studies may claim something, and not forty."""
    draws = np.random.default_rng(3).normal(0.0, 1.0, (1000, 10, 5))
    p_values = stats.ttest_1samp(draws, 0, axis=2).pvalue
    naive = sum(any(p < LEVEL for p in row) for row in p_values)
    after = sum(any(p < LEVEL for p in holm(list(row))) for row in p_values)
    assert naive > 350
    assert 29 <= after <= 71  # 50, plus and minus three standard deviations


def test_texts_of_p_values():
    assert [p_text(p) for p in (0.0, 0.0009, 0.001, 0.0512, 0.5)] == ["< 0.001", "< 0.001", "0.001", "0.051", "0.50"]
