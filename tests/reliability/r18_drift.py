"""R18: adapters and deltas of another schema or vocabulary do not get in, and neither do requests of another schema."""

from dataclasses import replace

import httpx
import pytest
import torch
from pushing import new_store, small_bundle
from support import say, serving

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
