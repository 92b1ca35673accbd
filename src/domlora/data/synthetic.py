"""A world of many domains whose true click probability is known: for tests, examples and scale benchmarks.

``logit(x, d) = v . softplus(2 (W_d x + b)) + o_d``, ``W_d = W + U_d V_d``: a shared teacher network whose first
layer gets a low-rank difference in each domain. Nobody can predict clicks better than the true probability, so the gap
between a model's AUC and the AUC of the truth says how much is left to learn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.features.schema import FIRST_ID, Feature, Schema

__all__ = ["Sample", "World"]

_FRACTIONS = (0.6, 0.2, 0.2)


class Sample(NamedTuple):
    """Rows and their true click probabilities, ``(B,)`` float64."""

    batch: Batch
    probability: Tensor


@dataclass(frozen=True)
class World:
    """Domains that share a teacher and differ by low-rank matrices in its first layer.

    Args:
        num_domains: D.
        num_dense: G, standard normal features.
        hidden_units: width of the teacher.
        difference_rank: rank of a domain's difference.
        difference: Frobenius norm of a domain's difference over that of the shared matrix; 0 for a world without domains.
        click_rate_spread: standard deviation of a domain's own offset in the logit.
        sharpness: standard deviation of the logit; larger is easier to predict.
        size_skew: domain d has rows in proportion to ``(d + 1) ** -size_skew``; 0 for equal sizes.
        seed: which world.

    Raises:
        ConfigError: a number out of range.

    Example:
        >>> batch, probability = World(num_domains=3).sample(1000, seed=1)
        >>> batch.dense.shape, batch.ids.shape, bool((probability > 0).all())
        (torch.Size([1000, 16]), torch.Size([1000, 1]), True)
    """

    num_domains: int = 10
    num_dense: int = 16
    hidden_units: int = 32
    difference_rank: int = 2
    difference: float = 0.7
    click_rate_spread: float = 0.3
    sharpness: float = 1.8
    size_skew: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.num_domains, self.num_dense, self.hidden_units, self.difference_rank)
        spreads = (self.difference, self.click_rate_spread, self.sharpness)
        finite = all(map(math.isfinite, (*spreads, self.size_skew)))
        if min(sizes) < 1 or not finite or min(spreads) < 0 or self.sharpness == 0:
            raise ConfigError("a world needs sizes of at least 1, spreads >= 0 and sharpness > 0", received=self)

    @property
    def schema(self) -> Schema:
        """The domain's number as the one categorical feature, then the dense ones."""
        names = tuple(f"d{number}" for number in range(self.num_domains))
        dense = tuple(Feature(f"x{column}", "numeric") for column in range(self.num_dense))
        return Schema((Feature("domain", num_ids=FIRST_ID + self.num_domains), *dense), domains=names)

    def sample(self, num_rows: int, seed: int) -> Sample:
        """Draw rows; the same ``seed`` draws the same rows."""
        if num_rows < 1:
            raise ConfigError("a sample needs at least one of num_rows", received=num_rows)
        generator = torch.Generator().manual_seed(_mix(self.seed, seed, 1))
        share = torch.arange(1, self.num_domains + 1, dtype=torch.float64) ** -self.size_skew
        domain = torch.multinomial(share, num_rows, replacement=True, generator=generator)
        dense = torch.randn(num_rows, self.num_dense, generator=generator)
        probability = self.probability(dense, domain)
        label = (torch.rand(num_rows, generator=generator, dtype=torch.float64) < probability).float()
        return Sample(Batch((domain + FIRST_ID).unsqueeze(1), dense, domain, label), probability)

    def probability(self, dense: Tensor, domain: Tensor) -> Tensor:
        """The true click probabilities of rows, ``(B, G), (B,) -> (B,)`` float64."""
        return torch.sigmoid(self._logit(dense, domain))

    def dataset(self, num_rows: int, seed: int) -> tuple[Dataset, Tensor]:
        """A dataset split 60/20/20, and the true probabilities of its test rows."""
        batch, probability = self.sample(num_rows, seed)
        first, second = (int(num_rows * part) for part in (_FRACTIONS[0], _FRACTIONS[0] + _FRACTIONS[1]))
        splits = {"train": slice(0, first), "valid": slice(first, second), "test": slice(second, num_rows)}
        return Dataset.from_batches(self.schema, {n: batch.take(s) for n, s in splits.items()}), probability[second:]

    def _logit(self, dense: Tensor, domain: Tensor) -> Tensor:
        matrix, hidden_bias, readout, offset = self._teacher()
        logit = torch.empty(len(dense), dtype=torch.float64)
        sizes = torch.bincount(domain, minlength=self.num_domains).tolist()
        for number, rows in enumerate(torch.split(torch.argsort(domain, stable=True), sizes)):
            hidden = _activate(dense[rows].double() @ matrix[number].T + hidden_bias)
            logit[rows] = hidden @ readout + offset[number]
        return logit

    def _teacher(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``W_d (D, H, G)``, ``b (H,)``, ``v (H,)`` and ``o (D,)``."""
        generator = torch.Generator().manual_seed(_mix(self.seed, 0, 0))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared = normal(self.hidden_units, self.num_dense) / math.sqrt(self.num_dense)
        hidden_bias, readout = 0.5 * normal(self.hidden_units), normal(self.hidden_units)
        probe = _activate(normal(4096, self.num_dense) @ shared.T + hidden_bias) @ readout
        readout = readout * self.sharpness / probe.std()
        offset = self.click_rate_spread * normal(self.num_domains) - self.sharpness * probe.mean() / probe.std()
        low_rank = normal(self.num_domains, self.hidden_units, self.difference_rank) @ normal(
            self.num_domains, self.difference_rank, self.num_dense
        )
        low_rank = low_rank / low_rank.flatten(1).norm(dim=1)[:, None, None] * shared.norm()
        return shared + self.difference * low_rank, hidden_bias, readout, offset


def _activate(x: Tensor) -> Tensor:
    """Smooth enough that a base model comes within 0.4 AUC points of the truth when there is one domain."""
    return F.softplus(2 * x)


def _mix(*numbers: int) -> int:
    """One seed out of several, so that world 1 with rows 2 is not world 2 with rows 1."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % (2**63)
    return mixed
