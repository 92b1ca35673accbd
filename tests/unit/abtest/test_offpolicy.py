"""Estimates beside sums written out, and beside a world where the truth is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from domlora.abtest.offpolicy import direct, doubly_robust, effective_rows, importance_weights, ips, snips
from domlora.errors import ConfigError, DataError


class Drawn(NamedTuple):
    """A log of one context of five items, drawn by one policy, for another one whose worth is known."""

    reward: Any
    target: Any
    logged: Any
    item: Any
    rates: Any
    policy: Any
    truth: float


def drawn(seed: int, rows: int = 4000) -> Drawn:
    random = np.random.default_rng(seed)
    rates = np.array([0.02, 0.05, 0.1, 0.03, 0.08])
    logging = np.array([0.4, 0.3, 0.05, 0.2, 0.05])
    policy = np.array([0.05, 0.1, 0.5, 0.05, 0.3])
    item = random.choice(5, rows, p=logging)
    reward = (random.random(rows) < rates[item]).astype(float)
    return Drawn(reward, policy[item], logging[item], item, rates, policy, float(policy @ rates))


def test_they_are_the_formulas() -> None:
    one = drawn(1, 300)
    weight = importance_weights(one.target, one.logged)
    by_hand = [one.target[i] / one.logged[i] for i in range(300)]
    assert ips(one.reward, weight).value == pytest.approx(sum(w * r for w, r in zip(by_hand, one.reward)) / 300)  # noqa: B905
    assert snips(one.reward, weight).value == pytest.approx(float(np.dot(by_hand, one.reward) / sum(by_hand)))
    wrong = np.array([0.2, 0.1, 0.3, 0.4, 0.5])
    expected = np.full(300, float(one.policy @ wrong))
    found = doubly_robust(one.reward, weight, wrong[one.item], expected)
    assert found.value == pytest.approx(float(np.mean(expected + weight * (one.reward - wrong[one.item]))))
    assert direct(expected).value == pytest.approx(float(one.policy @ wrong))
    assert effective_rows(weight) == pytest.approx(sum(by_hand) ** 2 / sum(w * w for w in by_hand))
    assert found.effective_rows == effective_rows(weight)


def estimates(one: Drawn, **options: Any) -> dict[str, Any]:
    weight = importance_weights(one.target, one.logged)
    nearly = one.rates * 1.2
    expected = np.full(len(weight), float(one.policy @ nearly))
    return {
        "ips": ips(one.reward, weight, **options),
        "snips": snips(one.reward, weight, **options),
        "dr": doubly_robust(one.reward, weight, nearly[one.item], expected, **options),
    }


@pytest.mark.parametrize("interval", ["log", "normal"])
def test_they_are_unbiased_and_their_intervals_hold_the_truth(interval: str) -> None:
    worlds = [drawn(seed) for seed in range(300)]
    found = [estimates(one, interval=interval) for one in worlds]
    truth = worlds[0].truth
    for name in ("ips", "snips", "dr"):
        values = np.array([each[name].value for each in found])
        assert abs(values.mean() - truth) < 3 * values.std() / np.sqrt(300) + (1e-3 if name == "snips" else 0)
        held = np.mean([each[name].low <= truth <= each[name].high for each in found])
        assert 0.915 < held < 0.98, name
        errors = np.array([each[name].std_error for each in found])
        assert errors.mean() == pytest.approx(values.std(), rel=0.12)
    spread = {name: np.std([each[name].value for each in found]) for name in ("ips", "snips", "dr")}
    assert spread["dr"] < spread["ips"]
    assert spread["snips"] < spread["ips"]


def test_the_bootstrap_agrees_and_its_seed_decides() -> None:
    one = drawn(3)
    weight = importance_weights(one.target, one.logged)
    drawn_, normal = snips(one.reward, weight, interval="bootstrap"), snips(one.reward, weight, interval="normal")
    assert drawn_.low == pytest.approx(normal.low, rel=0.05)
    assert drawn_.high == pytest.approx(normal.high, rel=0.05)
    assert drawn_ == snips(one.reward, weight, interval="bootstrap")
    assert drawn_ != snips(one.reward, weight, interval="bootstrap", seed=1)


def test_rows_of_one_unit_are_not_independent() -> None:
    one = drawn(5, 500)
    twice = {"reward": np.repeat(one.reward, 2), "weight": np.repeat(one.target / one.logged, 2)}
    apart, together = ips(**twice), ips(**twice, cluster=np.repeat(np.arange(500), 2))
    once = ips(one.reward, one.target / one.logged)
    assert together.std_error == pytest.approx(once.std_error, rel=1e-9)
    assert apart.std_error < 0.75 * together.std_error
    assert together.value == pytest.approx(once.value)


def test_clipping_trades_variance_for_a_bias_downwards() -> None:
    truth, plain, clipped = drawn(0).truth, [], []
    for seed in range(100):
        one = drawn(seed, 1000)
        plain.append(ips(one.reward, importance_weights(one.target, one.logged)).value)
        clipped.append(ips(one.reward, importance_weights(one.target, one.logged, clip=3.0)).value)
    assert np.std(clipped) < np.std(plain)
    assert np.mean(clipped) < truth - 3 * np.std(clipped) / 10


def test_the_same_policy_is_the_plain_mean() -> None:
    one = drawn(7)
    for found in (ips(one.reward, np.ones(4000)), snips(one.reward, np.ones(4000))):
        assert found.value == one.reward.mean()
        assert found.effective_rows == found.num_rows == 4000
    nothing = ips(np.zeros(10), np.ones(10))
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("target", "logged"), [([0.5], [0.0]), ([1.5], [0.5]), ([0.5, 0.5], [0.5]), ([np.nan], [0.5]), ([], [])]
)
def test_no_probabilities_no_weights(target: list[float], logged: list[float]) -> None:
    with pytest.raises(DataError):
        importance_weights(target, logged)


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        importance_weights([0.5], [0.5], clip=0)
    with pytest.raises(DataError, match="share choices"):
        snips([1.0, 0.0], np.zeros(2))
    with pytest.raises(DataError, match="finite"):
        ips([np.inf], np.ones(1))
    with pytest.raises(DataError, match="predictions"):
        doubly_robust([1.0, 0.0], np.ones(2), [0.5], [0.5])
    with pytest.raises(ConfigError, match="unknown interval"):
        ips([1.0, 0.0], np.ones(2), interval="exact")  # type: ignore[arg-type]
