"""Plots of studies and datasets, each an SVG to be put into a page: no fixed colours or fonts, the same bytes every time.

Lines and words take ``currentColor`` and the font of the page. A method has its own colour and its own marker, so that
no plot rests on colour alone. The page may set the colours by the CSS variables ``--series-1`` ... ``--series-6``,
``--grid`` and ``--surface``; without them, colours are used that stand out on white and on black.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from domlora.studies.describing.facts import Clicks, DomainFacts
from domlora.studies.describing.facts_text import interval
from domlora.studies.statistics import interval_text, score_text, spread, verdict
from domlora.studies.tables import METHODS, Cell, Curve, DomainRow, ParameterRow

__all__ = [
    "click_rates",
    "click_rates_by_size",
    "differences",
    "domain_auc",
    "learning_curves",
    "parameter_counts",
    "series_number",
]

WIDTH = 400  # in SVG units: small enough to be read on a phone, two beside each other on a desk

# Colours that stand for others: matplotlib wants numbers, the page wants CSS. No other colour is used here.
INK, GRID, SURFACE = "#000001", "#000002", "#000003"
SERIES = tuple(f"#00010{number}" for number in range(1, 7))
_CSS = {
    INK: "currentColor",
    GRID: "var(--grid, #80808055)",
    SURFACE: "var(--surface, #ffffff)",
    SERIES[0]: "var(--series-1, #6f7680)",
    SERIES[1]: "var(--series-2, #c4560a)",
    SERIES[2]: "var(--series-3, #1a73c7)",
    SERIES[3]: "var(--series-4, #9a4fb0)",
    SERIES[4]: "var(--series-5, #0b8577)",
    SERIES[5]: "var(--series-6, #8a7000)",
}
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "domlora",
    "font.size": 11,
    "text.parse_math": False,  # a name is a name, also with dollars in it
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


class _Look(NamedTuple):
    colour: str
    marker: str


def series_number(method: str, methods: Sequence[str]) -> int:
    """The number of a method's colour, 1 to 6: fixed for known methods, by position for others.

    >>> series_number("two_stage", ["base", "two_stage"]), series_number("mine", ["base", "mine"])
    (3, 5)
    """
    if method in METHODS:
        return METHODS.index(method) + 1
    others = [name for name in methods if name not in METHODS]
    return len(METHODS) + 1 + others.index(method) % (len(SERIES) - len(METHODS))


def domain_auc(rows: Sequence[DomainRow], title: str) -> str:
    """AUC by domain: a marker a method at its mean, a line from its least to its greatest seed, a tick at the truth."""
    shown = [row for row in rows if any(cell.score.num_values for cell in row.cells)]
    methods = [cell.method for cell in shown[0].cells] if shown else []
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(len(shown), len(methods))
        for place, row in enumerate(shown):
            for cell, y in zip(row.cells, _lanes(place, len(methods)), strict=True):
                look = _look(cell.method, methods)
                axes.plot([100 * cell.score.low, 100 * cell.score.high], [y, y], color=look.colour, lw=1.6, alpha=0.6)
                axes.plot(100 * cell.score.mean, y, look.marker, color=look.colour, ms=5)
            axes.vlines(100 * row.truth, place - 0.4, place + 0.4, color=INK, lw=1.2, linestyles=(0, (2, 1.5)))
        _names(axes, [row.name for row in shown])
        axes.set_xlabel("AUC in points")
        has_truth = any(not math.isnan(row.truth) for row in shown)
        _legend(figure, methods, [Line2D([], [], color=INK, lw=1.2, ls=(0, (2, 1.5)), label="truth")] * has_truth)
        return _svg(figure, title, "; ".join(map(_domain_words, shown)))


def differences(rows: Sequence[tuple[str, Sequence[Cell]]], title: str, metric: str = "WAUC") -> str:
    """A forest plot: the difference to the base with its 95 % interval, a line a name and method.

    A filled marker is an interval on one side of zero; a hollow one holds zero, or has no interval.

    Args:
        rows: names (of models or domains) and their cells; cells without pairs are left out.
    """
    compared = [(name, [cell for cell in cells if cell.difference.num_pairs]) for name, cells in rows]
    shown = [(name, cells) for name, cells in compared if cells]
    methods = [m for m in dict.fromkeys(c.method for _, cells in rows for c in cells) if _occurs(m, shown)]
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(len(shown), len(methods))
        for place, (_, cells) in enumerate(shown):
            lanes = dict(zip(methods, _lanes(place, len(methods)), strict=True))
            for cell in cells:
                _draw_difference(axes, cell, lanes[cell.method], _look(cell.method, methods))
        axes.axvline(0, color=INK, lw=1, zorder=1.5)
        _names(axes, [name for name, _ in shown])
        axes.set_xlabel(f"{metric} minus base in points, 95 % interval")
        _legend(figure, methods)
        words = [f"{name}: {', '.join(map(_difference_words, cells))}" for name, cells in shown]
        return _svg(figure, title, "; ".join(words))


def learning_curves(curves: Sequence[Curve], title: str) -> str:
    """WAUC on the validation split after each epoch: seeds thin, their mean thick, each seed's best epoch marked.

    The mean ends where the first seed stops, because a mean over fewer and fewer seeds jumps. The axis begins near the
    lowest fifth of all values: a start from chance level would press everything else flat.
    """
    shown = [curve for curve in curves if curve.epochs]
    methods = list(dict.fromkeys(curve.method for curve in shown))
    with mpl.rc_context(_STYLE | {"axes.spines.left": True}):
        figure = _figure(250)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for method in methods:
            look = _look(method, methods)
            seeds = [dict(zip(curve.epochs, curve.wauc, strict=True)) for curve in shown if curve.method == method]
            for points in seeds:
                axes.plot(
                    list(points), [100 * value for value in points.values()], color=look.colour, lw=0.8, alpha=0.5
                )
            common = sorted(set.intersection(*map(set, seeds)))
            mean = [100 * spread(points[epoch] for points in seeds).mean for epoch in common]
            axes.plot(common, mean, color=look.colour, lw=2.2)
        for curve in shown:
            _mark_best(axes, curve, _look(curve.method, methods))
        values = sorted(100 * value for curve in shown for value in curve.wauc)
        if values:
            low, high = values[len(values) // 5], values[-1]
            axes.set_ylim(low - max(0.12 * (high - low), 0.05), high + max(0.08 * (high - low), 0.05))
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation WAUC in points")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure, methods)
        return _svg(figure, title, "; ".join(map(_curve_words, shown)))


def parameter_counts(rows: Sequence[ParameterRow], title: str) -> str:
    """Two panels of bars: all learned numbers, and those without the embedding tables, where adapters can be seen.

    A row without adapters is left out where a row of the same model holds the same numbers and adapters beside them.
    """
    adapted = {(row.model, row.tables, row.dense) for row in rows if row.adapters}
    shown = [row for row in rows if row.adapters or (row.model, row.tables, row.dense) not in adapted]
    names = [f"{row.model}: {', '.join(row.methods)}" for row in shown]
    with mpl.rc_context(_STYLE):
        figure = _figure(2 * (24 + 20 * len(shown)) + 96)
        for axes, kinds in zip(figure.subplots(2, 1), (_KINDS, _KINDS[1:]), strict=True):
            _bars(axes, shown, kinds)
            _names(axes, names, limit=30)
            axes.set_title("all parameters" if kinds == _KINDS else "without embedding tables", loc="left", fontsize=11)
        handles = [Line2D([], [], color=kind.colour, alpha=kind.alpha, lw=7, label=kind.name) for kind in _KINDS]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
        return _svg(figure, title, "; ".join(map(_parameter_words, names, shown)))


def click_rates(domains: Sequence[DomainFacts], total: Clicks, title: str) -> str:
    """Click rate by domain with its 95 % interval, and a dashed line at that of all rows."""
    shown = [domain for domain in domains if domain.total.rows]
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(len(shown), 1)
        low, rate, high = _rates(shown)
        axes.hlines(range(len(shown)), low, high, color=SERIES[2], lw=1.6)
        axes.plot(rate, range(len(shown)), "o", color=SERIES[2], ms=5)
        axes.axvline(100 * (total.rate or 0.0), color=INK, lw=1.2, ls=(0, (2, 1.5)))
        _names(axes, [domain.name for domain in shown])
        axes.set_xlabel("click rate in %, 95 % interval; dashed: all rows")
        return _svg(figure, title, "; ".join(f"{domain.name}: {interval(domain.total)}" for domain in shown))


def click_rates_by_size(domains: Sequence[DomainFacts], total: Clicks, title: str) -> str:
    """The same for many domains: click rates over rows, with the names of the largest, the highest and the lowest."""
    shown = [domain for domain in domains if domain.total.rows]
    with mpl.rc_context(_STYLE | {"axes.spines.left": True}):
        figure = _figure(280)
        axes = figure.add_subplot(xscale="log", xlabel="rows", ylabel="click rate in %, 95 % interval")
        axes.grid()
        rows, (low, rate, high) = [domain.total.rows for domain in shown], _rates(shown)
        axes.vlines(rows, low, high, color=SERIES[2], lw=0.8, alpha=0.4)
        axes.plot(rows, rate, "o", color=SERIES[2], ms=3)
        axes.axhline(100 * (total.rate or 0.0), color=INK, lw=1.2, ls=(0, (2, 1.5)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        for place in {
            key(range(len(shown)), key=by.__getitem__) for key, by in ((max, rows), (max, rate), (min, rate))
        }:
            name = _shortened(shown[place].name)
            axes.annotate(name, (rows[place], rate[place]), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        return _svg(figure, title, f"{len(shown)} domains; all rows: {interval(total)}")


# ------------------------------------------------------------------------------------------------------- the pieces


def _rates(domains: Sequence[DomainFacts]) -> list[list[float]]:
    """Lower ends, rates and upper ends in percent."""
    clicks = [domain.total for domain in domains]
    return [[100 * (getattr(each, name) or 0.0) for each in clicks] for name in ("low", "rate", "high")]


def _look(method: str, methods: Sequence[str]) -> _Look:
    number = series_number(method, methods) - 1
    return _Look(SERIES[number], _MARKERS[number])


def _occurs(method: str, shown: Sequence[tuple[str, Sequence[Cell]]]) -> bool:
    return any(cell.method == method for _, cells in shown for cell in cells)


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
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _canvas(num_rows: int, num_lanes: int) -> tuple[Figure, Axes]:
    """A figure as high as its rows need, with stripes that lead the eye from a name to its markers."""
    row_height = max(22, 9 * num_lanes + 6)
    figure = _figure(72 + row_height * max(num_rows, 1))
    axes = figure.add_subplot()
    for place in range(1, num_rows, 2):
        axes.axhspan(place - 0.5, place + 0.5, color=GRID, alpha=0.35, lw=0)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _lanes(place: int, num: int) -> list[float]:
    """Where the methods of one row stand, from top to bottom."""
    return [place + 0.76 * ((lane + 0.5) / num - 0.5) for lane in range(num)]


def _names(axes: Axes, names: Sequence[str], limit: int = 24) -> None:
    axes.set_yticks(range(len(names)), [_shortened(name, limit) for name in names])
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)


def _shortened(name: str, limit: int = 24) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def _short(count: float) -> str:
    """A count on an axis: 0, 250k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _legend(figure: Figure, methods: Sequence[str], more: Sequence[Line2D] = ()) -> None:
    looks = {method: _look(method, methods) for method in methods}
    handles = [
        Line2D([], [], ls="", marker=k.marker, color=k.colour, ms=6, label=_shortened(m)) for m, k in looks.items()
    ]
    handles += more
    if handles:
        figure.legend(
            handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.2, handletextpad=0.3
        )


