"""An arm that no training stands behind: of several candidates the one that validation prefers, judged by other seeds.

Whether a dataset wants adapters, and how large, is a property of the dataset, and one run's validation rows are too few to
tell. So a seed takes the candidate whose mean validation WAUC over the *other* seeds is the best, and no seed chooses for
itself. The test split decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domlora.studies.reporting.cells import Line, pair_of, value_of
from domlora.studies.reporting.statistics import Spread, spread

__all__ = ["KIND", "Candidate", "candidates", "is_selected", "selected"]

KIND = "select"
_LEAST_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one arm was worth on validation, and how many seeds took it."""

    model: str
    arm: str
    name: str
    valid: Spread
    taken: int
    num_seeds: int


def is_selected(line: Line) -> bool:
    """Whether a line repeats another one's figures under the name of an arm of ``[select]``."""
    return line.get("kind") == KIND


def selected(results: Iterable[Line], facts: Mapping[str, Any]) -> list[Line]:
    """The same lines, and behind them a line a seed for each arm of ``[select]``.

    Candidates that no model has on a dataset are left out there; a model that lacks one of the others gets no such arm,
    so that one name means one choice. Seeds are those that all others have; with fewer than three, or with one candidate,
    there is no choice and no line. Of equal means the candidate named first wins.

    Args:
        results: result lines; of two runs of the same dataset, model, method and seed the later counts.
        facts: of the study; ``select`` holds each arm's ``of``.

    Example:
        >>> figures = {"a": (0.7, 0.8, 0.7), "b": (0.6, 0.9, 0.8)}
        >>> lines = [
        ...     {"dataset": "d", "model": "m", "method": name, "seed": seed, "key": f"{name}{seed}", "valid_wauc": wauc}
        ...     for name, own in figures.items()
        ...     for seed, wauc in enumerate(own)
        ... ]
        >>> [line["selected"] for line in selected(lines, {"select": {"best": {"of": ["a", "b"]}}})[6:]]
        ['b', 'a', 'a']
    """
    lines = [line for line in results if not is_selected(line)]
    newest = {(line["dataset"], line["model"], line["method"], pair_of(line)[0]): line for line in lines}
    groups: dict[tuple[str, str], dict[str, dict[int, Line]]] = {}
    for (dataset, model, method, seed), line in newest.items():
        if not math.isnan(value_of(line, "valid_wauc")):
            groups.setdefault((dataset, model), {}).setdefault(method, {})[seed] = line
    on: dict[str, set[str]] = {}
    for (dataset, _), runs in groups.items():
        on.setdefault(dataset, set()).update(runs)
    found = [
        one
        for (dataset, _), runs in groups.items()
        for arm, told in (facts.get("select") or {}).items()
        for one in _select(runs, arm, [name for name in told["of"] if name in on[dataset]])
    ]
    return [*lines, *found]


def candidates(runs: Iterable[Line]) -> tuple[Candidate, ...]:
    """What stood to choose in the lines of one dataset, for each model and arm of ``[select]``."""
    lines = list(runs)
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if is_selected(line):
            groups.setdefault((line["model"], line["method"]), []).append(line)
    return tuple(each for (model, arm), own in groups.items() for each in _candidates(lines, model, arm, own))


def _select(runs: Mapping[str, Mapping[int, Line]], arm: str, of: Sequence[str]) -> Iterator[Line]:
    if len(of) < 2 or not all(name in runs for name in of):
        return
    seeds = sorted(set.intersection(*(set(runs[name]) for name in of)))
    if len(seeds) < _LEAST_SEEDS:
        return
    for seed in seeds:
        others = [other for other in seeds if other != seed]
        worth = {name: math.fsum(value_of(runs[name][other], "valid_wauc") for other in others) for name in of}
        best = max(of, key=worth.__getitem__)
        line = runs[best][seed]
        # No time and no curve of its own: nothing was trained, and both stand in the line that it repeats.
        own = {"method": arm, "kind": KIND, "selected": best, "candidates": list(of), "key": f"{line['key']}-{arm}"}
        yield {**line, **own, "seconds": None, "best_epoch": None, "history": []}


def _candidates(lines: Sequence[Line], model: str, arm: str, own: Sequence[Line]) -> Iterator[Candidate]:
    seeds, taken = {int(line["seed"]) for line in own}, Counter(line["selected"] for line in own)
    for name in own[0]["candidates"]:
        same = [line for line in lines if (line["model"], line["method"]) == (model, name)]
        valid = spread(value_of(line, "valid_wauc") for line in same if int(line["seed"]) in seeds)
        yield Candidate(model, arm, name, valid, taken[name], len(seeds))
