"""Interleaved lists are fair, and the preference is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from domlora.abtest.interleaving import Draft, credit, preference, team_draft
from domlora.errors import ConfigError, DataError

RANKINGS = st.lists(st.integers(0, 15), unique=True, max_size=12)


@given(RANKINGS, RANKINGS, st.integers(1, 20), st.integers(0, 2**32))
def test_a_list_holds_the_best_of_both_and_nothing_twice(a: list[int], b: list[int], length: int, seed: int) -> None:
    draft = team_draft(a, b, length, np.random.default_rng(seed))
    assert len(set(draft.items)) == len(draft.items) == len(draft.teams)
    assert len(draft.items) == min(length, len({*a, *b}))
    for ranking, team in ((a, 0), (b, 1)):
        mine = [item for item, whose in zip(draft.items, draft.teams, strict=True) if whose == team]
        assert mine == sorted(mine, key=ranking.index), "in the order of its ranking"
        if mine:  # what a ranking skipped was there already
            before = ranking[: ranking.index(mine[-1])]
            place = draft.items.index(mine[-1])
            assert set(before) <= set(draft.items[:place])


def test_each_team_is_first_half_of_the_time_and_has_half_of_the_places() -> None:
    random = np.random.default_rng(0)
    drafts = [team_draft(range(10), range(9, -1, -1), 5, random) for _ in range(2000)]
    assert abs(np.mean([draft.teams[0] for draft in drafts]) - 0.5) < 0.04
    assert abs(np.mean([sum(draft.teams) for draft in drafts]) - 2.5) < 0.06
    assert all(abs(sum(draft.teams[:4]) - 2) == 0 for draft in drafts), "each round, one of each"


def clicks(draft: Draft, rates: dict[object, float], random: np.random.Generator) -> list[int]:
    return [place for place, item in enumerate(draft.items) if random.random() < rates[item] / (1 + place)]


def test_alike_rankings_are_not_told_apart_and_the_better_one_is() -> None:
    random = np.random.default_rng(1)
    rates: dict[object, float] = {item: 0.6 - 0.05 * item for item in range(10)}
    good, noisy = list(range(10)), [3, 1, 0, 2, 6, 4, 5, 9, 7, 8]
    false_alarms = 0
    for _ in range(60):
        drafts = [team_draft(good, good, 6, random) for _ in range(80)]
        found = preference([f"u{i % 40}" for i in range(80)], [credit(d, clicks(d, rates, random)) for d in drafts])
        false_alarms += found.p_value < 0.05
    assert false_alarms <= binom.ppf(0.999, 60, 0.05)
    drafts = [team_draft(noisy, good, 6, random) for _ in range(1600)]
    found = preference([f"u{i % 800}" for i in range(1600)], [credit(d, clicks(d, rates, random)) for d in drafts])
    assert found.p_value < 0.01
    assert found.low > 0.5
    assert found.mean_low > 0


def test_lists_of_one_unit_are_one_observation() -> None:
    many = preference(["u"] * 100 + ["v"] * 100, [1] * 100 + [-1] * 100)
    assert (many.wins, many.losses, many.ties, many.p_value) == (1, 1, 0, 1.0)
    assert many.mean_low < -100
    one = preference(["u1", "u2", "u3", "u4", "u5", "u6"], [3, 1, 2, 1, 0, 1])
    assert (one.wins, one.losses, one.ties) == (5, 0, 1)
    assert one.p_value == pytest.approx(2 * 0.5**5)
    assert preference(["u"], [0]).p_value == 1.0


def test_a_place_is_credited_once() -> None:
    draft = Draft(("a", "b", "c"), (0, 1, 1))
    assert [credit(draft, places) for places in ([], [0], [1, 1, 1], [0, 1, 2])] == [0, -1, 1, 1]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError):
        team_draft([1], [2], 0, np.random.default_rng(0))
    for units, scores in (([], []), (["u"], [1, 2])):
        with pytest.raises(DataError):
            preference(units, scores)
