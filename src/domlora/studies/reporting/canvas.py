"""What all plots are made with: an SVG to be put into a page, with no fixed colours or fonts, the same bytes every time.

Lines and words take ``currentColor`` and the font of the page. A method has its own colour and its own marker, so that
no plot rests on colour alone. The page may set the colours by the CSS variables ``--series-1`` ... ``--series-8``,
``--grid`` and ``--surface``; without them, colours are used that stand out on white and on black.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import chain, count
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from domlora.studies.reporting.tables import METHODS

__all__ = [
    "GRID",
    "INK",
    "SERIES",
    "SURFACE",
    "WIDTH",
    "Axes",
    "Figure",
    "Look",
    "drawing",
    "figure_of",
    "key_line",
    "lanes",
    "legend",
    "log_axis",
    "looks_of",
    "name_rows",
    "round_ticks",
    "row_axes",
    "series_number",
    "short_count",
    "shortened",
    "svg",
    "value_ticks",
]

WIDTH = 400  # in SVG units: small enough to be read on a phone, two beside each other on a desk

# Colours that stand for others: matplotlib wants numbers, the page wants CSS. No other colour is used in plots.
INK, GRID, SURFACE = "#000001", "#000002", "#000003"
SERIES = tuple(f"#00010{number}" for number in range(1, 9))
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
    SERIES[6]: "var(--series-7, #c43d6b)",
    SERIES[7]: "var(--series-8, #5b5fc7)",
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "<", ">", "h")
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
_LETTER = 6.2  # width of a letter at this size, on average: legends are broken into lines by it


class Look(NamedTuple):
    """What a method looks like in every plot of a page: the number of its colour (from 1) and its marker."""

    number: int
    marker: str

    @property
    def colour(self) -> str:
        """The colour that stands for the page's."""
        return SERIES[self.number - 1]


def looks_of(methods: Sequence[str]) -> dict[str, Look]:
    """A look a method: fixed for known methods, for others what is free in their order; the base's grey is its own.

    With more methods than colours, colours come again with other markers.

    >>> {name: look.number for name, look in looks_of(["base", "two_stage", "mine", "yours"]).items()}
    {'base': 1, 'two_stage': 3, 'mine': 2, 'yours': 4}
    """
    fixed = {method: METHODS.index(method) + 1 for method in methods if method in METHODS}
    others = [method for method in dict.fromkeys(methods) if method not in METHODS]
    numbers = range(2, len(SERIES) + 1)
    first = ((number, 0) for number in numbers if number not in fixed.values())
    again = ((number, times) for times in count(1) for number in numbers)
    found = {method: Look(number, _MARKERS[number - 1]) for method, number in fixed.items()}
    for method, (number, times) in zip(others, chain(first, again), strict=False):
        found[method] = Look(number, _MARKERS[(number - 1 + 4 * times) % len(_MARKERS)])
    return {method: found[method] for method in dict.fromkeys(methods)}


def series_number(method: str, methods: Sequence[str]) -> int:
    """The number of a method's colour among the methods of a page."""
    return looks_of(methods)[method].number


@contextmanager
def drawing(*, left: bool = False) -> Iterator[None]:
    """The style of all plots; ``left`` draws the line of the y axis."""
    with mpl.rc_context(_STYLE | {"axes.spines.left": left}):
        yield


def figure_of(height: float) -> Figure:
    """An empty figure of the common width."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def row_axes(figure: Figure, num_rows: int, place: int = 111) -> Axes:
    """Axes for one row a name, with stripes that lead the eye from a name to its markers."""
    axes = figure.add_subplot(place)
    for row in range(1, num_rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color=GRID, alpha=0.35, lw=0)
    axes.grid(axis="x")
    round_ticks(axes.xaxis)
    return axes


def lanes(place: int, num: int) -> list[float]:
    """Where the methods of one row stand, from top to bottom."""
    return [place + 0.76 * ((lane + 0.5) / num - 0.5) for lane in range(num)]


def name_rows(axes: Axes, names: Sequence[str], limit: int = 24, lines: int = 1) -> None:
    """Names at the left of rows, the first on top; long ones on several lines where that is allowed, else shortened."""
    shown = [shortened(name, limit * lines) for name in names]
    axes.set_yticks(range(len(names)), ["\n".join(wrap(name, limit)) if lines > 1 else name for name in shown])
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)


def round_ticks(axis: Axis, num: int = 6, *, integer: bool = False) -> None:
    """A few round numbers."""
    axis.set_major_locator(MaxNLocator(num, integer=integer))


def log_axis(axis: Axis) -> None:
    """Counts at 1, 2 and 5 times powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short_count(value))


def value_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """A tick at each of these values and nowhere else."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: text(value))


def shortened(name: str, limit: int = 24) -> str:
    """A name on one line that ends in an ellipsis where it is too long."""
    flat = " ".join(name.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def short_count(count: float) -> str:
    """A count on an axis.

    >>> short_count(0), short_count(250_000), short_count(1_500_000)
    ('0', '250k', '1.5M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def key_line(label: str, colour: str, **more: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=colour, label=shortened(label), **more)


def legend(figure: Figure, looks: Mapping[str, Look], more: Iterable[Line2D] = ()) -> None:
    """Names above the plot, as many a line as have room."""
    entries = [key_line(method, look.colour, ls="", marker=look.marker, ms=6) for method, look in looks.items()]
    entries += more
    if not entries:
        return
    widths = [len(str(entry.get_label())) * _LETTER + 40 for entry in entries]
    one_line = sum(widths) <= WIDTH - 10
    columns = len(entries) if one_line else max(1, int((WIDTH - 10) / max(widths)))
    figure.legend(handles=entries, loc="outside upper left", ncols=columns, columnspacing=1.2, handletextpad=0.3)


def svg(figure: Figure, title: str, description: str) -> str:
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
