import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.evaluation.metrics import auc_by_group, wauc
from domlora.evaluation.paired import auc_differences, wauc_difference


def by_hand(label, one, two):
    """Every pair of a positive and a negative row, as the paper defines it."""

    def wins(score):
        gap = score[label == 1][:, None] - score[label == 0][None, :]
        return (gap > 0) + 0.5 * (gap == 0)

    gain = wins(one) - wins(two)
    above, below = gain.mean(1), gain.mean(0)
    return gain.mean(), np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 30))
def test_every_pair_counted(seed, positives, negatives):
    draw = np.random.default_rng(seed)
    label = draw.permutation(np.repeat([1, 0], [positives, negatives]))
    one, two = draw.integers(0, 12, (2, len(label))) / 12  # with ties
    found = auc_differences(label, one, two, np.zeros(len(label), int))
    np.testing.assert_allclose([found.value[0], found.standard_error[0]], by_hand(label, one, two), atol=1e-12)


def test_groups_are_apart():
    draw = np.random.default_rng(0)
    label, group = draw.integers(0, 2, 300), draw.integers(0, 4, 300)
    one, two = draw.random((2, 300))
    found = auc_differences(label, one, two, group, num_groups=6)
    expected = auc_by_group(label, one, group, 6) - auc_by_group(label, two, group, 6)
    np.testing.assert_allclose(found.value, expected, atol=1e-12)
    for number in range(4):
        rows = group == number
        alone = auc_differences(label[rows], one[rows], two[rows], np.zeros(rows.sum(), int))
        assert alone.standard_error[0] == pytest.approx(found.standard_error[number])
    assert np.isnan(found.standard_error[4:]).all()


def test_a_group_without_pairs_has_no_error():
    found = auc_differences([1, 0, 0, 1], [0.3, 0.2, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1])
    assert found.value[0] == 1.0
    assert np.isnan([found.standard_error[0], found.value[1]]).all()


def test_its_error_is_that_of_samples():
    """Over many draws of rows the difference spreads as its standard error says."""
    draw = np.random.default_rng(1)
    found = []
    for _ in range(300):
        label = draw.integers(0, 2, 400)
        common = label + draw.normal(size=400)
        one, two = (1 / (1 + np.exp(-common - draw.normal(size=400))) for _ in range(2))
        found.append(auc_differences(label, one, two, np.zeros(400, int)))
    spread = np.std([one.value[0] for one in found])
    assert np.mean([one.standard_error[0] for one in found]) == pytest.approx(spread, rel=0.15)


def test_wauc_is_the_domains_by_their_rows():
    draw = np.random.default_rng(2)
    domain = draw.choice([3, 7, 9, -1], 800, p=[0.6, 0.2, 0.15, 0.05])
    label = np.where(domain == 9, 1, draw.integers(0, 2, 800))  # a domain of one class
    one, two = draw.random((2, 800))
    found = wauc_difference(label, one, two, domain)
    assert found.value == pytest.approx(wauc(label, one, domain) - wauc(label, two, domain))
    apart = auc_differences(label, one, two, np.searchsorted([-1, 3, 7, 9], domain))
    rows = np.bincount(np.searchsorted([-1, 3, 7], domain[domain != 9]))
    assert found.standard_error == pytest.approx(np.sqrt(rows**2 @ apart.standard_error[:3] ** 2) / rows.sum())
