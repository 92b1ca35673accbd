"""From result lines to the tables of a study: main, per domain, parameters.

A method is compared with ``base`` of the same dataset, model, seed and data. AUC stays in 0..1 in the numbers here and
is shown in points (x 100).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from domlora.errors import DataError
from domlora.studies.statistics import Interval, Spread, gap_closed, paired, spread

__all__ = [
    "BASE",
    "COUNTS",
    "MEAN",
    "METHODS",
    "TRUTH",
    "Cell",
    "Curve",
    "DatasetTable",
    "DomainRow",
    "Line",
    "ModelRow",
    "ParameterRow",
    "Tables",
    "method_order",
    "read_results",
    "tabulate",
]

BASE = "base"
TRUTH = "truth"
MEAN = "mean over models"
METHODS = (BASE, "joint", "two_stage", "bias_only")
"""The order of columns; other methods follow by name."""

Line: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[int, str]
"""What two runs must share to be a pair beside dataset and model: the seed and the fingerprint of the data."""
Scores: TypeAlias = Mapping[tuple[str, str, Pair], float]
"""(model, method, pair) -> a metric."""
Truth: TypeAlias = Mapping[str, float]
"""Fingerprint of the data -> the metric of its true probabilities; worlds may differ from seed to seed."""

COUNTS = ("params_total", "params_tables", "params_adapters")
"""The counts of a result line: whole numbers."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One method: its AUC, its paired difference to the base, the share of the gap to the truth that it closes.

    The base's own difference has no pairs; without a truth ``gap_closed`` has none either. ``num_models`` is 1, or how
    many models a mean is over.
    """

    method: str
    score: Spread
    difference: Interval
    gap_closed: Interval
    num_models: int


@dataclass(frozen=True, slots=True)
class ModelRow:
    """WAUC of one model, or of the mean over models (``MEAN``), a cell a method."""

    model: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class DomainRow:
    """AUC of one domain, a cell a method; ``status`` is ``scored``, ``one class`` or ``no rows``.

    ``rows`` and ``click_rate`` are of the test split, and means where seeds have data of their own.
    """

    name: str
    rows: int
    click_rate: float
    status: str
    truth: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """Learned numbers of one model; methods that have the same counts share a row."""

    model: str
    methods: tuple[str, ...]
    total: int
    tables: int
    adapters: int

    @property
    def dense(self) -> int:
        """All that is neither an embedding table nor an adapter."""
        return self.total - self.tables - self.adapters


@dataclass(frozen=True, slots=True)
class Curve:
    """WAUC on the validation split after each epoch of one run."""

    method: str
    seed: int
    epochs: tuple[float, ...]
    wauc: tuple[float, ...]
    best_epoch: float


@dataclass(frozen=True, slots=True)
class DatasetTable:
    """All that a study says of one dataset.

    Args:
        methods: in the order of the columns, without the truth.
        mean: the mean over models; a seed counts only if every model of a method has it. None for a single model.
        domains: AUC by domain, largest first, as a mean over models; ``domains_by_model`` has each model's own.
        curves: of each model.
        truth: WAUC of the true click probabilities, of no value where nobody knows them.
    """

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    models: tuple[ModelRow, ...]
    mean: ModelRow | None
    domains: tuple[DomainRow, ...]
    domains_by_model: Mapping[str, tuple[DomainRow, ...]]
    parameters: tuple[ParameterRow, ...]
    curves: Mapping[str, tuple[Curve, ...]]
    truth: Spread
    runs: tuple[Line, ...]

    @property
    def overall(self) -> ModelRow:
        """The row that speaks for the dataset: the mean over models, or the only model."""
        return self.mean or self.models[0]


@dataclass(frozen=True, slots=True)
class Tables:
    """A study: its datasets, the runs they rest on in a fixed order, and what a reader must be warned of."""

    datasets: tuple[DatasetTable, ...]
    runs: tuple[Line, ...]
    cautions: tuple[str, ...]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``results.jsonl``, none if there is no such file; of lines with one key the newest (last) counts.

    A line that an interruption cut short is left out, wherever it stands: the study runs it again behind it.

    Raises:
        DataError: a line that is whole and no result.
    """
    newest: dict[str, dict[str, Any]] = {}
    pieces = path.read_bytes().splitlines() if path.is_file() else []
    for number, piece in enumerate(pieces, 1):
        try:
            line: Any = json.loads(piece)
        except ValueError:  # cut, perhaps inside a character
            continue
        if not isinstance(line, dict) or not isinstance(line.get("key"), str):
            rule = f"line {number} of {path} must be a JSON object with a key"
            raise DataError(rule, received=piece[:60], next_step="Delete the line and run the study again")
        newest[line["key"]] = line
    return list(newest.values())


