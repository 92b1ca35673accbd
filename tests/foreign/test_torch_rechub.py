"""torch-rechub 0.9.0: its ranking models as they are, and its CTRTrainer on a model with adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from domlora.adapters.attach import attach_, freeze_
from domlora.adapters.bank import adapter_parameters, base_state

pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models import ranking
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

TOWER = {"dims": [16, 8], "dropout": 0.1}  # a BatchNorm after every layer comes with its MLP
MODELS = [
    *("wdl", "autoint", "dcn", "dcnv2", "dcnv2 mix", "dcnv2 stacked", "edcn"),
    *("fibinet all", "fibinet each", "fibinet", "deepfm"),
]


def domain_of(x: dict[str, Tensor]) -> Tensor:
    return x["domain"]


def batch(num_rows: int = 48) -> dict[str, Tensor]:
    return {
        "user": torch.randint(0, 10, (num_rows,)),
        "item": torch.randint(0, 7, (num_rows,)),
        "domain": (torch.arange(num_rows) % 3)[torch.randperm(num_rows)],
        "price": torch.randn(num_rows),
    }


def build(name: str) -> Any:
    # fresh features each time: they carry their embedding tables with them
    wide = RandomNormal(0, 0.3)  # its own 1e-4 makes every answer 0.5
    sizes = {"user": 10, "item": 7, "domain": 3}
    sparse = [SparseFeature(key, size, embed_dim=8, initializer=wide) for key, size in sizes.items()]
    dense = [DenseFeature("price")]
    kind, _, variant = name.partition(" ")
    if kind == "wdl":
        return ranking.WideDeep(sparse + dense, sparse + dense, TOWER)
    if kind == "autoint":
        return ranking.AutoInt(sparse, dense, num_layers=2, dropout=0.1, mlp_params=TOWER)
    if kind == "dcn":
        return ranking.DCN(sparse + dense, 2, TOWER)
    if kind == "dcnv2":
        structure = variant if variant == "stacked" else "parallel"
        mix = {"use_low_rank_mixture": variant == "mix", "low_rank": 4, "num_experts": 2}
        return ranking.DCNv2(sparse + dense, 2, TOWER, model_structure=structure, **mix)
    if kind == "edcn":
        return ranking.EDCN(sparse, 2, {"dropout": 0.1})
    if kind == "fibinet":
        return ranking.FiBiNet(sparse, TOWER, bilinear_type=f"field_{variant or 'interaction'}")
    return ranking.DeepFM(sparse + dense, sparse, TOWER)


@pytest.mark.parametrize("name", MODELS)
def test_law(law: Callable[..., None], name: str) -> None:
    law(build(name), batch(), domain_of)


# its own trainer


def clicks(x: dict[str, Tensor]) -> Tensor:
    """In domain 0 a high price is clicked, in domain 1 a low one, in domain 2 neither matters."""
    slope = torch.tensor([3.0, -3.0, 0.0])[x["domain"]]
    return torch.bernoulli(torch.sigmoid(slope * x["price"]))


def loaders(num_rows: int = 600) -> tuple[DataLoader[Any], DataLoader[Any]]:
    x = batch(num_rows)
    numpy = {name: column.numpy() for name, column in x.items()}
    train, valid, _ = DataGenerator(numpy, clicks(x).numpy()).generate_dataloader(split_ratio=[0.7, 0.3], batch_size=64)
    return train, valid


def trainer_of(model: Any, folder: Path, **options: Any) -> CTRTrainer:
    adam = {"lr": 1e-2, "weight_decay": 0.0}
    return CTRTrainer(model, optimizer_params=adam, n_epoch=6, device="cpu", model_path=str(folder), **options)


@pytest.mark.parametrize("name", ["wdl", "deepfm"])
def test_the_trainer_trains_adapters_alone(name: str, tmp_path: Path) -> None:
    train, valid = loaders()
    model = build(name)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    freeze_(attach_(model, 3, temperature=4, domain=domain_of))
    trainer = trainer_of(model, tmp_path, regularization_params={"embedding_l2": 1e-4, "dense_l2": 1e-5})
    before = trainer.evaluate(model, valid)
    trainer.fit(train, valid)
    assert trainer.evaluate(model, valid) > before + 0.1
    assert all(torch.equal(base[key], tensor) for key, tensor in base_state(model).items())
    assert len(trainer.predict(model, valid)) == 180


def test_joint_training_moves_base_and_banks(tmp_path: Path) -> None:
    train, valid = loaders()
    model = attach_(build("deepfm"), 3, temperature=4, domain=domain_of)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path).fit(train, valid)
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not still & {name for name, _ in adapter_parameters(model)}
    assert not still


def test_its_early_stopping_puts_the_best_adapters_back(tmp_path: Path) -> None:
    """The trainer keeps ``state_dict`` of the best epoch; the banks are in there."""
    train, valid = loaders()
    model = freeze_(attach_(build("deepfm"), 3, temperature=4, domain=domain_of))
    trainer = trainer_of(model, tmp_path, earlystop_patience=1)
    trainer.n_epoch = 60
    trainer.fit(train, valid)
    assert trainer.evaluate(model, valid) == pytest.approx(trainer.early_stopper.best_auc)
