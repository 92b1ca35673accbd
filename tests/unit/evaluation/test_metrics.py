from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.errors import ConfigError, DataError
from domlora.evaluation import metrics


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Undefined values are NaN by decision, never by an accident that numpy warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def world(num_rows: int = 500, num_groups: int = 7, seed: int = 0, decimals: int | None = 2) -> tuple[Any, ...]:
    """label, probability (with heavy ties), group, whole weights."""
    random = np.random.default_rng(seed)
    probability = random.random(num_rows)
    label = (random.random(num_rows) < probability).astype(np.float32)
    if decimals is not None:
        probability = probability.round(decimals)
    return label, probability, random.integers(0, num_groups, num_rows), random.integers(0, 4, num_rows)


def auc_of_pairs(label: Any, probability: Any) -> float:
    """The definition: every positive against every negative."""
    positive, negative = probability[label == 1], probability[label == 0]
    if not len(positive) or not len(negative):
        return math.nan
    wins = [float(p > n) + 0.5 * float(p == n) for p in positive for n in negative]
    return sum(wins) / len(wins)


def ece_of_loops(label: Any, probability: Any, num_bins: int, bins: str) -> float:
    """Bins filled row by row; a row stands in the middle of its ties."""
    total = len(label)
    members: dict[int, list[int]] = {}
    for row in range(total):
        lower = sum(probability[other] < probability[row] for other in range(total))
        equal = sum(probability[other] == probability[row] for other in range(total))
        share = probability[row] if bins == "equal_width" else (lower + equal / 2) / total
        members.setdefault(min(int(share * num_bins), num_bins - 1), []).append(row)
    return sum(
        len(rows) / total * abs(sum(float(probability[row]) - float(label[row]) for row in rows)) / len(rows)
        for rows in members.values()
    )


