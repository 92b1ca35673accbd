# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_, detach_, freeze_, merge_, movable, options_of
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state, is_adapter_parameter
from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.root import disabled, routed
from domlora.errors import ConfigError, UnknownDomainError

DOMAIN = torch.tensor([2, 0, 1, 0, -1])


class Net(nn.Module):
    """A tower, a head, an attention-like map over middle axes and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.tower = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:  # (B, 4, 3) to (B,)
        logit: Tensor = self.head(self.tower(self.norm(self.query(x).flatten(1)))).squeeze(-1)
        return logit


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trained(model: nn.Module) -> nn.Module:
    """All banks filled, as after training."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.copy_(torch.randn(bank.shape, generator=random) * 0.3)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted() -> nn.Module:
    return trained(attach_(net(), 3)).eval()


def digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(name.encode())
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


# choosing layers


def test_all_linears_by_default() -> None:
    assert list(adapter_layers(attach_(net(), 3))) == ["query", "tower.0", "tower.2", "head"]


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["tower.*"], [], ["tower.0", "tower.2"]),
        (["*"], ["head", "qu*"], ["tower.0", "tower.2"]),
        (["head", "*.0"], [], ["tower.0", "head"]),
        (["tower.[02]"], ["*.2"], ["tower.0"]),
    ],
)
def test_globs(include: list[str], exclude: list[str], names: list[str]) -> None:
    assert sorted(adapter_layers(attach_(net(), 3, include=include, exclude=exclude))) == sorted(names)


def test_a_glob_without_a_match_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Received: 'towr\.0'. Did you mean 'tower\.0'\?"):
        attach_(net(), 3, include=["tower.*", "towr.0"])


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="exclude must leave"):
        attach_(net(), 3, exclude=["*"])


@pytest.mark.parametrize(
    "options",
    [
        {"include": ["nothing"]},
        {"exclude": ["*"]},
        {"temperature": 0},
        {"rank": -1},
        {"rank": 0, "bias": False},
        {"domain": "dom"},
        {"num_domains": 0},
    ],
)
def test_a_refused_attach_leaves_the_model_as_it_was(options: dict[str, Any], x: Tensor) -> None:
    model = net().eval()
    before, expected = list(model.state_dict()), model(x, DOMAIN)
    with pytest.raises(ConfigError):
        attach_(model, **{"num_domains": 3, **options})
    assert list(model.state_dict()) == before
    assert torch.equal(model(x, DOMAIN), expected)
    attach_(model, 3)  # and it can still be done right


def test_twice_is_refused(adapted: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"adapters already.*detach_"):
        attach_(adapted, 3)


def test_a_model_around_an_adapted_one_is_refused(adapted: nn.Module) -> None:
    """Adapters on adapters would share names with what is inside and could not be taken off."""
    with pytest.raises(ConfigError, match="adapters already"):
        attach_(nn.ModuleDict({"inner": adapted}), 3, domain=None)


def test_ranks() -> None:
    ranks = {name: layer.rank for name, layer in adapter_layers(attach_(net(), 3, temperature=8)).items()}
    assert ranks == {"query": 1, "tower.0": 4, "tower.2": 2, "head": 1}
    assert {layer.rank for layer in adapter_layers(attach_(net(), 3, rank=5)).values()} == {5}


def test_options_are_what_attach_takes() -> None:
    options = AdapterOptions()
    model = attach_(net(), 3, **{name: getattr(options, name) for name in AdapterOptions.__slots__})
    assert list(adapter_layers(model)) == ["tower.0", "tower.2"]


def test_options_can_be_asked_for() -> None:
    model = attach_(net(), 3, temperature=8, include=["tower.*"], exclude=["*.2"])
    assert options_of(model) == AdapterOptions(8, None, None, True, ("tower.*",), ("*.2",))
    assert options_of(copy.deepcopy(model)) == options_of(model)
    assert options_of(detach_(model)) is None


def test_it_returns_the_same_model() -> None:
    model = net()
    assert attach_(model, 3) is model
    assert freeze_(model) is model
    assert detach_(model) is model
    assert merge_(attach_(model, 3), 0) is model


def test_rank_zero_is_a_bias_where_there_is_one(x: Tensor) -> None:
    model = net().eval()
    expected = model(x, DOMAIN)
    layers = adapter_layers(attach_(model, 3, rank=0))
    assert list(layers) == ["tower.0", "tower.2", "head"]
    assert {layer.lora_A.numel() for layer in layers.values()} == {0}
    assert torch.equal(model(x, DOMAIN), expected)
    with pytest.raises(ConfigError, match="must leave a linear layer"):
        attach_(net(), 3, rank=0, include=["query"])


