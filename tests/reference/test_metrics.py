"""Metrics against scikit-learn's, on the same rows in this process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from domlora.evaluation import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")
calibration = pytest.importorskip("sklearn.calibration")

SEEDS = range(5)


def rows(seed: int, num_rows: int, decimals: int | None, rate: float = 0.2) -> tuple[Any, ...]:
    """label, probability, positive weights."""
    random = np.random.default_rng(seed)
    label = (random.random(num_rows) < rate).astype(np.float32)
    probability = 1 / (1 + np.exp(-random.normal(label - 1.5, 1.0)))
    probability = probability if decimals is None else probability.round(decimals)
    return label, probability, random.uniform(0.1, 10.0, num_rows)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_rows", [40, 5000])
@pytest.mark.parametrize("decimals", [None, 3, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc(seed: int, num_rows: int, decimals: int | None, dtype: Any) -> None:
    label, probability, weight = rows(seed, num_rows, decimals)
    probability = probability.astype(dtype)
    expected = sklearn_metrics.roc_auc_score(label, probability)
    assert metrics.auc(label, probability) == pytest.approx(expected, abs=1e-13)
    expected = sklearn_metrics.roc_auc_score(label, probability, sample_weight=weight)
    assert metrics.auc(label, probability, weight) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_with_rows_of_weight_zero(seed: int) -> None:
    label, probability, weight = rows(seed, 300, 1)
    weight[::3] = 0
    expected = sklearn_metrics.roc_auc_score(label, probability, sample_weight=weight)
    assert metrics.auc(label, probability, weight) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_groups", [3, 400])
def test_auc_by_group_down_to_groups_of_a_few_rows(num_groups: int, weighted: bool) -> None:
    label, probability, weight = rows(0, 1600, 2, rate=0.5)
    group = np.random.default_rng(1).integers(0, num_groups, label.size)
    ours = metrics.auc_by_group(label, probability, group, num_groups, weight if weighted else None)
    total = mass = 0.0
    for g in range(num_groups):
        at = group == g
        if len(set(label[at])) < 2:
            assert math.isnan(ours[g])
            continue
        sample_weight = weight[at] if weighted else np.ones(at.sum())
        expected = sklearn_metrics.roc_auc_score(label[at], probability[at], sample_weight=sample_weight)
        assert ours[g] == pytest.approx(expected, abs=1e-12)
        total, mass = total + expected * sample_weight.sum(), mass + sample_weight.sum()
    wauc = metrics.wauc(label, probability, group, weight if weighted else None)
    assert wauc == pytest.approx(total / mass, abs=1e-12)
    assert metrics.gauc(label, probability, group, weight if weighted else None).value == pytest.approx(wauc)


@pytest.mark.parametrize("seed", SEEDS)
def test_log_loss(seed: int) -> None:
    label, probability, weight = rows(seed, 1000, 1)  # rounded, so that some are exactly 0
    probability[:3], label[:3] = [0.0, 1.0, 0.0], [0, 0, 1]
    assert metrics.log_loss(label, probability) == pytest.approx(sklearn_metrics.log_loss(label, probability))
    expected = sklearn_metrics.log_loss(label, probability, sample_weight=weight)
    assert metrics.log_loss(label, probability, weight) == pytest.approx(expected)
    half = probability.astype(np.float32)
    assert metrics.log_loss(label, half) == pytest.approx(sklearn_metrics.log_loss(label, half), rel=1e-5)


@pytest.mark.parametrize(("bins", "strategy"), [("equal_width", "uniform"), ("equal_mass", "quantile")])
def test_calibration_error_from_a_calibration_curve(bins: Any, strategy: str) -> None:
    label, probability, _ = rows(0, 5000, None)
    observed, predicted = calibration.calibration_curve(label, probability, n_bins=10, strategy=strategy)
    share = np.histogram(probability, bins=10, range=(0, 1))[0] / 5000 if strategy == "uniform" else np.full(10, 0.1)
    expected = np.sum(share[share > 0] * np.abs(observed - predicted))
    assert metrics.expected_calibration_error(label, probability, bins=bins) == pytest.approx(expected, abs=1e-12)
