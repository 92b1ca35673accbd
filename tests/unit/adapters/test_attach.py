# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_, detach_, freeze_, merge_
from domlora.adapters.bank import (
    adapter_layers,
    adapter_parameters,
    base_state,
    is_adapter_parameter,
    load_rows_,
    rows_of,
)
from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.root import disabled, routed
from domlora.errors import BundleError, ConfigError, UnknownDomainError

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


def test_it_returns_the_same_model() -> None:
    model = net()
    assert attach_(model, 3) is model
    assert freeze_(model) is model
    assert detach_(model) is model


# where domains come from


def test_a_fresh_adapter_changes_no_bit(x: Tensor) -> None:
    model = net().eval()
    expected = model(x, DOMAIN)
    assert torch.equal(attach_(model, 3)(x, DOMAIN), expected)


def test_a_mixed_batch_is_its_rows(adapted: nn.Module, x: Tensor) -> None:
    mixed = adapted(x, DOMAIN)
    alone = torch.cat([adapted(x[row : row + 1], DOMAIN[row : row + 1]) for row in range(5)])
    assert (mixed - alone).abs().max() <= 1e-6
    assert (mixed - detach_(adapted)(x, DOMAIN)).abs().max() > 1e-2


@pytest.mark.parametrize("call", ["positional", "keyword", "all keywords"])
def test_the_argument_is_found_however_it_is_given(adapted: nn.Module, x: Tensor, call: str) -> None:
    expected = adapted(x, DOMAIN)
    given = {
        "positional": lambda: adapted(x, DOMAIN),
        "keyword": lambda: adapted(x, domain=DOMAIN),
        "all keywords": lambda: adapted(domain=DOMAIN, x=x),
    }[call]()
    assert torch.equal(given, expected)


def test_a_wrong_argument_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Received: 'domains'. Did you mean 'domain'\?"):
        attach_(net(), 3, domain="domains")


def test_a_foreign_sequential_has_no_domain_argument() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ConfigError, match=r"Sequential.*routed\(model, domain\)"):
        attach_(model, 2)


def test_a_function_reads_domains_from_the_call() -> None:
    model = trained(attach_(nn.Sequential(nn.Linear(3, 4)), 2, domain=lambda x: (x[:, 0] > 0).long()))
    x = torch.tensor([[1.0, 2, 3], [-1.0, 2, 3]])
    with routed(model, torch.tensor([1, 0])):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_routed_gives_domains_to_a_foreign_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    trained(attach_(model, 2, domain=None))
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([0, 1])):
        mixed = model(x)
    for number in (0, 1):
        merged = merge_(copy.deepcopy(model), number)
        assert (merged(x)[number] - mixed[number]).abs().max() <= 1e-6
    with pytest.raises(ConfigError, match="routed"):
        model(x)


def test_a_bare_linear_is_refused_clearly() -> None:
    with pytest.raises(ConfigError, match=r"nn\.Sequential|itself|inside"):
        attach_(nn.Linear(3, 4), 2, domain=None)


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear layer"):
        attach_(nn.Sequential(nn.ReLU()), 2, domain=None)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("arguments", [(), (None,)], ids=["left out", "None"])
def test_a_domain_that_is_not_given_is_asked_for(arguments: tuple[None, ...]) -> None:
    model = attach_(Optional(), 2)
    with pytest.raises(ConfigError, match="domain"):
        model(torch.randn(2, 3), *arguments)
    assert model(torch.randn(2, 3), torch.tensor([0, 1])).shape == (2, 4)


def test_an_unknown_domain_stops_the_call_and_leaves_no_trace(adapted: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnknownDomainError):
        adapted(x, DOMAIN + 1)
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 16))


def test_a_layer_outside_forward_is_refused(adapted: nn.Module, x: Tensor) -> None:
    adapted(x, DOMAIN)
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 16))


def test_routed_lets_one_layer_be_called_alone(adapted: nn.Module) -> None:
    head = adapted.get_submodule("head")
    h = torch.randn(2, 16)
    with routed(adapted, torch.tensor([1, -1])):
        alone = head(h)
    assert isinstance(head, LowRankLinear)
    assert torch.equal(alone[1], head.base(h)[1])
    assert not torch.equal(alone[0], head.base(h)[0])


def test_routed_wins_over_the_argument(adapted: nn.Module, x: Tensor) -> None:
    expected = adapted(x, DOMAIN)
    with routed(adapted, DOMAIN):
        assert torch.equal(adapted(x, torch.zeros_like(DOMAIN)), expected)
    assert not torch.equal(adapted(x, torch.zeros_like(DOMAIN)), expected)


@pytest.mark.parametrize("end", ["well", "with an error"])
def test_routed_ends_whatever_happens(adapted: nn.Module, x: Tensor, end: str) -> None:
    try:
        with routed(adapted, DOMAIN):
            if end != "well":
                raise RuntimeError
    except RuntimeError:
        pass
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 16))
    adapted(x, DOMAIN)