class TestOrder:
    @pytest.mark.parametrize("decimals", [None, 2, 1, 0])
    def test_auc_is_the_share_of_pairs_won(self, decimals: int | None) -> None:
        label, probability, _, _ = world(200, decimals=decimals)
        assert metrics.auc(label, probability) == pytest.approx(auc_of_pairs(label, probability), abs=1e-14)

    @pytest.mark.parametrize(
        ("label", "probability", "expected"),
        [
            ([0, 1], [0.2, 0.7], 1.0),
            ([0, 1], [0.7, 0.2], 0.0),
            ([0, 1, 0, 1], [0.3, 0.3, 0.3, 0.3], 0.5),
            ([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1], 0.75),
            ([1, 0], [math.inf, -math.inf], 1.0),
            ([0, 1], [0.0, -0.0], 0.5),
        ],
    )
    def test_auc_by_hand(self, label: list[int], probability: list[float], expected: float) -> None:
        assert metrics.auc(label, probability) == expected

    @pytest.mark.parametrize("label", [[1, 1], [0, 0], [1], [0]])
    def test_one_class_is_nan(self, label: list[int]) -> None:
        assert math.isnan(metrics.auc(label, [0.5] * len(label)))

    def test_a_class_of_weight_zero_is_no_class(self) -> None:
        assert math.isnan(metrics.auc([0, 1, 1], [0.1, 0.2, 0.3], weight=[1.0, 0.0, 0.0]))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_float_types_keep_their_ties(self, dtype: Any) -> None:
        label, probability, _, _ = world(decimals=None)
        probability = probability.astype(dtype)
        assert metrics.auc(label, probability) == pytest.approx(auc_of_pairs(label, probability), abs=1e-14)

    def test_scores_that_only_float64_can_tell_apart(self) -> None:
        assert metrics.auc([0, 1], [0.5, 0.5 + 1e-12]) == 1.0
        assert metrics.auc([0, 1], np.array([0.5, 0.5 + 1e-12], dtype=np.float32)) == 0.5

    @pytest.mark.parametrize("num_groups", [1, 3, 50, 2000])
    def test_groups_are_scored_as_if_alone(self, num_groups: int) -> None:
        label, probability, group, _ = world(600, num_groups)
        by_group = metrics.auc_by_group(label, probability, group, num_groups + 2)
        alone = [auc_of_pairs(label[group == g], probability[group == g]) for g in range(num_groups + 2)]
        np.testing.assert_allclose(by_group, alone, atol=1e-14)
        assert np.isnan(by_group[-2:]).all()

    def test_ties_end_where_a_group_ends(self) -> None:
        label, same, group = np.array([0, 1, 0, 0, 1, 1]), np.full(6, 0.5), np.array([0, 0, 1, 1, 1, 1])
        assert metrics.auc_by_group(label, same, group).tolist() == [0.5, 0.5]
        assert metrics.calibration_by_group(label, same, group).expected_calibration_error.tolist() == [0.0, 0.0]

    def test_num_groups_is_counted_when_left_out(self) -> None:
        assert metrics.auc_by_group([0, 1, 1], [0.1, 0.2, 0.3], [0, 0, 2]).shape == (3,)

    def test_wauc_weighs_a_domain_by_all_its_rows(self) -> None:
        # Domain 0: 2 rows, AUC 1. Domain 1: 4 rows, AUC 3/4. Domain 2: one class, left out of both sums.
        label = [0, 1, 1, 0, 1, 0, 1, 1, 1]
        probability = [0.1, 0.2, 0.9, 0.8, 0.7, 0.1, 0.5, 0.5, 0.5]
        domain = [0, 0, 1, 1, 1, 1, 2, 2, 2]
        assert metrics.wauc(label, probability, domain) == pytest.approx((2 * 1 + 4 * 0.75) / 6)
        assert metrics.macro_auc(label, probability, domain) == pytest.approx((1 + 0.75) / 2)

    def test_wauc_when_no_domain_can_be_scored(self) -> None:
        assert math.isnan(metrics.wauc([0, 1], [0.1, 0.2], [0, 1]))
        assert math.isnan(metrics.macro_auc([0, 1], [0.1, 0.2], [0, 1]))

    @pytest.mark.parametrize("rename", [lambda d: d - 1, lambda d: d * 10**12 - 5, lambda d: 100 - d])
    def test_the_numbers_of_domains_do_not_matter(self, rename: Any) -> None:
        label, probability, domain, _ = world()
        for metric in (metrics.wauc, metrics.macro_auc):
            expected = metric(label, probability, domain)
            assert metric(label, probability, rename(domain)) == pytest.approx(expected, abs=1e-15)

    def test_gauc_by_hand(self) -> None:
        # User 5: AUC 1 of 2 rows. User 9: AUC 1/2 of 3 rows. User -1: one class, 1 row of 6.
        value = metrics.gauc([0, 1, 0, 1, 0, 1], [0.1, 0.2, 0.3, 0.5, 0.7, 0.9], [5, 5, 9, 9, 9, -1])
        assert value.value == pytest.approx((2 * 1 + 3 * 0.5) / 5)
        assert value.coverage == pytest.approx(5 / 6)

    def test_gauc_when_every_user_has_one_class(self) -> None:
        value = metrics.gauc([0, 1], [0.1, 0.2], [0, 1])
        assert math.isnan(value.value)
        assert value.coverage == 0.0

    def test_gauc_by_group_is_gauc_of_each_group_alone(self) -> None:
        label, probability, group, weight = world(800, 4)
        user = np.random.default_rng(1).integers(0, 60, 800) * 10**10
        by_group = metrics.gauc_by_group(label, probability, user, group, 5, weight)
        for g in range(4):
            at = group == g
            alone = metrics.gauc(label[at], probability[at], user[at], weight[at]).value
            assert by_group[g] == pytest.approx(alone, abs=1e-14)
        assert math.isnan(by_group[4])


CALIBRATION = {
    "log_loss": metrics.log_loss,
    "normalized_entropy": metrics.normalized_entropy,
    "predicted_over_observed": metrics.predicted_over_observed,
    "expected_calibration_error": metrics.expected_calibration_error,
}


