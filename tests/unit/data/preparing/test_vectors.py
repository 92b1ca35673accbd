from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from domlora.config import parse
from domlora.data.dataset import Dataset
from domlora.data.plan import Plan
from domlora.data.prepare import prepare
from domlora.errors import ConfigError, DataError
from domlora.models.build import stored_options
from domlora.training.stages import Recipe, pretrain, seeded, with_vectors

NAMES = [f"item {number}" for number in range(6)]
VECTORS = {name: np.arange(3, dtype=np.float32) + 10 * number for number, name in enumerate(NAMES)}


def write_vectors(folder: Path, kind: str, vectors: dict[str, Any]) -> str:
    if kind == "parquet":
        table = pa.table({"id": list(vectors), "vector": [list(map(float, v)) for v in vectors.values()]})
        pq.write_table(table, folder / "vectors.parquet")
        return "vectors.parquet"
    lines = [f"{name},{' '.join(map(str, vector))}" for name, vector in vectors.items()]
    (folder / "vectors.csv").write_text("id,vector\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return "vectors.csv"


def prepared(folder: Path, path: str, **options: Any) -> Dataset:
    random = np.random.default_rng(0)
    size = 200
    rows = {
        "k": range(size),
        "item": [NAMES[n] for n in random.integers(5, size=size)],
        "seen": [[NAMES[n] for n in random.integers(5, size=2)] for _ in range(size)],
        "d": ["u", "v"] * (size // 2),
        "click": random.integers(2, size=size),
    }
    pq.write_table(pa.table(rows), folder / "log.parquet")
    plan = {
        "source": {"files": ["log.parquet"], "key": ["k"]},
        "columns": {"domain": "d", "label": "click"},
        "features": {
            "item": {"vectors": path, **options},
            "seen": {"kind": "sequence", "share": "item", "max_length": 2},
        },
    }
    prepare(parse(Plan, plan), folder / "out", folder=folder)
    return Dataset.open(folder / "out")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_vectors_are_in_the_order_of_ids(kind: str, tmp_path: Path) -> None:
    given = {name: vector for name, vector in VECTORS.items() if name != "item 2"} | {"never seen": np.ones(3)}
    data = prepared(tmp_path, write_vectors(tmp_path, kind, given))
    vectors = data.vectors["item"]
    words = data.encoder.vocabularies["item"]
    assert vectors.shape == (len(words) + 2, 3)
    assert not vectors[:2].any()
    for word, vector in zip(words, vectors[2:], strict=True):
        assert torch.equal(vector, torch.from_numpy(given.get(word, np.zeros(3))).float())
    assert data.manifest["vectors"] == {"item": {"width": 3, "trainable": False, "words_without": 1}}


@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_starts_from_them(trainable: bool, tmp_path: Path) -> None:
    data = prepared(tmp_path, write_vectors(tmp_path, "csv", VECTORS), train_vectors=trainable)
    options = {"name": "mlp", "embedding_dim": 3, "hidden_units": [4]}
    assert with_vectors(options, data)["freeze_pretrained"] == {"item": not trainable}
    assert with_vectors({**options, "pretrained": {}}, data) == {**options, "pretrained": {}}
    recipe = seeded(parse(Recipe, {"pretrain": {"fit": {"max_epochs": 1, "batch_size": 32}}}), 1)
    model, _ = pretrain(data, options, recipe)
    (learned,) = [p for p in model.parameters() if p.shape == data.vectors["item"].shape]
    assert learned.requires_grad == trainable
    assert torch.equal(learned.detach(), data.vectors["item"]) == (not trainable)


def test_the_width_that_a_bundle_stores_stands_for_the_vectors(tmp_path: Path) -> None:
    data = prepared(tmp_path, write_vectors(tmp_path, "csv", VECTORS))
    made = with_vectors({"name": "mlp"}, data)
    stored = stored_options(made)
    again = with_vectors(stored, data)
    assert torch.equal(again["pretrained"]["item"], data.vectors["item"])
    assert again["freeze_pretrained"] == made["freeze_pretrained"]
    other = {**stored, "pretrained": {"item": 4}}  # of another width, so they are others
    assert with_vectors(other, data) == other


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"item 1": [1.0, 2.0], "item 2": [1.0]}, "must give 2 finite numbers"),
        ({"item 1": [1.0, float("nan")]}, "finite numbers"),
        ({"nothing": [1.0]}, "no vector for any value of feature 'item'"),
        ({"item 1": ["a", "b"]}, "a value and its numbers"),
    ],
)
def test_files_that_are_refused(vectors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, write_vectors(tmp_path, "csv", vectors))
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named_before_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domlora.data.prepare._Preparation.run", mock.Mock(side_effect=AssertionError))
    with pytest.raises(DataError, match=r"missing.*nowhere\.csv"):
        prepared(tmp_path, "nowhere.csv")


def test_a_feature_without_a_vocabulary_can_have_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of its own"):
        prepared(tmp_path, "vectors.csv", hash_buckets=5)