def test_a_layer_without_bias_gets_none_and_no_layer_gets_one_if_told_so() -> None:
    with_bias = {name: layer.lora_bias is not None for name, layer in adapter_layers(attach_(net(), 3)).items()}
    assert with_bias == {"query": False, "tower.0": True, "tower.2": True, "head": True}
    assert all(layer.lora_bias is None for layer in adapter_layers(attach_(net(), 3, bias=False)).values())


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear layer"):
        attach_(nn.Sequential(nn.ReLU()), 2, domain=None)


def test_a_lazy_layer_must_have_its_shape_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    with pytest.raises(ConfigError, match=r"Received: '0'.*one batch first"):
        attach_(model, 2, domain=None)
    model(torch.randn(2, 3))
    assert list(adapter_layers(attach_(model, 2, domain=None))) == ["0", "1"]


# a bare layer


def bare(**options: Any) -> tuple[nn.Linear, nn.Module]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    return layer, attach_(layer, 2, **{"domain": None, **options})


def test_a_bare_linear_is_replaced_by_what_attach_returns() -> None:
    layer, model = bare()
    assert isinstance(model, LowRankLinear)
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([0, 1])):
        assert torch.equal(model(x), layer(x))
        trained(model)
        assert not torch.equal(model(x), layer(x))
    assert type(layer) is nn.Linear
    assert list(base_state(model)) == ["weight", "bias"]


def test_a_bare_linear_is_given_back() -> None:
    layer, model = bare()
    assert detach_(trained(model)) is layer
    assert type(layer) is nn.Linear


def test_a_bare_linear_is_merged() -> None:
    layer, model = bare()
    x, domain = torch.randn(2, 3), torch.tensor([1, 1])
    with routed(trained(model), domain):
        expected = model(x)
    with disabled(model):
        assert torch.equal(model(x), layer(x))
    merged = merge_(model, 1)
    assert type(merged) is nn.Linear
    assert (merged(x) - expected).abs().max() <= 1e-6


def test_a_bare_linear_reads_domains_by_a_function() -> None:
    _, model = bare(domain=lambda x: (x[:, 0] > 0).long())
    x = torch.tensor([[1.0, 2, 3], [-1.0, 2, 3]])
    found = trained(model)(x)
    with routed(model, torch.tensor([1, 0])):
        assert torch.equal(model(x), found)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), found)


# taking off, merging, copying


def test_detach_gives_the_same_modules_back(x: Tensor) -> None:
    model = net().eval()
    modules, keys, expected = dict(model.named_modules()), list(model.state_dict()), model(x, DOMAIN)
    trained(attach_(model, 3))
    detach_(model)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x, DOMAIN), expected)
    assert type(model) is Net
    attach_(model, 2)  # and again


@pytest.mark.parametrize("number", [0, 1, 2])
def test_merged_is_the_routed_path(adapted: nn.Module, x: Tensor, number: int) -> None:
    with torch.no_grad():
        expected = adapted(x, torch.full((5,), number))
        merged = merge_(copy.deepcopy(adapted), number)
        assert (merged(x, DOMAIN) - expected).abs().max() <= 1e-6
    assert [type(module) for module in merged.modules()] == [type(module) for module in net().modules()]
    assert list(merged.state_dict()) == list(net().state_dict())
    assert all(merged.get_parameter(name).shape == p.shape for name, p in net().named_parameters())


@pytest.mark.parametrize("number", [-1, 3])
def test_merging_an_unknown_domain_changes_nothing(adapted: nn.Module, x: Tensor, number: int) -> None:
    expected = adapted(x, DOMAIN)
    with pytest.raises(UnknownDomainError):
        merge_(adapted, number)
    assert torch.equal(adapted(x, DOMAIN), expected)


def test_a_merged_copy_leaves_the_original_alone(adapted: nn.Module, x: Tensor) -> None:
    before, expected = digest(adapted.named_parameters()), adapted(x, DOMAIN)
    merge_(copy.deepcopy(adapted), 1)
    assert digest(adapted.named_parameters()) == before
    assert torch.equal(adapted(x, DOMAIN), expected)


def test_merging_keeps_frozen_what_was_frozen() -> None:
    model = freeze_(attach_(net(), 3))
    assert not any(parameter.requires_grad for parameter in merge_(model, 0).parameters())


