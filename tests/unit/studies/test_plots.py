"""Plots are read as XML: what they say, where markers lie, and that they bring nothing into a page but themselves."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from domlora.studies import plots
from domlora.studies.statistics import Interval, Spread, paired, spread
from domlora.studies.tables import Cell, Curve, DomainRow, ParameterRow

HOSTILE = """"><script>alert('$x_1$ & id="a" #000001')</script>"""
NOTHING = paired([])


def cell(method: str, scores: list[float], differences: tuple[float, ...] = ()) -> Cell:
    return Cell(method, spread(scores), paired(differences), NOTHING, 1)


def row(name: str, truth: float = math.nan, rows: int = 100) -> DomainRow:
    cells = (cell("base", [0.70, 0.72]), cell("two_stage", [0.74, 0.78], (0.04, 0.06)))
    return DomainRow(name, rows, 0.2, "scored", truth, cells)


CURVES = (
    Curve("base", 1, (0.0, 1.0, 2.0), (0.5, 0.76, 0.77), 2.0),
    Curve("base", 2, (0.0, 1.0), (0.5, 0.75), 1.0),
    Curve("two_stage", 1, (0.0, 1.0), (0.77, 0.78), 1.0),
)
PARAMETERS = (
    ParameterRow("mlp", ("base",), 100, 60, 0),
    ParameterRow("mlp", ("joint", "two_stage"), 120, 60, 20),
    ParameterRow("star", ("base",), 200, 60, 0),
)


def every_plot(name: str = "app") -> dict[str, str]:
    rows = [row(name, truth=0.8), row("web")]
    curves = [Curve(c.method, c.seed, c.epochs, c.wauc, c.best_epoch) for c in CURVES]
    parameters = [ParameterRow(name, p.methods, p.total, p.tables, p.adapters) for p in PARAMETERS]
    return {
        "domain_auc": plots.domain_auc(rows, name),
        "differences": plots.differences([(r.name, r.cells) for r in rows], name),
        "learning_curves": plots.learning_curves(curves, name),
        "parameter_counts": plots.parameter_counts(parameters, name),
    }


@pytest.fixture(scope="module")
def svgs() -> dict[str, str]:
    return every_plot()


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@pytest.fixture(params=["domain_auc", "differences", "learning_curves", "parameter_counts"])
def svg(request, svgs) -> str:
    return svgs[request.param]


def test_same_bytes_every_time(svgs):
    assert every_plot() == svgs


