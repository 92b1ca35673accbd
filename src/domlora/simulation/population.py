"""Users and items whose true click probabilities are known."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, Schema

__all__ = ["Population", "Visit"]

_BLOCK = 256
Array = NDArray[np.float64]


class Visit(NamedTuple):
    """A user who looks at a domain, and what could be shown.

    Args:
        number: of the visit.
        user: of the visitor; users come back.
        domain: the number of the domain.
        items: numbers of the candidates, ``(C,)``.
        dense: what the model may know of them, ``(C, G)``.
        probability: that the user clicks on each if it is shown.
        lot: the chance that decides, in [0, 1): one a candidate, so that a better ranking meets the same luck.
    """

    number: int
    user: int
    domain: int
    items: NDArray[np.int64]
    dense: NDArray[np.float32]
    probability: Array
    lot: Array

    @property
    def unit(self) -> str:
        """The user's name."""
        return f"user-{self.user}"

    def clicked(self, shown: NDArray[np.intp]) -> NDArray[np.intp]:
        """Which of the shown candidates are clicked."""
        clicked: NDArray[np.intp] = shown[self.lot[shown] < self.probability[shown]]
        return clicked


@dataclass(frozen=True)
class Population:
    """Who visits, and what is there to show. The same numbers and seed make the same visits, in any order.

    Half of a row's numbers belong to the user and half to the item; the probability is that of a
    :class:`domlora.data.synthetic.World`, whose domains differ.

    Args:
        num_users: who visit with unequal frequency.
        num_items: of which each visit has ``num_candidates``.
        num_candidates: that a visit may be shown.
        click_rate: of items shown at random, about.
        world: of the probabilities.
        seed: of everything else.

    Raises:
        ConfigError: a number out of range.

    Example:
        >>> population = Population(num_users=100, num_items=50, num_candidates=8)
        >>> visit = population.visit(7)
        >>> visit.dense.shape, visit.probability.shape, visit.domain < population.world.num_domains
        ((8, 16), (8,), True)
    """

    num_users: int = 20_000
    num_items: int = 2_000
    num_candidates: int = 20
    click_rate: float = 0.1
    world: World = field(default_factory=lambda: World(num_domains=4, difference=2.0, sharpness=2.5, seed=1))
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_users, self.num_candidates) < 1 or self.num_items < self.num_candidates:
            raise ConfigError("a population needs users, and at least as many items as candidates", received=self)
        if not 0 < self.click_rate < 1:
            raise ConfigError("a click rate must lie between 0 and 1", received=self.click_rate)

    @property
    def schema(self) -> Schema:
        """What the model may know: the domain and numbers, as the world has them."""
        return self.world.schema

    @property
    def encoder(self) -> Encoder:
        """From a request's values to ids."""
        return Encoder(self.schema, {"domain": list(self.schema.domains)})

    def visit(self, number: int) -> Visit:
        """One visit."""
        return self._block(number // _BLOCK)[number % _BLOCK]

    def question(self, visit: Visit) -> dict[str, Any]:
        """The visit as ``POST /v1/score`` wants it."""
        name = self.schema.domains[visit.domain]
        columns = {f"x{column}": values for column, values in enumerate(visit.dense.T.tolist())}
        items = [f"item-{item}" for item in visit.items.tolist()]
        return {"domain": name, "unit": visit.unit, "request": {"domain": name}, "candidates": columns, "items": items}

    def rows(self, num_visits: int, *, first: int) -> Batch:
        """What a log of random rankings would hold: one shown candidate a visit, clicked or not.

        Args:
            num_visits: how many.
            first: number of the first one; others than those that are to be simulated.
        """
        visits = [self.visit(number) for number in range(first, first + num_visits)]
        domain = torch.tensor([visit.domain for visit in visits])
        dense = torch.from_numpy(np.stack([visit.dense[0] for visit in visits]))
        label = torch.tensor([float(visit.lot[0] < visit.probability[0]) for visit in visits])
        return Batch((domain + FIRST_ID).unsqueeze(1), dense, domain, label)

    @functools.cached_property
    def _traits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        half = self.world.num_dense // 2
        random = np.random.default_rng((self.seed, 0))
        users = random.standard_normal((self.num_users, half), np.float32)
        return users, random.standard_normal((self.num_items, self.world.num_dense - half), np.float32)

    @functools.cached_property
    def _shift(self) -> float:
        """Of the logit, so that random items are clicked at the click rate."""
        logit = _logit(self.world.sample(20_000, seed=self.seed).probability.numpy())
        low, high = -30.0, 30.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if _sigmoid(logit + middle).mean() > self.click_rate else (middle, high)
        return low

    @functools.cached_property
    def _last_block(self) -> dict[int, list[Visit]]:
        return {}

    def _block(self, number: int) -> list[Visit]:
        """Visits that are made together, which is a hundred times faster than one by one."""
        kept = self._last_block
        if number not in kept:
            made = self._make(number)
            while len(kept) >= 8:  # threads of one traffic are at neighbouring blocks
                kept.pop(next(iter(kept)), None)
            kept[number] = made
        return kept.get(number) or self._make(number)

    def _make(self, block: int) -> list[Visit]:
        users, items = self._traits
        random = np.random.default_rng((self.seed, 1, block))
        count, size = _BLOCK, self.num_candidates
        user = (self.num_users * random.random(count) ** 1.5).astype(np.int64)  # some come more often
        domain = random.integers(self.world.num_domains, size=count)
        places = (np.arange(size) + random.random((count, size))) * (self.num_items / size)  # each item at most once
        shown = places.astype(np.int64)
        dense = np.concatenate([np.repeat(users[user][:, None], size, 1), items[shown]], axis=2)
        true = self.world.probability(torch.from_numpy(dense).flatten(0, 1), torch.from_numpy(domain.repeat(size)))
        probability = _sigmoid(_logit(true.numpy()) + self._shift).reshape(count, size)
        lot = random.random((count, size))
        start = block * count
        return [
            Visit(start + i, int(user[i]), int(domain[i]), shown[i], dense[i], probability[i], lot[i])
            for i in range(count)
        ]


def _sigmoid(logit: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-logit))
    return found


def _logit(probability: Array) -> Array:
    inside = np.clip(probability, 1e-12, 1 - 1e-12)
    found: Array = np.log(inside) - np.log1p(-inside)
    return found
