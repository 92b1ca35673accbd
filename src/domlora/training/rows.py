"""What the loop reads: the rows of all domains, or those of one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from domlora.data.batching import Pass, rows_in_memory
from domlora.data.shards import uninitialised
from domlora.evaluation.metrics import wauc
from domlora.features.batch import Batch
from domlora.features.schema import Schema

__all__ = ["OneDomain", "Rows", "batches_of"]

_CHUNK_ROWS = 1 << 16


class Rows(Protocol):
    """What the loop reads: a prepared dataset, or anything with the same methods."""

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        ...

    def num_rows(self, split: str) -> int:
        """Rows of a split."""
        ...

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
        """Batches of a split without the first ``start``; with a seed in an order that depends on seed and epoch alone.

        ``sort_by_domain`` asks for the rows *inside* a batch in order of domain, which need not be heard.
        """
        ...

    def fingerprint(self) -> str:
        """Equal for equal rows in equal order, so that a run goes on only with the rows it began with."""
        ...


class OneDomain:
    """The rows of one domain, in the schema of all.

    A split is picked out of ``data`` when it is first asked for and kept as long as this view: all views together hold the
    rows once, one after the other only those of one domain, whether ``data`` is in memory or streamed.

    Args:
        data: the rows of all domains.
        domain: which; -1 for those of no known one.

    Example:
        >>> from domlora.data.synthetic import World
        >>> data = World(num_domains=3).dataset(1000, seed=1)[0]
        >>> views = [OneDomain(data, domain) for domain in range(3)]
        >>> sum(view.num_rows("train") for view in views) == data.num_rows("train")
        True
        >>> next(views[2].batches("train", 4, seed=1)).domain
        tensor([2, 2, 2, 2])
    """

    def __init__(self, data: Rows, domain: int) -> None:
        self.data, self.domain = data, domain
        self._picked: dict[str, Batch] = {}

    @property
    def schema(self) -> Schema:
        """What the columns mean."""
        return self.data.schema

    def num_rows(self, split: str) -> int:
        """Rows of the domain in a split."""
        return self.read(split).num_rows

    def read(self, split: str) -> Batch:
        """All rows of the domain in a split. Do not write into its tensors."""
        if split not in self._picked:
            chunks = self.data.batches(split, _CHUNK_ROWS, sort_by_domain=False)
            picked = [chunk.take(torch.nonzero(chunk.domain == self.domain).squeeze(1)) for chunk in chunks]
            self._picked[split] = _joined(picked or [uninitialised(self.schema, 0)])
        return self._picked[split]

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        sort_by_domain: bool = True,  # noqa: ARG002 - there is one
        start: int = 0,
    ) -> Iterator[Batch]:
        """As ``Dataset.batches``."""
        return batches_of(self.read(split), batch_size, seed=seed, epoch=epoch, start=start)

    def fingerprint(self) -> str:
        """Of all rows, and which of them these are."""
        return hashlib.sha256(f"{self.data.fingerprint()} domain {self.domain}".encode()).hexdigest()

    @property
    def can_be_trained(self) -> bool:
        """Whether there are rows to train on, and validation rows of both classes to stop by."""
        if not (self.num_rows("train") and self.num_rows("valid")):
            return False
        rows = self.read("valid")
        weight = None if rows.weight is None else rows.weight.numpy()
        return not math.isnan(wauc(rows.label.numpy(), rows.label.numpy(), rows.domain.numpy(), weight))


def batches_of(
    rows: Batch, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0
) -> Iterator[Batch]:
    """Rows in memory as ``Dataset.batches`` gives those of a split."""
    asked = Pass(batch_size, seed, epoch, sort_by_domain=False, start=start)
    return (batch for chunk in rows_in_memory(rows, asked) for batch in chunk)


def _joined(parts: list[Batch]) -> Batch:
    """Rows behind each other; at least one part."""

    def column(name: str) -> Any:
        pieces = [getattr(part, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces)

    return Batch(*(column(name) for name in Batch._fields))
