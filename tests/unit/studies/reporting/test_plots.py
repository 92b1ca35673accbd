"""Plots are read as XML: what they say, where markers lie, and that they bring nothing into a page but themselves."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.studies.reporting import forest, plots, trends
from domlora.studies.reporting.arms import Mark, OptionCurve, Point, Switch, Switches
from domlora.studies.reporting.canvas import looks_of, series_number
from domlora.studies.reporting.cells import Cell
from domlora.studies.reporting.statistics import Interval, Spread, paired, spread
from domlora.studies.reporting.tables import MEAN, Curve, DomainRow, ParameterRow

HOSTILE = """"><script>alert('$x_1$ & id="a" #000001')</script>"""
NOTHING = paired([])
METHODS = ("base", "joint", "two_stage")
SURE, UNSURE = Interval(0.01, 0.005, 0.015, 3), Interval(0.03, -0.01, 0.07, 3)


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


def option_curves(option: str = "adapter.temperature") -> list[OptionCurve]:
    points = tuple(
        Point(value, f"t{value:g}", spread([0.7]), Interval(mean, mean - 0.001, mean + 0.001, 3), NOTHING)
        for value, mean in ((4.0, 0.01), (16.0, 0.02), (256.0, 0.03))
    )
    return [OptionCurve(option, "two_stage", MEAN, points), OptionCurve(option, "two_stage", "mlp", points)]


def switch_rows(name: str = "+ one", *, steps: bool = True) -> Switches:
    step = SURE if steps else NOTHING
    rows = (Switch("a", name, spread([0.7]), SURE, step), Switch("b", "+ two", spread([0.7]), UNSURE, step))
    return Switches("mlp", "base", "base", spread([0.7]), steps, True, rows)


def every_plot(name: str = "app") -> dict[str, str]:
    rows = [row(name, truth=0.8), row("web")]
    many = [row(f"{name}{number}", rows=10 + number) for number in range(50)]
    curves = [Curve(c.method, c.seed, c.epochs, c.wauc, c.best_epoch) for c in CURVES]
    parameters = [ParameterRow(name, p.methods, p.total, p.tables, p.adapters) for p in PARAMETERS]
    marks = [Mark(name, method, 100 + place, SURE) for place, method in enumerate(METHODS)]
    return {
        "domain_auc": plots.domain_auc(rows, name, METHODS),
        "differences": forest.differences([(r.name, r.cells) for r in rows], name, METHODS),
        "domain_differences": forest.domain_differences(rows, SURE, name, "two_stage", METHODS),
        "domain_distribution": forest.domain_distribution(many, name, "two_stage", METHODS),
        "switched": forest.switched(switch_rows(name), name, [*METHODS, "a", "b"]),
        "switch_steps": forest.switch_steps(switch_rows(name), name),
        "learning_curves": trends.learning_curves(curves, name, METHODS),
        "option_curve": trends.option_curve(option_curves(name), name, METHODS),
        "quality_by_size": trends.quality_by_size(marks, name, METHODS),
        "parameter_counts": plots.parameter_counts(parameters, name),
    }


UNNAMED = ("learning_curves", "domain_distribution")  # no name of a row stands in these


@pytest.fixture(scope="module")
def svgs() -> dict[str, str]:
    return every_plot()


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


@pytest.fixture(
    params=[
        *("domain_auc", "differences", "domain_differences", "domain_distribution", "switched", "switch_steps"),
        *("learning_curves", "option_curve", "quality_by_size", "parameter_counts"),
    ]
)
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
        if kind not in UNNAMED:
            shown = " ".join(words(svg))
            assert '"><script>al' in shown, kind


def test_long_names_are_shortened(svgs):
    text = words(plots.domain_auc([row("x" * 99)], "t", METHODS))
    assert "x" * 23 + "\u2026" in text


def test_letters_that_the_font_lacks_are_no_warning(recwarn):
    assert "電子 📱" in words(plots.domain_auc([row("電子 📱")], "t", METHODS))
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def uses_of(svg: str, colour: str) -> list[ElementTree.Element]:
    return [use for use in ElementTree.fromstring(svg).iter("use") if colour in (use.get("style") or "")]


def test_a_larger_difference_lies_further_right_and_a_sure_one_is_filled():
    nothing = Spread(math.nan, math.nan, math.nan, math.nan, 0)
    cells = [Cell("joint", nothing, SURE, NOTHING, 1), Cell("two_stage", nothing, UNSURE, NOTHING, 1)]
    svg = forest.differences([("mlp", cells)], "t", METHODS)
    joint = [float(use.get("x", "nan")) for use in uses_of(svg, "fill: var(--series-2")]
    hollow = [use for use in uses_of(svg, "fill: var(--surface") if "--series-3" in (use.get("style") or "")]
    assert len(hollow) == 1
    assert max(joint) < float(hollow[0].get("x", "nan"))