def test_merging_a_computed_weight_is_right_or_refused() -> None:
    """A parametrised weight is computed at each call: adding to it in place would be lost."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = trained(attach_(nn.Sequential(layer), 2, domain=None))
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([1, 1])):
        expected = model(x)
    try:
        merged = merge_(model, 1)
    except ConfigError:
        return
    assert (merged(x) - expected).abs().max() <= 1e-6


def test_merging_a_frozen_base_works_under_a_graph(adapted: nn.Module, x: Tensor) -> None:
    """Banks that learn and a base that does not, with gradients on."""
    freeze_(adapted)
    expected = adapted(x, torch.ones(5, dtype=torch.int64)).detach()
    merged = merge_(adapted, 1)
    assert all(parameter.is_leaf for parameter in merged.parameters())
    assert (merged(x, DOMAIN) - expected).abs().max() <= 1e-6


def test_a_subclass_of_linear_stays_what_it_is() -> None:
    class Special(nn.Linear):
        pass

    model = attach_(nn.Sequential(Special(3, 4)), 2, domain=None)
    assert type(merge_(copy.deepcopy(model), 0)[0]) is Special  # type: ignore[index]
    assert type(detach_(model)[0]) is Special  # type: ignore[index]


@pytest.mark.parametrize("include", [["*"], ["first"], ["second"]], ids=str)
def test_one_layer_in_two_places_is_adapted_in_both_or_refused(include: list[str]) -> None:
    """Half of a shared layer adapted would be a silent surprise."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first

        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    model = Twice()
    keys = list(model.state_dict())
    try:
        attach_(model, 2, include=include)
    except ConfigError:
        return
    assert model.first is model.second
    assert list(detach_(model).state_dict()) == keys


def test_a_layer_in_two_places_is_merged_once() -> None:
    shared = nn.Linear(3, 3)
    model = trained(attach_(nn.Sequential(shared, nn.Tanh(), shared), 2, domain=None))
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([1, 1])):
        expected = model(x)
    merged = merge_(model, 1)
    assert merged[0] is merged[2]  # type: ignore[index]
    assert (merged(x) - expected).abs().max() <= 1e-6


def test_a_weight_shared_with_a_table_stays_shared_and_merging_spares_the_table() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor, domain: Tensor) -> Tensor:
            out: Tensor = self.out(self.table(ids))
            return out

    model = trained(attach_(Tied(), 2))
    ids, domain = torch.arange(4), torch.ones(4, dtype=torch.int64)
    table, expected = model.table.weight.detach().clone(), model(ids, domain)  # type: ignore[union-attr,operator]
    assert model.get_parameter("out.base.weight") is model.get_parameter("table.weight")
    merge_(model, 1)
    assert torch.equal(model.table.weight, table)  # type: ignore[union-attr,arg-type]
    assert (model(ids, domain) - expected).abs().max() <= 1e-6


def test_a_bias_shared_by_two_layers_is_merged_in_each() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    trained(attach_(model, 2, domain=None))
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([1, 1])):
        expected = model(x)
    assert (merge_(model, 1)(x) - expected).abs().max() <= 1e-6


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Telling(Doubling):
    """Says what it is as a plain layer, which differs between domains."""

    def plain(self, domain: int) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features)
        with torch.no_grad():
            layer.weight.copy_(2 * self.weight)
            layer.bias.copy_(2 * self.bias + domain)
        return layer


def test_a_layer_whose_forward_is_its_own_is_adapted_and_not_merged() -> None:
    model = trained(attach_(nn.Sequential(nn.Linear(3, 3), Doubling(3, 4)), 2, domain=None))
    x, domain = torch.randn(2, 3), torch.tensor([1, 0])
    with routed(model, domain):
        expected = model(x)
    with pytest.raises(ConfigError, match=r"Received: 'Doubling'.*plain\(domain\)"):
        merge_(model, 1)
    with routed(model, domain):  # nothing was changed, of the layer before it either
        assert torch.equal(model(x), expected)


def test_a_layer_says_what_it_is_for_one_domain() -> None:
    layer = Telling(3, 4)
    model = trained(attach_(nn.Sequential(layer), 2, domain=None))
    x, weight = torch.randn(2, 3), layer.weight.detach().clone()
    with routed(model, torch.tensor([1, 1])):
        expected = model(x) + 1
    merged = merge_(model, 1)
    assert type(merged[0]) is nn.Linear  # type: ignore[index]
    assert (merged(x) - expected).abs().max() <= 1e-6
    assert torch.equal(layer.weight, weight)


