"""FuxiCTR 2.3.10: models composed of its blocks as its zoo composes them, its own fit, and the zoo itself if it is at hand.

The wheel holds the blocks but not the zoo. ``DOMLORA_FUXICTR=<checkout of FuxiCTR>`` runs the same laws on the zoo's files.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, freeze_
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state

pytest.importorskip("fuxictr.pytorch.models", reason="FuxiCTR is not installed")
from fuxictr.features import FeatureMap
from fuxictr.pytorch import layers
from fuxictr.pytorch.models import BaseModel

ZOO = Path(os.environ.get("DOMLORA_FUXICTR", "nowhere")) / "model_zoo"
DIM, UNITS = 8, [16, 8]


def domain_of(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["domain"].long()


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(inputs)["y_pred"]


def batch(num_rows: int = 48) -> dict[str, Tensor]:
    """A batch as its loaders make it: a dict of columns, the label among them."""
    price, domain = torch.randn(num_rows), (torch.arange(num_rows) % 3)[torch.randperm(num_rows)]
    slope = torch.tensor([3.0, -3.0, 0.0])[domain]  # high prices are clicked in domain 0, low ones in domain 1
    return {
        "user": torch.randint(1, 10, (num_rows,)),
        "item": torch.randint(1, 7, (num_rows,)),
        "domain": domain,
        "price": price,
        "click": torch.bernoulli(torch.sigmoid(slope * price)),
    }


def feature_map(folder: str) -> FeatureMap:
    found = FeatureMap("clicks", folder)
    for name, size in {"user": 10, "item": 7, "domain": 3}.items():
        found.features[name] = {"source": "", "type": "categorical", "vocab_size": size, "padding_idx": 0}
    found.features["domain"].pop("padding_idx")
    found.features["price"] = {"source": "", "type": "numeric"}
    found.labels, found.default_emb_dim = ["click"], DIM
    found.num_fields = found.get_num_fields()
    found.set_column_index()
    return found


def widened(model: Any) -> Any:
    """Its embeddings start at 1e-4, which makes every answer 0.5."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    return model


def options(folder: str) -> dict[str, Any]:
    return {
        "verbose": 0,
        "model_root": folder,
        "metrics": ["AUC"],
        "optimizer": "adam",
        "loss": "binary_crossentropy",
        "embedding_dim": DIM,
        "learning_rate": 1e-2,
        "embedding_regularizer": 1e-6,
    }