def tabulate(results: Iterable[Line]) -> Tables:
    """The tables of some result lines, in an order that does not depend on the order of the lines.

    Of two runs of the same dataset, model, method and seed the later counts.

    Raises:
        DataError: no run of a model.
    """
    newest: dict[tuple[str, str, str, int], Line] = {}
    num_lines = 0
    for line in results:
        num_lines += 1
        newest[line["dataset"], line["model"], line["method"], int(line["seed"])] = line
    order = sorted(newest, key=lambda run: (run[0], run[2] == TRUTH, run[1], method_order(run[2]), run[3]))
    runs = tuple(newest[run] for run in order)
    names = list(dict.fromkeys(line["dataset"] for line in runs if line["method"] != TRUTH))
    if not names:
        raise DataError("a report needs at least one run of a model", received=f"{num_lines} result lines")
    datasets = tuple(_dataset_table(name, [line for line in runs if line["dataset"] == name]) for name in names)
    cautions = [caution for dataset in datasets for caution in _cautions(dataset)]
    if num_lines > len(runs):
        cautions.insert(0, f"{num_lines - len(runs)} older runs of the same dataset, model, method and seed left out.")
    return Tables(datasets, runs, tuple(cautions))


def method_order(method: str) -> tuple[int, str]:
    """What methods are sorted by: the known ones first, in the order of ``METHODS``."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _dataset_table(name: str, lines: Sequence[Line]) -> DatasetTable:
    runs = [line for line in lines if line["method"] != TRUTH]
    truths = [line for line in lines if line["method"] == TRUTH]
    truth = {_key(line)[2][1]: _number(line, "wauc") for line in truths}
    models = sorted({line["model"] for line in runs})
    methods = tuple(sorted({line["method"] for line in runs}, key=method_order))
    scores = {_key(line): _number(line, "wauc") for line in runs}
    rows = [ModelRow(model, _cells(scores, [model], methods, truth)) for model in models]
    by_model = {model: _domain_rows(runs, truths, [model], methods) for model in models}
    return DatasetTable(
        name=name,
        methods=methods,
        seeds=tuple(sorted({int(line["seed"]) for line in runs})),
        models=tuple(rows),
        mean=ModelRow(MEAN, _cells(scores, models, methods, truth)) if len(models) > 1 else None,
        domains=_domain_rows(runs, truths, models, methods),
        domains_by_model=by_model,
        parameters=tuple(row for model in models for row in _parameter_rows(runs, model)),
        curves={model: tuple(_curve(line) for line in runs if line["model"] == model) for model in models},
        truth=spread(truth.values()),
        runs=tuple(lines),
    )


def _key(line: Line) -> tuple[str, str, Pair]:
    return line["model"], line["method"], (int(line["seed"]), str(line.get("data_fingerprint", "")))


def _number(line: Line, key: str) -> float:
    value = line.get(key)
    return math.nan if value is None else float(value)


def _cells(scores: Scores, models: Sequence[str], methods: Sequence[str], truth: Truth) -> tuple[Cell, ...]:
    known = {key: score for key, score in scores.items() if not math.isnan(score)}
    return tuple(_cell(known, models, method, truth) for method in methods)


def _cell(scores: Scores, models: Sequence[str], method: str, truth: Truth) -> Cell:
    present = [model for model in models if _has(scores, model, method)]
    compared = [model for model in present if method != BASE and _has(scores, model, BASE)]
    after, before = _means(scores, compared, method), _means(scores, compared, BASE)
    pairs = [pair for pair in after if pair in before]
    known = [pair for pair in pairs if not math.isnan(truth.get(pair[1], math.nan))]
    share = gap_closed([before[p] for p in known], [after[p] for p in known], [truth[p[1]] for p in known])
    return Cell(
        method,
        score=spread(_means(scores, present, method).values()),
        difference=paired(after[pair] - before[pair] for pair in pairs),
        gap_closed=share,
        num_models=len(present),
    )


def _has(scores: Scores, model: str, method: str) -> bool:
    return any(key[:2] == (model, method) for key in scores)


def _means(scores: Scores, models: Sequence[str], method: str) -> dict[Pair, float]:
    """The mean over the models for each seed (and data) that all of them have, so that no mean mixes model sets."""
    pairs = sorted({key[2] for key in scores if key[1] == method})
    whole = [pair for pair in pairs if models and all((model, method, pair) in scores for model in models)]
    return {pair: math.fsum(scores[model, method, pair] for model in models) / len(models) for pair in whole}


def _domain_rows(
    runs: Sequence[Line], truths: Sequence[Line], models: Sequence[str], methods: Sequence[str]
) -> tuple[DomainRow, ...]:
    scores: dict[str, dict[tuple[str, str, Pair], float]] = {}
    truth: dict[str, dict[str, float]] = {}
    facts: dict[str, list[Line]] = {}
    for line in runs:
        for domain in line.get("domains") or ():
            facts.setdefault(domain["name"], []).append(domain)
            scores.setdefault(domain["name"], {})[_key(line)] = _number(domain, "auc")
    for line in truths:
        for domain in line.get("domains") or ():
            truth.setdefault(domain["name"], {})[_key(line)[2][1]] = _number(domain, "auc")
    rows = [_domain_row(name, facts[name], scores[name], models, methods, truth.get(name, {})) for name in facts]
    return tuple(sorted(rows, key=lambda row: (-row.rows, row.name)))


def _domain_row(
    name: str, facts: Sequence[Line], scores: Scores, models: Sequence[str], methods: Sequence[str], truth: Truth
) -> DomainRow:
    statuses = {fact.get("status") or "scored" for fact in facts}
    return DomainRow(
        name,
        rows=round(spread(_number(fact, "rows") for fact in facts).mean),
        click_rate=spread(_number(fact, "click_rate") for fact in facts).mean,
        status="scored" if "scored" in statuses else max(statuses),
        truth=spread(truth.values()).mean,
        cells=_cells(scores, models, methods, truth),
    )


def _parameter_rows(runs: Sequence[Line], model: str) -> Iterator[ParameterRow]:
    methods: dict[tuple[int, ...], list[str]] = {}
    for line in runs:
        if line["model"] != model or any(line.get(key) is None for key in COUNTS):
            continue
        same = methods.setdefault(tuple(int(line[key]) for key in COUNTS), [])
        if line["method"] not in same:
            same.append(line["method"])
    for counts, names in methods.items():
        yield ParameterRow(model, tuple(names), *counts)


def _curve(line: Line) -> Curve:
    points = [(_number(point, "epoch"), _number(point, "wauc")) for point in line.get("history") or ()]
    kept = sorted(point for point in points if not any(map(math.isnan, point)))
    epochs, wauc = zip(*kept, strict=True) if kept else ((), ())
    return Curve(line["method"], int(line["seed"]), tuple(epochs), tuple(wauc), _number(line, "best_epoch"))


def _cautions(dataset: DatasetTable) -> Iterator[str]:
    runs = [line for line in dataset.runs if line["method"] != TRUTH]
    expected = len(dataset.models) * len(dataset.methods) * len(dataset.seeds)
    if len(runs) < expected:
        yield (
            f"{dataset.name}: {expected - len(runs)} of {expected} runs (models, methods, seeds) are missing. "
            "Means are over the seeds that are there, and over the models that have a method."
        )
    if len({_key(line)[2] for line in runs}) > len(dataset.seeds):
        yield f"{dataset.name}: runs of one seed on several versions of the data. Only runs on the same data are paired."
    if BASE not in dataset.methods:
        yield f"{dataset.name}: no runs of the base, so there is nothing to compare with."