def test_a_forward_that_was_replaced_on_a_layer_is_kept_or_refused() -> None:
    """Libraries replace it to move weights between devices or to scale what comes out."""
    layer = nn.Linear(3, 4)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    model = nn.Sequential(layer)
    x = torch.randn(2, 3)
    expected = model(x)
    attach_(model, 2, domain=None).eval()
    with routed(model, torch.tensor([1, 1])):
        assert torch.equal(model(x), expected)
        trained(model)
        expected = model(x)
    try:
        merged = merge_(model, 1)
    except ConfigError:
        return
    assert (merged(x) - expected).abs().max() <= 1e-6


# layers that are read and not called


class Attention(nn.Module):
    """nn.MultiheadAttention reads the weight of out_proj and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x)[0])
        return out


def test_attention_of_torch_is_left_alone_and_what_is_around_it_adapted() -> None:
    model = attach_(Attention(), 2)
    assert list(adapter_layers(model)) == ["head"]
    assert model(torch.randn(2, 3, 4), torch.tensor([0, 1])).shape == (2, 3, 1)


def test_asking_for_attention_of_torch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MultiheadAttention.*Received: 'attention\.\*'.*query, key, value"):
        attach_(Attention(), 2, include=["attention.*"])


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_of_torch_calls_its_adapted_layers(training: bool) -> None:
    """In evaluation it has a fast path that reads weights."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    model = trained(attach_(model, 2, domain=None)).train(training)
    assert list(adapter_layers(model)) == ["linear1", "linear2"]
    x = torch.randn(2, 3, 4)
    with torch.no_grad(), routed(model, torch.tensor([1, 1])):
        expected = model(x)
        with disabled(model):
            assert (model(x) - expected).abs().max() > 1e-2
    with torch.no_grad():
        assert (merge_(model, 1)(x) - expected).abs().max() <= 1e-6


def test_training_mode_is_kept() -> None:
    model = attach_(net().eval(), 3)
    assert not any(module.training for module in model.modules())


# freezing


def moved(model: nn.Module, x: Tensor, steps: int = 3) -> set[str]:
    """Names in the state dict whose bits change in training."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, DOMAIN).square().sum().backward()
        optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_freeze_moves_adapters_only_statistics_included(x: Tensor) -> None:
    model = freeze_(attach_(net(), 3))
    names = moved(model, x)
    assert names == {name for name, _ in adapter_parameters(model)}


def test_without_freeze_statistics_move(x: Tensor) -> None:
    assert "norm.running_mean" in moved(attach_(net(), 3), x)


def test_freeze_except(x: Tensor) -> None:
    model = freeze_(attach_(net(), 3), except_=["head.base.*", "norm.*"])
    names = {name for name in moved(model, x) if not is_adapter_parameter(name)}
    assert {"head.base.weight", "head.base.bias", "norm.weight", "norm.running_mean"} <= names
    assert not any("tower" in name or "query" in name for name in names)


def test_freeze_refuses_a_glob_without_a_match() -> None:
    model = attach_(net(), 3)
    with pytest.raises(ConfigError, match="match a parameter"):
        freeze_(model, except_=["hed.*"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freeze_survives_a_deep_copy(x: Tensor) -> None:
    model = copy.deepcopy(freeze_(attach_(net(), 3)))
    assert all(is_adapter_parameter(name) for name in moved(model, x))


def test_freezing_twice_is_freezing_once(x: Tensor) -> None:
    model = freeze_(freeze_(attach_(net(), 3), except_=["norm.*"]))
    assert all(is_adapter_parameter(name) for name in moved(model, x))


@pytest.mark.parametrize("end", [detach_, lambda model: merge_(model, 1)], ids=["detached", "merged"])
def test_statistics_of_a_plain_model_are_its_own_again(x: Tensor, end: Any) -> None:
    model = end(freeze_(attach_(net(), 3))).requires_grad_(True)
    assert "norm.running_mean" in moved(model, x)


def test_globs_of_what_moves_leave_out_what_stands_still() -> None:
    model = net()
    model.get_parameter("norm.weight").requires_grad_(False)
    assert movable(model, ["norm.*"]) == ["norm.bias"]
    with pytest.raises(ConfigError, match="match a parameter"):
        movable(model, ["nrm.*"])


def test_statistics_that_were_frozen_can_move_again(x: Tensor) -> None:
    model = freeze_(freeze_(attach_(net(), 3)), except_=["norm.*"])
    assert "norm.running_mean" in moved(model, x)
