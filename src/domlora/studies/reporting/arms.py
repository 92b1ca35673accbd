"""What a study's arms tell beside the tables: what each switch moves, curves over an option, quality against size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from domlora.studies.reporting.cells import BASE, TRUTH, Scores, compare, means, scores_of, value_of
from domlora.studies.reporting.selection import is_selected
from domlora.studies.reporting.statistics import Interval, Spread, paired, spread
from domlora.studies.reporting.tables import MEAN, DatasetTable, Tables

__all__ = [
    "Arms",
    "Mark",
    "OptionCurve",
    "Point",
    "Switch",
    "Switches",
    "arms_of",
    "domain_count_curves",
    "option_curves",
    "quality",
    "switches",
]

_LEAST_VALUES = 3
_MANY_METHODS = 5
_FORMS = ("+", "-", "\u2212", "without ", "no ")
"""How the titles of arms begin that each switch one thing."""
_NAMES = ("arm", "kind", "method", "name", "title")
"""Entries of a line's config that say what a run is called and not how it was trained."""


@dataclass(frozen=True, slots=True)
class Arms:
    """How a study wants its arms to be read.

    Args:
        reference: the arm that switches are compared with.
        steps: arms in an order in which each adds one thing to the one before, without the reference.
        titles: what arms are called in plots and tables, where their names say too little.
    """

    reference: str = BASE
    steps: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)


class Switch(NamedTuple):
    """One arm: its WAUC, its difference to the reference, and to the arm before it where arms are steps."""

    method: str
    title: str
    score: Spread
    difference: Interval
    step: Interval


@dataclass(frozen=True, slots=True)
class Switches:
    """The arms of one model (or the mean over models) against a reference.

    ``steps``: each arm builds on the one before. ``chosen``: a study's steps or switches, not just all that it has.
    """

    model: str
    reference: str
    reference_title: str
    score: Spread
    steps: bool
    chosen: bool
    rows: tuple[Switch, ...]


class Point(NamedTuple):
    """One value of an option: its arm, WAUC, difference to the base and share of the gap to the truth."""

    value: float
    method: str
    score: Spread
    difference: Interval
    gap_closed: Interval


@dataclass(frozen=True, slots=True)
class OptionCurve:
    """Arms of one kind that differ in one number, of one model or of the mean over models; smallest value first."""

    option: str
    kind: str
    model: str
    points: tuple[Point, ...]


class Mark(NamedTuple):
    """One model and method: learned numbers outside the embedding tables, and WAUC with its interval over seeds."""

    model: str
    method: str
    parameters: int
    score: Interval


def arms_of(facts: Mapping[str, Any], tables: Tables) -> Arms:
    """What the facts of a study and its lines say of arms; names that have no run are left out.

    Args:
        facts: may hold ``reference``, ``steps`` and ``titles``; a line's own ``title`` stands in for a missing one.
    """
    told = {line["method"]: str(line["title"]) for line in tables.runs if line.get("title")}
    titles = {**told, **{str(name): str(title) for name, title in (facts.get("titles") or {}).items()}}
    steps = tuple(step for step in facts.get("steps") or () if step in tables.methods)
    reference = str(facts.get("reference") or BASE)
    return Arms(reference if reference in tables.methods else BASE, steps, titles)


# --------------------------------------------------------------------------------------------------------- switches


def switches(dataset: DatasetTable, arms: Arms) -> tuple[Switches, ...]:
    """What each arm moves, the mean over models first; none where a study has no arms that switch one thing each.

    Such arms are the study's steps; else those whose title begins like a switch (``+ dropout dead``, ``without bias``);
    else, with a reference of their own or more methods than a plot by model can hold, all of them.
    """
    others = tuple(method for method in dataset.methods if method != arms.reference)
    chosen = _chosen(others, arms)
    every = others if arms.reference != BASE or len(others) > _MANY_METHODS else ()
    scores, models = _scores(dataset), [row.model for row in dataset.models]
    names = {**({MEAN: models} if len(models) > 1 else {}), **{model: [model] for model in models}}
    found = [_switches(scores, own, name, chosen or every, arms, bool(chosen)) for name, own in names.items()]
    return tuple(each for each in found if any(row.difference.num_pairs for row in each.rows))