def _draw_difference(axes: Axes, cell: Cell, y: float, look: _Look) -> None:
    mean, low, high = (100 * value for value in cell.difference[:3])
    axes.plot([low, high], [y, y], color=look.colour, lw=1.6)
    fill = look.colour if verdict(cell.difference) in ("gain", "loss") else SURFACE
    axes.plot(mean, y, look.marker, color=look.colour, markerfacecolor=fill, markeredgewidth=1.2, ms=5.5)


def _mark_best(axes: Axes, curve: Curve, look: _Look) -> None:
    if curve.best_epoch in curve.epochs:
        best = 100 * curve.wauc[curve.epochs.index(curve.best_epoch)]
        axes.plot(curve.best_epoch, best, look.marker, color=look.colour, markerfacecolor=SURFACE, ms=4.5, zorder=4)


def _domain_words(row: DomainRow) -> str:
    scores = [f"{cell.method} {score_text(cell.score)}" for cell in row.cells]
    truth = [] if math.isnan(row.truth) else [f"truth {100 * row.truth:.2f}"]
    return f"{row.name}: {', '.join(scores + truth)}"


def _difference_words(cell: Cell) -> str:
    return f"{cell.method} {interval_text(cell.difference)}"


def _curve_words(curve: Curve) -> str:
    return f"{curve.method}, seed {curve.seed}: best {100 * max(curve.wauc):.2f} of {len(curve.epochs)} points"