def test_what_has_no_pair_is_not_in_the_forest():
    text = words(
        forest.differences(
            [("alone", [cell("base", [0.7]), cell("joint", [0.7])]), ("pair", row("x").cells)], "t", METHODS
        )
    )
    assert "pair" in text
    assert "alone" not in text
    assert "base" not in text
    assert "joint" not in text


def test_one_seed_has_a_marker_and_no_interval():
    svg = forest.differences([("mlp", [cell("joint", [0.7], (0.01,))])], "t", METHODS)
    assert len(uses_of(svg, "fill: var(--surface")) == 1
    assert "nan" not in svg.lower()


def test_truth_is_drawn_where_it_is_known(svgs):
    assert "truth" in words(svgs["domain_auc"])
    assert "truth" not in words(plots.domain_auc([row("app")], "t", METHODS))


def test_domains_without_auc_are_left_out():
    one_class = DomainRow("lone", 5, 0.0, "one class", math.nan, (cell("base", []), cell("joint", [])))
    text = words(plots.domain_auc([one_class, row("app")], "t", METHODS))
    assert "app" in text
    assert "lone" not in text


def test_every_curve_marks_its_best_epoch(svgs):
    best = uses_of(svgs["learning_curves"], "fill: var(--surface")
    assert len(best) == 3


def test_learning_curves_are_not_pressed_flat_by_a_start_from_chance():
    epochs = tuple(map(float, range(9)))
    wauc = (0.5, *[0.77 + 0.001 * epoch for epoch in range(8)])
    svg = trends.learning_curves([Curve("base", seed, epochs, wauc, 8.0) for seed in range(3)], "t", METHODS)
    ticks = [float(text) for text in words(svg) if re.fullmatch(r"\d\d(\.\d+)?", text)]
    assert 76 < min(ticks) < max(ticks) < 79


def test_parameters_leave_out_a_base_that_is_part_of_its_adapted_rows(svgs):
    text = words(svgs["parameter_counts"])
    assert text.count("app: joint, two_stage") == 2  # one in each panel
    assert text.count("app: base") == 2  # star's numbers, no adapters beside them
    assert "20 in adapters" in svgs["parameter_counts"]


def test_nothing_to_draw_is_an_empty_plot():
    for svg in (
        plots.domain_auc([], "t", METHODS),
        forest.differences([], "t", METHODS),
        forest.domain_differences([], NOTHING, "t", "joint", METHODS),
        forest.domain_distribution([], "t", "joint", METHODS),
        trends.learning_curves([], "t", METHODS),
        trends.option_curve([], "t", METHODS),
        trends.quality_by_size([], "t", METHODS),
    ):
        assert svg.startswith("<svg")
        assert "nan" not in svg.lower()


# ------------------------------------------------------------------------------------------------------------ looks


@given(st.lists(st.text(st.characters(codec="ascii"), max_size=6), unique=True, max_size=40), st.data())
def test_every_method_has_a_look_of_its_own(others, data):
    methods = data.draw(st.permutations([*dict.fromkeys(["base", "two_stage", *others])]))
    looks = looks_of(methods)
    assert list(looks) == methods
    assert len(set(looks.values())) == len(methods)  # a colour may come again, with another marker
    assert (looks["base"].number, looks["two_stage"].number) == (1, 3)
    assert [method for method, look in looks.items() if look.number == 1] == ["base"]
    assert all(1 <= look.number <= 8 for look in looks.values())


def test_colours_are_not_shared_before_they_run_out():
    methods = ["base", "joint", "two_stage", "bias_only", *"abcdefgh"]
    assert [series_number(method, methods) for method in methods] == [1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5]


def test_legends_name_all_of_many_methods():
    methods = ["base", *(f"method-{number}" for number in range(12))]
    cells = [cell(method, [0.7], (0.01, 0.02)) for method in methods[1:]]
    assert set(methods[1:]) <= set(words(forest.differences([("mlp", cells)], "t", methods)))


# ----------------------------------------------------------------------------------------------------------- domains


def sized(svg: str) -> list[float]:
    """Widths of the round markers of a forest by domain, from their outlines."""
    root = ElementTree.fromstring(svg)
    names = {use.get("href", "")[1:] for use in root.iter("use") if "--series-3" in (use.get("style") or "")}
    paths = [path.get("d", "") for path in root.iter("path") if path.get("id") in names]
    widths = []
    for path in paths:
        x = [float(number) for number in re.findall(r"(-?[\d.]+) -?[\d.]+", path)]
        widths.append(max(x) - min(x))
    return widths


