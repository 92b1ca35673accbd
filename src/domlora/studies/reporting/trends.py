"""Plots over an axis of numbers: learning curves, WAUC over an option, WAUC over the number of parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from domlora.studies.reporting.arms import Mark, OptionCurve, Point
from domlora.studies.reporting.canvas import (
    INK,
    SURFACE,
    Axes,
    Look,
    drawing,
    figure_of,
    legend,
    log_axis,
    looks_of,
    round_ticks,
    shortened,
    svg,
    value_ticks,
)
from domlora.studies.reporting.statistics import Interval, interval_text, spread, verdict
from domlora.studies.reporting.tables import MEAN, Curve

__all__ = ["learning_curves", "option_curve", "quality_by_size"]

_MANY_CURVES = 24
_WIDE = 8  # values whose largest is this many times the smallest are drawn on a log axis


def learning_curves(curves: Sequence[Curve], title: str, methods: Sequence[str]) -> str:
    """WAUC on the validation split after each epoch: seeds thin, their mean thick, each seed's best epoch marked.

    The mean ends where the first seed stops, because a mean over fewer and fewer seeds jumps. The axis begins near the
    lowest fifth of all values: a start from chance level would press everything else flat. Of very many runs only the
    means are drawn.
    """
    shown = [curve for curve in curves if curve.epochs]
    present = {curve.method for curve in shown}
    looks = {method: look for method, look in looks_of(methods).items() if method in present}
    with drawing(left=True):
        figure = figure_of(250 + 14 * (len(looks) // 4))
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for method, look in looks.items():
            _seeds_and_mean(axes, [curve for curve in shown if curve.method == method], look, len(shown))
        _cut_low(axes, [100 * value for curve in shown for value in curve.wauc])
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation WAUC in points")
        round_ticks(axes.xaxis, integer=True)
        legend(figure, looks)
        return svg(figure, title, "; ".join(map(_curve_words, shown)))


def option_curve(curves: Sequence[OptionCurve], title: str, methods: Sequence[str], *, share: bool = False) -> str:
    """The difference to the base over the values of an option, a line a kind; single models thin behind their mean.

    Args:
        curves: of one option; those of the mean over models (or of the only model) carry intervals and the legend.
        share: draw the share of the gap to the truth instead.
    """
    leading = list(_leading(curves))
    all_looks = looks_of(list(dict.fromkeys([*methods, *(curve.kind for curve in curves)])))
    looks = {curve.kind: all_looks[curve.kind] for curve in leading}
    values = sorted({point.value for curve in curves for point in curve.points})
    with drawing(left=True):
        figure = figure_of(280)
        axes = figure.add_subplot()
        axes.grid(axis="y")
        if values and values[0] > 0 and values[-1] / values[0] >= _WIDE:
            axes.set_xscale("log")
        for curve in curves:
            _thin(axes, curve, all_looks[curve.kind], share) if curve not in leading else None
        for curve in leading:
            _with_intervals(axes, curve, looks[curve.kind], share)
        axes.axhline(0, color=INK, lw=1, zorder=1.5)
        value_ticks(axes.xaxis, values, lambda value: f"{value:g}")
        axes.set_xlabel(shortened(curves[0].option, 60) if curves else "")
        axes.set_ylabel("share of the gap closed, %" if share else "WAUC minus base in points")
        legend(figure, looks)
        return svg(figure, title, "; ".join(_option_words(curve, share) for curve in leading))


def quality_by_size(marks: Sequence[Mark], title: str, methods: Sequence[str]) -> str:
    """WAUC over learned numbers outside the tables, a mark a model and method; a model's marks are joined and named."""
    present = {mark.method for mark in marks}
    looks = {method: look for method, look in looks_of(methods).items() if method in present}
    by_model: dict[str, list[Mark]] = {}
    for mark in sorted(marks, key=lambda mark: mark.parameters):
        by_model.setdefault(mark.model, []).append(mark)
    with drawing(left=True):
        figure = figure_of(max(300, 120 + 15 * len(by_model)))
        axes = figure.add_subplot(xscale="log")
        axes.grid()
        for own in by_model.values():
            axes.plot([m.parameters for m in own], [100 * m.score.mean for m in own], color=INK, lw=0.6, alpha=0.35)
        for mark in marks:
            _draw_mark(axes, mark, looks[mark.method])
        _name_models(axes, {model: own[-1] for model, own in by_model.items()})
        log_axis(axes.xaxis)
        axes.set_xlabel("parameters outside the embedding tables")
        axes.set_ylabel("test WAUC in points")
        legend(figure, looks)
        return svg(figure, title, "; ".join(map(_mark_words, marks)))


# --------------------------------------------------------------------------------------------------- learning curves


