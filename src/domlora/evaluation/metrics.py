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

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from domlora.errors import ConfigError, DataError, nearest

__all__ = [
    "GAUC",
    "Bins",
    "Calibration",
    "Difference",
    "auc",
    "auc_by_group",
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
Weight: TypeAlias = ArrayLike | None
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


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
    rows = _read(label, probability, weight)
    return float(_auc_and_mass(_rank(rows), rows.weight)[0][0])


def auc_by_group(
    label: ArrayLike, probability: ArrayLike, group: ArrayLike, num_groups: int | None = None, weight: Weight = None
) -> Floats:
    """AUC inside each group; NaN where a group lacks a class.

    >>> auc_by_group([0, 1, 1, 0, 1], [0.2, 0.3, 0.1, 0.5, 0.9], [0, 0, 1, 2, 2], num_groups=4)
    array([ 1., nan,  1., nan])
    """
    rows = _read(label, probability, weight, group, num_groups)
    return _auc_and_mass(_rank(rows), rows.weight)[0]


def wauc(label: ArrayLike, probability: ArrayLike, domain: ArrayLike, weight: Weight = None) -> float:
    """Mean of the domains' AUC weighted by their rows: ``sum_d n_d AUC_d / sum_d n_d``.

    Domains of one class are left out of both sums. ``n_d`` counts the positive and negative rows at hand.

    **Source**: MLoRA (RecSys 2024). Difference from the authors' code: their AUC is a trapezoid over 500 thresholds,
    which squeezed or saturated scores pull down; ours is exact.

    >>> wauc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], domain=[0, 0, 1, 1, 1])
    0.4
    """
    rows = _read(label, probability, weight, *_compact(domain))
    return _mean_auc(*_auc_and_mass(_rank(rows), rows.weight))


def macro_auc(label: ArrayLike, probability: ArrayLike, domain: ArrayLike, weight: Weight = None) -> float:
    """Plain mean of the domains' AUC, over the domains with two classes.

    >>> macro_auc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], domain=[0, 0, 1, 1, 1])
    0.5
    """
    value = auc_by_group(label, probability, *_compact(domain), weight)
    return _mean_auc(value, np.ones_like(value))


def gauc(label: ArrayLike, probability: ArrayLike, user: ArrayLike, weight: Weight = None) -> GAUC:
    """Mean of the users' AUC weighted by their rows, over the users with two classes.

    **Source**: Zhu et al., Optimized Cost per Click in Taobao Display Advertising (KDD 2017).

    >>> gauc([0, 1, 0, 1, 1], [0.1, 0.2, 0.9, 0.8, 0.7], user=[7, 7, 9, 9, 4])
    GAUC(value=0.5, coverage=0.8)
    """
    rows = _read(label, probability, weight, *_compact(user))
    value, mass = _auc_and_mass(_rank(rows), rows.weight)
    return GAUC(_mean_auc(value, mass), float(_ratio(mass[~np.isnan(value)].sum(), mass.sum())))


def gauc_by_group(
    label: ArrayLike,
    probability: ArrayLike,
    user: ArrayLike,
    group: ArrayLike,
    num_groups: int | None = None,
    weight: Weight = None,
) -> Floats:
    """``gauc`` inside each group: a user's rows in another group do not count here."""
    rows = _read(label, probability, weight, group, num_groups)
    users, num_users = _compact(user)
    _same_length(rows.label, users, "user")
    pair, num_pairs = _compact(rows.group * num_users + users)
    value, mass = _auc_and_mass(_rank(rows._replace(group=pair, num_groups=num_pairs)), rows.weight)
    owner = np.zeros(num_pairs, dtype=np.int64)
    owner[pair] = rows.group
    scored = ~np.isnan(value)
    owner, value, mass = owner[scored], value[scored], mass[scored]
    return _ratio(_sum_by(owner, mass * value, rows.num_groups), _sum_by(owner, mass, rows.num_groups))


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
    _one_of("metric", metric, get_args(Metric))
    if num_samples < 1:
        raise ConfigError("num_samples must be at least 1", received=num_samples)
    groups = _compact(domain) if metric == "wauc" else (None, None)
    rows = _read(label, probability_a, None, *groups)
    a, b = _rank(rows), _rank(_read(label, probability_b, None, *groups))
    cluster, num_clusters = (None, rows.label.size) if user is None else _compact(user)
    if cluster is not None:
        _same_length(rows.label, cluster, "user")

    def difference(weight: Floats) -> float:
        return _mean_auc(*_auc_and_mass(a, weight)) - _mean_auc(*_auc_and_mass(b, weight))

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
    return float(_log_loss(_read(label, probability, weight, bounded=True))[0])


def normalized_entropy(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Log loss over the entropy of the mean label: 1 is what the best constant gets, lower is better.

    **Source**: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook (ADKDD 2014), equation 1.

    >>> normalized_entropy([0, 1], [0.5, 0.5])
    1.0
    """
    return float(_normalized_entropy(_read(label, probability, weight, bounded=True))[0])


def predicted_over_observed(label: ArrayLike, probability: ArrayLike, weight: Weight = None) -> float:
    """Predicted clicks over observed clicks (PCOC): above 1 the model promises too much. NaN without a click.

    >>> predicted_over_observed([0, 1, 1, 0], [0.5, 0.5, 0.5, 1.0])
    1.25
    """
    return float(_predicted_over_observed(_read(label, probability, weight, bounded=True))[0])


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
    return float(_expected_calibration_error(_read(label, probability, weight, bounded=True), num_bins, bins)[0])


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
    rows = _read(label, probability, weight, group, num_groups, bounded=True)
    return Calibration(
        click_rate=_mean_by_group(rows.label, rows),
        log_loss=_log_loss(rows),
        normalized_entropy=_normalized_entropy(rows),
        predicted_over_observed=_predicted_over_observed(rows),
        expected_calibration_error=_expected_calibration_error(rows, num_bins, bins),
    )


# ---------------------------------------------------------------------------------------------------- foundations


class _Rows(NamedTuple):
    label: Bools
    score: NDArray[np.floating[Any]]
    weight: Floats
    group: Ints
    num_groups: int


class _Ranking(NamedTuple):
    """All that one sort of the rows tells about AUC; the weights may still change.

    ``negative`` holds the negative rows by (group, score). The positive row ``positive[i]``, of group ``group[i]``, beats
    the negatives of its group in front of place ``below[i]`` and ties with those from there to ``through[i]``. The
    negatives of group g lie from ``first[g]`` to ``first[g + 1]``.
    """

    positive: Ints
    group: Ints
    below: Ints
    through: Ints
    negative: Ints
    first: Ints


def _order(rows: _Rows) -> tuple[Ints, Bools]:
    """Row numbers by (group, score), and where a new (group, score) begins."""
    # The default kind is numpy's vectorised sort, five times faster than "stable"; equal scores need no order.
    order = np.argsort(rows.score)
    starts = np.zeros(order.size, dtype=np.bool_)
    if rows.num_groups > 1:
        # Group and place in one integer: a stable sort by group at the speed of a plain one.
        key = (rows.group[order] << 32) | np.arange(order.size)
        key.sort()
        order = order[key & 0xFFFFFFFF]
        group = key >> 32
        starts[1:] = group[1:] != group[:-1]
    score = rows.score[order]
    starts[1:] |= score[1:] != score[:-1]
    starts[0] = True
    return order, starts


def _rank(rows: _Rows) -> _Ranking:
    order, starts = _order(rows)
    is_positive = rows.label[order]
    at = np.flatnonzero(is_positive)  # taking by number is several times faster than by mask
    positive, negative = order[at], order[np.flatnonzero(~is_positive)]
    block = np.cumsum(starts)[at]  # ties form a block; counted from 1
    begin = np.append(np.flatnonzero(starts), order.size)
    edges = begin - np.append(0, np.cumsum(is_positive))[begin]  # negatives in front of each block
    first = _offsets(rows.group[negative], rows.num_groups)
    return _Ranking(positive, rows.group[positive], edges[block - 1], edges[block], negative, first)


def _auc_and_mass(ranking: _Ranking, weight: Floats) -> tuple[Floats, Floats]:
    """AUC and summed weight of each group."""
    num_groups = ranking.first.size - 1
    reach = _running_sum(weight[ranking.negative])
    start = reach[ranking.first]
    positives = weight[ranking.positive]
    wins = positives * (reach[ranking.below] + reach[ranking.through] - 2 * start[ranking.group])  # twice the wins
    positive, negative = _sum_by(ranking.group, positives, num_groups), np.diff(start)
    value = _ratio(_sum_by(ranking.group, wins, num_groups), 2 * positive * negative)
    return value.clip(0.0, 1.0), positive + negative


def _mean_auc(value: Floats, mass: Floats) -> float:
    scored = ~np.isnan(value)
    return float(_ratio(np.dot(value[scored], mass[scored]), mass[scored].sum()))


def _log_loss(rows: _Rows) -> Floats:
    eps = np.finfo(rows.score.dtype).eps
    p = rows.score.clip(eps, 1 - eps).astype(np.float64)
    return _mean_by_group(-np.log(np.where(rows.label, p, 1 - p)), rows)


def _normalized_entropy(rows: _Rows) -> Floats:
    rate = _mean_by_group(rows.label, rows)
    rate[(rate == 0) | (rate == 1)] = np.nan
    return _ratio(_log_loss(rows), -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def _predicted_over_observed(rows: _Rows) -> Floats:
    return _ratio(_sum_by_group(rows.score, rows), _sum_by_group(rows.label, rows))


def _expected_calibration_error(rows: _Rows, num_bins: int, bins: Bins) -> Floats:
    _one_of("bins", bins, get_args(Bins))
    if num_bins < 1:
        raise ConfigError("num_bins must be at least 1", received=num_bins)
    place = _place_by_mass(rows) if bins == "equal_mass" else rows.score.astype(np.float64)
    number = np.minimum((place * num_bins).astype(np.int64), num_bins - 1)
    cells = rows._replace(group=rows.group * num_bins + number, num_groups=rows.num_groups * num_bins)
    gap = np.abs(_sum_by_group(rows.score.astype(np.float64) - rows.label, cells))
    return _ratio(gap.reshape(-1, num_bins).sum(axis=1), _sum_by_group(1.0, rows))


def _place_by_mass(rows: _Rows) -> Floats:
    """The share of its group's weight that lies below each row, half of its own ties included."""
    order, starts = _order(rows)
    mass = _running_sum(rows.weight[order])
    edges = mass[np.append(np.flatnonzero(starts), order.size)]
    middle = ((edges[:-1] + edges[1:]) / 2)[np.cumsum(starts) - 1]
    first = mass[_offsets(rows.group, rows.num_groups)]
    group = rows.group[order]
    place = np.empty(order.size)
    place[order] = np.nan_to_num(_ratio(middle - first[group], np.diff(first)[group]))
    return place


def _running_sum(values: Floats) -> Floats:
    """Sum in front of each place, and of all at the end."""
    sums = np.zeros(values.size + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def _offsets(group: Ints, num_groups: int) -> Ints:
    """Where each group begins in rows sorted by group, and where the last one ends."""
    return np.append(0, np.cumsum(np.bincount(group, minlength=num_groups)))


def _sum_by(group: Ints, values: NDArray[Any], num_groups: int) -> Floats:
    return np.bincount(group, values, num_groups).astype(np.float64, copy=False)


def _sum_by_group(values: Any, rows: _Rows) -> Floats:
    return _sum_by(rows.group, values * rows.weight, rows.num_groups)


def _mean_by_group(values: Any, rows: _Rows) -> Floats:
    return _ratio(_sum_by_group(values, rows), _sum_by_group(1.0, rows))


def _ratio(top: Any, bottom: Any) -> Floats:
    """Division that answers NaN, without a warning, where the divisor is 0."""
    bottom = np.asarray(bottom, dtype=np.float64)
    quotient: Floats = np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom != 0)
    return quotient


def _compact(group: ArrayLike) -> tuple[Ints, int]:
    """Any integers as 0..n-1 in their order, each of the n in use."""
    values = _integers("domain and user", group)
    low = int(values.min(initial=0))
    span = int(values.max(initial=0)) - low + 1
    if span > 4 * values.size + 1024:
        known, index = np.unique(values, return_inverse=True)
        return index, known.size
    used: Bools = np.bincount(values - low, minlength=span) > 0  # a table instead of a sort
    return (np.cumsum(used) - 1)[values - low], int(np.count_nonzero(used))


# The checks: values are looked at once, here.


def _read(
    label: ArrayLike,
    probability: ArrayLike,
    weight: Weight = None,
    group: ArrayLike | None = None,
    num_groups: int | None = None,
    *,
    bounded: bool = False,
) -> _Rows:
    labels = np.asarray(label)
    if labels.ndim != 1 or labels.size == 0:
        raise DataError("a metric needs at least one row, in arrays of one axis", received=labels.shape)
    _refuse("label must be 0 or 1", (labels != 0) & (labels != 1), labels)
    score = np.asarray(probability)
    _same_length(labels, score, "probability")
    score = score if score.dtype == np.float32 else score.astype(np.float64)
    _refuse("probability must not be NaN", np.isnan(score), score)
    if bounded:
        _refuse("probability must be in 0..1 (apply the sigmoid to logits)", (score < 0) | (score > 1), score)
    weights = np.ones(labels.size) if weight is None else np.asarray(weight, dtype=np.float64)
    _same_length(labels, weights, "weight")
    _refuse("weight must be finite and not negative", ~(np.isfinite(weights) & (weights >= 0)), weights)
    groups = np.zeros(labels.size, dtype=np.int64) if group is None else _integers("group", group)
    _same_length(labels, groups, "group")
    count = int(groups.max()) + 1 if num_groups is None else num_groups
    _refuse(f"group must be in 0..{count - 1}", (groups < 0) | (groups >= count), groups)
    return _Rows(labels.astype(np.bool_), score, weights, groups, count)


def _integers(name: str, values: ArrayLike) -> Ints:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} must be integers", received=str(array.dtype), next_step="Number their names first")
    return array.astype(np.int64, copy=False)


def _same_length(labels: NDArray[Any], values: NDArray[Any], name: str) -> None:
    if values.shape != labels.shape:
        raise DataError(f"{name} must be as long as label, {labels.shape}", received=values.shape)


def _refuse(rule: str, bad: Bools, values: NDArray[Any]) -> None:
    if bad.any():
        rows = np.flatnonzero(bad)
        which = f"Broken by {rows.size} of {bad.size} rows, the first of them {rows[:5].tolist()}"
        raise DataError(rule, received=values[rows[:5]].tolist(), next_step=which)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is not known", received=value, next_step=nearest(str(value), known))