def _chosen(others: Sequence[str], arms: Arms) -> tuple[str, ...]:
    """Steps, or arms that are called switches."""
    if steps := tuple(step for step in arms.steps if step in others):
        return steps
    titled = tuple(method for method in others if arms.titles.get(method, method).startswith(_FORMS))
    return titled if len(titled) > 1 else ()


def _switches(
    scores: Scores, models: Sequence[str], name: str, methods: Sequence[str], arms: Arms, chosen: bool
) -> Switches:
    """The arms that any of the models has; a step is paired with the step before it."""
    steps, last, rows = bool(arms.steps), arms.reference, []
    for method in methods:
        present = [model for model in models if (model, method) in scores]
        if not present:
            continue
        score = spread(means(scores, present, method).values())
        step = compare(scores, models, method, last) if steps else paired([])
        title = arms.titles.get(method, method)
        rows.append(Switch(method, title, score, compare(scores, models, method, arms.reference), step))
        last = method
    start = [model for model in models if (model, arms.reference) in scores]
    score = spread(means(scores, start, arms.reference).values())
    title = arms.titles.get(arms.reference, arms.reference)
    return Switches(name, arms.reference, title, score, steps, chosen, tuple(rows))


# ----------------------------------------------------------------------------------------------------------- curves


def option_curves(dataset: DatasetTable) -> tuple[OptionCurve, ...]:
    """For each option in which three arms of one kind or more differ, and in nothing else, a curve a kind and model.

    A value that is a list (widths of layers) counts where all lists are multiples of the smallest: 1, 2, 4 times. An arm is
    compared with the ``base`` arm of the same value where there is one, else with ``base``. The mean over models is first.
    """
    groups = _groups(dataset)
    bases = {option: arms for (option, kind), arms in groups.items() if kind == BASE}
    scores, models = _scores(dataset), [row.model for row in dataset.models]
    names = {**({MEAN: models} if len(models) > 1 else {}), **{model: [model] for model in models}}
    found = []
    for (option, kind), arms in groups.items():
        same = bases.get(option, {}) if kind != BASE else {}
        for name, chosen in names.items():
            points = tuple(_points(scores, chosen, arms, same))
            if len(points) >= _LEAST_VALUES:
                found.append(OptionCurve(option, kind, name, points))
    return tuple(found)


def domain_count_curves(tables: Tables) -> tuple[OptionCurve, ...]:
    """Over the number of domains: datasets whose names differ in digits alone, such as taobao-10, -20 and -30.

    A curve a method; ``model`` is the common part of the datasets' names.
    """
    families: dict[str, dict[int, DatasetTable]] = {}
    for dataset in tables.datasets:
        families.setdefault(re.sub(r"\d+", "N", dataset.name), {})[dataset.num_domains] = dataset
    found = []
    for family, sizes in families.items():
        for place, method in enumerate(tables.methods):
            points = tuple(_count_points(sizes, method))
            if method != BASE and len(points) >= _LEAST_VALUES:
                found.append((place, OptionCurve("number of domains", method, family, points)))
    return tuple(curve for _, curve in found)


def quality(dataset: DatasetTable) -> tuple[Mark, ...]:
    """WAUC and learned numbers of each model and method.

    The interval is that of the difference to the mean of all marks of the same seed: what all runs of a seed share (its
    world, its split) is taken out, as it is from paired differences. Where a seed is not common to all marks, it is left
    out; with fewer than two common ones the interval is that of the mark's own values.
    """
    scores, sizes = _scores(dataset), _sizes(dataset)
    marks = [key for key in scores if key in sizes]
    common = sorted(set.intersection(*(set(scores[key]) for key in marks))) if marks else []
    centre = {pair: math.fsum(scores[key][pair] for key in marks) / len(marks) for pair in common}
    shift = math.fsum(centre.values()) / len(centre) if len(centre) > 1 else 0.0
    found = []
    for key in marks:
        own = list(scores[key].values())
        around = paired([scores[key][pair] - centre[pair] for pair in common] if len(common) > 1 else own)
        mean, low, high = (value + shift for value in around[:3])
        found.append(Mark(*key, sizes[key], Interval(mean, low, high, around.num_pairs)))
    return tuple(found)


