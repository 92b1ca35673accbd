# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.layers.dropout import Dropout
from domlora.layers.embedding import EmbeddingTable


@pytest.fixture(autouse=True)
def every_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs here end within the second that lies between two checkpoints."""
    monkeypatch.setattr("domlora.training.fit._APART_S", 0.0)


class Click(nn.Module):
    """A table, a normalisation, a tower with dropout and a head: one of each kind of parameter."""

    def __init__(self, num_ids: int = 5, num_dense: int = 4) -> None:
        super().__init__()
        self.embedding = EmbeddingTable([num_ids], 3)
        self.norm = nn.BatchNorm1d(3 + num_dense)
        self.tower = nn.Sequential(nn.Linear(3 + num_dense, 8), nn.ReLU(), Dropout(0.3))
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        logit: Tensor = self.head(self.tower(self.norm(torch.cat([self.embedding(ids).flatten(1), dense], 1)))).squeeze(
            1
        )
        return logit


class KilledError(Exception):
    """What the tests kill a run with."""


class Watched:
    """Rows that count what is read of them, and kill the reader after ``kill_after`` training batches."""

    def __init__(self, data: Dataset, kill_after: int | None = None) -> None:
        self.data, self.kill_after = data, kill_after
        self.asked: list[tuple[str, int | None, int]] = []
        self.sizes: list[int] = []

    @property
    def schema(self) -> Schema:
        return self.data.schema

    def num_rows(self, split: str) -> int:
        return self.data.num_rows(split)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0, **order: Any
    ) -> Iterator[Batch]:
        self.asked.append((split, seed, epoch))
        for batch in self.data.batches(split, batch_size, seed=seed, epoch=epoch, **order):
            if split == "train":
                if self.kill_after is not None and len(self.sizes) >= self.kill_after:
                    raise KilledError
                self.sizes.append(batch.num_rows)
            yield batch


def digest_of(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def data() -> Dataset:
    return World(num_domains=3, num_dense=4, hidden_units=8).dataset(1500, seed=0)[0]


@pytest.fixture
def click() -> Any:
    """Makes the model of a seed."""

    def make(seed: int = 0) -> Click:
        torch.manual_seed(seed)
        return Click()

    return make


@pytest.fixture
def watched() -> type[Watched]:
    return Watched


@pytest.fixture
def killed() -> type[KilledError]:
    return KilledError


@pytest.fixture
def digest() -> Any:
    return digest_of
