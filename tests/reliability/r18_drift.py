"""R18: adapters and deltas of another schema or vocabulary do not get in, and neither do requests of another schema."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pushing import new_store, small_bundle
from support import domlora, say, serving

from domlora.adapters.attach import attach_
from domlora.bundle import Bundle
from domlora.errors import BundleError
from domlora.features.encode import Encoder
from domlora.features.schema import Feature
from domlora.models.build import build_model
from domlora.serving.delta import apply, write
from domlora.serving.export import export
from domlora.serving.pack import adapter_payload, random_rows

pytestmark = pytest.mark.reliability
PLAN = """
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.price]
kind = "numeric"
"""


def _drifted(features: tuple[Feature, ...]) -> Bundle:
    """The same options for other features, and words for them."""
    old = small_bundle()
    schema = replace(old.encoder.schema, features=features)
    torch.manual_seed(0)
    model = attach_(build_model(schema=schema, **old.model_options), schema.num_domains, temperature=4.0)
    words = {f.name: [f"v{n}" for n in range(f.num_ids - 2)] for f in features if f.has_vocabulary}
    return Bundle(model, old.model_options, Encoder(schema, words))


def test_drift(tmp_path):
    old = small_bundle()
    export(old, tmp_path / "old", [random_rows(old.encoder.schema)])
    features = old.encoder.schema.features
    drifts = {
        "removed": features[:-1],
        "added": (*features, Feature("more", num_ids=5)),
        "grown": (replace(features[0], num_ids=features[0].num_ids + 1), *features[1:]),
        "hashed": (Feature("f0", num_ids=1002, hash_buckets=1000), *features[1:]),
    }
    store = new_store(tmp_path / "old", tmp_path / "live")
    with serving(store.folder, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=20) as client:
        for kind, drifted in drifts.items():
            content = adapter_payload(_drifted(drifted), "toys", version="2")
            told = client.put("/v1/adapters/toys", content=content)
            assert (kind, told.status_code, "another base" in told.text) == (kind, 400, True), told.text
        row = {feature.name: "v1" for feature in features}
        for asked in ({**row, "f0": None, "f4": 7}, {"f0": "v1"}, {**row, "f0": [["v1"]]}):
            told = client.post("/v1/score", json={"domain": "toys", "candidates": [asked]})
            assert told.status_code in (200, 400), told.text
        assert client.post("/v1/score", json={"domain": "toys", "candidates": [{"f0": "v1"}]}).status_code == 400
    say(f"adapters of {len(drifts)} drifted schemas refused")


def test_a_delta_of_another_version_is_refused(exported, tmp_path):
    old = small_bundle()
    export(old, tmp_path / "old", [random_rows(old.encoder.schema)])
    write(tmp_path / "old", exported, tmp_path / "delta")
    with pytest.raises(BundleError, match="made from"):
        apply(exported, tmp_path / "delta", tmp_path / "new")


def _log(folder: Path, items: int, price: str = "price", kind: type = float) -> Path:
    """A log of clicks, and the plan that prepares it."""
    folder.mkdir()
    draw = np.random.default_rng(1)
    columns = {
        "item": draw.integers(items, size=3_000),
        price: list(map(kind, draw.random(3_000).tolist())),
        "scene": np.array(["home", "cart"])[draw.integers(2, size=3_000)],
        "click": draw.integers(2, size=3_000),
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    (folder / "plan.toml").write_text(PLAN, encoding="utf-8")
    return folder / "plan.toml"


def test_training_on_drifted_data_fails_before_its_first_step(tmp_path):
    said = {
        "renamed column": domlora("prepare", _log(tmp_path / "a", 50, price="cost"), "--out", tmp_path / "no"),
        "text for numbers": domlora(
            "prepare", _log(tmp_path / "b", 50, kind="{:.1f} EUR".format), "--out", tmp_path / "no"
        ),
    }
    for name, items in (("c", 50), ("d", 60)):
        assert domlora("prepare", _log(tmp_path / name, items), "--out", tmp_path / name / "data").returncode == 0
    quick = ["--set", "train.pretrain.fit.max_epochs=1", "--set", "model.hidden_units=[8]"]
    done = domlora("pretrain", "--data", tmp_path / "c" / "data", "--out", tmp_path / "base", *quick)
    assert done.returncode == 0, done.stderr
    adapt = ["adapt", "--bundle", tmp_path / "base", "--out", tmp_path / "no"]
    said["other vocabulary"] = domlora(*adapt, "--data", tmp_path / "d" / "data")
    manifest = json.loads((tmp_path / "c" / "data" / "manifest.json").read_text(encoding="utf-8"))
    shard = next(tmp_path / "c" / "data" / name for name in manifest["files"] if name.endswith(".parquet"))
    rows = pq.read_table(shard)
    pq.write_table(rows.drop_columns(rows.column_names[:1]), shard)
    said["shard without a column"] = domlora(*adapt, "--data", tmp_path / "c" / "data")
    words = {"renamed column": "price", "text for numbers": "price", "other vocabulary": "same schema and vocabularies"}
    for kind, done in said.items():
        assert (kind, done.returncode, "Traceback" in done.stderr) == (kind, 2, False), done.stderr
        assert words.get(kind, shard.name) in done.stderr, (kind, done.stderr)
    assert not (tmp_path / "no").exists()
    say(f"{len(said)} kinds of drifted logs and data refused before a step, with exit code 2")