def test_routed_inside_routed(adapted: nn.Module, x: Tensor) -> None:
    """The inner block has its own domains, the outer one goes on with those it had."""
    with routed(adapted, DOMAIN):
        outer = adapted(x, DOMAIN)
        with routed(adapted, torch.tensor([1])):
            inner = adapted(x[:1], torch.tensor([1]))
        assert torch.equal(adapted(x, DOMAIN * 0), outer)
    assert torch.equal(inner, adapted(x[:1], torch.tensor([1])))


def test_routed_refuses_unknown_domains_before_the_block(adapted: nn.Module, x: Tensor) -> None:
    expected = adapted(x, DOMAIN)
    with pytest.raises(UnknownDomainError), routed(adapted, torch.tensor([9])):
        pass
    assert torch.equal(adapted(x, DOMAIN), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_forward_clears_the_route(x: Tensor, error: type[BaseException]) -> None:
    class Failing(Net):
        fails = True

        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            out = super().forward(x, domain)
            if self.fails:
                raise error
            return out

    model = attach_(Failing(), 3).eval()
    with pytest.raises(error):
        model(x, DOMAIN)
    if error is RuntimeError:  # torch calls no hooks on an interrupt; the next call fills the route anew anyway
        with pytest.raises(ConfigError, match="outside its model's forward"):
            model.get_submodule("head")(torch.randn(5, 16))
    model.fails = False  # type: ignore[assignment]
    assert model(x[:2], DOMAIN[:2]).shape == (2,)


def test_disabled_is_the_base(adapted: nn.Module, x: Tensor) -> None:
    before = adapted(x, DOMAIN)
    base = detach_(copy.deepcopy(adapted))(x, DOMAIN)
    with disabled(adapted) as inside:
        assert inside is adapted
        assert torch.equal(adapted(x, DOMAIN), base)
        with disabled(adapted):
            assert torch.equal(adapted(x, DOMAIN), base)
        assert torch.equal(adapted(x, DOMAIN), base)  # the inner block did not switch them on
        adapted.get_submodule("head")(torch.randn(7, 16))  # needs no domains
    assert torch.equal(adapted(x, DOMAIN), before)


def test_disabled_ends_after_an_error(adapted: nn.Module, x: Tensor) -> None:
    before = adapted(x, DOMAIN)
    with pytest.raises(RuntimeError), disabled(adapted):
        raise RuntimeError
    assert torch.equal(adapted(x, DOMAIN), before)


@pytest.mark.parametrize(
    "verb",
    [
        detach_,
        lambda m: merge_(m, 0),
        lambda m: disabled(m).__enter__(),
        lambda m: routed(m, DOMAIN).__enter__(),
        lambda m: rows_of(m, 0),
        lambda m: load_rows_(m, 0, {}),
    ],
)
def test_a_model_without_adapters_is_told_so(verb: Any) -> None:
    with pytest.raises(ConfigError, match=r"no adapters.*attach_"):
        verb(net())


# taking off, merging, copying


def test_detach_gives_the_same_modules_back(x: Tensor) -> None:
    model = net().eval()
    modules, keys, expected = dict(model.named_modules()), list(model.state_dict()), model(x, DOMAIN)
    trained(attach_(model, 3))
    detach_(model)
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x, DOMAIN), expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    attach_(model, 2)  # and again


@pytest.mark.parametrize("number", [0, 1, 2])
def test_merged_is_the_routed_path(adapted: nn.Module, x: Tensor, number: int) -> None:
    with torch.no_grad():
        expected = adapted(x, torch.full((5,), number))
        merged = merge_(copy.deepcopy(adapted), number)
        assert (merged(x, DOMAIN) - expected).abs().max() <= 1e-6
    assert [type(module) for module in merged.modules()] == [type(module) for module in net().modules()]
    assert set(net().state_dict()) <= set(merged.state_dict())


def test_merged_has_the_original_keys_where_layers_have_biases(adapted: nn.Module) -> None:
    model = attach_(net(), 3, exclude=["query"])
    assert list(merge_(model, 1).state_dict()) == list(net().state_dict())


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


def test_a_subclass_of_linear_stays_what_it_is() -> None:
    class Special(nn.Linear):
        pass

    model = attach_(nn.Sequential(Special(3, 4)), 2, domain=None)
    assert type(merge_(copy.deepcopy(model), 0)[0]) is Special  # type: ignore[index]
    assert type(detach_(model)[0]) is Special  # type: ignore[index]


def test_a_deep_copy_is_independent(adapted: nn.Module, x: Tensor) -> None:
    expected = adapted(x, DOMAIN)
    other = copy.deepcopy(adapted)
    with routed(other, torch.tensor([0, 0])):
        assert torch.equal(adapted(x, DOMAIN), expected)
        with disabled(adapted):
            assert other(x[:2], DOMAIN).shape == (2,)
    with torch.no_grad():
        for _, bank in adapter_parameters(other):
            bank.zero_()
    assert torch.equal(adapted(x, DOMAIN), expected)
    layers = [next(iter(adapter_layers(model).values())) for model in (adapted, other)]
    assert layers[0].route is not layers[1].route
    detach_(other)
    assert not other._forward_hooks
    assert not other._forward_pre_hooks
    assert torch.equal(adapted(x, DOMAIN), expected)


