"""DeepCTR-Torch 0.3.0: its models as they are, and its own compile, fit and predict on a model with adapters."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domlora.adapters.attach import attach_, detach_, freeze_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(threading.Thread, "start", lambda _: None)  # its import asks the network for a newer version
    pytest.importorskip("deepctr_torch", reason="DeepCTR-Torch is not installed")
from deepctr_torch import models
from deepctr_torch.callbacks import EarlyStopping, ModelCheckpoint
from deepctr_torch.inputs import DenseFeat, SparseFeat

TOWER = {"dnn_hidden_units": (16, 8), "init_std": 0.3}  # its own 1e-4 makes every answer 0.5
NORM = {"dnn_use_bn": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wdl": ("WDL", NORM),
    "mlp": ("WDL", NORM),  # without its linear part: see build
    "nfm": ("NFM", {}),
    "nfm dropout": ("NFM", {"bi_dropout": 0.3}),
    "autoint": ("AutoInt", NORM),
    "pnn": ("PNN", {}),
    "pnn outer": ("PNN", {"use_outter": True}),
    "dcn": ("DCN", NORM),
    "dcnv2": ("DCN", {"cross_parameterization": "matrix"}),
    "dcn mix": ("DCNMix", {"low_rank": 4, "num_experts": 2}),
    "fibinet all": ("FiBiNET", {"bilinear_type": "all"}),
    "fibinet each": ("FiBiNET", {"bilinear_type": "each"}),
    "fibinet": ("FiBiNET", {"bilinear_type": "interaction"}),
    "deepfm": ("DeepFM", NORM),
    "xdeepfm": ("xDeepFM", {"cin_layer_size": (8, 8)}),
}
ROWS = 48


def domain_of(x: Tensor) -> Tensor:
    return x[:, 2].long()


def columns(num_rows: int = ROWS) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "user": random.integers(0, 10, num_rows),
        "item": random.integers(0, 7, num_rows),
        "domain": random.permutation(np.arange(num_rows) % 3),
        "price": random.normal(size=num_rows).astype("float32"),
    }


def batch() -> Tensor:
    """What ``fit`` makes of columns: one float matrix."""
    return torch.from_numpy(np.stack([column.astype("float32") for column in columns().values()], axis=1))


def build(name: str, **options: Any) -> Any:
    kind, own = MODELS[name]
    sparse = [SparseFeat("user", 10, 8), SparseFeat("item", 7, 8), SparseFeat("domain", 3, 8)]
    features = [*sparse, DenseFeat("price", 1)]
    inputs = [features] if kind == "PNN" else [[] if name == "mlp" else features, features]
    return getattr(models, kind)(*inputs, **{**TOWER, **own, **options})


@pytest.mark.parametrize("name", MODELS)
def test_law(law: Callable[..., None], name: str) -> None:
    law(build(name), batch(), domain_of)


def test_the_laws_are_about_every_linear_of_the_model() -> None:
    layers = adapter_layers(attach_(build("fibinet"), 3, domain=domain_of))
    assert list(layers) == [
        *("SE.excitation.0", "SE.excitation.2"),
        *(f"Bilinear.bilinear.{pair}" for pair in range(3)),
        *("dnn.linears.0", "dnn.linears.1", "dnn_linear"),
    ]


# its own loop


def clicks(x: dict[str, np.ndarray]) -> np.ndarray:
    """In domain 0 a high price is clicked, in domain 1 a low one, in domain 2 neither matters."""
    slope = np.array([3.0, -3.0, 0.0])[x["domain"]]
    chance = 1 / (1 + np.exp(-slope * x["price"]))
    return (np.random.default_rng(1).random(len(chance)) < chance).astype("float32")


def compiled(model: Any, lr: float = 1e-2) -> Any:
    moving = [p for p in model.parameters() if p.requires_grad]
    model.compile(torch.optim.Adam(moving, lr=lr), "binary_crossentropy", metrics=["auc", "logloss"])
    return model


def test_fit_trains_adapters_alone_and_predict_uses_them() -> None:
    x = columns(600)
    y = clicks(x)
    model = build("deepfm", dnn_dropout=0.1)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled(model)
    before = model.evaluate(dict(x), y)
    freeze_(attach_(model, 3, temperature=4, domain=domain_of))
    assert model.evaluate(dict(x), y) == before
    history = compiled(model).fit(dict(x), y, batch_size=128, epochs=8, verbose=0)
    after = model.evaluate(dict(x), y)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert after["auc"] > before["auc"] + 0.1
    assert all(torch.equal(base[name], tensor) for name, tensor in base_state(model).items())


def test_compile_by_name_and_joint_training() -> None:
    """``compile("adam")`` takes ``model.parameters()``: after attach_ the banks are among them."""
    x = columns(300)
    model = attach_(build("deepfm"), 3, temperature=4, domain=domain_of)
    before = {name: bank.clone() for name, bank in adapter_parameters(model)}
    model.compile("adam", "binary_crossentropy", metrics=["auc"])
    model.fit(dict(x), clicks(x), batch_size=64, epochs=2, verbose=0, validation_split=0.2)
    moved = [name for name, bank in adapter_parameters(model) if not torch.equal(bank, before[name])]
    assert len(moved) == len(before)


def test_a_merged_model_goes_through_its_loop() -> None:
    x = columns(300)
    model = freeze_(attach_(build("xdeepfm"), 3, temperature=4, domain=domain_of))
    compiled(model).fit(dict(x), clicks(x), batch_size=64, epochs=2, verbose=0)
    said = model.predict(dict(x))
    for number in range(3):
        rows = x["domain"] == number
        plain = merge_(copy.deepcopy(model), number)
        assert np.abs(plain.predict({k: v[rows] for k, v in x.items()}) - said[rows]).max() <= 1e-6


def test_regularisation_keeps_watching_the_weights_of_the_model() -> None:
    """It keeps (name, parameter) pairs from the day the model was built."""
    model = build("deepfm", l2_reg_dnn=0.1)
    before = model.get_regularization_loss()
    attach_(model, 3, domain=domain_of)
    assert torch.equal(model.get_regularization_loss(), before)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in watched(model))
    assert torch.equal(detach_(model).get_regularization_loss(), before)


def test_regularisation_watches_merged_weights() -> None:
    model = build("deepfm", l2_reg_dnn=0.1)
    merge_(attach_(model, 3, domain=domain_of), 1)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in watched(model))


def test_its_early_stopping_and_checkpoint_of_weights(tmp_path: Path) -> None:
    x = columns(300)
    y, kept = clicks(x), tmp_path / "weights.ckpt"
    model = freeze_(attach_(build("deepfm"), 3, temperature=4, domain=domain_of))
    callbacks = [
        EarlyStopping(monitor="val_auc", mode="max", patience=1),
        ModelCheckpoint(str(kept), monitor="val_auc", mode="max", save_best_only=True, save_weights_only=True),
    ]
    compiled(model).fit(dict(x), y, batch_size=64, epochs=4, verbose=0, validation_split=0.2, callbacks=callbacks)
    other = attach_(build("deepfm"), 3, temperature=4, domain=domain_of)
    other.load_state_dict(torch.load(kept, weights_only=True))  # noqa: TID251 - the peer's file, read as its users do
    assert np.abs(other.predict(dict(x)) - 0.5).max() > 0.1


def test_its_checkpoint_of_a_whole_model(tmp_path: Path) -> None:
    """The default of its ModelCheckpoint, and how its manual saves a model: the object as it is."""
    x, kept = columns(300), tmp_path / "model.ckpt"
    model = attach_(build("deepfm"), 3, temperature=4, domain=domain_of)
    compiled(model).fit(
        dict(x), clicks(x), batch_size=64, verbose=0, callbacks=[ModelCheckpoint(str(kept), monitor="loss")]
    )
    other = torch.load(kept, weights_only=False)  # noqa: TID251 - the peer's file, read as its users do
    assert np.array_equal(other.predict(dict(x)), model.predict(dict(x)))
    assert detach_(other).get_regularization_loss() == detach_(model).get_regularization_loss()


def watched(model: Any) -> list[Tensor]:
    return [w[1] if isinstance(w, tuple) else w for weights, *_ in model.regularization_weight for w in weights]
