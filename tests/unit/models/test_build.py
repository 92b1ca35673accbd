import pytest
import torch
from torch import nn

from domlora.errors import ConfigError, SchemaError
from domlora.features.schema import Feature, Schema
from domlora.layers import mlp
from domlora.models.backbones import DeepFM, XDeepFM
from domlora.models.build import MODELS, build_model
from domlora.models.multi_domain.star import STAR

KEYS = ["mlp", "star", "wdl", "nfm", "autoint", "pnn", "dcn", "fibinet", "deepfm", "xdeepfm"]
KEYS += ["shared_bottom", "mmoe", "ple", "pepnet", "adasparse"]
KEYS += ["sar_net", "m2m", "adaptdhm", "hamur", "m3oe", "apg"]
OF_PAIRS = ["nfm", "autoint", "pnn", "fibinet", "deepfm", "xdeepfm"]


def test_the_keys_are_exact():
    assert list(MODELS) == KEYS


@pytest.mark.parametrize("name", KEYS)
def test_defaults(name, schema):
    model = build_model(name, schema)
    assert type(model) is MODELS[name]
    assert model.embedding.embedding_dim == 8
    towers = [module for module in model.tower.modules() if isinstance(module, mlp.MLP)]
    assert towers
    for tower in towers:
        assert [layer.out_features for layer in tower] == [256, 128, 64]
        assert tower.dropout == 0.5


def test_a_name_within_a_name_is_another_name(schema):
    assert type(build_model("deepfm", schema)) is DeepFM
    assert type(build_model("xdeepfm", schema)) is XDeepFM
    assert type(build_model("star", schema)) is STAR


@pytest.mark.parametrize("name", ["xdepfm", "XDeepFM", "deepfm_lora", "", 3])
def test_unknown_names(name, schema):
    with pytest.raises(ConfigError, match="Known: '"):
        build_model(name, schema)
    with pytest.raises(ConfigError, match="Did you mean 'xdeepfm'"):
        build_model("xdepfm", schema)


def test_unknown_options(schema):
    with pytest.raises(
        ConfigError, match=r"'dcn' has no such option. Received: 'cros_layers'. Did you mean 'cross_layers'"
    ):
        build_model("dcn", schema, cros_layers=2)
    with pytest.raises(ConfigError, match="no such option"):
        build_model("mlp", schema, cross_layers=2)  # another model's
    with pytest.raises(ConfigError, match="no such option"):
        build_model("mlp", schema, self=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"embedding_dim": 0}),
        ("mlp", {"embedding_dim": -8}),
        ("mlp", {"embedding_dim": 8.0}),
        ("mlp", {"embedding_dim": True}),
        ("mlp", {"hidden_units": []}),
        ("mlp", {"hidden_units": 64}),
        ("mlp", {"hidden_units": "64"}),
        ("mlp", {"hidden_units": [64, 0]}),
        ("mlp", {"hidden_units": [64, 1.5]}),
        ("mlp", {"dropout": 1.0}),
        ("mlp", {"dropout": -0.1}),
        ("mlp", {"dropout": float("nan")}),
        ("mlp", {"dropout": "0.5"}),
        ("mlp", {"dropout": None}),
        ("mlp", {"init_std": 0.0}),
        ("mlp", {"init_std": float("inf")}),
        ("autoint", {"num_heads": 0}),
        ("autoint", {"scaling": "yes"}),
        ("dcn", {"cross_layers": 0}),
        ("fibinet", {"reduction": 0}),
        ("fibinet", {"bilinear": "every"}),
        ("fibinet", {"bilinear": ["all"]}),
        ("xdeepfm", {"cin_units": [127, 0]}),
        ("xdeepfm", {"split_half": 1}),
        ("shared_bottom", {"domain_units": []}),
        ("mmoe", {"num_experts": 0}),
        ("ple", {"num_levels": 0}),
        ("pepnet", {"gate_units": 0}),
        ("pepnet", {"priors": "c0"}),
        ("adasparse", {"variant": "pruned"}),
        ("adasparse", {"epsilon": 2.0}),
        ("sar_net", {"num_own_experts": 0}),
        ("m2m", {"vector_dim": 0}),
        ("adaptdhm", {"num_clusters": 0}),
        ("adaptdhm", {"momentum": 1.0}),
        ("hamur", {"rank": 0}),
        ("m3oe", {"domain_units": []}),
        ("apg", {"over_parameterized": 1}),
    ],
)
def test_values_are_checked_and_shown(name, options, schema):
    ((key, value),) = options.items()
    with pytest.raises(ConfigError) as caught:
        build_model(name, schema, **options)
    assert str(caught.value).startswith(f"{key} must be")
    assert f"Received: {value!r}" in str(caught.value)


def test_options_reach_the_model(schema):
    assert len(build_model("dcn", schema, cross_layers=5).cross.kernels) == 5
    assert build_model("autoint", schema, num_layers=2, num_heads=1, head_dim=3).attention[1].out_features == 3
    assert build_model("autoint", schema, scaling=True).attention[0].scale == 8**-0.5
    assert build_model("fibinet", schema, bilinear="all").plain_products.shared
    assert build_model("xdeepfm", schema, cin_units=[10, 6], split_half=False).cin.out_features == 16
    torch.manual_seed(0)
    assert build_model("mlp", schema, init_std=3.0).embedding.weight.std() > 2


def test_a_schema_without_pairs():
    one = Schema((Feature("c", num_ids=4), Feature("x", "numeric")), domains=("a",))
    rows = torch.tensor([[1], [3]]), torch.randn(2, 1), torch.tensor([0, -1])
    for name in sorted(set(KEYS) - set(OF_PAIRS)):
        assert build_model(name, one)(*rows).shape == (2,)
    for name in OF_PAIRS:
        with pytest.raises(SchemaError, match=rf"'{name}' crosses categorical features.*Received: \['c'\]"):
            build_model(name, one)


def test_a_schema_of_numbers_alone():
    numbers = Schema((Feature("x", "numeric"), Feature("y", "numeric")), domains=("a", "b"))
    rows = torch.zeros(3, 0, dtype=torch.int64), torch.randn(3, 2), torch.tensor([1, 0, -1])
    for name in sorted(set(KEYS) - set(OF_PAIRS)):
        assert build_model(name, numbers)(*rows).shape == (3,)


@pytest.mark.parametrize("name", KEYS)
def test_one_seed_one_model(name, schema):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(name, schema).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_new_model_costs_a_class_and_a_line(schema, monkeypatch):
    class Constant(nn.Module):
        def __init__(self, schema, *, embedding_dim, hidden_units, dropout, level: float = 1.0):  # noqa: ARG002
            super().__init__()
            self.level = level

        def forward(self, ids, dense, domain):  # noqa: ARG002
            return torch.full((len(ids),), self.level)

    monkeypatch.setitem(MODELS, "constant", Constant)
    assert build_model("constant", schema, level=2.5).level == 2.5
    with pytest.raises(ConfigError, match="level must be above 0"):
        build_model("constant", schema, level=-1.0)
