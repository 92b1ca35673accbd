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
    live, other = said((1, 1, 1), rows=120), said((1.05, 1.05, 1.05), rows=120)
    assert judge(live, other, DOMAINS, Limits(max_fall=0.0, z=4)).passed
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
    with pytest.raises(ConfigError, match="at least 0"):
        Limits(max_fall=-1)