def _seeds_and_mean(axes: Axes, curves: Sequence[Curve], look: Look, num_curves: int) -> None:
    seeds = [dict(zip(curve.epochs, curve.wauc, strict=True)) for curve in curves]
    for points in seeds if num_curves <= _MANY_CURVES else ():
        axes.plot(list(points), [100 * value for value in points.values()], color=look.colour, lw=0.8, alpha=0.5)
    common = sorted(set.intersection(*map(set, seeds)))
    mean = [100 * spread(points[epoch] for points in seeds).mean for epoch in common]
    axes.plot(common, mean, color=look.colour, lw=2.2)
    for curve in curves:
        _mark_best(axes, curve, look)


def _mark_best(axes: Axes, curve: Curve, look: Look) -> None:
    if curve.best_epoch in curve.epochs:
        best = 100 * curve.wauc[curve.epochs.index(curve.best_epoch)]
        axes.plot(curve.best_epoch, best, look.marker, color=look.colour, markerfacecolor=SURFACE, ms=4.5, zorder=4)


def _cut_low(axes: Axes, values: Sequence[float]) -> None:
    if values:
        ranked = sorted(values)
        low, high = ranked[len(ranked) // 5], ranked[-1]
        axes.set_ylim(low - max(0.12 * (high - low), 0.05), high + max(0.08 * (high - low), 0.05))


def _curve_words(curve: Curve) -> str:
    return f"{curve.method}, seed {curve.seed}: best {100 * max(curve.wauc):.2f} of {len(curve.epochs)} points"


# ----------------------------------------------------------------------------------------------------- option curves


def _leading(curves: Sequence[OptionCurve]) -> Iterator[OptionCurve]:
    """Of each kind the mean over models, or the first curve."""
    for kind in dict.fromkeys(curve.kind for curve in curves):
        own = [curve for curve in curves if curve.kind == kind]
        yield next((curve for curve in own if curve.model == MEAN), own[0])


def _interval(point: Point, share: bool) -> Interval:
    return point.gap_closed if share else point.difference


def _thin(axes: Axes, curve: OptionCurve, look: Look, share: bool) -> None:
    means = [100 * _interval(point, share).mean for point in curve.points]
    axes.plot([point.value for point in curve.points], means, color=look.colour, lw=0.8, alpha=0.4)


def _with_intervals(axes: Axes, curve: OptionCurve, look: Look, share: bool) -> None:
    found = [_interval(point, share) for point in curve.points]
    values = [point.value for point in curve.points]
    axes.plot(values, [100 * each.mean for each in found], color=look.colour, lw=1.8)
    for value, each in zip(values, found, strict=True):
        axes.plot([value, value], [100 * each.low, 100 * each.high], color=look.colour, lw=1.4)
        fill = look.colour if verdict(each) in ("gain", "loss") else SURFACE
        axes.plot(value, 100 * each.mean, look.marker, color=look.colour, markerfacecolor=fill, ms=6)


def _option_words(curve: OptionCurve, share: bool) -> str:
    points = [f"{point.value:g}: {interval_text(_interval(point, share))}" for point in curve.points]
    return f"{curve.kind}, {curve.model}: {', '.join(points)}"


# ------------------------------------------------------------------------------------------------- quality over size


def _draw_mark(axes: Axes, mark: Mark, look: Look) -> None:
    mean, low, high = (100 * value for value in mark.score[:3])
    axes.plot([mark.parameters] * 2, [low, high], color=look.colour, lw=1.2, alpha=0.7)
    axes.plot(mark.parameters, mean, look.marker, color=look.colour, ms=6)


def _name_models(axes: Axes, last: Mapping[str, Mark]) -> None:
    """Names at the right, pushed apart where marks are close, each with a thin line to its mark."""
    low, high = axes.get_ylim()
    gap = (high - low) / max(14, len(last))
    placed = _apart({model: 100 * mark.score.mean for model, mark in last.items()}, gap)
    for model, y in placed.items():
        mark = last[model]
        axes.annotate(
            shortened(model, 16),
            xy=(mark.parameters, 100 * mark.score.mean),
            xytext=(1.03, y),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.4, "alpha": 0.4, "shrinkB": 4},
        )
    axes.set_ylim(min([low, *placed.values()]) - gap / 2, max([high, *placed.values()]) + gap / 2)


def _apart(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights at least ``gap`` apart, close to the wanted ones: upwards from the lowest, then all moved down by half."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name, height in sorted(wanted.items(), key=lambda item: item[1]):
        last = placed[name] = max(height, last + gap)
    shift = sum(placed[name] - wanted[name] for name in placed) / max(len(placed), 1)
    return {name: height - shift for name, height in placed.items()}


def _mark_words(mark: Mark) -> str:
    return f"{mark.model}, {mark.method}: {mark.parameters:,} parameters, {100 * mark.score.mean:.2f}"
