"""All models and arms of a dataset beside the one that validation prefers: is it better than each of the others?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter

from domlora.studies.reporting.cells import TRUTH, Line, Pair, pair_of, value_of
from domlora.studies.reporting.selection import is_selected
from domlora.studies.reporting.statistics import LEVEL, Interval, Spread, holm, p_value, paired, spread
from domlora.studies.reporting.tables import DatasetTable

__all__ = ["STANDINGS", "Standing", "standings"]

STANDINGS = (
    "All models and arms, best first, beside the one with the best mean validation WAUC, which stands on top: the test "
    "split chose nothing. Differences are paired by seed. † stays after Holm's correction over all lines of a dataset."
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
    runs: defaultdict[tuple[str, str], dict[Pair, Line]] = defaultdict(dict)
    for line in dataset.runs:
        if line["method"] != TRUTH and not is_selected(line):
            runs[line["model"], line["method"]][pair_of(line)] = line
    whole = {key: lines for key, lines in runs.items() if len(lines) == len(dataset.seeds)}
    if len(dataset.models) < 2 or not whole:
        return ()
    best = max(whole, key=lambda key: spread(value_of(line, "valid_wauc") for line in whole[key].values()).mean)
    others = sorted(key for key in runs if key != best)
    differences = [_difference(runs[key], runs[best]) for key in others]
    adjusted = holm([p_value(each) for each in differences])
    found = [
        _standing(key, runs[key], difference, p)
        for key, difference, p in zip(others, differences, adjusted, strict=True)
    ]
    first = _standing(best, runs[best], paired([]), float("nan"))
    return (first, *sorted(found, key=attrgetter("score.mean"), reverse=True))


def _difference(lines: dict[Pair, Line], best: dict[Pair, Line]) -> Interval:
    both = sorted(lines.keys() & best.keys())
    return paired(value_of(lines[pair], "wauc") - value_of(best[pair], "wauc") for pair in both)


def _standing(key: tuple[str, str], lines: dict[Pair, Line], difference: Interval, p: float) -> Standing:
    score, valid = (spread(value_of(line, name) for line in lines.values()) for name in ("wauc", "valid_wauc"))
    counts = {(line.get("params_total"), line.get("params_tables")) for line in lines.values()}
    total, tables = counts.pop() if len(counts) == 1 else (None, None)
    without = None if total is None or tables is None else int(total) - int(tables)
    return Standing(*key, score, valid, difference, p, without)
