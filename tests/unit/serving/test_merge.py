"""One domain of a bundle as a plain one."""

from __future__ import annotations

import pytest
import torch

from domlora.adapters.bank import adapter_layers
from domlora.bundle import Bundle
from domlora.errors import ConfigError, UnknownDomainError
from domlora.serving.merge import merge


def scores(model, batch):
    with torch.no_grad():
        return model.eval()(batch.ids, batch.dense, batch.domain)


@pytest.mark.parametrize("name", ["mlp", "autoint", "pepnet"])
def test_it_scores_as_the_domain_did_and_is_a_bundle(name, bundle_of, rows, tmp_path):
    bundle = bundle_of(name, adapters={"temperature": 4.0, "include": ["tower.*"]})
    batch = rows(50)._replace(domain=torch.full((50,), 1))
    expected = scores(bundle.model, batch)
    state = {key: tensor.clone() for key, tensor in bundle.model.state_dict().items()}
    bundle.version = 7
    plain = merge(bundle, "web")
    assert plain.facts["merged"] == {"domain": "web", "version": 7}
    assert plain.adapter is None
    assert not adapter_layers(plain.model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in bundle.model.state_dict().items())
    plain.save(tmp_path / "plain")
    opened = Bundle.open(tmp_path / "plain")
    assert (scores(opened.model, batch) - expected).abs().max() <= 1e-5
    assert opened.facts["merged"]["domain"] == "web"


def test_what_cannot_be_merged_is_refused(bundle_of):
    adapters = {"temperature": 4.0, "include": ["tower.*"]}
    with pytest.raises(UnknownDomainError, match="'web'"):
        merge(bundle_of(adapters=adapters), "wep")
    with pytest.raises(ConfigError, match="no adapters"):
        merge(bundle_of(), "web")
    with pytest.raises(ConfigError, match="same kind"):
        merge(bundle_of("star", adapters=adapters), "web")
