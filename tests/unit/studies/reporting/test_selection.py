"""Arms that are chosen by the validation figures of the other seeds: worked out by hand."""

from __future__ import annotations

import csv
import io
from itertools import permutations
from typing import Any

import pytest

from domlora.studies.reporting.arms import Arms, option_curves, quality
from domlora.studies.reporting.latex import to_latex
from domlora.studies.reporting.selection import candidates, is_selected, selected
from domlora.studies.reporting.tables import Tables, tabulate
from domlora.studies.reporting.text import to_csv, to_markdown

FACTS = {"select": {"best": {"of": ["base", "joint"]}}}
# joint is better on validation by 4, -1, -1: seeds 2 and 3 see the 4, seed 1 does not.
VALID = {"base": (0.70, 0.70, 0.70), "joint": (0.74, 0.69, 0.69)}
TEST = {"base": (0.60, 0.60, 0.60), "joint": (0.63, 0.62, 0.61)}


def line(method: str, seed: int, valid: float | None, wauc: float, **more: Any) -> dict[str, Any]:
    found = {"dataset": "toy", "model": "mlp", "method": method, "seed": seed, "key": f"{method}{seed}"}
    sizes = {
        "params_total": 100 + 20 * (method != "base"),
        "params_tables": 60,
        "params_adapters": 20 * (method != "base"),
    }
    history = [{"epoch": 1.0, "wauc": valid}]
    return found | sizes | {"valid_wauc": valid, "wauc": wauc, "seconds": 3.0, "history": history} | more


def lines(**more: Any) -> list[dict[str, Any]]:
    return [
        line(method, seed, valid, TEST[method][seed - 1], **more)
        for method, own in VALID.items()
        for seed, valid in enumerate(own, 1)
    ]


def taken(results: list[Any]) -> dict[int, str]:
    return {each["seed"]: each["selected"] for each in results if is_selected(each)}


def tables() -> Tables:
    return tabulate(selected(lines(), FACTS))


def test_no_seed_chooses_for_itself() -> None:
    assert taken(selected(lines(), FACTS)) == {1: "base", 2: "joint", 3: "joint"}


def test_what_a_seed_says_does_not_move_its_own_choice() -> None:
    for seed in (1, 2, 3):
        before = taken(selected(lines(), FACTS))[seed]
        for valid in (0.0, 1.0):
            changed = [each | {"valid_wauc": valid} if each["key"] == f"joint{seed}" else each for each in lines()]
            assert taken(selected(changed, FACTS))[seed] == before


def test_the_test_split_decides_nothing() -> None:
    changed = [each | {"wauc": 1 - each["wauc"]} for each in lines()]
    assert taken(selected(changed, FACTS)) == taken(selected(lines(), FACTS))


def test_it_has_the_figures_of_what_it_takes() -> None:
    cell = next(cell for cell in tables().datasets[0].overall.cells if cell.method == "best")
    assert cell.score.mean == pytest.approx((0.60 + 0.62 + 0.61) / 3)
    assert cell.difference.mean == pytest.approx((0.0 + 0.02 + 0.01) / 3)
    assert cell.difference.num_pairs == 3


def test_the_order_of_lines_decides_nothing() -> None:
    found = {tuple(sorted(taken(selected(list(order), FACTS)).items())) for order in permutations(lines())}
    assert found == {((1, "base"), (2, "joint"), (3, "joint"))}


def test_twice_is_once() -> None:
    once = selected(lines(), FACTS)
    assert selected(once, FACTS) == once


def test_the_first_of_equal_candidates_is_taken() -> None:
    equal = [each | {"valid_wauc": 0.7} for each in lines()]
    assert set(taken(selected(equal, FACTS)).values()) == {"base"}
    other = {"select": {"best": {"of": ["joint", "base"]}}}
    assert set(taken(selected(equal, other)).values()) == {"joint"}


