"""Arms whose numbers were worked out by hand: switches, steps, curves over options and domains, quality and size."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.studies.reporting.arms import Arms, arms_of, domain_count_curves, option_curves, quality, switches
from domlora.studies.reporting.statistics import paired
from domlora.studies.reporting.tables import MEAN, DatasetTable, Tables, tabulate


def line(method: str, seed: int, wauc: float, model: str = "mlp", dataset: str = "toy", **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "model": model, "method": method, "seed": seed, "wauc": wauc, **more}


def study(
    gains: dict[str, tuple[float, ...]], model: str = "mlp", start: float = 0.7, **more: Any
) -> list[dict[str, Any]]:
    """The base at ``start``, and every arm above it by its gains, seed by seed."""
    runs = {"base": (0.0,) * len(next(iter(gains.values()))), **gains}
    return [
        line(method, seed, start + gain, model, **more)
        for method, own in runs.items()
        for seed, gain in enumerate(own, 1)
    ]


def dataset_of(lines: list[dict[str, Any]]) -> DatasetTable:
    (dataset,) = tabulate(lines).datasets
    return dataset


# ---------------------------------------------------------------------------------------------------------- switches

ONE, TWO = (0.010, 0.012, 0.014), (0.030, 0.033, 0.036)


def test_a_step_is_paired_with_the_step_before_it():
    (found,) = switches(dataset_of(study({"one": ONE, "two": TWO})), Arms(steps=("one", "two")))
    assert found.steps
    assert [row.method for row in found.rows] == ["one", "two"]
    assert found.rows[0].step == pytest.approx(paired(ONE))
    assert found.rows[1].step == pytest.approx(paired([0.020, 0.021, 0.022]))
    assert found.rows[1].difference == pytest.approx(paired(TWO))
    assert found.score.mean == pytest.approx(0.7)


def test_steps_follow_the_order_of_the_study_and_not_of_the_lines():
    (found,) = switches(dataset_of(study({"one": ONE, "two": TWO})), Arms(steps=("two", "one")))
    assert [row.method for row in found.rows] == ["two", "one"]
    assert found.rows[1].step.mean == pytest.approx(-0.021)


def test_a_reference_of_its_own():
    (found,) = switches(dataset_of(study({"one": ONE, "two": TWO})), Arms(reference="two"))
    assert (found.reference, found.chosen, found.steps) == ("two", False, False)
    assert {row.method: round(row.difference.mean, 4) for row in found.rows} == {"base": -0.033, "one": -0.021}
    assert all(row.step.num_pairs == 0 for row in found.rows)


@pytest.mark.parametrize("form", ["+ dropout dead", "\u2212 the bias", "without the bias"])
def test_arms_that_are_called_switches_are_those_that_are_shown(form):
    lines = study({"one": ONE, "two": TWO, "joint": ONE})
    titles = {"one": form, "two": "+ all of it"}
    (found,) = switches(dataset_of(lines), Arms(titles=titles))
    assert found.chosen
    assert [row.title for row in found.rows] == [form, "+ all of it"]


def test_few_methods_without_titles_are_no_switches():
    assert switches(dataset_of(study({"one": ONE, "two": TWO})), Arms()) == ()


def test_many_methods_are_all_shown():
    lines = study({f"arm{number}": ONE for number in range(6)})
    (found,) = switches(dataset_of(lines), Arms())
    assert not found.chosen
    assert len(found.rows) == 6


def test_over_models_a_step_is_the_mean_of_those_that_have_both():
    lines = study({"one": ONE, "two": TWO}) + study({"one": TWO}, model="dcn")
    mean, *models = switches(dataset_of(lines), Arms(steps=("one", "two")))
    assert mean.model == MEAN
    assert mean.rows[0].step.mean == pytest.approx((0.012 + 0.033) / 2)
    assert mean.rows[1].step.mean == pytest.approx(0.021)  # mlp alone
    assert [each.model for each in models] == ["dcn", "mlp"]
    assert [row.method for row in models[0].rows] == ["one"]


def test_a_step_that_no_run_has_is_stepped_over():
    arms = arms_of({"steps": ["one", "missing", "two"], "reference": "gone"}, tabulate(study({"one": ONE, "two": TWO})))
    assert arms.steps == ("one", "two")
    assert arms.reference == "base"


def test_titles_come_from_the_facts_and_else_from_the_lines():
    lines = study({"one": ONE, "two": TWO}, title="of the line")
    arms = arms_of({"titles": {"one": "of the facts"}}, tabulate(lines))
    assert (arms.titles["one"], arms.titles["two"]) == ("of the facts", "of the line")


# ----------------------------------------------------------------------------------------------------------- options


def sweep(
    values: dict[str, Any], option: str = "temperature", kind: str = "two_stage", **more: Any
) -> list[dict[str, Any]]:
    lines = study(dict.fromkeys(values, ONE))
    for each in lines:
        if each["method"] in values:
            each |= {"kind": kind, "config": {"method": kind, "adapter": {option: values[each["method"]]}, **more}}
    return lines


def test_arms_that_differ_in_one_number_make_a_curve():
    (curve,) = option_curves(dataset_of(sweep({"t64": 64, "t4": 4, "t16": 16})))
    assert (curve.option, curve.kind, curve.model) == ("adapter.temperature", "two_stage", "mlp")
    assert [(point.value, point.method) for point in curve.points] == [(4.0, "t4"), (16.0, "t16"), (64.0, "t64")]
    assert curve.points[0].difference == pytest.approx(paired(ONE))


@pytest.mark.parametrize(
    "values",
    [{"a": 4, "b": 16}, {"a": 4, "b": 4, "c": 16}, {"a": "x", "b": "y", "c": "z"}, {"a": True, "b": False, "c": None}],
)
def test_two_values_or_words_make_no_curve(values):
    assert option_curves(dataset_of(sweep(values))) == ()


def test_an_arm_that_differs_in_more_is_not_in_the_curve():
    lines = sweep({"t4": 4, "t16": 16, "t64": 64, "odd": 256})
    for each in lines:
        if each["method"] == "odd":
            each["config"] = {**each["config"], "model": {"dropout": 0.5}}
    (curve,) = option_curves(dataset_of(lines))
    assert [point.method for point in curve.points] == ["t4", "t16", "t64"]


def test_lists_count_as_multiples_of_the_smallest():
    lists = {"one": [32, 16], "two": [64, 32], "five": [160, 80], "other": [64, 16]}
    (curve,) = option_curves(dataset_of(sweep(lists, "hidden_units")))
    assert [(point.value, point.method) for point in curve.points] == [(1.0, "one"), (2.0, "two"), (5.0, "five")]


def test_an_arm_is_compared_with_the_base_of_its_own_size():
    lines = []
    for size, (base, adapted) in {1: (0.70, 0.71), 2: (0.72, 0.75), 3: (0.74, 0.76)}.items():
        for kind, wauc in (("base", base), ("two_stage", adapted)):
            name = kind if size == 1 else f"{kind} x{size}"
            config = {"model": {"embedding_dim": 8 * size}}
            lines += [line(name, seed, wauc, kind=kind, config=config) for seed in (1, 2, 3)]
    base, adapted = sorted(option_curves(dataset_of(lines)), key=lambda curve: curve.kind)
    assert [round(point.difference.mean, 4) for point in base.points] == [0.0, 0.02, 0.04]
    assert [round(point.difference.mean, 4) for point in adapted.points] == [0.01, 0.03, 0.02]


def test_over_models_the_mean_comes_first():
    values = {"t4": 4, "t16": 16, "t64": 64}
    lines = sweep(values) + [{**each, "model": "dcn", "wauc": each["wauc"] + 0.1} for each in sweep(values)]
    assert [curve.model for curve in option_curves(dataset_of(lines))] == [MEAN, "dcn", "mlp"]


def test_old_lines_without_options_make_no_curve():
    assert option_curves(dataset_of(study({"one": ONE, "two": ONE, "three": ONE}))) == ()


def sizes(*numbers: int, name: str = "world-{}") -> Tables:
    lines = []
    for number in numbers:
        more = {"dataset": name.format(number), "num_domains": number}
        lines += study({"joint": tuple(gain * number for gain in ONE)}, **more)
        lines.append({**line("truth", 0, 0.9, "truth"), **more})
    return tabulate(lines)


def test_datasets_whose_names_differ_in_digits_make_a_curve_over_domains():
    (curve,) = domain_count_curves(sizes(10, 3, 1))
    assert (curve.option, curve.kind, curve.model) == ("number of domains", "joint", "world-N")
    assert [point.value for point in curve.points] == [1, 3, 10]
    assert [round(point.difference.mean, 4) for point in curve.points] == [0.012, 0.036, 0.12]
    assert curve.points[2].gap_closed.mean == pytest.approx(0.6)


def test_other_datasets_make_none():
    assert domain_count_curves(sizes(10, 3)) == ()
    other = [each for number in (3, 5, 7) for each in study({"joint": ONE}, dataset="x" * number, num_domains=number)]
    assert domain_count_curves(tabulate(other)) == ()


# ----------------------------------------------------------------------------------------------------------- quality


def marks_of(lines: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    for each in lines:
        each |= {"params_total": 100 if each["method"] == "base" else 130, "params_tables": 60}
    return {(mark.model, mark.method): mark for mark in quality(dataset_of(lines))}


def test_size_is_what_stands_outside_the_tables():
    marks = marks_of(study({"joint": ONE}))
    assert {key: mark.parameters for key, mark in marks.items()} == {("mlp", "base"): 40, ("mlp", "joint"): 70}


@given(st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=3))
def test_what_all_runs_of_a_seed_share_does_not_widen_an_interval(shared):
    lines = study({"joint": ONE})
    moved = [{**each, "wauc": each["wauc"] + shared[each["seed"] - 1]} for each in lines]
    still, marks = marks_of(lines), marks_of(moved)
    for key, mark in marks.items():
        assert mark.score.high - mark.score.low == pytest.approx(still[key].score.high - still[key].score.low, abs=1e-9)
        wanted = math.fsum(each["wauc"] for each in moved if each["method"] == key[1]) / 3
        assert mark.score.mean == pytest.approx(wanted)


def test_one_seed_is_a_mark_without_an_interval():
    (base, joint) = marks_of(study({"joint": (0.01,)})).values()
    assert (base.score.mean, joint.score.mean) == pytest.approx((0.70, 0.71))
    assert math.isnan(joint.score.low)


def test_a_run_without_counts_is_no_mark():
    assert quality(dataset_of(study({"joint": ONE}))) == ()
