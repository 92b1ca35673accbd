"""Errors of ratios and CUPED against tea-tasting, power and corrections against statsmodels, coverage by simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import tea_tasting as tt
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower

from domlora.abtest.power import needed_units
from domlora.abtest.sequential import drift
from domlora.abtest.statistics import (
    Columns,
    Comparison,
    adjusted,
    compare,
    interval,
    moments_of,
    sample_ratio,
    student,
)

Z = 1.959963984540054


def users(seed: int = 3, units: int = 4000) -> pd.DataFrame:
    table = tt.make_users_data(rng=seed, n_users=units, covariates=True, return_type="pandas")
    return table.assign(sessions_covariate=table["sessions_covariate"].clip(lower=0))


def both(table: pd.DataFrame, names: list[str]) -> list[np.ndarray]:
    return [moments_of(table.loc[table["variant"] == arm, names].to_numpy()) for arm in (0, 1)]


@pytest.mark.parametrize("denominator", ["sessions", None])
@pytest.mark.parametrize("cuped", [False, True])
def test_equals_tea_tasting(denominator: str | None, cuped: bool) -> None:
    table = users()
    names = ["orders", "sessions", "orders_covariate", "sessions_covariate"]
    before = (3, 0 if denominator is None else 4) if cuped else None
    found = compare(*both(table, names), Columns(1, 0 if denominator is None else 2, before))
    metric = tt.RatioOfMeans(
        "orders",
        denominator,
        "orders_covariate" if cuped else None,
        "sessions_covariate" if cuped and denominator else None,
        use_t=False,
        equal_var=False,
    )
    theirs = tt.Experiment(orders=metric).analyze(table)["orders"]
    low, high = interval(found, Z)
    ours = (found.control, found.treatment, found.lift, low, high)
    close = 1e-9 if denominator is None else 1e-3  # theirs knows no leverage: 4,000 units, so a few parts in 10,000
    assert np.allclose(ours, [theirs.control, theirs.treatment, theirs.rel_effect_size,
                              theirs.rel_effect_size_ci_lower, theirs.rel_effect_size_ci_upper], rtol=close)  # fmt: skip
    error = np.hypot(found.control_error, found.treatment_error)
    assert np.isclose((found.treatment - found.control) / error, theirs.statistic, rtol=close)
    assert (found.reduction > 0.2) == cuped


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_errors_of_few_units_are_those_of_the_jackknife(spread: float) -> None:
    """Of equal ones to the last digit, of unequal ones on average; the delta method alone says too little there."""
    random = np.random.default_rng(5)
    size = np.ceil(random.lognormal(4.0, spread, (200, 60)))
    clicks = random.binomial(size.astype(int), random.beta(2.0, 8.0, (200, 60)))
    found = compare(*[moments_of(np.stack([size, clicks], -1))] * 2, Columns(2, 1))
    rows, ratio = size.sum(1, keepdims=True), clicks.sum(1, keepdims=True) / size.sum(1, keepdims=True)
    without = (clicks.sum(1, keepdims=True) - clicks) / (rows - size)
    jackknife = 59 / 60 * ((without - without.mean(1, keepdims=True)) ** 2).sum(1)
    delta = 60 / 59 * ((clicks - ratio * size) ** 2).sum(1) / rows[:, 0] ** 2
    ours, theirs = (found.control_error**2 / jackknife).mean(), (delta / jackknife).mean()
    assert ours == pytest.approx(1.0, abs=0.02 if spread else 1e-9)
    assert theirs < 0.97 if spread else theirs == pytest.approx(1.0)


def test_critical_values_of_few_units() -> None:
    assert student(1.959964, [10, 100, np.inf]) == pytest.approx([2.2281, 1.9840, 1.959964], abs=1e-3)
    found = compare(*[moments_of([[1.0, each % 2] for each in range(40)])] * 2, Columns(2, 1))
    assert found.freedom == pytest.approx(78)
    uneven = compare(*[moments_of([[1.0 if each else 100.0, each % 2] for each in range(40)])] * 2, Columns(2, 1))
    assert uneven.freedom == pytest.approx(2.0), "one unit of an arm has nearly all rows"


def test_variances_of_gamma_units_are_as_sure_as_is_said() -> None:
    """How much the error varies from sample to sample, beside what its degrees of freedom say."""
    random = np.random.default_rng(6)
    size = random.gamma(2.0, 5.0, (3000, 80))
    clicks = size * random.normal(0.2, 0.05, (3000, 80))  # a unit's rows are alike
    found = compare(*[moments_of(np.stack([size, clicks], -1))] * 2, Columns(2, 1))
    variance = found.control_error**2
    shown = 2.0 / (variance.std() / variance.mean()) ** 2
    assert np.median(found.freedom) / 2 == pytest.approx(shown, rel=0.25)
    assert shown < 40, "of 80 units"


def test_moments_add_up() -> None:
    values = np.random.default_rng(0).normal(size=(30, 3))
    assert np.allclose(moments_of(values), moments_of(values[:11]) + moments_of(values[11:]))
    assert np.allclose(moments_of(values.reshape(2, 15, 3)).sum(0), moments_of(values))


def test_a_covariate_that_is_absent_changes_nothing() -> None:
    random = np.random.default_rng(1)
    values = np.concatenate([random.poisson(5.0, (2, 500, 2)), np.zeros((2, 500, 2))], -1)
    now, new = moments_of(values)
    plain, adjusted_ = compare(now, new, Columns(1, 2)), compare(now, new, Columns(1, 2, (3, 4)))
    assert np.allclose(plain, adjusted_)


def test_an_arm_without_clicks_has_no_interval() -> None:
    now, new = moments_of([[[3.0, 0.0]] * 40, [[3.0, 1.0]] * 40])
    found = compare(now, new, Columns(2, 1))
    assert np.isnan(interval(found, Z).low) or np.isinf(found.lift)


def test_sample_ratio_equals_tea_tasting() -> None:
    table = pd.DataFrame({"variant": [0] * 5120 + [1] * 4880})
    theirs = tt.Experiment(split=tt.SampleRatio(method="norm", correction=False)).analyze(table)["split"].pvalue
    assert np.isclose(sample_ratio([5120, 4880], [1, 1]), theirs)
    assert sample_ratio([0, 0], [1, 1]) == 1.0
    assert np.isclose(sample_ratio([7000, 3000], [7, 3]), 1.0)


def test_adjusted_equals_statsmodels() -> None:
    values = np.random.default_rng(2).random(40) ** 3
    assert np.allclose(adjusted(values), multipletests(values, method="fdr_bh")[1])
    assert np.isnan(adjusted([np.nan, np.nan])).all()


@pytest.mark.parametrize(("effect", "power", "part"), [(0.02, 0.8, 0.5), (0.05, 0.9, 0.2), (0.1, 0.95, 0.5)])
def test_units_are_those_of_a_single_test_and_the_looks(effect: float, power: float, part: float) -> None:
    rate = 0.1
    spread = (1 - rate) / rate
    single = NormalIndPower().solve_power(
        effect_size=np.log1p(effect) / np.sqrt(spread), power=power, alpha=0.05, ratio=part / (1 - part)
    )
    looks = (drift(power, 0.05) / (stats.norm.isf(0.025) + stats.norm.ppf(power))) ** 2
    assert needed_units(spread, effect, power, part=part) == pytest.approx(single / (1 - part) * looks, rel=1e-3)
    assert 1.02 < looks < 1.07


def test_clusters_keep_coverage_where_rows_do_not() -> None:
    """Units of unequal size with a taste of their own: 95 % of intervals hold the truth, of naive ones far fewer."""
    random = np.random.default_rng(4)
    runs, units = 600, 400
    size = random.geometric(0.08, (2, runs, units))
    taste = random.beta(1.0, 9.0, (2, runs, units))
    clicks = random.binomial(size, np.minimum(taste * np.array([1.0, 1.1])[:, None, None], 1.0))
    now, new = moments_of(np.stack([size, clicks], -1))
    low, high = interval(compare(now, new, Columns(2, 1)), Z)
    truth = np.minimum(1.1 * random.beta(1.0, 9.0, 2_000_000), 1.0).mean() / 0.1 - 1
    held = int(((low <= truth) & (truth <= high)).sum())
    rates, rows = clicks.sum(-1) / size.sum(-1), size.sum(-1)
    error = np.sqrt(rates * (1 - rates) / rows)
    naive = interval(Comparison(*rates, *error, np.zeros(runs)), Z)
    naively = int(((naive.low <= truth) & (truth <= naive.high)).sum())
    assert stats.binomtest(held, runs, 0.95).pvalue > 0.01
    assert naively < 0.75 * runs