class TestCalibration:
    def test_log_loss_by_hand(self) -> None:
        expected = -(math.log(0.75) + math.log(0.5) + 2 * math.log(0.1)) / 4
        assert metrics.log_loss([0, 1, 1], [0.25, 0.5, 0.1], [1, 1, 2]) == pytest.approx(expected)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("label", [0, 1])
    def test_certain_and_wrong_costs_the_eps_of_the_type(self, dtype: Any, label: int) -> None:
        loss = metrics.log_loss([label], np.array([1 - label], dtype=dtype))
        assert loss == pytest.approx(-math.log(np.finfo(dtype).eps), rel=1e-6)

    def test_certain_and_right_costs_nothing(self) -> None:
        assert metrics.log_loss([0, 1], [0.0, 1.0]) == pytest.approx(0, abs=1e-15)

    def test_the_click_rate_has_normalized_entropy_1(self) -> None:
        assert metrics.normalized_entropy([0, 0, 0, 1], [0.25] * 4) == pytest.approx(1.0)
        assert metrics.normalized_entropy([0, 0, 0, 1], [0.2, 0.1, 0.2, 0.6]) < 1.0
        assert metrics.normalized_entropy([0, 0, 0, 1], [0.5] * 4) > 1.0

    def test_what_one_class_leaves_undefined(self) -> None:
        for label in ([0, 0], [1, 1]):
            assert math.isnan(metrics.normalized_entropy(label, [0.5, 0.5]))
        assert math.isnan(metrics.predicted_over_observed([0, 0], [0.5, 0.5]))
        assert metrics.predicted_over_observed([1, 1], [0.5, 0.5]) == 0.5

    @pytest.mark.parametrize("bins", ["equal_mass", "equal_width"])
    @pytest.mark.parametrize("num_bins", [1, 3, 10, 64, 1000])
    @pytest.mark.parametrize("decimals", [None, 1])
    def test_ece_is_what_loops_give(self, num_bins: int, bins: Any, decimals: int | None) -> None:
        label, probability, _, _ = world(130, decimals=decimals)
        value = metrics.expected_calibration_error(label, probability, num_bins=num_bins, bins=bins)
        assert value == pytest.approx(ece_of_loops(label, probability, num_bins, bins), abs=1e-12)

    def test_equal_mass_bins_are_equal(self) -> None:
        # Ten rows, five bins: the gaps inside each pair of neighbours cancel, those of other pairs would not.
        probability = np.arange(10) / 10 + 0.05
        label = np.tile([0, 1], 5)
        pairs = probability.reshape(5, 2).mean(axis=1) - 0.5
        value = metrics.expected_calibration_error(label, probability, num_bins=5)
        assert value == pytest.approx(np.abs(pairs).mean())

    def test_equal_width_keeps_probability_one_in_the_last_bin(self) -> None:
        assert metrics.expected_calibration_error([1, 0], [1.0, 0.0], num_bins=4, bins="equal_width") == 0.0

    def test_groups_are_measured_as_if_alone(self) -> None:
        label, probability, group, weight = world(700, 9)
        label[group == 3] = 0
        by_group = metrics.calibration_by_group(label, probability, group, 10, weight, num_bins=6)
        for g in range(9):
            at = group == g
            assert by_group.click_rate[g] == pytest.approx(np.average(label[at], weights=weight[at]))
            for name, metric in CALIBRATION.items():
                options = {"num_bins": 6} if name == "expected_calibration_error" else {}
                alone = metric(label[at], probability[at], weight[at], **options)
                assert getattr(by_group, name)[g] == pytest.approx(alone, nan_ok=True), name
        assert all(math.isnan(column[9]) for column in by_group)
        assert math.isnan(by_group.normalized_entropy[3])


def rows_with(scores: st.SearchStrategy[Any], low: int = 2, high: int = 60) -> st.SearchStrategy[Any]:
    """(label, score, group, weight) lists of one length, with at least one row of each class."""
    row = st.tuples(st.integers(0, 1), scores, st.integers(0, 3), st.integers(0, 4))
    both = st.lists(row, min_size=low, max_size=high).filter(lambda rows: len({r[0] for r in rows}) == 2)
    return both.map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


FEW = st.integers(0, 12).map(lambda k: k / 12)
ANY = st.floats(-1e6, 1e6, width=32)


