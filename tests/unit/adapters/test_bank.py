# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, detach_, freeze_, merge_
from domlora.adapters.bank import (
    adapter_layers,
    adapter_parameters,
    add_domain_,
    base_state,
    is_adapter_parameter,
    load_rows_,
    remove_domain_,
    rows_of,
    trainable_report,
)
from domlora.adapters.root import route_of, routed
from domlora.errors import BundleError, ConfigError, UnknownDomainError

DOMAIN = torch.tensor([2, 0, 1, 0, -1])


class Net(nn.Module):
    """A layer without bias among those that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """Shapes (B, 6) to (B,)."""
        logit: Tensor = self.head(self.tower(x)).squeeze(-1)
        return logit


def net() -> Net:
    torch.manual_seed(0)
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
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted() -> nn.Module:
    return trained(attach_(net(), 3)).eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# one domain's rows


def test_rows_are_copies(adapted: nn.Module) -> None:
    rows = rows_of(adapted, 1)
    before = bits(adapted)
    for row in rows.values():
        row.fill_(7.0)
    assert same(bits(adapted), before)
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
    before = bits(adapted)
    if name == "head.lora_bias" and shape == (1,):
        rows[name] = torch.zeros(2)  # one output: (1,) would be right
    with pytest.raises(BundleError, match=name):
        load_rows_(adapted, 0, rows)
    assert same(bits(adapted), before)


def test_rows_of_another_model_write_nothing(adapted: nn.Module) -> None:
    before = bits(adapted)
    with pytest.raises(BundleError, match=r"tower\.9\.lora_A"):
        load_rows_(adapted, 0, {**rows_of(adapted, 1), "tower.9.lora_A": torch.zeros(1)})
    assert same(bits(adapted), before)


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


def test_a_state_dict_goes_from_model_to_model(adapted: nn.Module, x: Tensor) -> None:
    other = attach_(net(), 3).eval()
    assert not same(bits(other), bits(adapted))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(x, DOMAIN), adapted(x, DOMAIN))
    assert list(adapted.state_dict()) == [
        name for name, _ in adapted.named_parameters()
    ]  # banks and base, nothing else


def test_a_state_dict_of_another_height_is_refused(adapted: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        attach_(net(), 4).load_state_dict(adapted.state_dict())


def test_the_base_can_be_loaded_by_its_own_names(adapted: nn.Module, x: Tensor) -> None:
    plain = net().eval()
    plain.load_state_dict(base_state(adapted))
    assert torch.equal(plain(x, DOMAIN), detach_(adapted)(x, DOMAIN))


# more and fewer domains


def test_a_new_domain_scores_as_the_base_and_the_others_keep_their_bits(adapted: nn.Module, x: Tensor) -> None:
    before, expected = {number: rows_of(adapted, number) for number in range(3)}, adapted(x, DOMAIN)
    base = base_state(adapted)
    assert add_domain_(adapted) == 3
    assert {bank.shape[0] for _, bank in adapter_parameters(adapted)} == {4}
    assert all(same(rows_of(adapted, number), rows) for number, rows in before.items())
    assert same(base_state(adapted), base)
    assert torch.equal(adapted(x, DOMAIN), expected)
    new = torch.full((5,), 3)
    assert torch.equal(adapted(x, new), adapted(x, torch.full((5,), -1)))
    rows = rows_of(adapted, 3)
    assert not rows["head.lora_B"].any()
    assert rows["head.lora_A"].any()
    assert not torch.equal(rows["head.lora_A"], before[2]["head.lora_A"])
    assert add_domain_(adapted) == 4


@pytest.mark.parametrize("like", [0, 2])
def test_a_new_domain_like_another(adapted: nn.Module, x: Tensor, like: int) -> None:
    expected = adapted(x, torch.full((5,), like))
    assert add_domain_(adapted, like=like) == 3
    assert torch.equal(adapted(x, torch.full((5,), 3)), expected)
    with torch.no_grad():
        adapted.get_parameter("head.lora_bias")[3] += 1.0  # a copy, not a view
    assert torch.equal(adapted(x, torch.full((5,), like)), expected)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"rank": 0}, {"include": ["tower.2"]}], ids=str)
def test_every_kind_of_bank_grows_and_shrinks(options: dict[str, Any], x: Tensor) -> None:
    model = trained(attach_(net(), 3, **options)).eval()
    kept, expected = bits(model), model(x, DOMAIN)
    assert add_domain_(model) == 3
    assert model(x, torch.full((5,), 3)).shape == (5,)
    remove_domain_(model, 3)
    assert same(bits(model), kept)
    assert torch.equal(model(x, DOMAIN), expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_removed_domain_is_gone_and_those_above_move_down(adapted: nn.Module, x: Tensor, number: int) -> None:
    left = [other for other in range(3) if other != number]
    expected = {other: adapted(x, torch.full((5,), other)) for other in [*left, -1]}
    assert remove_domain_(adapted, number) is adapted
    assert {bank.shape[0] for _, bank in adapter_parameters(adapted)} == {2}
    for now, before in [*enumerate(left), (-1, -1)]:
        assert torch.equal(adapted(x, torch.full((5,), now)), expected[before])
    with pytest.raises(UnknownDomainError, match="0 to 1"):
        adapted(x, torch.full((5,), 2))


def test_the_last_domain_stays(adapted: nn.Module) -> None:
    for _ in range(2):
        remove_domain_(adapted, 0)
    kept = bits(adapted)
    with pytest.raises(ConfigError, match=r"at least one domain.*detach_"):
        remove_domain_(adapted, 0)
    assert same(bits(adapted), kept)


@pytest.mark.parametrize("verb", [remove_domain_, lambda model, number: add_domain_(model, like=number)])
@pytest.mark.parametrize("number", [-1, 3])
def test_unknown_domains_change_nothing(adapted: nn.Module, verb: Any, number: int) -> None:
    kept = bits(adapted)
    with pytest.raises(UnknownDomainError, match="0 to 2"):
        verb(adapted, number)
    assert same(bits(adapted), kept)
    assert route_of(adapted).num_domains == 3


@pytest.mark.parametrize("change", [add_domain_, lambda model: remove_domain_(model, 1)], ids=["add", "remove"])
def test_what_moves_and_what_does_not_is_kept(adapted: nn.Module, change: Callable[[nn.Module], Any]) -> None:
    """Frozen banks, their type, their kind of gradient, and the mode of each layer."""
    adapted.get_parameter("head.lora_A").requires_grad_(False)
    layers = adapter_layers(adapted)
    layers["head"].sparse = True
    with torch.no_grad():
        layers["tower.0"].lora_A = nn.Parameter(layers["tower.0"].lora_A.double())
    moving = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    change(adapted)
    assert {name: parameter.requires_grad for name, parameter in adapted.named_parameters()} == moving
    assert all(isinstance(bank, nn.Parameter) for _, bank in adapter_parameters(adapted))
    assert [layer.sparse for layer in layers.values()] == [False, False, True]
    assert not any(layer.training for layer in layers.values())
    assert adapted.get_parameter("tower.0.lora_A").dtype == torch.float64
    assert adapted.get_parameter("tower.0.lora_B").dtype == torch.float32


def test_banks_finer_than_their_base_stay_so() -> None:
    model = attach_(nn.Sequential(nn.Linear(2, 2)), 2, domain=None).bfloat16()
    (layer,) = adapter_layers(model).values()
    layer.base.float()
    add_domain_(model)
    assert {bank.dtype for _, bank in adapter_parameters(model)} == {torch.bfloat16}


def test_a_layer_in_two_places_grows_once() -> None:
    shared = nn.Linear(3, 3)
    model = attach_(nn.Sequential(shared, nn.Tanh(), shared), 2, domain=None)
    assert add_domain_(model) == 2
    assert {bank.shape[0] for _, bank in adapter_parameters(model)} == {3}
    remove_domain_(model, 0)
    assert {bank.shape[0] for _, bank in adapter_parameters(model)} == {2}


def test_two_adapted_models_under_one_roof_are_changed_together_or_not_at_all() -> None:
    """Each has its own number of domains: half a change would be a wrong answer later."""
    parts = {
        name: attach_(nn.Sequential(nn.Linear(2, 2)), height, domain=None) for name, height in (("a", 2), ("b", 3))
    }
    roof = nn.ModuleDict(parts)
    for change in (add_domain_, lambda model: remove_domain_(model, 0)):
        with contextlib.suppress(ConfigError):
            change(roof)  # type: ignore[operator]
        for part in parts.values():
            assert {bank.shape[0] for _, bank in adapter_parameters(part)} == {route_of(part).num_domains}


def test_a_new_domain_trains_alone(adapted: nn.Module, x: Tensor) -> None:
    """Onboarding: the base and the others keep their bits."""
    freeze_(adapted)
    add_domain_(adapted)
    before = {number: rows_of(adapted, number) for number in range(4)}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.train()(x, torch.full((5,), 3)).square().sum().backward()
        optimizer.step()
    assert all(same(rows_of(adapted, number), before[number]) for number in range(3))
    assert not torch.equal(rows_of(adapted, 3)["head.lora_bias"], before[3]["head.lora_bias"])
    assert same(base_state(adapted), base_state(attach_(net(), 1)))


def test_a_copy_grows_alone(adapted: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(adapted)
    add_domain_(other)
    assert route_of(adapted).num_domains == 3
    with pytest.raises(UnknownDomainError):
        adapted(x, DOMAIN + 1)
    assert other(x, DOMAIN + 1).shape == (5,)
    assert merge_(other, 3)(x, DOMAIN).shape == (5,)


def test_a_grown_model_is_routed_and_copied(adapted: nn.Module, x: Tensor) -> None:
    add_domain_(adapted, like=1)
    with routed(adapted, torch.full((5,), 3)):
        assert torch.equal(adapted(x, DOMAIN), adapted(x, torch.full((5,), 1)))
    other = trained(attach_(net(), 4)).eval()
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(x, DOMAIN + 1), adapted(x, DOMAIN + 1))


# counting


def test_the_report_counts_by_hand() -> None:
    report = trainable_report(attach_(net(), 3))
    first, second, head = (6 + 32) * 2 + 32, (32 + 16) * 1, (16 + 1) * 1 + 1  # A and B, and c where there is a bias
    assert report.layers == {"tower.0": first, "tower.2": second, "head": head}
    assert report.per_domain == first + second + head
    assert (report.num_domains, report.adapters) == (3, 3 * report.per_domain)
    assert report.base == report.base_trainable == (6 + 1) * 32 + 32 * 16 + 17
    assert report.adapters_trainable == report.adapters


def test_the_report_of_what_is_frozen() -> None:
    model = freeze_(attach_(net(), 3), except_=["head.base.bias"])
    model.get_parameter("head.lora_A").requires_grad_(False)
    report = trainable_report(model)
    assert report.base_trainable == 1
    assert report.adapters_trainable == report.adapters - 3 * 16
    moves = 1 + report.adapters_trainable
    assert str(report).startswith(f"trainable {moves:,} of {report.base + report.adapters:,} (")
    assert f"(3 domains x {report.per_domain:,} in 3 layers)" in str(report)


def test_the_report_follows_the_number_of_domains(adapted: nn.Module) -> None:
    before = trainable_report(adapted)
    add_domain_(adapted)
    after = trainable_report(adapted)
    assert (after.num_domains, after.adapters) == (4, before.adapters + before.per_domain)
    assert (after.layers, after.base) == (before.layers, before.base)


def test_the_report_of_a_layer_in_two_places_counts_it_once() -> None:
    shared = nn.Linear(3, 3)
    report = trainable_report(attach_(nn.Sequential(shared, nn.Tanh(), shared), 2, domain=None))
    assert report.base == 12
    assert report.per_domain == (3 + 3) * 1 + 3
    assert set(report.layers.values()) == {report.per_domain}


def test_the_report_of_a_plain_model() -> None:
    report = trainable_report(net())
    assert (report.adapters, report.num_domains, report.per_domain, report.layers) == (0, 0, 0, {})
    assert "in 0 layers" in str(report)
    assert str(trainable_report(nn.ReLU())).startswith("trainable 0 of 0 (0.00%)")
