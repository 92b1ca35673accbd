"""Rows of a new day among earlier ones, so that what is learned today does not forget yesterday."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.training.rows import Rows

__all__ = ["WithReplay"]


class WithReplay:
    """A day's training rows, each batch filled up with earlier ones; validation and test rows are the day's alone.

    One epoch is one pass over the day. Earlier rows come in an order of their own, and go on where the epoch before ended.

    Args:
        day: the new rows.
        earlier: rows of the same columns, whose ids mean the same.
        share: of the earlier rows in a batch, in (0, 1).
        batch_size: of the batches that will be asked for.

    Raises:
        DataError: the columns differ, or a batch has no room for both.

    Example:
        >>> from domlora.data.synthetic import World
        >>> day, earlier = (World(num_domains=2).dataset(1000, seed=seed)[0] for seed in (1, 2))
        >>> both = WithReplay(day, earlier, share=0.25, batch_size=100)
        >>> next(both.batches("train", 100, seed=1)).num_rows
        100
    """

    def __init__(self, day: Rows, earlier: Rows, share: float, batch_size: int) -> None:
        ours, theirs = day.schema, earlier.schema
        if (ours.num_slots, ours.num_dense) != (theirs.num_slots, theirs.num_dense):
            raise DataError(
                "earlier rows must have the columns of the new ones",
                received=f"{theirs.num_slots} ids and {theirs.num_dense} numbers, not {ours.num_slots} and {ours.num_dense}",
            )
        self.old_size = min(round(share * batch_size), earlier.num_rows("train"))
        self.new_size = batch_size - self.old_size
        if not (self.old_size and self.new_size):
            raise DataError("a batch must have room for new and for earlier rows", received=(batch_size, share))
        self.day, self.earlier, self.share, self.batch_size = day, earlier, share, batch_size
        self.steps = -(-day.num_rows("train") // self.new_size)

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self.day.schema

    def num_rows(self, split: str) -> int:
        """Rows of a split; of the training split with the earlier ones of one pass."""
        rows = self.day.num_rows(split)
        return rows + self.steps * self.old_size if split == "train" else rows

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        sort_by_domain: bool = True,
        start: int = 0,
    ) -> Iterator[Batch]:
        """As ``Dataset.batches``; training batches have the size that was said before."""
        if split != "train":
            yield from self.day.batches(
                split, batch_size, seed=seed, epoch=epoch, sort_by_domain=sort_by_domain, start=start
            )
            return
        if batch_size != self.batch_size:
            raise DataError(f"training batches have {self.batch_size} rows", received=batch_size)
        new = self.day.batches("train", self.new_size, seed=seed, epoch=epoch, start=start)
        old = self._earlier(seed, epoch * self.steps + start)
        for one, two in zip(new, old, strict=False):
            yield _joined(one, two)

    def fingerprint(self) -> str:
        """Of both."""
        told = f"{self.day.fingerprint()} {self.earlier.fingerprint()} {self.share} {self.batch_size}"
        return hashlib.sha256(told.encode()).hexdigest()

    def _earlier(self, seed: int | None, first: int) -> Iterator[Batch]:
        """Full batches of earlier rows without end, from number ``first`` on."""
        in_a_pass = self.earlier.num_rows("train") // self.old_size
        number, start = divmod(first, in_a_pass)
        while True:
            batches = self.earlier.batches("train", self.old_size, seed=seed, epoch=number, start=start)
            yield from (batch for batch in batches if batch.num_rows == self.old_size)
            number, start = number + 1, 0


def _joined(one: Batch, two: Batch) -> Batch:
    """Rows behind each other; weights are 1 where only the others have some, and users are left out."""
    if (one.weight is None) != (two.weight is None):
        one, two = (b._replace(weight=torch.ones_like(b.label)) if b.weight is None else b for b in (one, two))
    pairs = {name: (getattr(one, name), getattr(two, name)) for name in Batch._fields}
    return Batch(
        **{name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None and pair[1] is not None}
    )