class TestProperties:
    @given(rows_with(st.one_of(ANY, FEW)))
    def test_auc_survives_a_monotone_map(self, rows: Any) -> None:
        label, score, group, _ = rows
        ranks = np.unique(score, return_inverse=True)[1] ** 3 - 7.5
        assert metrics.auc(label, score) == metrics.auc(label, ranks)
        np.testing.assert_array_equal(
            metrics.auc_by_group(label, score, group), metrics.auc_by_group(label, ranks, group)
        )

    @given(rows_with(st.one_of(ANY, FEW)), st.randoms(use_true_random=False))
    def test_order_of_rows_does_not_change_a_bit(self, rows: Any, random: Any) -> None:
        label, score, group, weight = rows
        move = np.array(random.sample(range(len(label)), len(label)))
        before = metrics.auc_by_group(label, score, group, 4, weight)
        after = metrics.auc_by_group(label[move], score[move], group[move], 4, weight[move])
        np.testing.assert_array_equal(before, after)

    @given(rows_with(FEW))
    def test_other_metrics_do_not_see_the_order_of_rows(self, rows: Any) -> None:
        label, score, group, _ = rows
        back = slice(None, None, -1)
        for metric in (metrics.wauc, metrics.macro_auc):
            forth = metric(label, score, group)
            assert metric(label[back], score[back], group[back]) == pytest.approx(forth, nan_ok=True)
        for other in CALIBRATION.values():
            assert other(label[back], score[back]) == pytest.approx(other(label, score), abs=1e-12)

    @given(rows_with(st.one_of(ANY, FEW)))
    def test_complement(self, rows: Any) -> None:
        label, score, _, _ = rows
        value = metrics.auc(label, score)
        assert 0.0 <= value <= 1.0
        assert metrics.auc(1 - label, score) == pytest.approx(1 - value, abs=1e-15)
        assert metrics.auc(label, -score) == pytest.approx(1 - value, abs=1e-15)
        assert metrics.auc(1 - label, -score) == pytest.approx(value, abs=1e-15)

    @settings(deadline=None)
    @given(rows_with(FEW))
    def test_a_whole_weight_is_a_row_written_so_often(self, rows: Any) -> None:
        label, score, group, weight = rows
        if not weight.any():
            weight = weight + 1
        again = np.repeat(np.arange(len(label)), weight)
        many, few = (label[again], score[again]), (label, score)
        assert metrics.auc(*few, weight) == pytest.approx(metrics.auc(*many), nan_ok=True, abs=1e-15)
        for metric in (metrics.wauc, metrics.macro_auc):
            assert metric(*few, group, weight) == pytest.approx(metric(*many, group[again]), nan_ok=True)
        assert metrics.gauc(*few, group, weight) == pytest.approx(metrics.gauc(*many, group[again]), nan_ok=True)
        for other in CALIBRATION.values():
            assert other(*few, weight) == pytest.approx(other(*many), nan_ok=True, abs=1e-12)

    @given(rows_with(FEW), st.integers(-20, 20))
    def test_the_unit_of_weights_does_not_matter(self, rows: Any, power: int) -> None:
        label, score, group, weight = rows
        weight = weight + 0.5
        for metric in (metrics.auc, *CALIBRATION.values()):
            assert metric(label, score, weight * 2.0**power) == pytest.approx(metric(label, score, weight))
        wauc = metrics.wauc(label, score, group, weight)
        assert metrics.wauc(label, score, group, weight * 2.0**power) == pytest.approx(wauc, nan_ok=True)


