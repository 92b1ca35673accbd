"""What a model and a metric see of some rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, device

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Some rows of a prepared dataset.

    **Shape** (``B`` rows, ``S`` id slots, ``G`` dense columns): ``ids (B, S)`` int64, each slot counted within its own
    feature; ``dense (B, G)`` float32; ``domain (B,)`` int64, the index into ``schema.domains``, -1 for a domain that
    is not known; ``label (B,)`` float32 in {0, 1}; ``weight (B,)`` float32 or None for equal weights;
    ``user (B,)`` int64, a number for each user (used for grouped metrics only, never by a model), or None.
    """

    ids: Tensor
    dense: Tensor
    domain: Tensor
    label: Tensor
    weight: Tensor | None = None
    user: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return int(self.domain.shape[0])

    def take(self, rows: Tensor | slice) -> Batch:
        """The chosen rows (an index tensor, a mask or a slice) of every column."""
        weight = None if self.weight is None else self.weight[rows]
        user = None if self.user is None else self.user[rows]
        return Batch(self.ids[rows], self.dense[rows], self.domain[rows], self.label[rows], weight, user)

    def to(self, where: device) -> Batch:
        """The same rows on a device; itself if they are there already."""
        if self.ids.device == where:
            return self
        weight = None if self.weight is None else self.weight.to(where)
        user = None if self.user is None else self.user.to(where)
        ids, dense, domain, label = (
            self.ids.to(where),
            self.dense.to(where),
            self.domain.to(where),
            self.label.to(where),
        )
        return Batch(ids, dense, domain, label, weight, user)