def test_named_and_described(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    title, description = root.find("title"), root.find("desc")
    assert title is not None
    assert description is not None
    assert title.text == "app"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_nothing_of_the_outside(svg):
    assert not re.search(r"https?:|//|@import|<style|<metadata|<!--|font-family: '?DejaVu Sans'?[;\"]", svg)
    assert set(re.findall(r"\w+:\w+(?==)", svg)) <= {"xml:space"}


def test_colours_are_the_pages(svg):
    outside = re.sub(r"var\(--[\w-]+, #[0-9a-f]+\)", "", svg)
    assert not re.search(r"(fill|stroke): ?#", outside)
    assert "currentColor" in svg


def test_ids_are_used_and_differ_between_plots(svgs):
    page = "".join(svgs.values())
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    pointed = set(re.findall(r'(?:href="|url\()#([\w-]+)', page))
    named = {name for names in re.findall(r'aria-labelledby="([^"]*)"', page) for name in names.split()}
    assert pointed
    assert pointed | named == set(ids)


def test_names_stay_text():
    for kind, svg in every_plot(HOSTILE).items():
        root = ElementTree.fromstring(svg)
        assert root.find(".//script") is None, kind
        title = root.find("title")
        assert title is not None
        assert title.text == HOSTILE
        if kind != "learning_curves":
            assert any(text.startswith("\"><script>alert('$x_1") for text in words(svg)), kind


def test_long_names_are_shortened(svgs):
    text = words(plots.domain_auc([row("x" * 99)], "t"))
    assert "x" * 23 + "\u2026" in text


def test_letters_that_the_font_lacks_are_no_warning(recwarn):
    assert "電子 📱" in words(plots.domain_auc([row("電子 📱")], "t"))
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def uses_of(svg: str, colour: str) -> list[ElementTree.Element]:
    return [use for use in ElementTree.fromstring(svg).iter("use") if colour in (use.get("style") or "")]


def test_a_larger_difference_lies_further_right_and_a_sure_one_is_filled():
    low, high = Interval(0.01, 0.005, 0.015, 3), Interval(0.03, -0.01, 0.07, 3)
    nothing = Spread(math.nan, math.nan, math.nan, math.nan, 0)
    cells = [Cell("joint", nothing, low, NOTHING, 1), Cell("two_stage", nothing, high, NOTHING, 1)]
    svg = plots.differences([("mlp", cells)], "t")
    joint = [float(use.get("x", "nan")) for use in uses_of(svg, "fill: var(--series-2")]
    hollow = [use for use in uses_of(svg, "fill: var(--surface") if "--series-3" in (use.get("style") or "")]
    assert len(hollow) == 1
    assert max(joint) < float(hollow[0].get("x", "nan"))


def test_what_has_no_pair_is_not_in_the_forest():
    text = words(
        plots.differences([("alone", [cell("base", [0.7]), cell("joint", [0.7])]), ("pair", row("x").cells)], "t")
    )
    assert "pair" in text
    assert "alone" not in text
    assert "base" not in text
    assert "joint" not in text


def test_one_seed_has_a_marker_and_no_interval():
    svg = plots.differences([("mlp", [cell("joint", [0.7], (0.01,))])], "t")
    assert len(uses_of(svg, "fill: var(--surface")) == 1
    assert "nan" not in svg.lower()


def test_truth_is_drawn_where_it_is_known(svgs):
    assert "truth" in words(svgs["domain_auc"])
    assert "truth" not in words(plots.domain_auc([row("app")], "t"))


def test_domains_without_auc_are_left_out():
    one_class = DomainRow("lone", 5, 0.0, "one class", math.nan, (cell("base", []), cell("joint", [])))
    text = words(plots.domain_auc([one_class, row("app")], "t"))
    assert "app" in text
    assert "lone" not in text


def test_every_curve_marks_its_best_epoch(svgs):
    best = uses_of(svgs["learning_curves"], "fill: var(--surface")
    assert len(best) == 3


def test_learning_curves_are_not_pressed_flat_by_a_start_from_chance():
    epochs = tuple(map(float, range(9)))
    wauc = (0.5, *[0.77 + 0.001 * epoch for epoch in range(8)])
    svg = plots.learning_curves([Curve("base", seed, epochs, wauc, 8.0) for seed in range(3)], "t")
    ticks = [float(text) for text in words(svg) if re.fullmatch(r"\d\d(\.\d+)?", text)]
    assert 76 < min(ticks) < max(ticks) < 79


def test_parameters_leave_out_a_base_that_is_part_of_its_adapted_rows(svgs):
    text = words(svgs["parameter_counts"])
    assert text.count("app: joint, two_stage") == 2  # one in each panel
    assert text.count("app: base") == 2  # star's numbers, no adapters beside them
    assert "20 in adapters" in svgs["parameter_counts"]


def test_nothing_to_draw_is_an_empty_plot():
    for svg in (plots.domain_auc([], "t"), plots.differences([], "t"), plots.learning_curves([], "t")):
        assert svg.startswith("<svg")


def test_series_are_fixed_for_known_methods_and_in_range_for_all():
    methods = ["base", "a", "b", "c"]
    assert plots.series_number("bias_only", methods) == 4
    assert [plots.series_number(method, methods) for method in methods] == [1, 5, 6, 5]