def _parameter_words(name: str, row: ParameterRow) -> str:
    return f"{name}: {row.tables:,} in tables, {row.dense:,} dense, {row.adapters:,} in adapters"


def _svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element with a name and a description, and nothing that a page does not need."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's font has it, or draws a box
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", out.getvalue(), flags=re.DOTALL)
    body = body[body.index("<svg") :]
    head, inner = body.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', head)
    assert view is not None
    mark = "plot-" + hashlib.sha256(f"{title}\0{inner}".encode()).hexdigest()[:10]
    targets = set(re.findall(r"""(?:href="|url\()#([\w-]+)""", inner))
    # Words between tags hold no ">", so this reads tags only and leaves names alone.
    inner = re.sub(r"<[^>]*>", lambda tag: _for_page(tag.group(), mark, targets), inner)
    lines = "\n".join(line.strip() for line in inner.splitlines() if line.strip())
    return (
        f'<svg viewBox="{view[1]}" style="stroke-linejoin: round" role="img" aria-labelledby="{mark}-title {mark}-about">'
        f'<title id="{mark}-title">{escape(title)}</title><desc id="{mark}-about">{escape(description)}</desc>{lines}'
    )


def _for_page(tag: str, mark: str, targets: set[str]) -> str:
    """A tag with the page's colours; ids that are pointed at become unique on a page of many plots, others go."""
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _CSS.get(colour.group(), colour.group()), tag)
    tag = re.sub(r"""(href="|url\()#""", rf"\g<1>#{mark}-", tag.replace("xlink:href", "href"))
    return re.sub(r' id="([^"]*)"', lambda name: f' id="{mark}-{name[1]}"' if name[1] in targets else "", tag)
