"""Plots of single tables: scores by domain, counts of parameters, click rates of a dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from domlora.studies.describing.facts import Clicks, DomainFacts
from domlora.studies.describing.facts_text import interval
from domlora.studies.reporting.canvas import (
    INK,
    SERIES,
    Axes,
    drawing,
    figure_of,
    key_line,
    lanes,
    legend,
    log_axis,
    looks_of,
    name_rows,
    round_ticks,
    row_axes,
    short_count,
    shortened,
    svg,
)
from domlora.studies.reporting.statistics import score_text
from domlora.studies.reporting.tables import DomainRow, ParameterRow

__all__ = ["click_rates", "click_rates_by_size", "domain_auc", "parameter_counts"]

_DASHED = (0, (2, 1.5))


def domain_auc(rows: Sequence[DomainRow], title: str, methods: Sequence[str]) -> str:
    """AUC by domain: a marker a method at its mean, a line from its least to its greatest seed, a tick at the truth.

    Args:
        methods: of the page, which decide on the looks.
    """
    shown = [row for row in rows if any(cell.score.num_values for cell in row.cells)]
    looks = {cell.method: looks_of(methods)[cell.method] for cell in (shown[0].cells if shown else ())}
    with drawing():
        figure = figure_of(84 + max(22, 9 * len(looks) + 6) * max(len(shown), 1))
        axes = row_axes(figure, len(shown))
        for place, row in enumerate(shown):
            for cell, y in zip(row.cells, lanes(place, len(looks)), strict=True):
                look = looks[cell.method]
                axes.plot([100 * cell.score.low, 100 * cell.score.high], [y, y], color=look.colour, lw=1.6, alpha=0.6)
                axes.plot(100 * cell.score.mean, y, look.marker, color=look.colour, ms=5)
            axes.vlines(100 * row.truth, place - 0.4, place + 0.4, color=INK, lw=1.2, linestyles=_DASHED)
        name_rows(axes, [row.name for row in shown])
        axes.set_xlabel("AUC in points")
        has_truth = any(not math.isnan(row.truth) for row in shown)
        legend(figure, looks, [key_line("truth", INK, lw=1.2, ls=_DASHED)] * has_truth)
        return svg(figure, title, "; ".join(map(_domain_words, shown)))


def parameter_counts(rows: Sequence[ParameterRow], title: str) -> str:
    """Two panels of bars: all learned numbers, and those without the embedding tables, where adapters can be seen.

    A row without adapters is left out where a row of the same model holds the same numbers and adapters beside them.
    """
    adapted = {(row.model, row.tables, row.dense) for row in rows if row.adapters}
    shown = [row for row in rows if row.adapters or (row.model, row.tables, row.dense) not in adapted]
    names = [f"{row.model}: {', '.join(row.methods)}" for row in shown]
    with drawing():
        figure = figure_of(2 * (24 + 20 * len(shown)) + 96)
        for axes, kinds in zip(figure.subplots(2, 1), (_KINDS, _KINDS[1:]), strict=True):
            _bars(axes, shown, kinds)
            name_rows(axes, names, limit=30)
            axes.set_title("all parameters" if kinds == _KINDS else "without embedding tables", loc="left", fontsize=11)
        handles = [key_line(kind.name, kind.colour, alpha=kind.alpha, lw=7) for kind in _KINDS]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        return svg(figure, title, "; ".join(map(_parameter_words, names, shown)))


def click_rates(domains: Sequence[DomainFacts], total: Clicks, title: str) -> str:
    """Click rate by domain with its 95 % interval, and a dashed line at that of all rows."""
    shown = [domain for domain in domains if domain.total.rows]
    with drawing():
        figure = figure_of(72 + 22 * max(len(shown), 1))
        axes = row_axes(figure, len(shown))
        low, rate, high = _rates(shown)
        axes.hlines(range(len(shown)), low, high, color=SERIES[2], lw=1.6)
        axes.plot(rate, range(len(shown)), "o", color=SERIES[2], ms=5)
        axes.axvline(100 * (total.rate or 0.0), color=INK, lw=1.2, ls=_DASHED)
        name_rows(axes, [domain.name for domain in shown])
        axes.set_xlabel("click rate in %, 95 % interval; dashed: all rows")
        return svg(figure, title, "; ".join(f"{domain.name}: {interval(domain.total)}" for domain in shown))


def click_rates_by_size(domains: Sequence[DomainFacts], total: Clicks, title: str) -> str:
    """The same for many domains: click rates over rows, with the names of the largest, the highest and the lowest."""
    shown = [domain for domain in domains if domain.total.rows]
    with drawing(left=True):
        figure = figure_of(280)
        axes = figure.add_subplot(xscale="log", xlabel="rows", ylabel="click rate in %, 95 % interval")
        axes.grid()
        rows, (low, rate, high) = [domain.total.rows for domain in shown], _rates(shown)
        axes.vlines(rows, low, high, color=SERIES[2], lw=0.8, alpha=0.4)
        axes.plot(rows, rate, "o", color=SERIES[2], ms=3)
        axes.axhline(100 * (total.rate or 0.0), color=INK, lw=1.2, ls=_DASHED)
        log_axis(axes.xaxis)
        for place in {
            key(range(len(shown)), key=by.__getitem__) for key, by in ((max, rows), (max, rate), (min, rate))
        }:
            name = shortened(shown[place].name)
            axes.annotate(name, (rows[place], rate[place]), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        return svg(figure, title, f"{len(shown)} domains; all rows: {interval(total)}")


# ------------------------------------------------------------------------------------------------------- the pieces


def _rates(domains: Sequence[DomainFacts]) -> list[list[float]]:
    """Lower ends, rates and upper ends in percent."""
    clicks = [domain.total for domain in domains]
    return [[100 * (getattr(each, name) or 0.0) for each in clicks] for name in ("low", "rate", "high")]


class _Kind(NamedTuple):
    name: str
    colour: str
    alpha: float


_KINDS = (_Kind("tables", SERIES[0], 0.45), _Kind("dense", SERIES[0], 1.0), _Kind("adapters", SERIES[2], 1.0))


def _bars(axes: Axes, rows: Sequence[ParameterRow], kinds: Sequence[_Kind]) -> None:
    start = [0] * len(rows)
    for kind in kinds:
        counts = [int(getattr(row, kind.name)) for row in rows]
        axes.barh(range(len(rows)), counts, left=start, height=0.66, color=kind.colour, alpha=kind.alpha)
        start = [left + count for left, count in zip(start, counts, strict=True)]
    axes.grid(axis="x")
    round_ticks(axes.xaxis, 5)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))


def _domain_words(row: DomainRow) -> str:
    scores = [f"{cell.method} {score_text(cell.score)}" for cell in row.cells]
    truth = [] if math.isnan(row.truth) else [f"truth {100 * row.truth:.2f}"]
    return f"{row.name}: {', '.join(scores + truth)}"


def _parameter_words(name: str, row: ParameterRow) -> str:
    return f"{name}: {row.tables:,} in tables, {row.dense:,} dense, {row.adapters:,} in adapters"