@pytest.mark.parametrize(
    "left",
    [
        [each for each in lines() if each["seed"] < 3],
        [each for each in lines() if each["method"] == "base"],
        [each for each in lines() if each["key"] != "joint2"],
        [each | {"valid_wauc": None} if each["key"] == "joint2" else each for each in lines()],
    ],
    ids=["two seeds", "one candidate", "two seeds in common", "no figure on validation"],
)
def test_too_little_to_choose_from(left: list[dict[str, Any]]) -> None:
    assert selected(left, FACTS) == left


def test_a_candidate_without_runs_is_left_out() -> None:
    facts = {"select": {"best": {"of": ["base", "two_stage", "joint"]}}}
    found = selected(lines(), facts)
    assert taken(found) == {1: "base", 2: "joint", 3: "joint"}
    assert [each.name for each in candidates(found)] == ["base", "joint"]


def test_one_name_means_one_choice() -> None:
    """A model that lacks a candidate that others have on the dataset chooses from something else, so it does not choose."""
    facts = {"select": {"best": {"of": ["base", "joint", "third"]}}}
    third = [each | {"method": "third", "key": f"third{each['key']}"} for each in lines() if each["method"] == "base"]
    found = selected([*lines(), *third, *lines(model="dcn"), *lines(dataset="two")], facts)
    assert {(each["dataset"], each["model"]) for each in found if is_selected(each)} == {("toy", "mlp"), ("two", "mlp")}


def test_datasets_and_models_choose_for_themselves() -> None:
    other = [each | {"valid_wauc": 1 - each["valid_wauc"]} for each in lines(model="dcn")]
    found = selected([*lines(), *lines(dataset="two"), *other], FACTS)
    by_place = {(each["dataset"], each["model"], each["seed"]): each["selected"] for each in found if is_selected(each)}
    assert [by_place["toy", "mlp", seed] for seed in (1, 2, 3)] == ["base", "joint", "joint"]
    assert [by_place["two", "mlp", seed] for seed in (1, 2, 3)] == ["base", "joint", "joint"]
    assert [by_place["toy", "dcn", seed] for seed in (1, 2, 3)] == ["joint", "base", "base"]


def test_how_often_each_was_taken() -> None:
    found = {each.name: each for each in candidates(selected(lines(), FACTS))}
    assert {name: (each.taken, each.num_seeds) for name, each in found.items()} == {"base": (1, 3), "joint": (2, 3)}
    assert found["joint"].valid.mean == pytest.approx((0.74 + 0.69 + 0.69) / 3)


def test_nothing_is_counted_twice() -> None:
    """No run, no time, no curve, no size of its own: those stand in the lines that it repeats."""
    found = tables()
    dataset = found.datasets[0]
    assert sum(each["seconds"] or 0.0 for each in found.runs) == 18.0
    assert {name for row in dataset.parameters for name in row.methods} == {"base", "joint"}
    assert {mark.method for mark in quality(dataset)} == {"base", "joint"}
    assert {curve.method for curve in dataset.curves["mlp"] if curve.epochs} == {"base", "joint"}
    assert found.cautions == ()


def test_selections_of_different_values_are_no_curve_over_an_option() -> None:
    arms = {f"t{value}": value for value in (4, 16, 64)}
    runs = [
        line(name, seed, 0.7, 0.6, kind="joint", config={"adapter": {"temperature": value}})
        for name, value in arms.items()
        for seed in (1, 2, 3)
    ]
    facts = {"select": {f"best_{name}": {"of": [name, *arms]} for name in arms}}
    dataset = tabulate(selected(runs, facts)).datasets[0]
    assert [curve.kind for curve in option_curves(dataset)] == ["joint"]


def test_text_says_what_was_taken() -> None:
    found = tables()
    markdown, latex = to_markdown(found, Arms()), to_latex(found, Arms())
    assert "| toy | mlp | best | joint | 70.67 ± 2.89 | 2 of 3 seeds |" in markdown
    assert r"What was selected" in latex
    assert "2 of 3 seeds" in latex
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [row["selected"] for row in rows if row["method"] == "best"] == ["base", "joint", "joint"]
    assert {row["selected"] for row in rows if row["method"] != "best"} == {""}
