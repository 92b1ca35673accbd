from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domlora.errors import DataError, EngineError
from domlora.evaluation import metrics
from domlora.evaluation.evaluate import Predictions, Table, by_domain, predict
from domlora.features.batch import Batch


class Click(nn.Module):
    """A model with what evaluation mode must switch off, and a part that stays switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.inference = torch.is_inference_mode_enabled()
        logit: Tensor = self.linear(self.dropout(self.norm(dense))).squeeze(1)
        return logit + domain + ids[:, 0]


class Fixed(nn.Module):
    """Answers what it was given."""

    def __init__(self, logit: Tensor) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, *_: Tensor) -> Tensor:
        return self.logit


def batch(num_rows: int, seed: int = 0, **columns: Any) -> Batch:
    random = torch.Generator().manual_seed(seed)
    rows = Batch(
        ids=torch.randint(0, 3, (num_rows, 2), generator=random),
        dense=torch.randn(num_rows, 3, generator=random),
        domain=torch.randint(0, 3, (num_rows,), generator=random),
        label=torch.randint(0, 2, (num_rows,), generator=random).float(),
    )
    return rows._replace(**columns)


def predictions(num_rows: int = 900, num_domains: int = 3, **columns: Any) -> Predictions:
    random = np.random.default_rng(0)
    probability = random.random(num_rows)
    label = (random.random(num_rows) < probability).astype(np.float32)
    return Predictions(label, probability, random.integers(0, num_domains, num_rows))._replace(**columns)


class TestPredict:
    def test_probabilities_are_the_models_own(self) -> None:
        model, batches = Click().eval(), [batch(5), batch(3, seed=1)]
        answer = predict(model, iter(batches))
        with torch.no_grad():
            logit = torch.cat([model(b.ids, b.dense, b.domain) for b in batches])
        np.testing.assert_array_equal(answer.probability, torch.sigmoid(logit.double()).numpy())
        np.testing.assert_array_equal(answer.label, torch.cat([b.label for b in batches]))
        np.testing.assert_array_equal(answer.domain, torch.cat([b.domain for b in batches]))
        assert [c.dtype for c in answer[:3]] == [np.float32, np.float64, np.int64]
        assert answer.weight is None
        assert answer.user is None

    def test_weights_and_users_come_along(self) -> None:
        weight, user = torch.rand(5), torch.arange(5)
        answer = predict(Click(), [batch(5, weight=weight, user=user)])
        np.testing.assert_array_equal(answer.weight, weight)
        np.testing.assert_array_equal(answer.user, user)

    def test_every_submodule_gets_its_mode_back(self) -> None:
        model = Click().train()
        model.norm.eval()
        statistics = model.norm.running_mean.clone()  # type: ignore[union-attr]
        one, two = (predict(model, [batch(50)]) for _ in range(2))
        np.testing.assert_array_equal(one.probability, two.probability)
        assert model.inference
        assert [m.training for m in (model, model.linear, model.dropout, model.norm)] == [True, True, True, False]
        assert torch.equal(model.norm.running_mean, statistics)  # type: ignore[arg-type]

    def test_modes_come_back_after_an_error_too(self) -> None:
        model = Click().train()
        with pytest.raises(RuntimeError):
            predict(model, [batch(4, dense=torch.zeros(4, 99))])
        assert model.training
        assert model.dropout.training

    def test_half_precision_and_large_logits(self) -> None:
        logit = torch.tensor([20.0, 30.0, -800.0, 800.0], dtype=torch.bfloat16)
        answer = predict(Fixed(logit), [batch(4)])
        np.testing.assert_allclose(answer.probability, [1 / (1 + math.exp(-20)), 1 / (1 + math.exp(-30)), 0, 1])
        assert answer.probability[0] < answer.probability[1] < 1

    @pytest.mark.parametrize("batches", [[], [batch(0)]])
    def test_no_rows(self, batches: list[Batch]) -> None:
        with pytest.raises(DataError, match="at least one row"):
            predict(Click(), batches)

    def test_nan_says_which_rows(self) -> None:
        logit = torch.tensor([0.0, math.nan, 0.0, math.nan])
        with pytest.raises(EngineError, match=r"must not be NaN.*4 of 8 rows.*\[1, 3, 5, 7\]"):
            predict(Fixed(logit), [batch(4), batch(4)])

    def test_a_column_of_logits_is_refused(self) -> None:
        with pytest.raises(EngineError, match=r"one logit a row, \(4,\). Received: \(4, 1\)"):
            predict(Fixed(torch.zeros(4, 1)), [batch(4)])

    @pytest.mark.parametrize("column", ["weight", "user"])
    def test_a_column_in_some_batches_only(self, column: str) -> None:
        columns: dict[str, Any] = {column: torch.ones(4)}
        with pytest.raises(DataError, match=f"all batches have {column} or none. Received: '1 of 2 batches'"):
            predict(Click(), [batch(4)._replace(**columns), batch(4)])


class TestByDomain:
    def test_a_line_is_the_domain_alone(self) -> None:
        random = np.random.default_rng(1)
        answer = predictions(user=random.integers(0, 40, 900), weight=random.random(900).astype(np.float32))
        table = by_domain(answer, ["app", "web", "mail"], num_bins=5)
        assert [row.name for row in table.domains] == ["app", "web", "mail"]
        for d, row in enumerate(table.domains):
            label, probability, _, weight, user = (c[answer.domain == d] for c in answer if c is not None)
            assert (row.rows, row.positives) == (len(label), label.sum())
            assert row.click_rate == pytest.approx(np.average(label, weights=weight))
            assert row.auc == pytest.approx(metrics.auc(label, probability, weight))
            assert row.log_loss == pytest.approx(metrics.log_loss(label, probability, weight))
            assert row.normalized_entropy == pytest.approx(metrics.normalized_entropy(label, probability, weight))
            assert row.pcoc == pytest.approx(metrics.predicted_over_observed(label, probability, weight))
            ece = metrics.expected_calibration_error(label, probability, weight, num_bins=5)
            assert row.ece == pytest.approx(ece)
            assert row.gauc == pytest.approx(metrics.gauc(label, probability, user, weight).value)
            assert row.status == "scored"

    def test_totals(self) -> None:
        answer = predictions(user=np.random.default_rng(1).integers(0, 40, 900))
        table = by_domain(answer, ["app", "web", "mail"])
        pair = answer.label, answer.probability
        expected = {
            "wauc": sum(row.rows * row.auc for row in table.domains) / 900,
            "macro_auc": sum(row.auc for row in table.domains) / 3,
            "auc": metrics.auc(*pair),
            "gauc": metrics.gauc(*pair, answer.user).value,  # type: ignore[arg-type]
            "log_loss": metrics.log_loss(*pair),
            "normalized_entropy": metrics.normalized_entropy(*pair),
            "pcoc": metrics.predicted_over_observed(*pair),
            "ece": metrics.expected_calibration_error(*pair),
            "num_domains_scored": 3,
            "num_domains_one_class": 0,
        }
        assert table.summary == pytest.approx(expected)
        assert list(table.summary) == list(expected)
        assert table.overall.rows == 900
        assert table.gauc_coverage == metrics.gauc(*pair, answer.user).coverage  # type: ignore[arg-type]

    def test_one_class_empty_and_unknown_domains(self) -> None:
        label = np.array([0, 1, 0, 0, 1, 0], np.float32)
        probability = np.array([0.2, 0.8, 0.5, 0.5, 0.1, 0.9])
        table = by_domain(Predictions(label, probability, np.array([0, 0, 2, 2, -1, -1])), ["app", "web", "mail"])
        names = [(row.name, row.rows, row.status) for row in table.domains]
        assert names == [
            ("app", 2, "scored"),
            ("web", 0, "no rows"),
            ("mail", 2, "one class"),
            ("(unknown)", 2, "scored"),
        ]
        assert (table.num_domains_scored, table.num_domains_one_class) == (2, 1)
        assert table.wauc == table.macro_auc == 0.5  # app 1, unknown 0, each of two rows
        text = table.to_markdown()
        assert "one class" in text
        assert "no rows" in text

    def test_no_line_for_unknown_domains_when_there_are_none(self) -> None:
        assert len(by_domain(predictions(), ["app", "web", "mail"]).domains) == 3

    def test_nothing_can_be_scored(self) -> None:
        table = by_domain(
            Predictions(np.array([1, 0], np.float32), np.array([0.5, 0.5]), np.array([0, 1])), ["app", "web"]
        )
        assert math.isnan(table.wauc)
        assert math.isnan(table.macro_auc)
        assert table.num_domains_one_class == 2
        assert table.summary["auc"] == 0.5

    def test_without_users_there_is_no_gauc(self) -> None:
        table = by_domain(predictions(), ["app", "web", "mail"])
        assert math.isnan(table.summary["gauc"])
        assert math.isnan(table.gauc_coverage)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"domain": np.full(900, 3)}, r"domain must be in 0..2, or -1.*Received: \[3\].*900 rows"),
            ({"domain": np.full(900, -2)}, r"Received: \[-2\]"),
            ({"domain": np.zeros(3, dtype=np.int64)}, "group must be as long as label"),
            ({"label": np.full(900, 0.5, dtype=np.float32)}, "label must be 0 or 1"),
            ({"probability": np.full(900, np.nan)}, "probability must not be NaN"),
            ({"probability": np.full(900, 1.5)}, "probability must be in 0..1"),
        ],
    )
    def test_bad_predictions(self, columns: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            by_domain(predictions(**columns), ["app", "web", "mail"])

    def test_empty_predictions(self) -> None:
        nothing = Predictions(np.empty(0, np.float32), np.empty(0), np.empty(0, np.int64))
        with pytest.raises(DataError, match="at least one row"):
            by_domain(nothing, ["app"])


class TestTable:
    @pytest.fixture
    def table(self) -> Table:
        label, probability = np.array([0, 1, 0, 1, 1, 0], np.float32), np.array([0.25, 0.75, 0.75, 0.25, 0.5, 0.5])
        return by_domain(Predictions(label, probability, np.array([0, 0, 0, 0, 1, 1])), ["app|web", "mail", "empty"])

    def test_dict_is_json_without_nan(self, table: Table) -> None:
        plain = json.loads(json.dumps(table.to_dict(), allow_nan=False))
        assert plain["domains"][0]["auc"] == 0.5
        assert plain["domains"][2] | {"name": ""} == {
            **dict.fromkeys(plain["domains"][2]),
            "name": "",
            "rows": 0,
            "positives": 0,
            "status": "no rows",
        }
        assert plain["summary"].keys() == {*table.summary, "gauc_coverage"}
        assert plain["summary"]["gauc"] is None
        assert plain["overall"]["rows"] == 6

    def test_markdown(self, table: Table) -> None:
        lines = table.to_markdown().splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        cells = [[cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]] for line in lines]
        assert cells[0] == ["domain", "rows", "positives", "click rate", "AUC", "GAUC", "log loss", "NE", "PCOC", "ECE"]
        assert cells[2][:6] == ["app/web", "4", "2", "0.5000", "0.5000", ""]
        assert cells[3] == ["mail", "2", "1", "0.5000", "0.5000", "", "0.6931", "1.0000", "1.0000", "0.0000"]
        assert cells[4] == ["empty", "0", "0", "", "no rows", "", "", "", "", ""]
        assert [row[0] for row in cells[5:]] == ["(macro mean)", "(WAUC)", "(all)"]

    def test_a_table_is_a_value(self, table: Table) -> None:
        with pytest.raises(AttributeError):
            table.wauc = 1.0  # type: ignore[misc]
