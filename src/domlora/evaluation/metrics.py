"""How well scores order rows, and how far probabilities can be believed: exact, vectorised, plain numpy.

Two families. *Order* (``auc``, ``wauc``, ``macro_auc``, ``gauc``, ``bootstrap_difference``) only compares scores, so
logits do as well as probabilities. *Calibration* (``log_loss``, ``normalized_entropy``, ``predicted_over_observed``,
``expected_calibration_error``) reads the values and needs them in 0..1. ``auc_by_group``, ``gauc_by_group`` and
``calibration_by_group`` answer for all groups at once, without a loop over groups.

What they share

- **Shape**: every array is ``(B,)``; results by group are ``(num_groups,)``.
- ``label``: 0 or 1. ``probability``: not NaN. ``weight``: finite, not negative, equal when left out; **a row of
  weight 2 counts like the row written twice**, everywhere, also in the row counts of ``wauc``. Sums are float64, so AUC
  without weights, or with whole ones, is exact; keep weights within nine orders of magnitude.
- ``group``: 0..num_groups-1. ``domain`` and ``user``: any integers; -1 (unknown) is one domain or user like another.
- What is not defined is NaN: AUC and normalised entropy of one class, anything without rows.
- **Raises**: ``DataError`` for no rows, unequal lengths, labels other than 0 and 1, NaN, probabilities outside 0..1
  (calibration), bad weights or groups; the message names the first rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from domlora.errors import ConfigError
from domlora.evaluation.ranking import auc_and_mass, mean_auc, place_by_mass, rank
from domlora.evaluation.rows import (
    Floats,
    Rows,
    Weight,
    compact,
    mean_by_group,
    one_of,
    ratio,
    read_rows,
    same_length,
    sum_by,
    sum_by_group,
)

__all__ = [
    "GAUC",
    "Bins",
    "Calibration",
    "Difference",
    "at_thresholds",
    "auc",
    "auc_by_group",
    "auc_by_thresholds",
    "bootstrap_difference",
    "calibration_by_group",
    "expected_calibration_error",
    "gauc",
    "gauc_by_group",
    "log_loss",
    "macro_auc",
    "normalized_entropy",
    "predicted_over_observed",
    "wauc",
]

Bins = Literal["equal_mass", "equal_width"]
Metric = Literal["wauc", "auc"]


class GAUC(NamedTuple):
    """Grouped AUC, and the share of rows whose user has both classes (the other rows say nothing)."""

    value: float
    coverage: float


class Difference(NamedTuple):
    """Metric of model a minus metric of model b, and the ends of its 95 % interval."""

    difference: float
    low: float
    high: float


class Calibration(NamedTuple):
    """What ``calibration_by_group`` knows of each group, an array ``(num_groups,)`` a field."""

    click_rate: Floats
    log_loss: Floats
    normalized_entropy: Floats
    predicted_over_observed: Floats
    expected_calibration_error: Floats


# ---------------------------------------------------------------------------------------------------------- order


def auc(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties counting half.

    >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
    0.875
    """
    rows = read_rows(label, probability, weight)
    return float(auc_and_mass(rank(rows), rows.weight)[0][0])


def auc_by_group(
    label: ArrayLike, probability: ArrayLike, group: ArrayLike, num_groups: int | None = None, weight: Weight = None
) -> Floats:
    """AUC inside each group; NaN where a group lacks a class.

    >>> auc_by_group([0, 1, 1, 0, 1], [0.2, 0.3, 0.1, 0.5, 0.9], [0, 0, 1, 2, 2], num_groups=4)
    array([ 1., nan,  1., nan])
    """
    rows = read_rows(label, probability, weight, group, num_groups)
    return auc_and_mass(rank(rows), rows.weight)[0]


def auc_by_thresholds(
    label: ArrayLike, probability: ArrayLike, weight: Weight = None, *, num_thresholds: int = 500
) -> float:
    """Area under the ROC curve of some evenly spaced thresholds, as Keras estimates it.

    The trapezoid under the points of thresholds ``-e, 1/(n-1), 2/(n-1), ..., 1+e``, which is the exact AUC of probabilities
    that are told apart by a threshold or not at all: ``auc(label, at_thresholds(probability))``. Probabilities that lie
    close together, or next to 0 and 1, tie, which draws the figure towards one half.

    **Source**: ``tf.keras.metrics.AUC``, of which the MLoRA authors' code has a copy and takes 500 thresholds.

    >>> auc_by_thresholds([0, 1, 0, 1], [0.3001, 0.3002, 0.1, 0.8])
    0.875
    """
    return auc(label, at_thresholds(probability, num_thresholds), weight)


def at_thresholds(probability: ArrayLike, num_thresholds: int = 500) -> Floats:
    """How many of some evenly spaced thresholds lie below each probability: scores for the metrics of order.

    >>> at_thresholds([0.0, 0.25, 0.2501, 1.0], num_thresholds=5)
    array([1., 1., 2., 4.])
    """
    if num_thresholds < 3:
        raise ConfigError("num_thresholds must be at least 3", received=num_thresholds)
    values = np.asarray(probability, dtype=np.float64)
    read_rows(np.zeros(values.shape), values, bounded=True)
    inner = np.arange(1, num_thresholds - 1) / (num_thresholds - 1)
    return np.searchsorted(inner, values, side="left").astype(np.float64) + 1.0  # the first threshold is below all