def _scores(dataset: DatasetTable) -> Scores:
    return scores_of((line, value_of(line, "wauc")) for line in dataset.runs if line["method"] != TRUTH)


def _sizes(dataset: DatasetTable) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], list[int]] = {}
    for line in dataset.runs:
        if line["method"] != TRUTH and not is_selected(line) and line.get("params_total"):
            size = int(line["params_total"]) - int(line.get("params_tables") or 0)
            found.setdefault((line["model"], line["method"]), []).append(size)
    return {key: round(sum(sizes) / len(sizes)) for key, sizes in found.items()}


def _points(
    scores: Scores, models: Sequence[str], arms: Mapping[float, str], same: Mapping[float, str]
) -> Iterator[Point]:
    for value, method in sorted(arms.items()):
        present = [model for model in models if (model, method) in scores]
        if present:
            score = spread(means(scores, present, method).values())
            difference = compare(scores, present, method, same.get(value, BASE))
            yield Point(value, method, score, difference, paired([]))


def _count_points(sizes: Mapping[int, DatasetTable], method: str) -> Iterator[Point]:
    for size, dataset in sorted(sizes.items()):
        for cell in dataset.overall.cells:
            if cell.method == method and cell.difference.num_pairs:
                yield Point(size, method, cell.score, cell.difference, cell.gap_closed)


# -------------------------------------------------------------------------------------------- which arms differ how


def _groups(dataset: DatasetTable) -> dict[tuple[str, str], dict[float, str]]:
    """(option, kind) -> value -> arm, wherever at least three arms of a kind have all else in common."""
    found: dict[tuple[str, str], dict[float, str]] = {}
    for row in dataset.models:
        trained = [line for line in reversed(dataset.runs) if line["model"] == row.model and not is_selected(line)]
        runs = {line["method"]: line for line in trained}
        options = {m: _flat(runs[m].get("config") or {}) for m in dataset.methods if m in runs}
        kinds = {method: str(runs[method].get("kind") or method) for method in options}
        for option in dict.fromkeys(name for own in options.values() for name in own):
            for kind in dict.fromkeys(kinds.values()):
                arms = {m: own for m, own in options.items() if kinds[m] == kind and option in own}
                for group in _alike(arms, option):
                    if len(group) > len(found.get((option, kind), ())):
                        found[option, kind] = group
    return found


def _alike(arms: Mapping[str, Mapping[str, Any]], option: str) -> Iterator[dict[float, str]]:
    """Groups of arms that share all options but one, by their values of that one."""
    groups: dict[str, list[str]] = {}
    for method, own in arms.items():
        rest = {name: value for name, value in own.items() if name != option}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(method)
    for methods in groups.values():
        values = _numbers([arms[method][option] for method in methods])
        group: dict[float, str] = {}
        for value, method in zip(values, methods, strict=True):
            if value is not None:
                group.setdefault(value, method)
        if len(group) >= _LEAST_VALUES:
            yield dict(sorted(group.items()))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names; what only names an arm is left out."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in _NAMES:
            found[prefix + name] = value
    return found


def _numbers(values: Sequence[Any]) -> list[float | None]:
    """Numbers as they are; lists as multiples of the smallest list; None for anything else."""
    lists = [value for value in values if isinstance(value, list | tuple) and value and all(map(_is_number, value))]
    least = min(lists, key=sum, default=[])
    return [float(value) if _is_number(value) else _times(value, least) for value in values]


def _times(value: Any, least: Sequence[float]) -> float | None:
    if not isinstance(value, list | tuple) or len(value) != len(least) or not all(least):
        return None
    ratios = {round(one / other, 6) for one, other in zip(value, least, strict=True)} if least else set()
    return float(ratios.pop()) if len(ratios) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
