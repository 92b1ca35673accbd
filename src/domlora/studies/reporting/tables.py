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
from typing import Any

from domlora.errors import DataError
from domlora.studies.reporting.cells import (
    BASE,
    TRUTH,
    Cell,
    Line,
    Truth,
    cells_of,
    corrected,
    pair_of,
    scores_of,
    value_of,
)
from domlora.studies.reporting.selection import is_selected
from domlora.studies.reporting.statistics import Spread, p_value, spread

__all__ = [
    "COUNTS",
    "MEAN",
    "METHODS",
    "Curve",
    "DatasetTable",
    "DomainRow",
    "ModelRow",
    "ParameterRow",
    "Tables",
    "ordered",
    "read_results",
    "shown_domains",
    "tabulate",
]

MEAN = "mean over models"
METHODS = (BASE, "joint", "two_stage", "bias_only")
"""Methods that come first, in this order; others follow in the order in which their first runs stand."""

COUNTS = ("params_total", "params_tables", "params_adapters")
"""The counts of a result line: whole numbers."""


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
    """Learned numbers of one model; methods that have the same counts share a row.

    ``per_domain`` is what one more domain costs, None where lines do not tell.
    """

    model: str
    methods: tuple[str, ...]
    total: int
    tables: int
    adapters: int
    per_domain: int | None = None

    @property
    def without_tables(self) -> int:
        """All that is no embedding table."""
        return self.total - self.tables

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
        num_domains: that the models know, also those without rows in the test split.
        domains: AUC by domain, largest first, as a mean over models; ``domains_by_model`` has each model's own.
        curves: of each model.
        truth: WAUC of the true click probabilities, of no value where nobody knows them.
    """

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    num_domains: int
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

    @property
    def fewer(self) -> str:
        """Which methods not all models have, and how many do: ``joint_t4 3, separate_mlp 1 of 15``; mostly nothing."""
        number = len(self.models)
        found = [f"{cell.method} {cell.num_models}" for cell in self.overall.cells if cell.num_models < number]
        return f"{', '.join(found)} of {number}" if found else ""

    @property
    def over(self) -> str:
        """What figures of the whole dataset are of: a model, or a mean over several."""
        if self.mean is None:
            return self.models[0].model
        return (
            f"mean over the models of each method ({self.fewer})"
            if self.fewer
            else f"mean over {len(self.models)} models"
        )


@dataclass(frozen=True, slots=True)
class Tables:
    """A study: its datasets, the runs they rest on in a fixed order, and what a reader must be warned of.

    ``methods`` are those of all datasets, in the order of columns and colours, without the truth.
    """

    datasets: tuple[DatasetTable, ...]
    methods: tuple[str, ...]
    runs: tuple[Line, ...]
    cautions: tuple[str, ...]

    @property
    def corrected(self) -> bool:
        """Whether there is anything to correct for: a dataset with several models."""
        return any(len(dataset.models) > 1 for dataset in self.datasets)


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
    """The tables of some result lines.

    Of two runs of the same dataset, model, method and seed the later counts. The order of the lines decides nothing else,
    but for the order of methods that ``METHODS`` does not know.

    Raises:
        DataError: no run of a model.
    """
    lines = list(results)
    newest = {_run_of(line): line for line in lines}
    methods = ordered(run[2] for run in newest if run[2] != TRUTH)
    place = {method: number for number, method in enumerate((*methods, TRUTH))}
    runs = tuple(
        newest[run] for run in sorted(newest, key=lambda run: (run[0], run[2] == TRUTH, run[1], place[run[2]], run[3]))
    )
    names = list(dict.fromkeys(line["dataset"] for line in runs if line["method"] != TRUTH))
    if not names:
        raise DataError("a report needs at least one run of a model", received=f"{len(lines)} result lines")
    datasets = tuple(
        _dataset_table(name, [line for line in runs if line["dataset"] == name], methods) for name in names
    )
    cautions = [caution for dataset in datasets for caution in _cautions(dataset)]
    older = sum(_made_of(line) != _made_of(newest[_run_of(line)]) for line in lines)
    if older:
        cautions.insert(
            0, f"{older} older runs of the same dataset, model, method and seed, with other options or data, left out."
        )
    return Tables(datasets, methods, runs, tuple(cautions))


def _run_of(line: Line) -> tuple[str, str, str, int]:
    return line["dataset"], line["model"], line["method"], int(line["seed"])


def _made_of(line: Line) -> tuple[Any, Any]:
    """Two lines of one run that share it tell of one training, under an old and a new key."""
    return line.get("config_hash"), line.get("data_fingerprint")


def ordered(methods: Iterable[str]) -> tuple[str, ...]:
    """Each method once: those of ``METHODS`` first, others in the order in which they come.

    >>> ordered(["mine", "joint", "yours", "mine", "base"])
    ('base', 'joint', 'mine', 'yours')
    """
    seen = dict.fromkeys(methods)
    return (*(method for method in METHODS if method in seen), *(method for method in seen if method not in METHODS))


def shown_domains(rows: Sequence[DomainRow], limit: int = 40) -> tuple[DomainRow, ...]:
    """All domains, or of more than ``limit`` the largest half of it and of the others those whose differences are surest.

    Args:
        rows: largest first; so are those that come back.
    """
    if len(rows) <= limit:
        return tuple(rows)
    large, rest = rows[: limit // 2], rows[limit // 2 :]
    surest = sorted(rest, key=_least_p)[: limit - len(large)]
    kept = {row.name for row in surest}
    return (*large, *(row for row in rest if row.name in kept))


def _least_p(row: DomainRow) -> float:
    known = [p for cell in row.cells if not math.isnan(p := p_value(cell.difference))]
    return min(known, default=1.0)


def _dataset_table(name: str, lines: Sequence[Line], order: Sequence[str]) -> DatasetTable:
    runs = [line for line in lines if line["method"] != TRUTH]
    truths = [line for line in lines if line["method"] == TRUTH]
    truth = {pair_of(line)[1]: value_of(line, "wauc") for line in truths}
    models = sorted({line["model"] for line in runs})
    present = {line["method"] for line in runs}
    methods = tuple(method for method in order if method in present)
    scores = scores_of((line, value_of(line, "wauc")) for line in runs)
    cells = corrected([cells_of(scores, [model], methods, truth) for model in models])
    domains = _domains(runs, truths)
    return DatasetTable(
        name=name,
        methods=methods,
        seeds=tuple(sorted({int(line["seed"]) for line in runs})),
        num_domains=max(int(line.get("num_domains") or len(domains)) for line in runs),
        models=tuple(ModelRow(model, row) for model, row in zip(models, cells, strict=True)),
        mean=ModelRow(MEAN, cells_of(scores, models, methods, truth)) if len(models) > 1 else None,
        domains=_domain_rows(domains, models, methods),
        domains_by_model={model: _domain_rows(domains, [model], methods) for model in models},
        parameters=tuple(row for model in models for row in _parameter_rows(runs, model)),
        curves={model: tuple(_curve(line) for line in runs if line["model"] == model) for model in models},
        truth=spread(truth.values()),
        runs=tuple(lines),
    )


@dataclass(frozen=True, slots=True)
class _Domain:
    """What lines say of one domain: (run, figures) pairs, and the AUC of its truth."""

    runs: list[tuple[Line, Line]]
    truth: dict[str, float]


def _domains(runs: Sequence[Line], truths: Sequence[Line]) -> dict[str, _Domain]:
    found: dict[str, _Domain] = {}
    for line in runs:
        for figures in line.get("domains") or ():
            found.setdefault(figures["name"], _Domain([], {})).runs.append((line, figures))
    for line in truths:
        for figures in line.get("domains") or ():
            if figures["name"] in found:
                found[figures["name"]].truth[pair_of(line)[1]] = value_of(figures, "auc")
    return found


def _domain_rows(
    domains: Mapping[str, _Domain], models: Sequence[str], methods: Sequence[str]
) -> tuple[DomainRow, ...]:
    """Rows of some models, largest first; each method's differences are corrected over the domains."""
    kept = {name: [run for run in domain.runs if run[0]["model"] in models] for name, domain in domains.items()}
    known = [name for name, runs in kept.items() if runs]
    scores = {name: scores_of((line, value_of(figures, "auc")) for line, figures in kept[name]) for name in known}
    cells = [cells_of(scores[name], models, methods, domains[name].truth) for name in known]
    rows = [
        _domain_row(name, [figures for _, figures in kept[name]], domains[name].truth, row)
        for name, row in zip(known, corrected(cells), strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (-row.rows, row.name)))