def wauc(label: ArrayLike, probability: ArrayLike, domain: ArrayLike, weight: Weight = None) -> float:
    """Mean of the domains' AUC weighted by their rows: ``sum_d n_d AUC_d / sum_d n_d``.

    Domains of one class are left out of both sums. ``n_d`` counts the positive and negative rows at hand.

    **Source**: MLoRA (RecSys 2024). Difference from the authors' code: their AUC is a trapezoid over 500 thresholds,
    which squeezed or saturated scores pull down; ours is exact. Theirs is that of ``at_thresholds(probability)``.

    >>> wauc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], domain=[0, 0, 1, 1, 1])
    0.4
    """
    rows = read_rows(label, probability, weight, *compact(domain))
    return mean_auc(*auc_and_mass(rank(rows), rows.weight))


def macro_auc(label: ArrayLike, probability: ArrayLike, domain: ArrayLike, weight: Weight = None) -> float:
    """Plain mean of the domains' AUC, over the domains with two classes.

    >>> macro_auc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], domain=[0, 0, 1, 1, 1])
    0.5
    """
    value = auc_by_group(label, probability, *compact(domain), weight)
    return mean_auc(value, np.ones_like(value))


def gauc(label: ArrayLike, probability: ArrayLike, user: ArrayLike, weight: Weight = None) -> GAUC:
    """Mean of the users' AUC weighted by their rows, over the users with two classes.

    **Source**: Zhu et al., Optimized Cost per Click in Taobao Display Advertising (KDD 2017).

    >>> gauc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], user=[7, 7, 9, 9, 4])
    GAUC(value=0.5, coverage=0.8)
    """
    rows = read_rows(label, probability, weight, *compact(user))
    value, mass = auc_and_mass(rank(rows), rows.weight)
    return GAUC(mean_auc(value, mass), float(ratio(mass[~np.isnan(value)].sum(), mass.sum())))


def gauc_by_group(
    label: ArrayLike,
    probability: ArrayLike,
    user: ArrayLike,
    group: ArrayLike,
    num_groups: int | None = None,
    weight: Weight = None,
) -> Floats:
    """``gauc`` inside each group: a user's rows in another group do not count here."""
    rows = read_rows(label, probability, weight, group, num_groups)
    users, num_users = compact(user)
    same_length(rows.label, users, "user")
    pair, num_pairs = compact(rows.group * num_users + users)
    value, mass = auc_and_mass(rank(rows._replace(group=pair, num_groups=num_pairs)), rows.weight)
    owner = np.zeros(num_pairs, dtype=np.int64)
    owner[pair] = rows.group
    scored = ~np.isnan(value)
    owner, value, mass = owner[scored], value[scored], mass[scored]
    return ratio(sum_by(owner, mass * value, rows.num_groups), sum_by(owner, mass, rows.num_groups))


def bootstrap_difference(
    label: ArrayLike,
    probability_a: ArrayLike,
    probability_b: ArrayLike,
    domain: ArrayLike,
    metric: Metric = "wauc",
    num_samples: int = 200,
    seed: int = 0,
    user: ArrayLike | None = None,
) -> Difference:
    """How much better model a is than model b on the same rows, with a 95 % percentile interval.

    Both models are scored on the same resamples (paired), so what they share cancels. A resample draws users with all
    their rows when ``user`` is given, else rows; rows of one user are alike, and drawing them one by one makes the
    interval too narrow. A resample is a whole-number weight a row, so each model is sorted once.

    Args:
        metric: ``wauc`` (a domain's rows are those of the resample) or ``auc`` over all rows, whatever their domain.
        num_samples: 200 for a look, 1000 for a table. Resamples in which a metric is not defined are left out.
        seed: same seed, same interval.

    **Source**: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    >>> bootstrap_difference([0, 1, 0, 1], [0.1, 0.9, 0.2, 0.8], [0.1, 0.9, 0.2, 0.8], domain=[0, 0, 0, 0])
    Difference(difference=0.0, low=0.0, high=0.0)
    """
    one_of("metric", metric, get_args(Metric))
    if num_samples < 1:
        raise ConfigError("num_samples must be at least 1", received=num_samples)
    groups = compact(domain) if metric == "wauc" else (None, None)
    rows = read_rows(label, probability_a, None, *groups)
    a, b = rank(rows), rank(read_rows(label, probability_b, None, *groups))
    cluster, num_clusters = (None, rows.label.size) if user is None else compact(user)
    if cluster is not None:
        same_length(rows.label, cluster, "user")

    def difference(weight: Floats) -> float:
        return mean_auc(*auc_and_mass(a, weight)) - mean_auc(*auc_and_mass(b, weight))

    random = np.random.default_rng(seed)
    draws = np.empty(num_samples)
    for i in range(num_samples):
        drawn = random.integers(0, num_clusters, num_clusters)
        count = np.bincount(drawn, minlength=num_clusters).astype(np.float64)
        draws[i] = difference(count if cluster is None else count[cluster])
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]) if draws.size else (np.nan, np.nan)
    return Difference(difference(rows.weight), float(low), float(high))


