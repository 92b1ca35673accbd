"""All models and arms of a dataset beside the one that validation prefers: is it better than each of the others?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from domlora.studies.reporting.cells import TRUTH, Pair, scores_of, value_of
from domlora.studies.reporting.selection import is_selected
from domlora.studies.reporting.statistics import LEVEL, Interval, Spread, holm, p_value, paired, spread
from domlora.studies.reporting.tables import DatasetTable

__all__ = ["STANDINGS", "Standing", "standings"]

STANDINGS = (
    "All models and arms, best first, beside the one with the best mean validation WAUC of those that have every seed; it "
    "stands on top, and the test split chose nothing. Differences are paired by seed. † stays after Holm's correction over "
    "all lines of a dataset."
)


@dataclass(frozen=True, slots=True)
class Standing:
    """One model and arm.

    Args:
        score, valid: WAUC on the test split and on validation.
        difference: to the preferred one, which itself has no pairs.
        p_holm: of the difference, corrected over the dataset.
        without_tables: learned numbers that are in no embedding table; None where lines do not tell.
    """

    model: str
    method: str
    score: Spread
    valid: Spread
    difference: Interval
    p_holm: float
    without_tables: int | None

    @property
    def stays(self) -> bool:
        """Whether the difference is one after the correction too."""
        return self.p_holm < LEVEL


def standings(dataset: DatasetTable) -> tuple[Standing, ...]:
    """The preferred one, then the others by their test score; none with one model, or before every seed is there for one.

    Args:
        dataset: whose runs are compared. Arms that were selected repeat others and are left out.
    """
    runs = [line for line in dataset.runs if line["method"] != TRUTH and not is_selected(line)]
    scores, valid = (scores_of((line, value_of(line, name)) for line in runs) for name in ("wauc", "valid_wauc"))
    worth = {key: spread(valid.get(key, {}).values()) for key in scores}
    whole = [key for key, own in scores.items() if len(own) == worth[key].num_values == len(dataset.seeds)]
    if len(dataset.models) < 2 or not whole:
        return ()
    best = max(whole, key=lambda key: worth[key].mean)
    others = sorted(scores.keys() - {best})
    differences = [_difference(scores[key], scores[best]) for key in others]
    tests = [(paired([]), math.nan), *zip(differences, holm([p_value(each) for each in differences]), strict=True)]
    first, *found = [
        Standing(*key, spread(scores[key].values()), worth[key], *test, _without_tables(dataset, *key))
        for key, test in zip([best, *others], tests, strict=True)
    ]
    return (first, *sorted(found, key=attrgetter("score.mean"), reverse=True))


def _difference(own: Mapping[Pair, float], best: Mapping[Pair, float]) -> Interval:
    return paired(own[pair] - best[pair] for pair in sorted(own.keys() & best.keys()))


def _without_tables(dataset: DatasetTable, model: str, method: str) -> int | None:
    """None also where seeds differ in it."""
    counts = [row.without_tables for row in dataset.parameters if row.model == model and method in row.methods]
    return counts[0] if len(counts) == 1 else None
