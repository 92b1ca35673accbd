"""One pass over the batches of a dataset, which counts all that a description of it needs."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from domlora.data.dataset import SPLITS, Dataset
from domlora.features.batch import Batch
from domlora.features.encode import ABSENT_USER
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema
from domlora.studies.describing.distinct import LIMIT, Distinct, distinct, holds

__all__ = ["TEST", "TRAIN", "Census", "IdCensus", "NumberCensus", "take_census"]

BATCH_ROWS = 1 << 16
TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")

Counts = NDArray[np.int64]


class IdCensus:
    """Counts of one feature of ids.

    Attributes:
        absent: rows without a value, by split and domain, ``(3, D + 1)``; the last domain stands for unknown ones.
        values: ids that are not padding, ``(3, D + 1)``: rows with a value, but for a sequence.
        unknown: of these, ids of values outside the vocabulary, ``(3, D + 1)``.
        frequency: training rows (elements of a sequence) that have an id, ``(num_ids,)``: one number an id, less than what
            a model needs for its embedding.
    """

    def __init__(self, feature: Feature, num_domains: int) -> None:
        self.feature = feature
        self.absent, self.values, self.unknown = np.zeros((3, len(SPLITS), num_domains + 1), np.int64)
        self.frequency = np.zeros(feature.num_ids, np.int64)

    def add(self, split: int, domain: Counts, ids: Counts) -> None:
        """Rows of one split: their domains ``(B,)`` and their ids ``(slots, B)``."""
        num_domains = self.absent.shape[1]
        padding = ids == PAD_ID
        absent = padding.all(axis=0)
        self.absent[split] += np.bincount(domain[absent], minlength=num_domains)
        self.values[split] += len(ids) * np.bincount(domain, minlength=num_domains) - _by_domain(
            padding, domain, num_domains
        )
        self.unknown[split] += _by_domain(ids == OOV_ID, domain, num_domains)
        if split == TRAIN:
            np.add.at(self.frequency, ids.ravel(), 1)
            self.frequency[PAD_ID] = self.absent[TRAIN].sum()  # rows, not slots of padding


class NumberCensus:
    """Counts and sums of one numeric feature, in the units of ``Batch.dense``.

    Attributes:
        known: rows that have the number, by split and domain, ``(3, D + 1)``; all, unless the feature tells missing ones.
        total, squares: sums over the rows of a split, ``(3,)``.
        low, high: least and greatest number that a training row has.
    """

    def __init__(self, feature: Feature, num_domains: int) -> None:
        self.feature = feature
        self.known = np.zeros((len(SPLITS), num_domains + 1), np.int64)
        self.total, self.squares = np.zeros((2, len(SPLITS)))
        self.low, self.high = np.inf, -np.inf

    def add(self, split: int, domain: Counts, columns: NDArray[np.float32]) -> None:
        """Rows of one split: their domains ``(B,)`` and their ``(B, 1)`` or ``(B, 2)`` dense columns."""
        present = columns[:, 1] == 0 if self.feature.missing else np.ones(len(domain), np.bool_)
        numbers = columns[present, 0].astype(np.float64)
        self.known[split] += np.bincount(domain[present], minlength=self.known.shape[1])
        self.total[split] += numbers.sum()
        self.squares[split] += numbers @ numbers
        if split == TRAIN and len(numbers):
            self.low, self.high = min(self.low, numbers.min()), max(self.high, numbers.max())


class Census:
    """All counts of a dataset.

    Args:
        schema: of its rows.
        item: name of the feature that holds items, if any.
        limit: distinct users, and distinct items, by domain and split, that are counted exactly.

    Attributes:
        rows, clicks: by split and domain, ``(3, D + 1)``; the last domain stands for unknown ones.
        ids, numbers: counts of each feature of ids, and of each numeric one, by name.
        users, items: distinct ones in the groups that :meth:`group` numbers; None without such a column.
        user_rows: rows that have a user, by split and domain.
        new_user_rows, old_user_rows: test rows whose user no training row has, and the others, ``(D + 1,)``; estimates where
            users are sampled.
        new_item_rows: test rows whose item no training row has, ``(D + 1,)``; a value out of the vocabulary is new.
    """

    def __init__(self, schema: Schema, item: str | None, limit: int = LIMIT) -> None:
        num_domains = schema.num_domains
        starts = accumulate((feature.max_length for feature in schema.categorical), initial=0)
        dense_starts = accumulate((feature.num_dense for feature in schema.numeric), initial=0)
        self.schema, self.item = schema, item
        self.rows, self.clicks = np.zeros((2, len(SPLITS), num_domains + 1), np.int64)
        self.ids = {f.name: IdCensus(f, num_domains) for f in schema.categorical}
        self.numbers = {f.name: NumberCensus(f, num_domains) for f in schema.numeric}
        self.users = None if schema.user is None else Distinct(len(SPLITS) * (num_domains + 1), limit)
        self.items = None if item is None else Distinct(len(SPLITS) * (num_domains + 1), limit)
        self.user_rows = np.zeros((len(SPLITS), num_domains + 1), np.int64)
        self.new_user_rows, self.old_user_rows, self.new_item_rows = np.zeros((3, num_domains + 1), np.int64)
        self._slots = [slice(start, start + f.max_length) for start, f in zip(starts, schema.categorical, strict=False)]
        self._dense = [
            slice(start, start + f.num_dense) for start, f in zip(dense_starts, schema.numeric, strict=False)
        ]
        self._trained: Counts | None = None

    def group(self, split: int, domain: int) -> int:
        """Where ``users`` and ``items`` keep those of one domain in one split."""
        return split * (self.schema.num_domains + 1) + domain

    def add(self, split: int, batch: Batch) -> None:
        """Rows of one split. Splits come in the order of ``SPLITS``: what is new in test is told by training."""
        num_domains = self.schema.num_domains + 1
        domain = batch.domain.numpy() % num_domains  # -1, unknown, becomes the last
        self.rows[split] += np.bincount(domain, minlength=num_domains)
        self.clicks[split] += np.bincount(domain[batch.label.numpy() > 0.5], minlength=num_domains)
        ids, dense = np.ascontiguousarray(batch.ids.numpy().T), batch.dense.numpy()
        for counts, slots in zip(self.ids.values(), self._slots, strict=True):
            counts.add(split, domain, ids[slots])
            if self.items is not None and counts.feature.name == self.item:
                self._add_items(split, domain, ids[slots.start], counts.frequency)
        for numbers, columns in zip(self.numbers.values(), self._dense, strict=True):
            numbers.add(split, domain, dense[:, columns])
        if self.users is not None and batch.user is not None:
            self._add_users(split, domain, batch.user.numpy())

    def _add_items(self, split: int, domain: Counts, items: Counts, frequency: Counts) -> None:
        assert self.items is not None
        known = items >= FIRST_ID
        self.items.add(self.group(split, 0) + domain[known], items[known])
        if split == TEST:
            new = (items == OOV_ID) | (known & (frequency[items] == 0))
            self.new_item_rows += np.bincount(domain[new], minlength=len(self.new_item_rows))

    def _add_users(self, split: int, domain: Counts, users: Counts) -> None:
        assert self.users is not None
        known = users != ABSENT_USER
        domain, users = domain[known], users[known]
        self.users.add(self.group(split, 0) + domain, users)
        self.user_rows[split] += np.bincount(domain, minlength=self.user_rows.shape[1])
        if split != TEST:
            return
        if self._trained is None:
            groups = range(self.group(TRAIN, 0), self.group(TRAIN + 1, 0))
            self._trained = distinct(self.users.of(group) for group in groups)
        weight, length = self.users.weights(users), len(self.new_user_rows)  # all count, or a sample
        fresh = ~holds(self._trained, users)
        self.new_user_rows += _summed(domain, weight * fresh, length)
        self.old_user_rows += _summed(domain, weight * ~fresh, length)


def take_census(dataset: Dataset, item: str | None, *, limit: int = LIMIT) -> Census:
    """Read every split once, in stored order, and count."""
    census = Census(dataset.schema, item, limit)
    for split, name in enumerate(SPLITS):
        for batch in dataset.batches(name, BATCH_ROWS, sort_by_domain=False):
            census.add(split, batch)
    return census


def _by_domain(mask: NDArray[np.bool_], domain: Counts, num_domains: int) -> Counts:
    """How often ``mask (slots, B)`` is true in the rows of each domain."""
    if len(mask) == 1:
        return np.bincount(domain[mask[0]], minlength=num_domains)
    return _summed(domain, np.count_nonzero(mask, axis=0), num_domains)


def _summed(domain: Counts, weight: Counts, num_domains: int) -> Counts:
    return np.bincount(domain, weights=weight, minlength=num_domains).astype(np.int64)