# ---------------------------------------------------------------------------------------------------- calibration


def log_loss(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Mean of ``-log p`` of what happened, in nats.

    Probabilities are clipped to ``[eps, 1 - eps]`` with the eps of their own type (float32 1.2e-7, float64 2.2e-16), so
    that a row that was certain and wrong costs 16 or 36 and not infinity.

    >>> round(log_loss([0, 1], [0.5, 0.25]), 6)
    1.039721
    """
    return float(_log_loss(read_rows(label, probability, weight, bounded=True))[0])


def normalized_entropy(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Log loss over the entropy of the mean label: 1 is what the best constant gets, lower is better.

    **Source**: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (ADKDD 2014), equation 1.

    >>> normalized_entropy([0, 1], [0.5, 0.5])
    1.0
    """
    return float(_normalized_entropy(read_rows(label, probability, weight, bounded=True))[0])


def predicted_over_observed(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Predicted clicks over observed clicks (PCOC): above 1 the model promises too much. NaN without a click.

    >>> predicted_over_observed([0, 1, 1, 0], [0.5, 0.5, 0.5, 1.0])
    1.25
    """
    return float(_predicted_over_observed(read_rows(label, probability, weight, bounded=True))[0])


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, weight: Weight = None, *, num_bins: int = 10, bins: Bins = "equal_mass"
) -> float:
    """Mean gap between predicted and observed click rate: ``sum_b n_b / n |mean p_b - mean label_b|``.

    It is biased upward where bins are small: compare models on the same rows, not domains of different sizes.

    Args:
        num_bins: 10 by default; a bin wants some hundred rows.
        bins: ``equal_mass`` puts the same weight of rows, in order of probability, into every bin; equal probabilities
            share a bin, so the order of rows does not matter. ``equal_width`` cuts 0..1 evenly, as many papers do; with
            click rates of a few percent nearly all rows then fall into one bin.

    **Source**: Naeini et al. (AAAI 2015); equal mass: Roelofs et al., Mitigating Bias in Calibration Error Estimation
    (AISTATS 2022).

    >>> expected_calibration_error([0, 1, 1, 1], [0.25, 0.25, 0.75, 0.75], num_bins=2)
    0.25
    """
    return float(_expected_calibration_error(read_rows(label, probability, weight, bounded=True), num_bins, bins)[0])


def calibration_by_group(
    label: ArrayLike,
    probability: ArrayLike,
    group: ArrayLike,
    num_groups: int | None = None,
    weight: Weight = None,
    *,
    num_bins: int = 10,
    bins: Bins = "equal_mass",
) -> Calibration:
    """The click rate and the four metrics above of each group, against its own click rate and in its own bins.

    >>> calibration_by_group([0, 1, 1], [0.5, 0.5, 0.9], [0, 0, 1]).normalized_entropy
    array([ 1., nan])
    """
    rows = read_rows(label, probability, weight, group, num_groups, bounded=True)
    return Calibration(
        click_rate=mean_by_group(rows.label, rows),
        log_loss=_log_loss(rows),
        normalized_entropy=_normalized_entropy(rows),
        predicted_over_observed=_predicted_over_observed(rows),
        expected_calibration_error=_expected_calibration_error(rows, num_bins, bins),
    )


# The four formulas, for all groups at once.


def _log_loss(rows: Rows) -> Floats:
    eps = np.finfo(rows.score.dtype).eps
    p = rows.score.clip(eps, 1 - eps).astype(np.float64)
    return mean_by_group(-np.log(np.where(rows.label, p, 1 - p)), rows)


def _normalized_entropy(rows: Rows) -> Floats:
    rate = mean_by_group(rows.label, rows)
    rate[(rate == 0) | (rate == 1)] = np.nan
    return ratio(_log_loss(rows), -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def _predicted_over_observed(rows: Rows) -> Floats:
    return ratio(sum_by_group(rows.score, rows), sum_by_group(rows.label, rows))


def _expected_calibration_error(rows: Rows, num_bins: int, bins: Bins) -> Floats:
    one_of("bins", bins, get_args(Bins))
    if num_bins < 1:
        raise ConfigError("num_bins must be at least 1", received=num_bins)
    place = place_by_mass(rows) if bins == "equal_mass" else rows.score.astype(np.float64)
    number = np.minimum((place * num_bins).astype(np.int64), num_bins - 1)
    cells = rows._replace(group=rows.group * num_bins + number, num_groups=rows.num_groups * num_bins)
    gap = np.abs(sum_by_group(rows.score.astype(np.float64) - rows.label, cells))
    return ratio(gap.reshape(-1, num_bins).sum(axis=1), sum_by_group(1.0, rows))
