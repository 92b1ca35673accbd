"""Plots of differences with their intervals: by model, by domain, by arm.

A marker is filled only where its interval excludes zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from domlora.studies.reporting.arms import Switch, Switches
from domlora.studies.reporting.canvas import (
    GRID,
    INK,
    SERIES,
    SURFACE,
    Axes,
    Look,
    drawing,
    figure_of,
    lanes,
    legend,
    log_axis,
    looks_of,
    name_rows,
    round_ticks,
    row_axes,
    short_count,
    svg,
)
from domlora.studies.reporting.cells import Cell
from domlora.studies.reporting.statistics import Interval, interval_text, verdict
from domlora.studies.reporting.tables import DomainRow

__all__ = ["differences", "domain_differences", "domain_distribution", "switch_steps", "switched"]


def differences(
    rows: Sequence[tuple[str, Sequence[Cell]]], title: str, methods: Sequence[str], metric: str = "WAUC"
) -> str:
    """The difference of every method to the base, a line a name and method.

    Args:
        rows: names (of models or domains) and their cells; cells without pairs are left out.
        methods: of the page, which decide on the looks.
    """
    compared = [(name, [cell for cell in cells if cell.difference.num_pairs]) for name, cells in rows]
    shown = [(name, cells) for name, cells in compared if cells]
    present = dict.fromkeys(cell.method for _, cells in shown for cell in cells)
    looks = {method: look for method, look in looks_of(methods).items() if method in present}
    with drawing():
        figure = figure_of(84 + max(22, 9 * len(looks) + 6) * max(len(shown), 1))
        axes = row_axes(figure, len(shown))
        for place, (_, cells) in enumerate(shown):
            heights = dict(zip(looks, lanes(place, len(looks)), strict=True))
            for cell in cells:
                _draw(axes, cell.difference, heights[cell.method], looks[cell.method])
        _finish(axes, [name for name, _ in shown], f"{metric} minus base in points, 95 % interval")
        legend(figure, looks)
        words = [
            f"{name}: {', '.join(f'{c.method} {interval_text(c.difference)}' for c in cells)}" for name, cells in shown
        ]
        return svg(figure, title, "; ".join(words))


def domain_differences(
    rows: Sequence[DomainRow], overall: Interval, title: str, method: str, methods: Sequence[str]
) -> str:
    """One method by domain: rows largest first, markers as large as their domains, at the bottom the weighted mean.

    Args:
        overall: the difference in WAUC, which weighs domains by their rows.
    """
    shown = [(row, found) for row in rows if (found := _difference(row, method)).num_pairs]
    most = max((row.rows for row, _ in shown), default=1)
    look = looks_of(methods)[method]
    with drawing():
        figure = figure_of(72 + 20 * (len(shown) + 1))
        axes = row_axes(figure, len(shown) + 1)
        for place, (row, found) in enumerate(shown):
            _draw(axes, found, place, Look(look.number, "o"), size=3 + 8 * math.sqrt(row.rows / most))
        _draw(axes, overall, len(shown), Look(1, "D"), size=7, colour=INK)
        axes.axhline(len(shown) - 0.5, color=INK, lw=0.6)
        names = [f"{row.name} \u00b7 {short_count(row.rows)}" for row, _ in shown]
        _finish(axes, [*names, "all, by rows"], f"AUC of {method} minus base in points, 95 % interval", limit=30)
        words = [f"{row.name}, {row.rows:,} rows: {interval_text(found)}" for row, found in shown]
        return svg(figure, title, "; ".join([*words, f"all, weighted by rows: {interval_text(overall)}"]))


def domain_distribution(rows: Sequence[DomainRow], title: str, method: str, methods: Sequence[str]) -> str:
    """One method over many domains: how many gain how much, and the difference over the rows of a domain.

    Bars and markers are filled where an interval excludes zero.
    """
    shown = [(row, found) for row in rows if (found := _difference(row, method)).num_pairs]
    values = [100 * found.mean for _, found in shown]
    sure = [verdict(found) in ("gain", "loss") for _, found in shown]
    look = looks_of(methods)[method]
    with drawing(left=True):
        figure = figure_of(400)
        bars, cloud = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2, 3]})
        _histogram(bars, values, sure, look)
        _cloud(cloud, [row.rows for row, _ in shown], values, sure, look)
        for axes in (bars, cloud):
            axes.axvline(0, color=INK, lw=1, zorder=1.5)
        cloud.set_xlabel(f"AUC of {method} minus base in points")
        counts = Counter(verdict(found) for _, found in shown)
        return svg(figure, title, ", ".join(f"{word} in {number} domains" for word, number in counts.items()))


def switched(found: Switches, title: str, methods: Sequence[str]) -> str:
    """Every arm against the reference, a row an arm."""
    shown = [row for row in found.rows if row.difference.num_pairs]
    looks = looks_of(methods)
    with drawing():
        figure = figure_of(64 + 30 * len(shown))
        axes = row_axes(figure, len(shown))
        for place, row in enumerate(shown):
            _draw(axes, row.difference, place, looks[row.method])
        _finish(axes, [row.title for row in shown], f"WAUC minus {found.reference} in points, 95 % interval", lines=2)
        return svg(figure, title, "; ".join(f"{row.title}: {interval_text(row.difference)}" for row in shown))


def switch_steps(found: Switches, title: str) -> str:
    """A waterfall: each bar goes from the arm before to this one, with the interval of that step at its end."""
    shown = [row for row in found.rows if row.step.num_pairs]
    with drawing():
        figure = figure_of(72 + 32 * (len(shown) + 1))
        axes = row_axes(figure, len(shown) + 1)
        axes.plot(0, 0, "D", color=INK, ms=6)
        start = 0.0
        for place, row in enumerate(shown, 1):
            start = _bar(axes, row, place, start)
        names = [found.reference_title, *(row.title for row in shown)]
        _finish(axes, names, f"WAUC minus {found.reference} in points, 95 % interval of the step", lines=2)
        axes.margins(x=0.12)
        return svg(figure, title, "; ".join(f"{row.title}: {interval_text(row.step)}" for row in shown))


# ------------------------------------------------------------------------------------------------------- the pieces


def _difference(row: DomainRow, method: str) -> Interval:
    return next(cell.difference for cell in row.cells if cell.method == method)


def _draw(axes: Axes, found: Interval, y: float, look: Look, *, size: float = 5.5, colour: str = "") -> None:
    mean, low, high = (100 * value for value in found[:3])
    ink = colour or look.colour
    axes.plot([low, high], [y, y], color=ink, lw=1.6)
    fill = ink if verdict(found) in ("gain", "loss") else SURFACE
    axes.plot(mean, y, look.marker, color=ink, markerfacecolor=fill, markeredgewidth=1.2, ms=size)


def _finish(axes: Axes, names: Sequence[str], label: str, *, limit: int = 24, lines: int = 1) -> None:
    axes.axvline(0, color=INK, lw=1, zorder=1.5)
    name_rows(axes, names, limit, lines)
    axes.set_xlabel(label, loc="right")  # long ones run out under the names


def _histogram(axes: Axes, values: Sequence[float], sure: Sequence[bool], look: Look) -> None:
    if not values:
        return
    split = [[v for v, known in zip(values, sure, strict=True) if known is wanted] for wanted in (True, False)]
    axes.hist(
        split,
        bins=_edges(values),
        stacked=True,
        color=[look.colour, GRID],
        edgecolor=look.colour,
        linewidth=0.6,
    )
    axes.set_ylabel("domains")
    round_ticks(axes.yaxis, 4, integer=True)


def _edges(values: Sequence[float]) -> list[float]:
    """Even bins with zero at an edge, so that no bin mixes gains and losses."""
    width = max((max(values) - min(values)) / 30, 1e-6)
    first, last = math.floor(min(values) / width), math.ceil(max(values) / width)
    return [place * width for place in range(first, max(last, first + 1) + 1)]


def _cloud(axes: Axes, rows: Sequence[int], values: Sequence[float], sure: Sequence[bool], look: Look) -> None:
    axes.set_yscale("log")
    for wanted, fill, alpha in ((False, "none", 0.5), (True, look.colour, 0.8)):
        kept = [place for place, known in enumerate(sure) if known is wanted and rows[place] > 0]
        x, y = [values[place] for place in kept], [rows[place] for place in kept]
        axes.plot(x, y, "o", color=look.colour, markerfacecolor=fill, alpha=alpha, ms=3.5, markeredgewidth=0.8)
    log_axis(axes.yaxis)
    axes.grid()
    axes.set_ylabel("rows")


def _bar(axes: Axes, row: Switch, place: int, start: float) -> float:
    """Draw one step and tell where it ends."""
    mean, low, high = (100 * value for value in row.step[:3])
    end = start + mean
    colour = SERIES[2] if mean >= 0 else SERIES[1]
    sure = verdict(row.step) in ("gain", "loss")
    axes.barh(place, mean, left=start, height=0.5, color=colour if sure else SURFACE, edgecolor=colour, linewidth=1.2)
    axes.plot([start + low, start + high], [place, place], color=INK, lw=1.4)
    axes.plot([end, end], [place - 0.25, place + 1.25], color=INK, lw=0.6, ls=(0, (2, 2)))
    return end
