"""A study as one self-contained HTML page: what each dataset's section shows, and the template that it goes into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from domlora.studies.reporting import forest, plots, trends
from domlora.studies.reporting.arms import (
    Arms,
    OptionCurve,
    Switches,
    domain_count_curves,
    option_curves,
    quality,
    switches,
)
from domlora.studies.reporting.canvas import series_number
from domlora.studies.reporting.cells import BASE, TRUTH, Cell, Line
from domlora.studies.reporting.findings import (
    Family,
    Finding,
    domain_counts,
    families,
    findings,
    percent,
    share_text,
    word,
)
from domlora.studies.reporting.selection import Candidate, candidates, is_selected
from domlora.studies.reporting.sheets import MANY_METHODS, SELECTED, parameter_counts
from domlora.studies.reporting.standings import STANDINGS, Standing, standings
from domlora.studies.reporting.statistics import interval_text, p_text, p_value, score_text, verdict
from domlora.studies.reporting.tables import MEAN, DatasetTable, DomainRow, Tables, shown_domains

__all__ = ["page"]

_HOLLOW = "Filled: the interval lies on one side of zero. Hollow: it holds zero, or there is none."
_MOST_FORESTS, _MOST_CELLS = 4, 3000


class _Plot(NamedTuple):
    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class _Section:
    """A dataset as the page shows it."""

    anchor: str
    table: DatasetTable
    findings: tuple[Finding, ...]
    families: tuple[Family, ...]
    figures: tuple[tuple[str, str], ...]
    num_intervals: int
    candidates: tuple[Candidate, ...]
    standings: tuple[Standing, ...]
    model_plot: _Plot | None
    quality: _Plot | None
    switches: tuple[Switches, ...]
    switch_plots: tuple[_Plot, ...]
    options: tuple[_Plot, ...]
    domains: tuple[DomainRow, ...]
    domain_plots: tuple[_Plot, ...]
    curves: tuple[_Plot, ...]
    parameters: _Plot | None
    made: tuple[tuple[str, tuple[str, ...]], ...]

    def place(self, value: float) -> str:
        """Where a difference lies between the ends of this dataset's scale, in percent."""
        ends = [end for finding in self.findings for end in finding.difference[:3] if not math.isnan(end)]
        low, high = min(0.0, *ends), max(0.0, *ends)
        margin = 0.08 * (high - low) or 1.0
        return f"{100 * (value - low + margin) / (high - low + 2 * margin):.2f}"

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Anchor and title of each part that has something to show."""
        known = (
            ("switches", self.switch_title, self.switch_plots),
            ("options", "Options", self.options),
            ("domains", "Domains", self.domains),
            ("size", "Quality and size", self.quality),
            ("curves", "Learning curves", self.curves),
        )
        return tuple((f"{self.anchor}-{name}", title) for name, title, shown in known if shown)

    @property
    def selections(self) -> tuple[tuple[tuple[str, str], tuple[Candidate, ...]], ...]:
        """Candidates by model and selected arm."""
        keys = dict.fromkeys((each.model, each.arm) for each in self.candidates)
        return tuple((key, tuple(each for each in self.candidates if (each.model, each.arm) == key)) for key in keys)

    @property
    def switch_title(self) -> str:
        """Heading of the arms' part: of switches, or of all arms."""
        return "What each switch moves" if any(each.chosen for each in self.switches) else "All arms"

    @property
    def switch_table(self) -> bool:
        """Whether the arms need a table of their own: the main table holds those against the base."""
        return any(each.chosen or each.reference != BASE for each in self.switches)

    @property
    def each_models_domains(self) -> bool:
        """Whether a table of domains for each model would not swamp the page."""
        cells = len(self.table.domains) * len(self.table.models) * len(self.table.methods)
        return self.table.mean is not None and len(self.domains) == len(self.table.domains) and cells <= _MOST_CELLS