class TestBootstrap:
    def test_equals_resamples_written_out(self) -> None:
        label, a, domain, _ = world(120, 4)
        b = np.random.default_rng(5).random(120).round(1)
        value = metrics.bootstrap_difference(label, a, b, domain, num_samples=40, seed=3)
        random, draws = np.random.default_rng(3), []
        for _ in range(40):
            at = random.integers(0, 120, 120)
            draws.append(metrics.wauc(label[at], a[at], domain[at]) - metrics.wauc(label[at], b[at], domain[at]))
        low, high = np.quantile(draws, [0.025, 0.975])
        difference = metrics.wauc(label, a, domain) - metrics.wauc(label, b, domain)
        assert value == pytest.approx((difference, low, high), abs=1e-12)

    def test_equals_resamples_of_users_written_out(self) -> None:
        label, a, domain, _ = world(120, 4)
        b, user = a[::-1].copy(), np.arange(120) // 10 * 10**9
        value = metrics.bootstrap_difference(label, a, b, domain, "auc", num_samples=40, seed=3, user=user)
        random, draws = np.random.default_rng(3), []
        for _ in range(40):
            at = (random.integers(0, 12, 12)[:, None] * 10 + np.arange(10)).ravel()
            draws.append(metrics.auc(label[at], a[at]) - metrics.auc(label[at], b[at]))
        low, high = np.quantile(draws, [0.025, 0.975])
        assert value == pytest.approx((metrics.auc(label, a) - metrics.auc(label, b), low, high), abs=1e-12)

    def test_seed_and_sides(self) -> None:
        label, a, domain, _ = world()
        b = np.random.default_rng(5).random(500)
        one = metrics.bootstrap_difference(label, a, b, domain, num_samples=50)
        assert one == metrics.bootstrap_difference(label, a, b, domain, num_samples=50)
        assert one != metrics.bootstrap_difference(label, a, b, domain, num_samples=50, seed=1)
        back = metrics.bootstrap_difference(label, b, a, domain, num_samples=50)
        assert back == pytest.approx((-one.difference, -one.high, -one.low), abs=1e-12)
        assert 0 < one.low < one.difference < one.high

    def test_equal_order_is_no_difference(self) -> None:
        label, a, domain, _ = world()
        assert metrics.bootstrap_difference(label, a, a * 0.5, domain, num_samples=20) == (0.0, 0.0, 0.0)

    def test_interval_covers_the_true_difference(self) -> None:
        # Scores label * shift + noise have AUC Phi(shift / sqrt 2), so the truth is known.
        phi = NormalDist().cdf
        truth = phi(1.0 / math.sqrt(2)) - phi(0.6 / math.sqrt(2))
        random, covered, repeats, rows = np.random.default_rng(0), 0, 120, 400
        for repeat in range(repeats):
            label = np.arange(rows) % 2
            shared = random.normal(size=rows)
            a = label * 1.0 + 0.8 * shared + 0.6 * random.normal(size=rows)
            b = label * 0.6 + 0.8 * shared + 0.6 * random.normal(size=rows)
            domain = np.arange(rows) // 200
            value = metrics.bootstrap_difference(label, a, b, domain, num_samples=100, seed=repeat)
            covered += value.low <= truth <= value.high
        # 95 % of 120 with a standard deviation of 2.4; a 90 % interval would reach the upper end in 1 of 50 runs only.
        assert 105 <= covered <= 120

    def test_rows_of_one_user_say_less(self) -> None:
        label, a, domain, _ = world(200, 2)
        b = np.random.default_rng(5).random(200)
        label, a, b, domain = (np.repeat(column, 16) for column in (label, a, b, domain))
        by_row = metrics.bootstrap_difference(label, a, b, domain)
        by_user = metrics.bootstrap_difference(label, a, b, domain, user=np.repeat(np.arange(200), 16))
        ratio = (by_user.high - by_user.low) / (by_row.high - by_row.low)
        assert ratio == pytest.approx(4, rel=0.25)  # sixteen copies carry the knowledge of one

    def test_resamples_without_a_class_are_left_out(self) -> None:
        value = metrics.bootstrap_difference([0, 1], [0.1, 0.9], [0.9, 0.1], [0, 0], num_samples=30)
        assert value == (1.0, 1.0, 1.0)
        nothing = metrics.bootstrap_difference([1, 1], [0.1, 0.9], [0.9, 0.1], [0, 0], num_samples=5)
        assert all(map(math.isnan, nothing))

    def test_bad_options(self) -> None:
        with pytest.raises(ConfigError, match=r"metric is not known.*'wuac'.*Did you mean 'wauc'"):
            metrics.bootstrap_difference([0, 1], [0, 1], [0, 1], [0, 0], metric="wuac")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="num_samples must be at least 1"):
            metrics.bootstrap_difference([0, 1], [0, 1], [0, 1], [0, 0], num_samples=0)
        with pytest.raises(DataError, match="user must be as long as label"):
            metrics.bootstrap_difference([0, 1], [0, 1], [0, 1], [0, 0], user=[0])


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label": [], "probability": []}, "at least one row"),
            ({"label": [[0, 1]], "probability": [[0.1, 0.2]]}, "one axis"),
            ({"label": [0, 2]}, r"label must be 0 or 1. Received: \[2\].*1 of 2 rows.*\[1\]"),
            ({"label": [math.nan, 1]}, "label must be 0 or 1"),
            ({"label": [0, 1, 1]}, r"probability must be as long as label, \(3,\). Received: \(2,\)"),
            ({"probability": [math.nan, 0.2]}, r"probability must not be NaN.*the first of them \[0\]"),
            ({"weight": [1.0]}, "weight must be as long"),
            ({"weight": [1.0, -1.0]}, "weight must be finite and not negative"),
            ({"weight": [1.0, math.inf]}, "weight must be finite"),
            ({"weight": [math.nan, 1.0]}, "weight must be finite"),
        ],
    )
    def test_rows_that_cannot_be_used(self, change: dict[str, Any], message: str) -> None:
        rows = {"label": [0, 1], "probability": [0.1, 0.2], **change}
        for metric in (metrics.auc, metrics.log_loss, metrics.expected_calibration_error):
            with pytest.raises(DataError, match=message):
                metric(**rows)

    def test_logits_are_no_probabilities(self) -> None:
        assert metrics.auc([0, 1], [-3.0, 3.0]) == 1.0
        for metric in CALIBRATION.values():
            with pytest.raises(DataError, match=r"probability must be in 0..1"):
                metric([0, 1], [-3.0, 3.0])

    @pytest.mark.parametrize(
        ("group", "num_groups", "message"),
        [
            ([0, 3], 3, r"group must be in 0..2. Received: \[3\]"),
            ([-1, 0], None, r"group must be in 0..0. Received: \[-1\]"),
            ([0], 1, "group must be as long"),
            ([0.0, 1.0], 2, "group must be integers"),
        ],
    )
    def test_groups_that_cannot_be_used(self, group: list[Any], num_groups: int | None, message: str) -> None:
        with pytest.raises(DataError, match=message):
            metrics.auc_by_group([0, 1], [0.1, 0.2], group, num_groups)

    def test_domains_and_users_that_cannot_be_used(self) -> None:
        with pytest.raises(DataError, match="must be integers"):
            metrics.wauc([0, 1], [0.1, 0.2], ["app", "web"])
        with pytest.raises(DataError, match="as long as label"):
            metrics.wauc([0, 1], [0.1, 0.2], [0])
        with pytest.raises(DataError, match="user must be as long as label"):
            metrics.gauc_by_group([0, 1], [0.1, 0.2], [0], [0, 0])
        for metric in (metrics.wauc, metrics.gauc):
            with pytest.raises(DataError, match="at least one row"):
                metric([], [], [])

    def test_bad_bins(self) -> None:
        with pytest.raises(ConfigError, match=r"num_bins must be at least 1. Received: 0"):
            metrics.expected_calibration_error([0, 1], [0.1, 0.2], num_bins=0)
        with pytest.raises(ConfigError, match=r"bins is not known.*Did you mean 'equal_width'"):
            metrics.expected_calibration_error([0, 1], [0.1, 0.2], bins="equalwidth")  # type: ignore[arg-type]


