from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domlora.adapters.bank import adapter_parameters, base_state
from domlora.bundle import Bundle
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, DataError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training import crossfit as module
from domlora.training.crossfit import crossfit, fold_of
from domlora.training.optimizers import parameter_groups
from domlora.training.stages import CrossFit, Recipe, pretrain

IDS, DOMAINS, FOLDS = 40, 3, 3
SCHEMA = Schema((Feature("user", num_ids=IDS), Feature("item", num_ids=IDS)), domains=("a", "b", "c"))
MODEL = {"name": "deepfm", "embedding_dim": 4, "hidden_units": [8, 4], "dropout": 0.2}
STAGE: dict[str, Any] = {
    "fit": {"batch_size": 128, "max_epochs": 2, "patience": 4, "evaluations_per_epoch": 2},
    "optimizer": {kind: {"lr": 0.02} for kind in ("tables", "dense", "adapters")},
}


def rows(count: int, seed: int) -> Batch:
    """Labels of an id's taste, of the domain and of noise."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, IDS, (count, 2), generator=random)
    domain = torch.randint(0, DOMAINS, (count,), generator=random)
    taste = torch.randn(IDS, generator=torch.Generator().manual_seed(0))
    logit = taste[ids[:, 0]] * (domain - 1) + taste[ids[:, 1]]
    label = (torch.rand(count, generator=random) < logit.sigmoid()).float()
    return Batch(ids, torch.zeros(count, 0), domain, label)


@pytest.fixture(scope="module")
def clicks() -> Dataset:
    return Dataset.from_batches(SCHEMA, {"train": rows(1200, 1), "valid": rows(600, 2), "test": rows(600, 3)})


def recipe(**crossed: Any) -> Recipe:
    table = {"adapter": {"rank": 2}, "pretrain": STAGE, "adapt": STAGE, "auto": {"min_gain": 0.0}}
    return parse(Config, {"train": {**table, "crossfit": {"tables": STAGE, **crossed}}}).train


@pytest.fixture
def base(clicks: Dataset) -> nn.Module:
    return pretrain(clicks, MODEL, recipe())[0]


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules that the steps of the adapters ran."""
    made: list[Any] = []

    class Kept(module._Crossed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "_Crossed", Kept)
    return made


def with_flipped_fold(data: Dataset, fold: int) -> Dataset:
    splits = {split: data.read(split) for split in ("train", "valid", "test")}
    train = splits["train"]
    flipped = torch.where(fold_of(train.ids, FOLDS) == fold, 1 - train.label, train.label)
    return Dataset.from_batches(SCHEMA, {**splits, "train": train._replace(label=flipped)})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fold_s_tables_never_saw_its_labels(clicks: Dataset, base: nn.Module, crossed: list[Any]) -> None:
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    crossfit(base, clicks, MODEL, recipe())
    again = build_model(schema=SCHEMA, **MODEL)
    again.load_state_dict(start)
    crossfit(again, with_flipped_fold(clicks, 1), MODEL, recipe())
    before, after = (each.tables for each in crossed)
    assert sorted(before) == sorted(after) == list(range(FOLDS))
    assert [same(before[k], after[k]) for k in range(FOLDS)] == [False, True, False]


def test_tables_of_the_folds_go_where_the_model_goes(clicks: Dataset, base: nn.Module, crossed: list[Any]) -> None:
    crossfit(base, clicks, MODEL, recipe())
    (stepped,) = crossed
    stepped.to("meta")
    assert {tensor.device.type for its in stepped.tables.values() for tensor in its.values()} == {"meta"}


def test_a_row_is_scored_with_the_tables_of_its_fold(clicks: Dataset, base: nn.Module, crossed: list[Any]) -> None:
    crossfit(base, clicks, MODEL, recipe())
    batch, (stepped,) = clicks.read("train").take(slice(0, 64)), crossed
    fold, logit = fold_of(batch.ids, FOLDS), stepped.eval()(batch.ids, batch.dense, batch.domain)
    assert len(fold.unique()) == FOLDS
    own = base.state_dict()
    for k in range(FOLDS):
        base.load_state_dict({**own, **stepped.tables[k]})
        alone = base(batch.ids, batch.dense, batch.domain)
        torch.testing.assert_close(logit[fold == k], alone[fold == k])
        assert not torch.allclose(logit[fold != k], alone[fold != k])


def test_the_base_keeps_its_bits_and_folds_leave_no_trace(clicks: Dataset, base: nn.Module, tmp_path: Path) -> None:
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = crossfit(base, clicks, MODEL, recipe())
    assert found.best_epoch > 0
    assert same(base_state(base), start)
    assert {name for name in base.state_dict() if name.replace(".base.", ".") not in start} == {
        name for name, _ in adapter_parameters(base)
    }
    assert any(bank.any() for name, bank in adapter_parameters(base) if name.endswith("lora_B"))
    Bundle(base, MODEL, clicks.encoder).save(tmp_path / "bundle")
    assert same(Bundle.open(tmp_path / "bundle").model.state_dict(), base.state_dict())


