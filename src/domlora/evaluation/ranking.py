"""What one sort of the rows tells: AUC by group, and each row's place by mass.

A sort is the costly part of a metric, so its result is kept apart from the weights: a bootstrap sorts once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from domlora.evaluation.rows import Bools, Floats, Ints, Rows, ratio, sum_by

__all__ = ["Ranking", "auc_and_mass", "mean_auc", "place_by_mass", "rank"]


class Ranking(NamedTuple):
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


def rank(rows: Rows) -> Ranking:
    """Sort the rows once, by group and score."""
    order, starts = _order(rows)
    is_positive = rows.label[order]
    at = np.flatnonzero(is_positive)  # taking by number is several times faster than by mask
    positive, negative = order[at], order[np.flatnonzero(~is_positive)]
    block = np.cumsum(starts)[at]  # ties form a block; counted from 1
    begin = np.append(np.flatnonzero(starts), order.size)
    edges = begin - np.append(0, np.cumsum(is_positive))[begin]  # negatives in front of each block
    first = _offsets(rows.group[negative], rows.num_groups)
    return Ranking(positive, rows.group[positive], edges[block - 1], edges[block], negative, first)


def auc_and_mass(ranking: Ranking, weight: Floats) -> tuple[Floats, Floats]:
    """AUC and summed weight of each group."""
    num_groups = ranking.first.size - 1
    reach = _running_sum(weight[ranking.negative])
    start = reach[ranking.first]
    positives = weight[ranking.positive]
    wins = positives * (reach[ranking.below] + reach[ranking.through] - 2 * start[ranking.group])  # twice the wins
    positive, negative = sum_by(ranking.group, positives, num_groups), np.diff(start)
    value = ratio(sum_by(ranking.group, wins, num_groups), 2 * positive * negative)
    return value.clip(0.0, 1.0), positive + negative


def mean_auc(value: Floats, mass: Floats) -> float:
    """Mean of the groups' AUC weighted by their mass, over the groups that have one."""
    scored = ~np.isnan(value)
    return float(ratio(np.dot(value[scored], mass[scored]), mass[scored].sum()))


def place_by_mass(rows: Rows) -> Floats:
    """The share of its group's weight that lies below each row, half of its own ties included."""
    order, starts = _order(rows)
    mass = _running_sum(rows.weight[order])
    edges = mass[np.append(np.flatnonzero(starts), order.size)]
    middle = ((edges[:-1] + edges[1:]) / 2)[np.cumsum(starts) - 1]
    first = mass[_offsets(rows.group, rows.num_groups)]
    group = rows.group[order]
    place = np.empty(order.size)
    place[order] = np.nan_to_num(ratio(middle - first[group], np.diff(first)[group]))
    return place


def _order(rows: Rows) -> tuple[Ints, Bools]:
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


def _running_sum(values: Floats) -> Floats:
    """Sum in front of each place, and of all at the end."""
    sums = np.zeros(values.size + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def _offsets(group: Ints, num_groups: int) -> Ints:
    """Where each group begins in rows sorted by group, and where the last one ends."""
    return np.append(0, np.cumsum(np.bincount(group, minlength=num_groups)))
