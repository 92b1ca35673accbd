"""What a run tells whoever watches it, and what it found in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from domlora.evaluation.evaluate import Predictions

__all__ = ["Fit", "OnProgress", "Part", "Progress", "Watcher"]


class Progress(NamedTuple):
    """Where a run is: ``rows`` of ``total_rows`` in this epoch; ``value`` is the last validation figure, if any."""

    epoch: int
    rows: int
    total_rows: int
    loss: float
    value: float | None
    rows_per_second: float


OnProgress = Callable[[Progress], None]


@dataclass(slots=True)
class Part:
    """What was done since the last validation; ``loss`` is a sum over rows."""

    steps: int = 0
    rows: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    def add(self, rows: int, loss: float, seconds: float) -> None:
        self.steps += 1
        self.rows += rows
        self.loss += loss * rows
        self.seconds += seconds


@runtime_checkable
class Watcher(Protocol):
    """An ``on_progress`` that is also told of each validation; for figures of each domain, which a history does not hold."""

    def __call__(self, progress: Progress) -> None:
        """Where a run is."""

    def validated(self, history: list[dict[str, float]], said: Predictions) -> None:
        """``history`` is the one of the fit so far, the new entry at its end; ``said`` is what the entry tells of."""


@dataclass(slots=True)
class Fit:
    """What a run found: the figure of the weights that the model now holds, and how it got there.

    ``best_epoch`` counts passes over the data (a fraction when validating inside an epoch); 0 is the starting point.
    ``history`` has one entry a validation: ``epoch``, ``loss`` (training), ``wauc``, ``macro_auc``, ``log_loss`` (valid).
    """

    best_value: float = -math.inf
    best_epoch: float = 0.0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
