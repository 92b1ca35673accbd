"""Trials in their database: what counts, what is repeated, what is ended early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domlora.errors import ConfigError, EngineError
from domlora.studies.searching.space import Range, Space
from domlora.studies.searching.trials import Outcome, Trials, make_database
from domlora.training.fit import OnProgress, Progress

SPACE: Space = {
    "train.joint.optimizer.dense.lr": Range(1e-4, 1.0, log=True),
    "train.joint.fit.batch_size": Range(32, 256, step=32),
    "model.hidden_units": ([8], [16, 8]),
}


def figure(options: dict[str, Any]) -> float:
    return -abs(options["train.joint.optimizer.dense.lr"] - 0.01) - options["train.joint.fit.batch_size"] / 1e4


def one_fit(options: dict[str, Any], show: OnProgress) -> float:
    """Six validations that rise to the figure; between them the last one is told again, as ``fit`` does."""
    for epoch in range(6):
        if epoch:
            show(Progress(epoch, 50, 100, 0.5, figure(options) - 6 + epoch, 1.0))
        show(Progress(epoch + 1, 100, 100, 0.5, figure(options) - 5 + epoch, 1.0))
    return figure(options)


def two_fits(options: dict[str, Any], show: OnProgress) -> float:
    one_fit(options, show)
    return one_fit(options, show)


@pytest.fixture
def trials(tmp_path: Path) -> Callable[..., Trials]:
    make_database(tmp_path)

    def opened(name: str = "a", *, seed: int = 3, pruning: str = "none", space: Space = SPACE) -> Trials:
        return Trials(tmp_path, name, space, seed=seed, pruning=pruning)

    return opened


def made(search: Trials, count: int, objective: Any = one_fit) -> list[Outcome]:
    while len(search.outcomes()) < count:
        search.try_one(objective)
    return search.outcomes()


def test_options_are_of_the_space(trials: Any) -> None:
    outcomes = made(trials(), 5)
    assert {type(outcome.options["train.joint.fit.batch_size"]) for outcome in outcomes} == {int}
    for outcome in outcomes:
        assert outcome.options.keys() == SPACE.keys()
        assert 1e-4 <= outcome.options["train.joint.optimizer.dense.lr"] <= 1
        assert outcome.options["train.joint.fit.batch_size"] in range(32, 257, 32)
        assert outcome.options["model.hidden_units"] in ([8], [16, 8])
        assert outcome.value == figure(outcome.options)


def test_the_same_seed_tries_the_same(trials: Any) -> None:
    first = made(trials("a"), 11)
    assert made(trials("b"), 11) == first
    assert made(trials("c", seed=4), 2) != first[:2]


@pytest.mark.parametrize("pruning", ["none", "median"])
def test_a_search_that_is_cut_short_goes_on_as_if_it_had_not_been(trials: Any, pruning: str) -> None:
    """An error ends a trial as failed; a killed process leaves it running. Both are made again and count once."""
    straight = made(trials("straight", pruning=pruning), 13)

    def cut(options: dict[str, Any], show: OnProgress) -> float:
        show(Progress(1, 100, 100, 0.5, 0.1, 1.0))
        raise ConfigError("no such thing")

    for count in (0, 7, 12):
        search = trials("cut", pruning=pruning)
        made(search, count)
        with pytest.raises(ConfigError, match="no such thing"):
            search.try_one(cut)
        search._study.ask(search._space)  # and nobody ever tells how it went
        assert len(search.outcomes()) == count
    assert made(trials("cut", pruning=pruning), 13) == straight


@pytest.mark.parametrize("pruning", ["median", "halving"])
def test_a_trial_that_falls_behind_is_ended_early_and_counts(trials: Any, pruning: str) -> None:
    shown: list[int] = []

    def counted(options: dict[str, Any], show: OnProgress) -> float:
        shown.append(0)

        def count(at: Progress) -> None:
            shown[-1] += at.rows == at.total_rows
            show(at)

        return one_fit(options, count)

    outcomes = made(trials(pruning=pruning), 12, counted)
    ended = [outcome.value is None for outcome in outcomes]
    assert 0 < sum(ended) < 12
    assert not ended[0]
    assert min(shown) >= 4  # not before the figures say something
    best = max(outcome.value for outcome in outcomes if outcome.value is not None)
    assert best == max(figure(outcome.options) for outcome in outcomes)


def test_a_method_of_several_fits_is_not_ended_early(trials: Any) -> None:
    assert None not in [outcome.value for outcome in made(trials(pruning="median"), 8, two_fits)]


def test_options_that_were_tried_are_not_trained_again(trials: Any) -> None:
    tried: list[str] = []

    def remembered(options: dict[str, Any], show: OnProgress) -> float:
        tried.append(str(options))
        return float(options["model.dropout"])

    outcomes = made(trials(space={"model.dropout": (0.0, 0.1, 0.2)}), 6, remembered)
    assert len(outcomes) == 6
    assert len(tried) == len(set(tried)) <= 3
    assert all(outcome.value == outcome.options["model.dropout"] for outcome in outcomes)


def test_a_training_that_explodes_is_a_trial_without_a_figure(trials: Any) -> None:
    def exploding(options: dict[str, Any], show: OnProgress) -> float:
        if options["train.joint.optimizer.dense.lr"] > 1e-2:
            raise EngineError("the loss must be finite")
        return one_fit(options, show)

    outcomes = made(trials(), 6, exploding)
    lrs = [outcome.options["train.joint.optimizer.dense.lr"] for outcome in outcomes]
    assert [outcome.value is None for outcome in outcomes] == [lr > 1e-2 for lr in lrs]
    assert {outcome.error for outcome in outcomes if outcome.value is None} == {"the loss must be finite."}