def test_larger_domains_have_larger_marks():
    rows = [row("large", rows=9000), row("middle", rows=900), row("small", rows=9)]
    svg = forest.domain_differences(rows, SURE, "t", "two_stage", METHODS)
    widths = sized(svg)
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)
    shown = words(svg)
    assert {"large \u00b7 9k", "middle \u00b7 900", "small \u00b7 9", "all, by rows"} <= set(shown)


def test_a_distribution_counts_every_domain_once():
    rows = [row(f"d{number}", rows=number + 1) for number in range(60)]
    svg = forest.domain_distribution(rows, "t", "two_stage", METHODS)
    markers = [use for use in uses_of(svg, "--series-3") if (use.get("style") or "").count("--series-3")]
    assert len(markers) == 60
    description = ElementTree.fromstring(svg).find("desc")
    assert description is not None
    assert description.text == "no difference in 60 domains"


def test_a_method_that_some_domains_lack_is_drawn_for_the_others():
    lone = DomainRow("lone", 5, 0.0, "one class", math.nan, (cell("base", []), cell("two_stage", [])))
    shown = words(forest.domain_differences([row("app"), lone], SURE, "t", "two_stage", METHODS))
    assert any(text.startswith("app") for text in shown)
    assert not any(text.startswith("lone") for text in shown)


# ------------------------------------------------------------------------------------------------- switches and curves


def bars(svg: str) -> list[tuple[float, float]]:
    """Ends of the bars of a waterfall, left to right, from top to bottom."""
    found = []
    for path in ElementTree.fromstring(svg).iter("path"):
        style, numbers = path.get("style") or "", re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.get("d") or "")
        if ("--series-3" in style or "--series-2" in style) and len(numbers) == 4 and "fill: var" in style:
            x = [float(number) for number, _ in numbers]
            found.append((min(x), max(x)))
    return found


def test_each_step_starts_where_the_last_one_ended():
    up, down = Interval(0.02, 0.01, 0.03, 5), Interval(-0.01, -0.02, 0.0, 5)
    rows = (Switch("a", "+ a", spread([0.7]), up, up), Switch("b", "+ b", spread([0.7]), up, down))
    first, second = bars(forest.switch_steps(Switches("mlp", "base", "base", spread([0.7]), True, True, rows), "t"))
    assert first[1] == pytest.approx(second[1], abs=0.01)  # down again from the end of the first
    assert second[1] - second[0] == pytest.approx((first[1] - first[0]) / 2, rel=0.01)


def test_long_titles_are_broken_into_lines_and_not_cut():
    title = "+ embeddings start at one hundredth"
    shown = words(forest.switch_steps(switch_rows(title), "t"))
    assert "one hundredth" in " ".join(shown)
    assert not any("\u2026" in text for text in shown)


def test_an_option_that_spans_decades_is_on_a_log_axis():
    svg = trends.option_curve(option_curves(), "t", METHODS)
    assert {"4", "16", "256"} <= set(words(svg))
    x = sorted({float(use.get("x", "nan")) for use in uses_of(svg, "fill: var(--series-3")})[-4:]
    assert x[-1] - x[-2] == pytest.approx(2 * (x[-2] - x[-3]), rel=0.01)  # 16 to 256 is twice 4 to 16


def test_models_thin_behind_their_mean_bring_no_legend_of_their_own():
    assert words(trends.option_curve(option_curves(), "t", METHODS)).count("two_stage") == 1


def test_names_of_models_do_not_lie_on_each_other():
    marks = [Mark(f"model-{n}", "base", 1000 + n, Interval(0.7 + n * 1e-6, 0.69, 0.71, 5)) for n in range(10)]
    root = ElementTree.fromstring(trends.quality_by_size(marks, "t", METHODS))
    texts = [text for text in root.iter("text") if (text.text or "").startswith("model-")]
    heights = sorted(float(text.get("y", "nan")) for text in texts)
    assert len(heights) == 10
    assert all(below - above >= 9 for above, below in pairwise(heights))


def test_of_very_many_runs_only_means_are_drawn():
    def thin(num_seeds: int) -> int:
        curves = [Curve("base", seed, (0.0, 1.0), (0.7, 0.71), 1.0) for seed in range(num_seeds)]
        return trends.learning_curves(curves, "t", METHODS).count("stroke-width: 0.8")

    assert thin(5) == 5
    assert thin(30) == 0