def page(tables: Tables, arms: Arms, title: str, notes: Sequence[str], command: str) -> str:
    """The page as text; every name is escaped on its way in, only our own plots go in as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        {each.__name__: each for each in (interval_text, score_text, share_text, percent, verdict, p_text, p_value)},
        count=_count,
        counts=parameter_counts,
        word=word,
        series=lambda method: series_number(method, tables.methods),
        isnan=math.isnan,
        base=BASE,
        mean=MEAN,
    )
    template = environment.from_string(
        files("domlora.studies.reporting").joinpath("report.html").read_text(encoding="utf-8")
    )
    runs = [line for line in tables.runs if line["method"] != TRUTH]
    return template.render(
        title=title,
        notes=notes,
        command=command,
        cautions=tables.cautions,
        sections=[_section(dataset, number, tables, arms) for number, dataset in enumerate(tables.datasets, 1)],
        methods=tables.methods,
        long=len(tables.methods) > MANY_METHODS,
        corrected=tables.corrected,
        count_plots=list(_count_plots(tables)),
        arms=list(_arms(runs, tables.methods, arms)),
        num_runs=sum(not is_selected(line) for line in runs),
        selected=SELECTED,
        preferred=STANDINGS,
        studies=_distinct(tables.runs, "study"),
        versions=_versions(tables.runs),
        seconds=math.fsum(line.get("seconds") or 0.0 for line in runs),
    )


def _section(dataset: DatasetTable, number: int, tables: Tables, arms: Arms) -> _Section:
    found, moved = findings(dataset), switches(dataset, arms)
    shown = shown_domains(dataset.domains)
    scored = [cell for row in shown for cell in row.cells if cell.difference.num_pairs > 1]
    return _Section(
        anchor=f"dataset-{number}",
        table=dataset,
        findings=found,
        families=families(dataset),
        figures=tuple(_key_figures(dataset, found)),
        num_intervals=len(scored),
        candidates=candidates(dataset.runs),
        standings=standings(dataset),
        model_plot=_model_plot(dataset, moved, tables.methods),
        quality=_quality_plot(dataset, tables.methods),
        switches=moved,
        switch_plots=tuple(_switch_plots(dataset, moved, tables.methods)),
        options=tuple(_option_plots(option_curves(dataset), dataset.name, tables.methods)),
        domains=shown,
        domain_plots=tuple(_domain_plots(dataset, shown, _unmoved(found, moved), tables.methods)),
        curves=tuple(_curve_plots(dataset, tables.methods)),
        parameters=_parameter_plot(dataset),
        made=tuple(_made(dataset)),
    )


def _unmoved(found: Sequence[Finding], moved: Sequence[Switches]) -> tuple[Finding, ...]:
    """Findings of methods that are no switches, whose domains would say little; all where there are no others."""
    apart = {row.method for each in moved if each.chosen for row in each.rows}
    return tuple(finding for finding in found if finding.method not in apart) or tuple(found)


def _key_figures(dataset: DatasetTable, found: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """Name and value of each, for the method that leads."""
    cells = {cell.method: cell for cell in dataset.overall.cells}
    leading = found[0].method if found else ""
    for method in (BASE, leading):
        if method in cells:
            yield f"{method}: WAUC", score_text(cells[method].score)
    if dataset.truth.num_values:
        yield "truth: WAUC", score_text(dataset.truth)
    if leading and dataset.domains:
        yield f"{leading}: domains", domain_counts(dataset.domains, leading)
    shares = [row.adapters / row.total for row in dataset.parameters if leading in row.methods and row.total]
    if shares:
        low, high = percent(min(shares)), percent(max(shares))
        yield f"{leading}: adapters' share of all parameters", low if low == high else f"{low} to {high}"
    yield "runs", f"{_count(len(dataset.models), 'model')}, {_count(len(dataset.seeds), 'seed')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _distinct(runs: Iterable[Line], key: str) -> tuple[str, ...]:
    return tuple(sorted({str(line[key]) for line in runs if line.get(key)}))


# -------------------------------------------------------------------------------------------------------------- plots


def _model_plot(dataset: DatasetTable, moved: Sequence[Switches], methods: Sequence[str]) -> _Plot | None:
    """Models against the base; arms that have a plot of their own are left to it."""
    apart = {method for each in moved for method in (each.reference, *(row.method for row in each.rows))}
    models = [*dataset.models, *([dataset.mean] if dataset.mean else [])]
    rows = [(row.model, [cell for cell in row.cells if cell.method not in apart]) for row in models]
    if not _has_pairs(rows):
        return None
    svg = forest.differences(rows, f"WAUC against the base, {dataset.name}", methods)
    return _Plot(Markup(svg), f"{dataset.name}: difference to the base. {_HOLLOW}")


def _has_pairs(rows: Iterable[tuple[str, Sequence[Cell]]]) -> bool:
    return any(cell.difference.num_pairs for _, cells in rows for cell in cells)


def _quality_plot(dataset: DatasetTable, methods: Sequence[str]) -> _Plot | None:
    marks = quality(dataset)
    if len(marks) < 2:
        return None
    svg = trends.quality_by_size(marks, f"WAUC and parameters, {dataset.name}", methods)
    return _Plot(Markup(svg), "Up and to the left is better. A line joins the methods of one model.")


def _switch_plots(dataset: DatasetTable, moved: Sequence[Switches], methods: Sequence[str]) -> Iterator[_Plot]:
    for each in moved:
        title = f"What each switch moves, {each.model}, {dataset.name}"
        if each.steps:
            caption = (
                f"{each.model}. Each bar goes from the arm before to this one; hollow where its interval holds zero."
            )
            yield _Plot(Markup(forest.switch_steps(each, title)), caption)
        else:
            yield _Plot(Markup(forest.switched(each, title, methods)), f"{each.model}. {_HOLLOW}")


def _option_plots(curves: Sequence[OptionCurve], name: str, methods: Sequence[str]) -> Iterator[_Plot]:
    for option in dict.fromkeys(curve.option for curve in curves):
        own = [curve for curve in curves if curve.option == option]
        over = f"{own[0].model}; thin: single models" if own[0].model == MEAN else own[0].model
        svg = trends.option_curve(own, f"WAUC over {option}, {name}", methods)
        yield _Plot(Markup(svg), f"{option}: difference to the base with its 95 % interval, {over}.")


def _count_plots(tables: Tables) -> Iterator[_Plot]:
    curves = domain_count_curves(tables)
    for family in dict.fromkeys(curve.model for curve in curves):
        own = [curve for curve in curves if curve.model == family]
        svg = trends.option_curve(own, f"WAUC over the number of domains, {family}", tables.methods)
        yield _Plot(Markup(svg), f"{family}: difference to the base over the number of domains. {_HOLLOW}")
        if any(not math.isnan(point.gap_closed.mean) for curve in own for point in curve.points):
            svg = trends.option_curve(own, f"Share of the gap closed, {family}", tables.methods, share=True)
            yield _Plot(Markup(svg), f"{family}: share of the gap between base and truth that is closed.")


def _domain_plots(
    dataset: DatasetTable, shown: Sequence[DomainRow], found: Sequence[Finding], methods: Sequence[str]
) -> Iterator[_Plot]:
    over = dataset.over
    found = [each for each in found if _has_pairs((row.name, _only(row.cells, each.method)) for row in shown)]
    if len(shown) < len(dataset.domains):
        for finding in found[:_MOST_FORESTS]:
            title = f"{finding.method} against the base in all domains, {dataset.name}"
            svg = forest.domain_distribution(dataset.domains, title, finding.method, methods)
            counts = domain_counts(dataset.domains, finding.method)
            yield _Plot(Markup(svg), f"{finding.method} in all domains: {counts}.")
    for finding in found[: _MOST_FORESTS if len(shown) == len(dataset.domains) else 2]:
        title = f"{finding.method} against the base by domain, {dataset.name}"
        svg = forest.domain_differences(shown, finding.difference, title, finding.method, methods)
        yield _Plot(Markup(svg), f"{finding.method}, {over}. Larger markers: more rows. {_HOLLOW}")
    if any(cell.score.num_values for row in shown for cell in row.cells) and len(dataset.methods) <= MANY_METHODS:
        svg = plots.domain_auc(shown, f"AUC by domain, {dataset.name}", methods)
        ranges = ", with the range over seeds" if len(dataset.seeds) > 1 else ""
        yield _Plot(Markup(svg), f"AUC by domain{ranges}, {over}.")


def _only(cells: Sequence[Cell], method: str) -> list[Cell]:
    return [cell for cell in cells if cell.method == method]


def _curve_plots(dataset: DatasetTable, methods: Sequence[str]) -> Iterator[_Plot]:
    for model, curves in dataset.curves.items():
        if any(curve.epochs for curve in curves):
            svg = trends.learning_curves(curves, f"Learning curves of {model}, {dataset.name}", methods)
            yield _Plot(Markup(svg), model)


def _parameter_plot(dataset: DatasetTable) -> _Plot | None:
    if not dataset.parameters:
        return None
    svg = plots.parameter_counts(dataset.parameters, f"Parameters, {dataset.name}")
    return _Plot(Markup(svg), f"Parameters on {dataset.name}, with and without the embedding tables.")


# ---------------------------------------------------------------------------------------------------- how it was made


def _made(dataset: DatasetTable) -> Iterator[tuple[str, tuple[str, ...]]]:
    runs = [line for line in dataset.runs if line["method"] != TRUTH]
    yield "Seeds", tuple(map(str, dataset.seeds))
    yield "Data fingerprint", _distinct(runs, "data_fingerprint")
    for row in dataset.models:
        hashes = _distinct([line for line in runs if line["model"] == row.model], "config_hash")
        yield f"Configuration of {row.model}", hashes


def _arms(runs: Sequence[Line], methods: Sequence[str], arms: Arms) -> Iterator[tuple[str, str, str]]:
    """Name, method behind it and title of every arm that is more than a method by its own name."""
    kinds = {line["method"]: str(line.get("kind") or line["method"]) for line in runs}
    for method in methods:
        if kinds[method] != method or method in arms.titles:
            yield method, kinds[method], arms.titles.get(method, "")


def _versions(runs: Iterable[Line]) -> tuple[str, ...]:
    found = {f"{name} {number}" for line in runs for name, number in (line.get("versions") or {}).items()}
    return tuple(sorted(found))