def test_a_copy_of_a_copy_trains(adapted: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(copy.deepcopy(adapted))
    other(x, DOMAIN).sum().backward()
    assert all(bank.grad is None for _, bank in adapter_parameters(adapted))
    assert all(bank.grad is not None for _, bank in adapter_parameters(other))


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
    merge_(model, 1)
    assert torch.equal(model.table.weight, table)  # type: ignore[union-attr,arg-type]
    assert (model(ids, domain) - expected).abs().max() <= 1e-6


def test_layers_that_are_not_called_are_refused() -> None:
    """nn.MultiheadAttention reads the weight of out_proj and never calls it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            out: Tensor = self.head(self.attention(x, x, x)[0])
            return out

    x, domain = torch.randn(2, 3, 4), torch.tensor([0, 1])
    try:
        model = attach_(Attention(), 2)
    except ConfigError:
        return
    assert model(x, domain).shape == (2, 3, 1)


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


def test_statistics_that_were_frozen_can_move_again(x: Tensor) -> None:
    model = freeze_(freeze_(attach_(net(), 3)), except_=["norm.*"])
    assert "norm.running_mean" in moved(model, x)


# rows, state


def test_rows_are_copies(adapted: nn.Module) -> None:
    rows = rows_of(adapted, 1)
    before = digest(adapted.named_parameters())
    for row in rows.values():
        row.fill_(7.0)
    assert digest(adapted.named_parameters()) == before
    assert not any(row.requires_grad for row in rows.values())


def test_load_rows_touches_one_row(adapted: nn.Module) -> None:
    others = {number: rows_of(adapted, number) for number in (0, 2)}
    base = base_state(adapted)
    new = {name: torch.randn_like(row) for name, row in rows_of(adapted, 1).items()}
    assert load_rows_(adapted, 1, new) is adapted
    assert all(torch.equal(row, new[name]) for name, row in rows_of(adapted, 1).items())
    for number, rows in others.items():
        assert all(torch.equal(row, rows[name]) for name, row in rows_of(adapted, number).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(adapted).items())


def test_a_row_moves_between_models(adapted: nn.Module, x: Tensor) -> None:
    other = attach_(net(), 5).eval()
    load_rows_(other, 4, rows_of(adapted, 1))
    assert torch.equal(other(x, torch.full((5,), 4)), adapted(x, torch.full((5,), 1)))


NAMES = ["head.lora_bias", "tower.0.lora_A"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [None, (), (1,), (99,)], ids=str)
def test_rows_that_do_not_fit_write_nothing(adapted: nn.Module, name: str, shape: tuple[int, ...] | None) -> None:
    """Left out, or of a shape that a careless copy would broadcast."""
    rows = {key: torch.zeros_like(row) for key, row in rows_of(adapted, 0).items()}
    rows[name] = torch.zeros(shape or (7, 7, 7))
    if shape is None:
        del rows[name]
    before = digest(adapted.named_parameters())
    if name == "head.lora_bias" and shape == (1,):
        rows[name] = torch.zeros(2)  # one output: (1,) would be right
    with pytest.raises(BundleError, match=name):
        load_rows_(adapted, 0, rows)
    assert digest(adapted.named_parameters()) == before


def test_rows_of_another_model_write_nothing(adapted: nn.Module) -> None:
    before = digest(adapted.named_parameters())
    with pytest.raises(BundleError, match=r"tower\.9\.lora_A"):
        load_rows_(adapted, 0, {**rows_of(adapted, 1), "tower.9.lora_A": torch.zeros(1)})
    assert digest(adapted.named_parameters()) == before


@pytest.mark.parametrize("number", [-1, 3])
def test_rows_of_unknown_domains(adapted: nn.Module, number: int) -> None:
    with pytest.raises(UnknownDomainError):
        rows_of(adapted, number)
    with pytest.raises(UnknownDomainError):
        load_rows_(adapted, number, {})


def test_base_state_is_the_state_without_adapters() -> None:
    plain = net()
    expected = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    found = base_state(trained(attach_(plain, 3)))
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert list(base_state(net())) == list(expected)


def test_base_state_of_layers_that_are_called_base() -> None:
    model = nn.ModuleDict({"base": nn.Sequential(nn.Linear(2, 2)), "base_x": nn.Linear(2, 2)})
    keys = list(model.state_dict())
    assert list(base_state(attach_(model, 2, domain=None))) == keys


def test_parameters_of_adapters() -> None:
    model = attach_(net(), 3, include=["head"])
    assert [name for name, _ in adapter_parameters(model)] == ["head.lora_A", "head.lora_B", "head.lora_bias"]
    assert not is_adapter_parameter("lora_Above")
    assert is_adapter_parameter("lora_A")