def auc_of_trapezoid(label: Any, probability: Any, num_thresholds: int) -> float:
    """Keras' estimate step by step: rates at each threshold, then the area under the lines between them."""
    inner = [(i + 1) / (num_thresholds - 1) for i in range(num_thresholds - 2)]
    hits, alarms = [], []
    for threshold in [-1e-7, *inner, 1 + 1e-7]:
        says_yes = probability > threshold
        hits.append(says_yes[label == 1].mean())
        alarms.append(says_yes[label == 0].mean())
    lines = range(num_thresholds - 1)
    return float(sum((alarms[i] - alarms[i + 1]) * (hits[i] + hits[i + 1]) / 2 for i in lines))


class TestThresholds:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.lists(
            st.tuples(st.booleans(), st.floats(0, 1) | st.integers(0, 20).map(lambda i: i / 20)),
            min_size=2,
            max_size=40,
        ),
        num_thresholds=st.sampled_from([3, 5, 21, 500]),
    )
    def test_it_is_the_trapezoid(self, rows: list[tuple[bool, float]], num_thresholds: int) -> None:
        label = np.array([0, 1, *(int(one) for one, _ in rows)])
        probability = np.array([0.3, 0.6, *(p for _, p in rows)])
        value = metrics.auc_by_thresholds(label, probability, num_thresholds=num_thresholds)
        assert value == pytest.approx(auc_of_trapezoid(label, probability, num_thresholds), abs=1e-12)

    def test_spread_scores_lose_nothing_and_squeezed_ones_a_lot(self) -> None:
        label, probability, domain, weight = world(20000, 4, decimals=None)
        exact = metrics.auc(label, probability, weight)
        assert metrics.auc_by_thresholds(label, probability, weight) == pytest.approx(exact, abs=1e-5)
        squeezed = metrics.at_thresholds(0.5 + probability * 1e-4)
        assert metrics.auc(label, squeezed) == 0.5
        assert metrics.wauc(label, metrics.at_thresholds(probability), domain) == pytest.approx(
            metrics.wauc(label, probability, domain), abs=1e-4
        )

    def test_what_cannot_be_used(self) -> None:
        with pytest.raises(DataError, match=r"probability must be in 0..1"):
            metrics.at_thresholds([0.2, 1.2])
        with pytest.raises(ConfigError, match="num_thresholds must be at least 3"):
            metrics.auc_by_thresholds([0, 1], [0.2, 0.3], num_thresholds=2)
