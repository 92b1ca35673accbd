"""What is written, what is refused, and that a bundle stays as it was."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from domlora.adapters.attach import attach_
from domlora.bundle import Bundle
from domlora.errors import BundleError, ConfigError, DataError
from domlora.features.encode import Encoder
from domlora.serving.export import banks_of, export
from domlora.serving.program import Program


def scores(model, batch):
    with torch.no_grad():
        return model.eval()(batch.ids, batch.dense, batch.domain).numpy()


def close(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-5


def arrays(batch):
    return batch.ids.numpy(), batch.dense.numpy(), batch.domain.numpy()


def exported(bundle, folder, rows):
    """A program, after its answers were found to be the model's."""
    export(bundle, folder, [rows(20)])
    program, batch = Program.open(folder), rows(200, seed=8)
    expected = scores(bundle.model, batch)
    assert expected.std() > 0.01
    for plan in ("mixed", "by_domain"):
        close(program(*arrays(batch), plan=plan), expected)
    return program


def test_the_folder_describes_itself(adapted):
    folder, bundle = adapted.folder, adapted.bundle
    manifest = json.loads((folder / "manifest.json").read_text())
    assert Encoder.open(folder).fingerprint() == bundle.encoder.fingerprint()
    assert (manifest["model"]["name"], manifest["bundle_version"]) == ("mlp", None)
    assert manifest["schema"] == bundle.encoder.schema.fingerprint()
    assert manifest["domains"] == ["app", "web", "mail"]
    assert [(layer["name"], layer["scale"]) for layer in manifest["layers"]] == [("tower.0", 1.5), ("tower.1", 3.0)]
    assert manifest["inputs"]["mixed.onnx"]["ids"] == ["int64", ["rows", 5]]
    assert manifest["inputs"]["mixed.onnx"]["tower.0.lora_A"] == ["float", ["domains", 13, "rank_of_tower.0"]]
    assert manifest["inputs"]["one.onnx"]["tower.0.lora_B"] == ["float", ["rank_of_tower.0", 16]]
    assert "domain" not in manifest["inputs"]["one.onnx"]
    assert manifest["difference"] <= manifest["tolerance"] == 1e-5
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size - 200 < adapted.exported.size_bytes <= size


def test_adapters_lie_in_the_order_of_domains(adapted):
    for number in range(3):
        stored = load_file(adapted.folder / f"adapters/{number:05d}.safetensors")
        for name, bank in banks_of(adapted.bundle.model, number).items():
            assert np.array_equal(stored[name], bank)


def test_both_graphs_share_one_file_of_tables_on_page_bounds(adapted):
    places = []
    for name in ("mixed.onnx", "one.onnx"):
        graph = onnx.load(adapted.folder / name, load_external_data=False).graph
        told = [{each.key: each.value for each in tensor.external_data} for tensor in graph.initializer]
        places.append(sorted((int(t["offset"]), int(t["length"])) for t in told if t))
        assert {t["location"] for t in told if t} == {"tables.bin"}
    assert places[0] == places[1]
    assert 606 * 4 * 4 in [length for _, length in places[0]]
    assert all(offset % 4096 == 0 for offset, _ in places[0])


def test_equal_bundles_give_equal_bytes_without_names_of_the_machine(adapted, bundle_of, rows, tmp_path):
    again = bundle_of(adapters={"temperature": 4.0, "lora_alpha": 6.0, "include": ["tower.*"]})
    export(again, tmp_path / "again", [rows(50)])
    for path in adapted.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert (tmp_path / "again" / path.relative_to(adapted.folder)).read_bytes() == content
            assert b"site-packages" not in content
            assert b".py" not in content


def test_the_bundle_stays_as_it_is(bundle_of, rows, tmp_path):
    bundle = bundle_of(adapters={"temperature": 4.0})
    bundle.model.train()
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    export(bundle, tmp_path / "program", [rows(10)])
    assert bundle.model.training
    assert all(module.training for module in bundle.model.modules())
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    scores(bundle.model, rows(5))
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("mlp", {"rank": 0}),
        ("autoint", {"rank": 3, "bias": False, "include": ["*"]}),
        ("mlp", {"rank": 1, "include": ["tower.0"]}),
        ("autoint", {"temperature": 2.0, "lora_alpha": 7.0, "include": ["*"], "exclude": ["tower.1"]}),
    ],
    ids=["bias alone", "no bias", "one layer", "scaled"],
)
def test_adapters_of_every_form(name, adapters, bundle_of, rows, tmp_path):
    exported(bundle_of(name, adapters=adapters), tmp_path / "program", rows)


