"""Scores of runs, side by side: a method against another, paired by seed, averaged over models, corrected over rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from domlora.studies.reporting.statistics import LEVEL, Interval, Spread, gap_closed, holm, p_value, paired, spread

__all__ = [
    "BASE",
    "TRUTH",
    "Cell",
    "Line",
    "Pair",
    "Scores",
    "Truth",
    "cells_of",
    "compare",
    "corrected",
    "gains",
    "means",
    "pair_of",
    "scores_of",
    "value_of",
]

BASE = "base"
TRUTH = "truth"

Line: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[int, str]
"""What two runs must share to be a pair beside dataset and model: the seed and the fingerprint of the data."""
Scores: TypeAlias = Mapping[tuple[str, str], Mapping[Pair, float]]
"""(model, method) -> pair -> a metric; what was not scored is not there."""
Truth: TypeAlias = Mapping[str, float]
"""Fingerprint of the data -> the metric of its true probabilities; worlds may differ from seed to seed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One method: its AUC, its paired difference to the base, the share of the gap to the truth that it closes.

    The base's own difference has no pairs; without a truth ``gap_closed`` has none either. ``num_models`` is 1, or how
    many models a mean is over. ``p_holm`` is the p-value of the difference, corrected over the rows of its table (models,
    or domains); NaN where there is no test or one alone, as for a mean over models.
    """

    method: str
    score: Spread
    difference: Interval
    gap_closed: Interval
    num_models: int
    p_holm: float = math.nan

    @property
    def stays(self) -> bool:
        """Whether the difference is one after Holm's correction too."""
        return self.p_holm < LEVEL


def value_of(line: Line, key: str) -> float:
    """A number of a line, NaN where it is missing."""
    value = line.get(key)
    return math.nan if value is None else float(value)


def pair_of(line: Line) -> Pair:
    """Seed and fingerprint of the data of a run."""
    return int(line["seed"]), str(line.get("data_fingerprint", ""))


def scores_of(runs: Iterable[tuple[Line, float]]) -> Scores:
    """The metric of every run that has one, from pairs of a line and its value."""
    scores: dict[tuple[str, str], dict[Pair, float]] = {}
    for line, value in runs:
        if not math.isnan(value):
            scores.setdefault((line["model"], line["method"]), {})[pair_of(line)] = value
    return scores


def cells_of(scores: Scores, models: Sequence[str], methods: Sequence[str], truth: Truth) -> tuple[Cell, ...]:
    """A cell a method: of one model, or of the mean over several."""
    return tuple(_cell(scores, models, method, truth) for method in methods)


def corrected(rows: Sequence[Sequence[Cell]]) -> list[tuple[Cell, ...]]:
    """The same rows with ``p_holm``: each method's differences to the base are a family of tests, one a row."""
    columns = zip(*rows, strict=True) if rows else ()
    adjusted = [_corrected([p_value(cell.difference) for cell in column]) for column in columns]
    return [
        tuple(replace(cell, p_holm=adjusted[column][place]) for column, cell in enumerate(row))
        for place, row in enumerate(rows)
    ]


def _corrected(p_values: Sequence[float]) -> Sequence[float]:
    """One test alone is no family: there is nothing to correct, and nothing that could stay."""
    several = sum(not math.isnan(p) for p in p_values) > 1
    return holm(p_values) if several else [math.nan] * len(p_values)


def compare(scores: Scores, models: Sequence[str], method: str, reference: str) -> Interval:
    """A method minus another, paired by seed; of several models the mean over those that have both."""
    return paired(gains(scores, models, method, reference).values())


def gains(scores: Scores, models: Sequence[str], method: str, reference: str) -> dict[Pair, float]:
    """A method minus another for each seed that all models with both methods have."""
    both = [model for model in models if (model, method) in scores and (model, reference) in scores]
    after, before = means(scores, both, method), means(scores, both, reference)
    return {pair: after[pair] - before[pair] for pair in after if pair in before}


def means(scores: Scores, models: Sequence[str], method: str) -> dict[Pair, float]:
    """The mean over the models for each seed (and data) that all of them have, so that no mean mixes model sets."""
    runs = [scores[model, method] for model in models]
    whole = sorted(set.intersection(*map(set, runs))) if runs else []
    return {pair: math.fsum(run[pair] for run in runs) / len(runs) for pair in whole}


def _cell(scores: Scores, models: Sequence[str], method: str, truth: Truth) -> Cell:
    present = [model for model in models if (model, method) in scores]
    compared = [model for model in present if method != BASE and (model, BASE) in scores]
    after, before = means(scores, compared, method), means(scores, compared, BASE)
    pairs = [pair for pair in after if pair in before]
    known = [pair for pair in pairs if not math.isnan(truth.get(pair[1], math.nan))]
    share = gap_closed([before[p] for p in known], [after[p] for p in known], [truth[p[1]] for p in known])
    return Cell(
        method,
        score=spread(means(scores, present, method).values()),
        difference=paired(after[pair] - before[pair] for pair in pairs),
        gap_closed=share,
        num_models=len(present),
    )
