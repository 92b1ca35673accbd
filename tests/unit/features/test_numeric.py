from __future__ import annotations

import math
from statistics import fmean, pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.errors import SchemaError
from domlora.features.numeric import bucket, fit_boundaries, fit_numbers, standardise
from domlora.features.schema import FIRST_ID, PAD_ID, Feature

AGE = Feature("age", "numeric", mean=30.0, std=10.0)
NUMBERS = st.lists(st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.1])), min_size=1)


def test_fit_numbers() -> None:
    values = [1.5, 2.5, 2.5, 7.0, -3.25]
    mean, std = fit_numbers(np.array([*values, np.nan, np.inf, -np.inf, 1e300]))
    assert (mean, std) == (pytest.approx(fmean(values)), pytest.approx(pstdev(values)))
    feature = Feature("x", "numeric", mean=mean, std=std)
    assert abs(standardise(values, feature).mean()) < 1e-7
    assert standardise(values, feature).std() == pytest.approx(1.0)


def test_fit_numbers_with_logarithm() -> None:
    values = [0.0, -5.0, 1e6, 1e300]
    logs = [math.copysign(math.log1p(abs(value)), value) for value in values]
    mean, std = fit_numbers(np.array([*values, np.nan, np.inf]), "log1p")
    assert (mean, std) == (pytest.approx(fmean(logs)), pytest.approx(pstdev(logs)))
    feature = Feature("x", "numeric", transform="log1p", mean=mean, std=std)
    expected = [(log - mean) / std for log in logs]
    assert standardise(values, feature).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (0.0, 1.0)),
        ([np.nan, np.inf], (0.0, 1.0)),
        ([4.0, 4.0], (4.0, 1.0)),
        ([0.1] * 3, (0.1, 1.0)),  # 0.1 + 0.1 + 0.1 is not 3 * 0.1
        ([0.7] * 10, (0.7, 1.0)),
    ],
)
def test_numbers_that_never_change(values, expected) -> None:
    assert fit_numbers(np.array(values)) == expected


@given(NUMBERS, st.randoms(), st.sampled_from(["standard", "log1p"]))
def test_fits_do_not_hang_on_the_order_of_rows(values, random, transform) -> None:
    shuffled = random.sample(values, len(values))
    assert repr(fit_numbers(np.array(values), transform)) == repr(fit_numbers(np.array(shuffled), transform))
    assert repr(fit_boundaries(np.array(values), 4)) == repr(fit_boundaries(np.array(shuffled), 4))


@pytest.mark.parametrize(
    ("values", "buckets", "boundaries"),
    [
        (range(8), 4, (2.0, 4.0, 6.0)),
        (range(10), 4, (2.0, 5.0, 7.0)),
        (range(3), 10, (1.0, 2.0)),
        ([0] * 9 + [1], 2, ()),
        ([0] * 4 + [1] * 6, 2, (1.0,)),
        ([7, 7, 7], 5, ()),
        ([], 5, ()),
        ([np.nan, np.inf, 3, 4, -np.inf], 2, (4.0,)),
        (range(8), 1, ()),
    ],
)
def test_fit_boundaries(values, buckets, boundaries) -> None:
    found = fit_boundaries(np.array(list(values), dtype=np.float64), buckets)
    assert found == boundaries
    assert all(type(boundary) is float for boundary in found)


@given(NUMBERS, st.integers(2, 20))
def test_every_bucket_holds_a_training_row(values, buckets) -> None:
    boundaries = fit_boundaries(np.array(values), buckets)
    assert len(boundaries) < buckets
    assert list(boundaries) == sorted(set(boundaries))
    feature = Feature("x", "bucketed", num_ids=FIRST_ID + 1 + len(boundaries), boundaries=boundaries)
    found = set(bucket(values, feature).tolist()) - {PAD_ID}
    assert found == set(range(FIRST_ID, feature.num_ids)) or not any(map(math.isfinite, values))


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=300, unique=True), st.integers(2, 20))
def test_buckets_of_distinct_numbers_are_of_one_size(values, buckets) -> None:
    boundaries = fit_boundaries(np.array(values), buckets)
    feature = Feature("x", "bucketed", num_ids=FIRST_ID + 1 + len(boundaries), boundaries=boundaries)
    sizes = np.bincount(bucket(values, feature))[FIRST_ID:]
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("value", "id_"),
    [
        (-5, 2),
        (9.999, 2),
        (10, 3),
        ("10", 3),
        (19, 3),
        (20.0, 4),
        (1e300, 4),
        (None, PAD_ID),
        ("", PAD_ID),
        (float("nan"), PAD_ID),
        (float("inf"), PAD_ID),
        (float("-inf"), PAD_ID),
    ],
)
def test_bucket(value, id_) -> None:
    feature = Feature("x", "bucketed", num_ids=5, boundaries=(10.0, 20.0))
    assert bucket([value], feature).tolist() == [id_]
    assert bucket([0, value], feature).dtype == np.int64


def test_buckets_without_boundaries() -> None:
    assert bucket([1, None], Feature("x", "bucketed", num_ids=3)).tolist() == [FIRST_ID, PAD_ID]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([30, 40], [0.0, 1.0]),
        (["40", " 20 "], [1.0, -1.0]),
        ([None, float("inf")], [0.0, 0.0]),
        ([1e300, -1e300], [0.0, 0.0]),  # beyond float32
        pytest.param([10**400, True], [0.0, np.float32(-2.9)], id="huge"),
        (np.array([40, 50], dtype=np.uint8), [1.0, 2.0]),
        (np.array([40.0, np.nan], dtype=np.float32), [1.0, 0.0]),
    ],
)
def test_standardise(values, expected) -> None:
    found = standardise(values, AGE)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected)


def test_standardise_with_logarithm() -> None:
    feature = Feature("x", "numeric", transform="log1p", mean=1.0, std=2.0)
    values = [0, -3, 1e300, None, float("inf"), float("-inf")]
    expected = [-0.5, (-math.log(4) - 1) / 2, (math.log(1e300) - 1) / 2, 0.0, 0.0, 0.0]
    assert standardise(values, feature).tolist() == pytest.approx(expected)


def test_columns_are_named_and_not_features() -> None:
    feature = Feature("age", "numeric", columns=("born",))
    for function in (standardise, bucket):
        with pytest.raises(SchemaError, match="'born' needs numbers"):
            function(["old"], feature)