def test_all_but_tables_is_the_base_s(clicks: Dataset, base: nn.Module, crossed: list[Any]) -> None:
    tables = {id(p) for p in parameter_groups(base)["tables"]}
    names = {name for name, p in base.named_parameters() if id(p) in tables}
    crossfit(base, clicks, MODEL, recipe())
    assert all(set(each) == names == {"embedding.weight", "linear.table.weight"} for each in crossed[0].tables.values())
    one, other = (crossed[0].tables[k]["embedding.weight"] for k in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("freeze", [True, False])
def test_given_vectors_stay_unless_they_are_learned(clicks: Dataset, crossed: list[Any], freeze: bool) -> None:
    options = {**MODEL, "pretrained": {"item": torch.randn(IDS, 4)}, "freeze_pretrained": freeze}
    base = pretrain(clicks, options, recipe())[0]
    crossfit(base, clicks, options, recipe())
    assert ("embedding.tables.1.weight" in crossed[0].tables[0]) != freeze


def test_learned_vectors_want_their_start(clicks: Dataset) -> None:
    options = {**MODEL, "pretrained": {"item": torch.randn(IDS, 4)}, "freeze_pretrained": False}
    base = pretrain(clicks, options, recipe())[0]
    with pytest.raises(ConfigError, match="vectors that learned tables start from"):
        crossfit(base, clicks, {**options, "pretrained": {"item": 4}}, recipe())


@pytest.mark.parametrize("rule", ["lazy_adam", "rowwise_adagrad"])
def test_lazy_rules_move_the_same_parts(clicks: Dataset, base: nn.Module, rule: str) -> None:
    lazy = {kind: {"name": rule, "lr": 0.02} for kind in ("tables", "adapters")}
    stage = {**STAGE, "optimizer": lazy}
    table = {"adapter": {"rank": 2}, "adapt": stage, "auto": {"min_gain": 0.0}, "crossfit": {"tables": stage}}
    assert crossfit(base, clicks, MODEL, parse(Config, {"train": table}).train).best_epoch > 0


def test_a_run_goes_on_only_with_its_folds(clicks: Dataset, base: nn.Module, tmp_path: Path) -> None:
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    crossfit(base, clicks, MODEL, recipe(), checkpoint=tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"fold-0", "fold-1", "fold-2", "adapters"}
    again = build_model(schema=SCHEMA, **MODEL)
    again.load_state_dict(start)
    with pytest.raises(ConfigError, match="goes on only with the data"):
        crossfit(again, clicks, MODEL, recipe(folds=2), checkpoint=tmp_path)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 1 << 20))
def test_a_fold_is_a_matter_of_the_row_alone(seed: int, slots: int, folds: int) -> None:
    ids = torch.randint(0, 1 << 31, (20, slots), generator=torch.Generator().manual_seed(seed))
    found = fold_of(ids, folds)
    assert found.shape == (20,)
    assert ((found >= 0) & (found < folds)).all()
    assert torch.equal(fold_of(ids.flip(0), folds), found.flip(0))
    assert torch.equal(torch.cat([fold_of(row.unsqueeze(0), folds) for row in ids]), found)


@pytest.mark.parametrize("folds", [2, 3, 7, 16])
def test_folds_are_even_also_among_the_rows_of_one_id(folds: int) -> None:
    ids = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    shares = torch.bincount(fold_of(ids, folds), minlength=folds) * folds / len(ids)
    assert ((shares - 1).abs() < 0.05).all()
    for slot in (0, 1):
        counts = torch.bincount(fold_of(ids[ids[:, slot] == 5], folds), minlength=folds)
        assert counts.min() > 300 / folds / 2


@pytest.mark.parametrize("folds", [1, 0, -3, (1 << 20) + 1])
def test_folds_are_checked(folds: int) -> None:
    with pytest.raises(ConfigError, match=f"folds must be from 2 to 1048576. Received: {folds}") as caught:
        CrossFit(folds)
    assert "\n" not in str(caught.value)


def test_rows_of_one_fold_are_refused(clicks: Dataset, base: nn.Module) -> None:
    splits = {split: clicks.read(split) for split in ("train", "valid")}
    alike = splits["train"]._replace(ids=torch.full_like(splits["train"].ids, 2))
    with pytest.raises(DataError, match="two folds at least"):
        crossfit(base, Dataset.from_batches(SCHEMA, {**splits, "train": alike}), MODEL, recipe())


def test_what_cannot_be_adapted_is_told_before_tables_are_trained(clicks: Dataset, base: nn.Module) -> None:
    moving = replace(recipe(), adapt=replace(recipe().adapt, moving=("embedding.*",)))
    with pytest.raises(ConfigError, match="stands still"):
        crossfit(base, clicks, MODEL, moving)
    crossfit(base, clicks, MODEL, recipe())
    with pytest.raises(ConfigError, match="adapters already"):
        crossfit(base, clicks, MODEL, recipe())