def _domain_row(name: str, facts: Sequence[Line], truth: Truth, cells: tuple[Cell, ...]) -> DomainRow:
    statuses = {fact.get("status") or "scored" for fact in facts}
    return DomainRow(
        name,
        rows=round(spread(value_of(fact, "rows") for fact in facts).mean),
        click_rate=spread(value_of(fact, "click_rate") for fact in facts).mean,
        status="scored" if "scored" in statuses else max(statuses),
        truth=spread(truth.values()).mean,
        cells=cells,
    )


def _parameter_rows(runs: Sequence[Line], model: str) -> Iterator[ParameterRow]:
    methods: dict[tuple[int, int, int, int | None], list[str]] = {}
    for line in runs:
        if line["model"] != model or is_selected(line) or any(line.get(key) is None for key in COUNTS):
            continue
        own = line.get("params_per_domain")
        total, tables, adapters = (int(line[key]) for key in COUNTS)
        same = methods.setdefault((total, tables, adapters, None if own is None else int(own)), [])
        if line["method"] not in same:
            same.append(line["method"])
    for counts, names in methods.items():
        yield ParameterRow(model, tuple(names), *counts)


def _curve(line: Line) -> Curve:
    points = [(value_of(point, "epoch"), value_of(point, "wauc")) for point in line.get("history") or ()]
    kept = sorted(point for point in points if not any(map(math.isnan, point)))
    epochs, wauc = zip(*kept, strict=True) if kept else ((), ())
    return Curve(line["method"], int(line["seed"]), tuple(epochs), tuple(wauc), value_of(line, "best_epoch"))


def _cautions(dataset: DatasetTable) -> Iterator[str]:
    runs = [line for line in dataset.runs if line["method"] != TRUTH and not is_selected(line)]
    expected = len({(line["model"], line["method"]) for line in runs}) * len(dataset.seeds)
    if len(runs) < expected:
        yield (
            f"{dataset.name}: {expected - len(runs)} of {expected} runs (models, methods, seeds) are missing. "
            "Means are over the seeds that are there, and over the models that have a method."
        )
    if len({pair_of(line) for line in runs}) > len(dataset.seeds):
        yield f"{dataset.name}: runs of one seed on several versions of the data. Only runs on the same data are paired."
    if BASE not in dataset.methods:
        yield f"{dataset.name}: no runs of the base, so there is nothing to compare with."
