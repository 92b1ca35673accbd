from __future__ import annotations

import json
import math

import numpy as np
import pytest

from domlora.errors import ConfigError, DataError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.gate import Limits, judge, remember
from domlora.evaluation.metrics import auc

DOMAINS = ("app", "web", "tv")


def said(noise: tuple[float, float, float], rows: int = 3000, seed: int = 1) -> Predictions:
    """Scores that see the label through more or less noise; the same labels for each noise."""
    dice = np.random.default_rng(seed)
    domain = np.repeat(np.arange(3), rows // 3)
    label = dice.integers(0, 2, rows).astype("f4")
    score = label + np.asarray(noise)[domain] * dice.standard_normal(rows)
    return Predictions(label, 1 / (1 + np.exp(-score)), domain)


def test_no_difference_passes() -> None:
    verdict = judge(said((1, 1, 1)), said((1, 1, 1)), DOMAINS)
    assert verdict.passed
    assert verdict.wauc.value == 0
    assert [row.status for row in verdict.domains] == ["passed"] * 3


def test_only_the_domain_that_falls_is_named() -> None:
    verdict = judge(said((1, 1, 1)), said((1, 3, 0.8)), DOMAINS)
    assert [row.status for row in verdict.domains] == ["passed", "fell", "passed"]
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith("web: AUC falls from")
    assert "fell" in verdict.to_markdown()
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["passed"] is False


def test_a_fall_within_chance_or_within_the_limit_passes() -> None:
    live, other = said((1, 1, 1), rows=600), said((1.05, 1.05, 1.05), rows=600)
    assert judge(live, other, DOMAINS, Limits(max_fall=0.0, z=20)).passed
    assert not judge(live, other, DOMAINS, Limits(max_fall=0.0, z=1)).passed
    live, other = said((1, 1, 1), rows=30_000), said((1.3, 1, 1), rows=30_000)
    assert not judge(live, other, DOMAINS).passed
    assert judge(live, other, DOMAINS, Limits(max_fall=0.5)).passed


def test_drift_is_seen_though_both_are_equally_bad() -> None:
    before = remember(said((0.5, 0.5, 0.5)), DOMAINS)
    today = said((0.5, 9, 0.5), seed=2)
    verdict = judge(today, today, DOMAINS, remembered=before)
    assert [row.status for row in verdict.domains] == ["passed", "drifted", "passed"]
    assert "look at the labels" in verdict.reasons[0]
    assert judge(today, today, DOMAINS).passed, "nothing is remembered"
    assert judge(today, said((0.5, 0.5, 0.5), seed=2), DOMAINS, remembered=before).passed, "new ids, and not the labels"


def test_too_few_rows_are_not_judged() -> None:
    few = said((1, 1, 1))
    one_class = few._replace(label=np.where(few.domain == 2, 1, few.label).astype("f4"))
    verdict = judge(one_class, one_class, (*DOMAINS, "radio"))
    assert [row.status for row in verdict.domains] == ["passed", "passed", "unjudged", "unjudged"]
    assert verdict.domains[3].num_rows == 0
    assert verdict.passed
    assert set(remember(one_class, DOMAINS)) == {"app", "web"}
    worse = said((1, 9, 1), rows=120)
    assert judge(said((1, 1, 1), rows=120), worse, DOMAINS).passed
    assert not judge(said((1, 1, 1), rows=120), worse, DOMAINS, Limits(min_rarer=5)).passed
    before = remember(said((0.5, 0.5, 0.5), rows=120), DOMAINS)
    today = said((0.5, 9, 0.5), seed=2)
    assert judge(today, today, DOMAINS, remembered=before).passed, "what is remembered is chance"


@pytest.mark.parametrize("least", [0, 1, 2])
def test_a_domain_of_one_class_is_never_judged(least: int) -> None:
    few = said((1, 1, 1))
    one_class = few._replace(label=np.where(few.domain == 2, 1, few.label).astype("f4"))
    verdict = judge(one_class, one_class, (*DOMAINS, "radio"), Limits(min_rarer=least))
    assert [row.status for row in verdict.domains] == ["passed", "passed", "unjudged", "unjudged"]


def test_reversed_labels_are_named_though_the_candidate_has_learned_them() -> None:
    rows = said((0.5, 0.5, 0.5))
    label = np.where(rows.domain == 1, 1 - rows.label, rows.label).astype("f4")
    live = rows._replace(label=label)
    learned = live._replace(probability=np.where(rows.domain == 1, 1 - rows.probability, rows.probability))
    for before in (None, remember(rows, DOMAINS)):
        verdict = judge(live, learned, DOMAINS, remembered=before)
        assert [row.status for row in verdict.domains] == ["passed", "reversed", "passed"]
        assert verdict.reasons[0].startswith("web: AUC of the live model is")
    coins = said((99, 99, 99), seed=4)
    assert judge(coins, coins, DOMAINS).passed, "a live model that knows nothing is not reversed"


def test_all_domains_together_may_fall_by_more_than_chance() -> None:
    live = said((1, 1, 1))
    noise = 0.4 * np.random.default_rng(10).standard_normal(3000)
    other = live._replace(probability=1 / (1 + np.exp(noise) * (1 / live.probability - 1)))
    limits = Limits(z=3.0)
    verdict = judge(live, other, DOMAINS, limits)
    assert all(row.status == "passed" for row in verdict.domains), "each is within its chance"
    (reason,) = verdict.reasons
    assert reason.startswith("all judged domains: WAUC falls by")
    assert judge(other, live, DOMAINS, limits).passed


def test_clicks_that_are_no_longer_recorded_are_a_warning() -> None:
    rows = said((1, 1, 1))
    rows = rows._replace(probability=1 / (1 + np.exp(0.5) * (1 / rows.probability - 1)))  # calibrated
    assert judge(rows, rows, DOMAINS).warnings == []
    silent = rows._replace(label=np.where(rows.domain == 1, 0, rows.label).astype("f4"))
    verdict = judge(silent, silent, DOMAINS)
    assert verdict.passed
    (warning,) = verdict.warnings
    assert warning == f"web: 0 clicks in 1,000 rows, and the candidate expects {verdict.domains[1].expected:.1f}"
    assert f"- warning: {warning}" in verdict.to_markdown()
    high = rows._replace(probability=np.where(rows.domain == 0, rows.probability**0.3, rows.probability))
    assert [line[:4] for line in judge(rows, high, DOMAINS).warnings] == ["app:"]
    assert judge(rows, high, DOMAINS, Limits(max_miscalibration=9.0)).warnings == []


def test_rows_that_judge_nothing_say_so() -> None:
    rows = said((1, 1, 1))
    silent = rows._replace(label=np.zeros_like(rows.label), probability=np.full_like(rows.probability, 1e-6))
    verdict = judge(silent, silent, DOMAINS)
    assert verdict.warnings == ["no domain has rows enough to be judged"]
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["wauc"] == [None, None]


def test_rows_of_no_domain_do_not_count() -> None:
    rows = said((1, 1, 1))
    strangers = rows._replace(domain=np.where(rows.domain == 0, -1, rows.domain))
    verdict = judge(strangers, strangers, DOMAINS)
    assert [row.num_rows for row in verdict.domains] == [0, 1000, 1000]


def test_what_is_remembered_is_the_auc() -> None:
    rows = said((1, 1, 1))
    known = remember(rows, DOMAINS)["web"]
    chosen = rows.domain == 1
    assert known["auc"] == pytest.approx(auc(rows.label[chosen], rows.probability[chosen]), abs=1e-12)
    repeated = [remember(said((1, 1, 1), seed=seed), DOMAINS)["web"]["auc"] for seed in range(60)]
    assert known["standard_error"] == pytest.approx(np.std(repeated, ddof=1), rel=0.35)


def test_calibration_is_told() -> None:
    rows = said((1, 1, 1))
    found = judge(rows, rows, DOMAINS).domains[0]
    chosen = rows.domain == 0
    assert found.pcoc == pytest.approx(rows.probability[chosen].sum() / rows.label[chosen].sum())
    assert math.isnan(judge(rows, rows, (*DOMAINS, "radio")).domains[3].pcoc)


def test_other_rows_and_limits_are_refused() -> None:
    with pytest.raises(DataError, match="same rows"):
        judge(said((1, 1, 1)), said((1, 1, 1), rows=300), DOMAINS)
    with pytest.raises(DataError, match="same rows"):
        judge(said((1, 1, 1)), said((1, 1, 1))._replace(label=said((1, 1, 1), seed=2).label), DOMAINS)
    with pytest.raises(ConfigError, match="at least 0"):
        Limits(max_fall=-1)
