"""Which model and arm validation prefers, and what the others lose to it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from domlora.studies.reporting.standings import Standing, standings
from domlora.studies.reporting.statistics import DASH, MINUS, holm, p_value, paired
from domlora.studies.reporting.tables import tabulate
from domlora.studies.reporting.text import to_markdown

TEST = {("mlp", "base"): (0.70, 0.72, 0.74), ("mlp", "joint"): (0.71, 0.74, 0.77), ("star", "base"): (0.72, 0.73, 0.73)}
VALID = {("mlp", "base"): 0.70, ("mlp", "joint"): 0.78, ("star", "base"): 0.77}


def line(model: str, method: str, seed: int, wauc: float, valid: float | None = None, **more: Any) -> dict[str, Any]:
    adapters = 20 * (method == "joint")
    names = {"dataset": "toy", "model": model, "method": method, "seed": seed, "key": f"{model}/{method}/{seed}"}
    counts = {"params_total": 100 + adapters, "params_tables": 60, "params_adapters": adapters}
    return {**names, **counts, "wauc": wauc, "valid_wauc": valid, **more}


def lines() -> list[dict[str, Any]]:
    return [
        line(model, method, seed, wauc, VALID[model, method])
        for (model, method), own in TEST.items()
        for seed, wauc in enumerate(own, 1)
    ]


def of(runs: list[dict[str, Any]]) -> tuple[Standing, ...]:
    (dataset,) = tabulate(runs).datasets
    return standings(dataset)


def test_validation_chooses_and_the_test_split_compares() -> None:
    first, *others = of(lines())
    assert (first.model, first.method) == ("mlp", "joint")
    assert first.difference.num_pairs == 0
    assert [(each.model, each.method) for each in others] == [("star", "base"), ("mlp", "base")]
    expected = [paired([0.01, -0.01, -0.04]), paired([-0.01, -0.02, -0.03])]
    for each, interval, p in zip(others, expected, holm([p_value(i) for i in expected]), strict=True):
        assert each.difference == pytest.approx(interval)
        assert each.p_holm == pytest.approx(p)
    assert [each.without_tables for each in (first, *others)] == [60, 40, 40]


def test_what_lacks_a_seed_is_never_preferred() -> None:
    """It has done the two easy ones."""
    runs = [each for each in lines() if (each["method"], each["seed"]) != ("joint", 1)]
    first, *others = of(runs)
    assert (first.model, first.method) == ("star", "base")
    assert [each.difference.num_pairs for each in others] == [2, 3]


def test_what_validation_did_not_judge_is_never_preferred() -> None:
    unknown = [each | {"valid_wauc": None} for each in lines() if (each["model"], each["method"]) == ("mlp", "joint")]
    first, *_ = of([*[each for each in lines() if each["method"] == "base"], *unknown])
    assert (first.model, first.method) == ("star", "base")


def test_one_model_needs_no_standings() -> None:
    assert of([each for each in lines() if each["model"] == "mlp"]) == ()


def test_arms_that_repeat_others_and_the_truth_are_left_out() -> None:
    extra = [line("mlp", "chosen", seed, 0.99, valid=0.99, kind="select") for seed in (1, 2, 3)]
    extra += [line("truth", "truth", seed, 0.999) for seed in (1, 2, 3)]
    assert list(map(str, of(lines() + extra))) == list(map(str, of(lines())))


def test_counts_that_differ_over_seeds_are_not_told() -> None:
    runs = lines()
    runs[0] = {**runs[0], "params_total": 101}
    assert [each.without_tables for each in of(runs)] == [60, 40, None]


def test_the_table() -> None:
    text = to_markdown(tabulate(lines()))
    assert "## All beside the preferred one" in text
    assert f"| toy | mlp | joint | 74.00 ± 3.00 | {DASH} |  | 60 |" in text
    assert f"| toy | mlp | base | 72.00 ± 2.00 | {MINUS}2.00 [{MINUS}4.48, +0.48], no difference |" in text
    assert math.isnan(of(lines())[0].p_holm)
