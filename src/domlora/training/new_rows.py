"""The rows of a new domain as a model sees them that was trained without it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Protocol

import torch

from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import OOV_ID, Schema
from domlora.training.rows import OneDomain, Rows, batches_of

__all__ = ["EncodedRows", "NewRows"]


class EncodedRows(Rows, Protocol):
    """Rows, and how raw values became their ids."""

    @property
    def encoder(self) -> Encoder:
        """Raw value to id."""
        ...


class NewRows:
    """The rows of one domain as an encoder makes them that knows fewer words: other ids become out-of-vocabulary.

    Args:
        data: made with an encoder that grew out of the one of ``schema``.
        domain: whose rows, by its name in the data.
        schema: what the model knows.
        number: of the domain there.
        most_valid: validation rows at the most, drawn at random.
    """

    def __init__(
        self, data: EncodedRows, domain: str, schema: Schema, number: int, *, most_valid: int | None = None
    ) -> None:
        self.number, self._schema, self.most_valid = number, schema, most_valid
        self.own = OneDomain(data, data.encoder.schema.domains.index(domain))
        self.names = [feature.name for feature in schema.slots]
        self.ends = torch.tensor([feature.num_ids for feature in schema.slots])
        self._read: dict[str, Batch] = {}

    @property
    def schema(self) -> Schema:
        return self._schema

    def seen_by(self, schema: Schema) -> NewRows:
        """The same rows as a model with another schema sees them."""
        other = copy.copy(self)
        other._schema, other.ends, other._read = schema, torch.tensor([f.num_ids for f in schema.slots]), {}
        return other

    def num_rows(self, split: str) -> int:
        return self.read(split).num_rows

    def read(self, split: str) -> Batch:
        """All rows of a split. Do not write into its tensors."""
        if split not in self._read:
            rows = self.own.read(split)
            if split == "valid" and self.most_valid is not None and rows.num_rows > self.most_valid:
                rows = next(batches_of(rows, self.most_valid, seed=0))
            ids = torch.where(rows.ids < self.ends, rows.ids, OOV_ID)
            self._read[split] = rows._replace(ids=ids, domain=torch.full_like(rows.domain, self.number))
        return self._read[split]

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
        return batches_of(self.read(split), batch_size, seed=seed, epoch=epoch, start=start)

    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"{self.own.fingerprint()} {self.schema.fingerprint()} {self.most_valid}".encode()
        ).hexdigest()

    def unknown(self) -> dict[str, int]:
        """By feature: ids of the training rows that a model with this schema does not know."""
        outside = (self.own.read("train").ids >= self.ends).sum(0).tolist()
        return {name: sum(n for n, of in zip(outside, self.names, strict=True) if of == name) for name in self.names}

    @property
    def has_both_classes(self) -> bool:
        label = self.read("valid").label
        return bool((label > 0.5).any()) and bool((label <= 0.5).any())
