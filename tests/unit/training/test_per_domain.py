"""Separate models, and finetuned copies of a base."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, DataError
from domlora.evaluation.evaluate import predict
from domlora.features.batch import Batch
from domlora.models.build import build_model
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.per_domain import finetune, separate
from domlora.training.rows import OneDomain
from domlora.training.stages import Recipe, Stage, pretrain
from domlora.training.validation import scores_of

MODEL: dict[str, Any] = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.3}
STAGE = Stage(FitOptions(batch_size=64, max_epochs=4, patience=9), OptimizerOptions(*[Rule(lr=0.02)] * 3))
MAD = Stage(STAGE.fit, OptimizerOptions(*[Rule(lr=0.5)] * 3))


def base_of(data: Dataset) -> nn.Module:
    model, _ = pretrain(data, MODEL, Recipe(pretrain=STAGE))
    return model


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def without(data: Dataset, *, train: int | None = None, valid: int | None = None) -> Dataset:
    """No training rows of one domain, no clicks among the validation rows of another."""
    rows, judged = data.read("train"), data.read("valid")
    label = judged.label if valid is None else torch.where(judged.domain == valid, 0.0, judged.label)
    splits = {"train": rows.take(rows.domain != (-9 if train is None else train))}
    splits |= {"valid": judged._replace(label=label), "test": data.read("test")}
    return Dataset.from_batches(data.schema, splits)


def unknown(rows: Batch) -> Batch:
    return rows._replace(domain=torch.full_like(rows.domain, -1))


def logits(model: nn.Module, rows: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(rows.ids, rows.dense, rows.domain)
    return found


def test_a_separate_model_is_that_of_its_rows_alone(data: Dataset) -> None:
    model, options, found = separate(data, MODEL, STAGE)
    assert options == {**MODEL, "per_domain": True, "unknown_domains": "mean"}
    for domain in range(3):
        alone, its = pretrain(OneDomain(data, domain), MODEL, Recipe(pretrain=STAGE))
        assert same(state(model.copies[domain]), state(alone))
        rows = OneDomain(data, domain).read("test")
        torch.testing.assert_close(logits(model, rows), logits(alone, rows))
        assert its.best_epoch > 0
    assert len(found.history) == 1


def test_unknown_domains_get_the_mean_of_separate_models(data: Dataset) -> None:
    model, _, _ = separate(data, MODEL, STAGE)
    rows = unknown(data.read("test").take(slice(0, 50)))
    mean = torch.stack([logits(each, rows) for each in model.copies]).mean(0)
    torch.testing.assert_close(logits(model, rows), mean)


def test_the_fit_of_separate_models_is_that_of_the_whole(data: Dataset) -> None:
    seen = []
    model, _, found = separate(data, MODEL, STAGE, on_progress=seen.append)
    entry = found.history[0]
    assert {name: entry[name] for name in ("wauc", "macro_auc", "log_loss")} == scores_of(model, data)
    assert found.best_value == entry["wauc"]
    parts = [pretrain(OneDomain(data, domain), MODEL, Recipe(pretrain=STAGE))[1] for domain in range(3)]
    sizes = [OneDomain(data, domain).num_rows("train") for domain in range(3)]
    total = sum(size * part.best_epoch for size, part in zip(sizes, parts, strict=True)) / 900
    assert found.best_epoch == entry["epoch"] == pytest.approx(total)
    at_best = [next(e["loss"] for e in p.history if e["epoch"] == p.best_epoch) for p in parts]
    mean = sum(size * loss for size, loss in zip(sizes, at_best, strict=True)) / 900
    assert entry["loss"] == pytest.approx(mean)
    assert {progress.total_rows for progress in seen} == set(sizes)


def test_a_domain_that_cannot_be_trained_gets_what_unknown_domains_get(data: Dataset) -> None:
    whole, _, _ = separate(data, MODEL, STAGE)
    for poor in (without(data, train=1), without(data, valid=1)):
        model, _, _ = separate(poor, MODEL, STAGE)
        assert model.own.tolist() == [True, False, True]
        assert all(same(state(model.copies[d]), state(whole.copies[d])) for d in (0, 2))
        rows = OneDomain(data, 1).read("test")
        mean = torch.stack([logits(model.copies[d], rows) for d in (0, 2)]).mean(0)
        torch.testing.assert_close(logits(model, rows), mean)


def test_no_domain_that_can_be_trained_is_a_user_error(data: Dataset) -> None:
    rows = data.read("train")
    splits = {"train": unknown(rows), "valid": data.read("valid")}
    with pytest.raises(DataError, match="a domain must have training rows"):
        separate(Dataset.from_batches(data.schema, splits), MODEL, STAGE)


def test_few_rows_are_validated_as_often_as_they_have_batches(data: Dataset) -> None:
    often = replace(STAGE, fit=replace(STAGE.fit, batch_size=256, evaluations_per_epoch=3))
    model, _, _ = separate(data, MODEL, often)  # a domain has 300 rows, two batches
    assert model.own.all()


# finetuning


def test_a_finetuned_domain_is_never_worse_than_the_base(data: Dataset) -> None:
    base = base_of(data)
    before = scores_of(base, data)
    model, options, found = finetune(base, data, MODEL, STAGE)
    assert options == {**MODEL, "per_domain": True, "unknown_domains": "base"}
    assert [entry["epoch"] for entry in found.history] == [0.0, found.best_epoch]
    assert found.history[0]["wauc"] == pytest.approx(before["wauc"], abs=1e-9)
    assert math.isnan(found.history[0]["loss"])
    assert found.best_value == found.history[1]["wauc"] > found.history[0]["wauc"]
    for domain in range(3):
        view = OneDomain(data, domain)
        assert scores_of(model, view)["wauc"] >= scores_of(base, view)["wauc"]


def test_unknown_domains_get_the_base(data: Dataset) -> None:
    base = base_of(data)
    before = state(base)
    model, _, _ = finetune(base, data, MODEL, STAGE)
    rows = unknown(data.read("test"))
    assert torch.equal(logits(model, rows), logits(base, rows))
    assert same(before, state(base))
    assert not same(before, state(model.copies[0]))


def test_finetuning_that_helps_nobody_gives_the_base_back(data: Dataset) -> None:
    base = base_of(data)
    model, _, found = finetune(base, data, MODEL, MAD)
    assert [entry["epoch"] for entry in found.history] == [0.0]
    assert (found.best_epoch, found.best_value) == (0.0, found.history[0]["wauc"])
    assert all(same(state(each), state(base)) for each in model.copies)


def test_a_domain_without_two_classes_keeps_the_base(data: Dataset) -> None:
    base = base_of(data)
    model, _, _ = finetune(base, without(data, valid=2), MODEL, STAGE)
    assert model.own.tolist() == [True, True, False]
    rows = OneDomain(data, 2).read("test")
    assert torch.equal(logits(model, rows), logits(base, rows))


def test_moving_names_what_moves(data: Dataset) -> None:
    base = base_of(data)
    model, _, found = finetune(base, data, MODEL, replace(STAGE, moving=("tower.1.*",)))
    moved = {
        name
        for each in model.copies
        for name, tensor in each.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    }
    assert found.best_epoch > 0
    assert moved == {"tower.1.weight", "tower.1.bias"}


def test_the_base_may_be_frozen(data: Dataset) -> None:
    base = base_of(data).requires_grad_(False)
    model, _, found = finetune(base, data, MODEL, STAGE)
    assert found.best_epoch > 0
    assert all(p.requires_grad for p in model.copies.parameters())


def test_a_gain_that_is_none_over_all_rows_leaves_the_base(data: Dataset, monkeypatch: Any) -> None:
    base, measured = base_of(data), scores_of

    def worse_once(model: nn.Module, rows: Any) -> dict[str, float]:
        scores = measured(model, rows)
        trained = not same(state(model.copies[0]), state(base))
        return {**scores, "wauc": scores["wauc"] - trained}

    monkeypatch.setattr("domlora.training.per_domain.scores_of", worse_once)
    model, _, found = finetune(base, data, MODEL, STAGE)
    assert (found.best_epoch, found.best_value) == (0.0, found.history[0]["wauc"])
    assert all(same(state(each), state(base)) for each in model.copies)


def test_a_base_is_one_plain_model(data: Dataset) -> None:
    for base in (attach_(base_of(data), 3), separate(data, MODEL, STAGE)[0]):
        with pytest.raises(ConfigError, match="one model without adapters"):
            finetune(base, data, MODEL, STAGE)


# checkpoints


def test_a_domain_that_has_ended_leaves_its_best_weights_alone(data: Dataset, tmp_path: Path) -> None:
    separate(data, MODEL, STAGE, checkpoint=tmp_path / "run")
    folders = sorted((tmp_path / "run").iterdir())
    assert [folder.name for folder in folders] == ["domain-0", "domain-1", "domain-2"]
    weights = sum(p.numel() for p in build_model(schema=data.schema, **MODEL).parameters())
    for folder in folders:
        assert (folder / "tensors.safetensors").stat().st_size < 4 * weights + 2000


def test_a_run_that_had_ended_is_not_trained_again(data: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    first, _, expected = separate(data, MODEL, STAGE, checkpoint=tmp_path / "run")
    monkeypatch.setattr(torch.Tensor, "backward", None)
    again, _, found = separate(data, MODEL, STAGE, checkpoint=tmp_path / "run")
    assert same(state(first), state(again))
    assert found == expected


def test_a_checkpoint_of_other_options_is_refused(data: Dataset, tmp_path: Path) -> None:
    separate(data, MODEL, STAGE, checkpoint=tmp_path / "run")
    other = replace(STAGE, fit=replace(STAGE.fit, seed=5))
    with pytest.raises(ValueError, match="a run goes on only with the options it began with"):
        separate(data, MODEL, other, checkpoint=tmp_path / "run")


def test_figures_are_json(data: Dataset) -> None:
    _, _, found = separate(data, MODEL, STAGE)
    assert json.loads(json.dumps(found.history)) == found.history
    assert predict(separate(data, MODEL, STAGE)[0], data.batches("test", 100)).probability.size == 300