class Composed(BaseModel):
    """A zoo model in short: embeddings, a tower, and one kind of interaction beside or before it."""

    def __init__(self, features: FeatureMap, kind: str, **kwargs: Any) -> None:
        super().__init__(features, model_id=kind, **kwargs)
        self.kind, fields, width = kind, features.num_fields, features.sum_emb_out_dim()
        self.embedding_layer = layers.FeatureEmbedding(features, DIM)
        if kind != "mlp":
            self.lr_layer = layers.LogisticRegression(features, use_bias=False)
        pairs = fields * (fields - 1)
        if kind == "nfm":
            self.pooling, width = layers.InnerProductInteraction(fields, output="bi_interaction"), DIM
        elif kind == "pnn":
            self.product, width = layers.InnerProductInteraction(fields, output="inner_product"), width + pairs // 2
        elif kind == "fibinet":
            self.senet, width = layers.SqueezeExcitation(fields, reduction_ratio=2), pairs * DIM
            self.bilinear = nn.ModuleList(layers.BilinearInteractionV2(fields, DIM) for _ in range(2))
        elif kind == "deepfm":
            self.fm = layers.FactorizationMachine(features)
        elif kind == "xdeepfm":
            self.cin = layers.CompressedInteractionNet(fields, [8, 8])
        elif kind in ("dcn", "dcnv2"):
            cross = layers.CrossNet if kind == "dcn" else layers.CrossNetV2
            self.cross, self.fc = cross(width, 2), nn.Linear(width + UNITS[-1], 1)
        elif kind == "autoint":
            self.query, self.key, self.value = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
            self.attention, self.fc = layers.ScaledDotProductAttention(0.1), nn.Linear(width, 1)
        hidden_only = kind in ("dcn", "dcnv2")
        self.tower = layers.MLP_Block(
            width, UNITS, output_dim=None if hidden_only else 1, dropout_rates=0.1, batch_norm=True
        )
        self.compile(kwargs["optimizer"], kwargs["loss"], kwargs["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.get_inputs(inputs)
        emb = self.embedding_layer(x)  # (B, F, E)
        return {"y_pred": self.output_activation(self.logit(x, emb, emb.flatten(1)))}

    def logit(self, x: dict[str, Tensor], emb: Tensor, flat: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.tower(flat)
        logit = self.lr_layer(x)
        if self.kind == "nfm":
            return logit + self.tower(self.pooling(emb))
        if self.kind == "pnn":
            return logit + self.tower(torch.cat([flat, self.product(emb)], 1))
        if self.kind == "fibinet":
            both = [self.bilinear[0](emb), self.bilinear[1](self.senet(emb))]
            return logit + self.tower(torch.cat(both, 1).flatten(1))
        if self.kind in ("dcn", "dcnv2"):
            return logit + self.fc(torch.cat([self.cross(flat), self.tower(flat)], 1))
        logit += self.tower(flat)  # in place, as the zoo does
        if self.kind == "deepfm":
            logit = logit + self.fm(x, emb)
        elif self.kind == "xdeepfm":
            logit = logit + self.cin(emb)
        elif self.kind == "autoint":
            seen, _ = self.attention(self.query(emb), self.key(emb), self.value(emb))
            logit = logit + self.fc((seen + emb).relu().flatten(1))
        return logit


KINDS = ("mlp", "wdl", "nfm", "autoint", "pnn", "dcn", "dcnv2", "fibinet", "deepfm", "xdeepfm")


def composed(kind: str, folder: Path) -> Any:
    return widened(Composed(feature_map(str(folder)), kind, **options(str(folder))))


@pytest.mark.parametrize("kind", KINDS)
def test_law(law: Callable[..., None], kind: str, tmp_path: Path) -> None:
    law(composed(kind, tmp_path), batch(), domain_of, answer)


# its own loop, which calls model.forward(batch) and not model(batch)


class Loader:
    """Batches of one epoch, again and again: what ``fit`` asks of a data loader."""

    def __init__(self, num_rows: int, batch_size: int = 64) -> None:
        self.rows, self.size = batch(num_rows), batch_size

    def __len__(self) -> int:
        return -(-len(self.rows["click"]) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows["click"]), self.size):
            yield {name: column[start : start + self.size] for name, column in self.rows.items()}


def test_fit_trains_adapters_alone(tmp_path: Path) -> None:
    model = composed("deepfm", tmp_path)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, valid = Loader(600), Loader(300)
    Path(model.model_dir).mkdir()
    before = model.evaluate(valid)["AUC"]
    freeze_(attach_(model, 3, temperature=4, domain=domain_of))
    assert model.evaluate(valid)["AUC"] == before
    model.compile("adam", "binary_crossentropy", 1e-2)
    model.fit(train, epochs=6, validation_data=valid)
    assert model.evaluate(valid)["AUC"] > before + 0.1
    assert all(torch.equal(base[name], tensor) for name, tensor in base_state(model).items())


def test_joint_training_moves_every_bank(tmp_path: Path) -> None:
    model = attach_(composed("deepfm", tmp_path), 3, temperature=4, domain=domain_of)
    before = {name: bank.detach().clone() for name, bank in adapter_parameters(model)}
    Path(model.model_dir).mkdir()
    model.compile("adam", "binary_crossentropy", 1e-2)
    model.fit(Loader(600), epochs=2, validation_data=Loader(300))
    assert not [name for name, bank in adapter_parameters(model) if torch.equal(bank, before[name])]


# the zoo's own files

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "DNN": ("DNN/DNN_torch", {"hidden_units": UNITS}),
    "WideDeep": ("WideDeep/WideDeep_torch", {"hidden_units": UNITS}),
    "NFM": ("NFM", {"hidden_units": UNITS}),
    "AutoInt": ("AutoInt", {"dnn_hidden_units": UNITS, "use_wide": True, "layer_norm": True, "num_heads": 2}),
    "PNN": ("PNN", {"hidden_units": UNITS}),
    "DCN": ("DCN/DCN_torch", {"dnn_hidden_units": UNITS}),
    "DCNv2": ("DCNv2", {"parallel_dnn_hidden_units": UNITS}),
    "FiBiNET": ("FiBiNET", {"hidden_units": UNITS}),
    "DeepFM": ("DeepFM/DeepFM_torch", {"hidden_units": UNITS}),
    "xDeepFM": ("xDeepFM", {"dnn_hidden_units": UNITS, "cin_hidden_units": [8, 8]}),
}


def from_the_zoo(name: str, folder: Path) -> Any:
    place, own = FILES[name]
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / place / "src" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shared = {**options(str(folder)), "batch_norm": True, "net_dropout": 0.1}
    return widened(getattr(module, name)(feature_map(str(folder)), **shared, **own))


@pytest.mark.skipif(not ZOO.is_dir(), reason="set DOMLORA_FUXICTR to a checkout of FuxiCTR to run its zoo")
@pytest.mark.parametrize("name", FILES)
def test_zoo_law(law: Callable[..., None], name: str, tmp_path: Path) -> None:
    law(from_the_zoo(name, tmp_path), batch(), domain_of, answer)


def test_the_laws_are_about_every_linear_of_the_model(tmp_path: Path) -> None:
    names = list(adapter_layers(attach_(composed("autoint", tmp_path), 3, domain=domain_of)))
    assert "tower.mlp.0" in names
    assert "query" in names
    assert "embedding_layer.embedding_layer.embedding_layers.price" in names  # how it embeds a number