VECTORS = {"item": np.random.default_rng(0).normal(size=(600, 5))}
MORE = {
    "mixed widths": {"embedding_dims": {"item": 3, "city": 2}},
    "given vectors": {"pretrained": VECTORS},
    "a copy for each domain": {"per_domain": True},
    "copies and a base": {"per_domain": True, "unknown_domains": "base", "pretrained": VECTORS},
    "experts": {"mixture": {"num_experts": 3, "rank": 2}},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_models_of_every_form(more, bundle_of, rows, tmp_path):
    program = exported(bundle_of("wdl", **more), tmp_path / "program", rows)
    assert sorted(path.name for path in (tmp_path / "program").glob("*.onnx")) == ["mixed.onnx"]
    assert program.layers == ()


def test_adapters_on_maps_of_given_vectors(bundle_of, rows, tmp_path):
    """Such a layer sees an axis more, and has no bias."""
    bundle = bundle_of("deepfm", adapters={"rank": 2, "include": ["*"]}, pretrained=VECTORS)
    assert any(
        name.startswith("embedding") for layer in exported(bundle, tmp_path / "p", rows).layers for name in [layer.name]
    )


class Alone(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.again = self.tower[0]

    def forward(self, ids, dense, domain):  # noqa: ARG002 - adapters read it
        return self.tower[1](torch.relu(self.again(self.tower[0](dense))) + 0.001 * ids[:, :1]).squeeze(-1)


def bundle_with(model, like):
    return Bundle(model, like.model_options, like.encoder)


def test_a_layer_in_two_places_has_one_adapter(adapted, rows, tmp_path):
    torch.manual_seed(1)
    model = attach_(Alone(), 3, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    program = exported(bundle_with(model, adapted.bundle), tmp_path / "program", rows)
    assert [layer.name for layer in program.layers] == ["tower.0", "tower.1"]


class Other(Alone):
    """Says something else in a trace."""

    def forward(self, ids, dense, domain):
        return super().forward(ids, dense, domain) + (1e-3 if torch.compiler.is_compiling() else 0.0)


class Asks(Alone):
    """Asks for values, which a graph cannot."""

    def forward(self, ids, dense, domain):
        return super().forward(ids, dense, domain) * (2 if dense.sum() > 0 else 1)


def test_graphs_that_differ_from_the_model_are_refused(adapted, rows, tmp_path):
    with pytest.raises(BundleError, match=r"logits to \d\.\de-05.*Received: 0\.00(10|09)"):
        export(bundle_with(Other(), adapted.bundle), tmp_path / "program", [rows(10)])
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_cannot_say_is_refused_in_one_line(adapted, rows, tmp_path):
    with pytest.raises(ConfigError, match="cannot be exported") as caught:
        export(bundle_with(Asks(), adapted.bundle), tmp_path / "program", [rows(10)])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_compared_is_refused(adapted, rows, tmp_path):
    with pytest.raises(DataError, match="needs rows"):
        export(adapted.bundle, tmp_path / "program", [rows(0)])
    with pytest.raises(ConfigError, match="float32"):
        export(bundle_with(Alone().double(), adapted.bundle), tmp_path / "program", [rows(4)])
    model = Alone()
    attach_(model.tower, 3, rank=1, domain=None)
    with pytest.raises(ConfigError, match="whole model"):
        export(bundle_with(model, adapted.bundle), tmp_path / "program", [rows(4)])


def test_only_an_export_is_replaced(adapted, rows, tmp_path):
    bundle = bundle_with(Alone(), adapted.bundle)
    adapted.bundle.save(tmp_path / "bundle")
    for overwrite in (False, True):
        with pytest.raises(DataError):
            export(bundle, tmp_path / "bundle", [rows(4)], overwrite=overwrite)
    Bundle.open(tmp_path / "bundle")
    first = export(bundle, tmp_path / "program", [rows(4)])
    with pytest.raises(DataError, match="must not exist"):
        export(bundle, tmp_path / "program", [rows(4)])
    assert export(bundle, tmp_path / "program", [rows(4)], overwrite=True).difference == first.difference


def test_all_domains_are_compared_however_few_the_samples(adapted):
    assert adapted.exported.num_rows == 100  # the rows as they are, and shared out to all domains
