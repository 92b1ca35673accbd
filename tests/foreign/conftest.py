"""The laws that adapters keep on models which this project did not write; each file beside builds one peer's models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from domlora.adapters.attach import attach_, detach_, freeze_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state, load_rows_, rows_of
from domlora.adapters.file import load_adapter_, save_adapter
from domlora.adapters.root import disabled, routed

NUM_DOMAINS = 3
CLOSE = 1e-6  # of probabilities and small logits in float32
TARGETS = torch.tensor([0.1, 0.4, 0.9])  # click rates so different that every domain has something to learn


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Foreign(NamedTuple):
    """A model as its own package builds it, a mixed batch as it takes it, and where its rows' domains are."""

    model: nn.Module
    x: Any
    domain: Callable[..., Tensor]
    answer: Callable[[nn.Module, Any], Tensor] = lambda model, x: model(x)
    options: Mapping[str, Any] = {}

    def adapted(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        return attach_(model, NUM_DOMAINS, temperature=4, domain=self.domain, **self.options)

    def base(self) -> nn.Module:
        """Frozen as adapted ones are: torch's own Linear rounds differently when its weight asks for no gradient."""
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    def trained(self) -> nn.Module:
        """After a few real steps of the adapters alone."""
        model = freeze_(self.adapted()).train()
        moving = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(moving, lr=3e-2)
        for _ in range(8):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
        return model.eval()

    def loss(self, model: nn.Module, x: Any = None) -> Tensor:
        """Summed over rows, so that a batch's gradient is the sum of its pieces'."""
        x = self.x if x is None else x
        said = self.answer(model, x).reshape(len(self.domain(x)), -1).mean(1)
        return F.mse_loss(said, TARGETS[self.domain(x)], reduction="sum")

    def score(self, model: nn.Module, x: Any = None) -> Tensor:
        with torch.no_grad():
            return self.answer(model, self.x if x is None else x)

    def pieces(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Each domain's number, the places of its rows in the batch, and those rows."""
        for number in range(NUM_DOMAINS):
            rows = (self.domain(self.x) == number).nonzero().squeeze(1)
            assert len(rows) > 1
            yield number, rows, tree_map(lambda t, rows=rows: t[rows], self.x)

    def routed_to(self, model: nn.Module, number: int) -> Tensor:
        """All rows as if they were of one domain, whatever their features say."""
        with routed(model, torch.full_like(self.domain(self.x), number)):
            return self.score(model)


def fresh_adapter_is_the_base(case: Foreign) -> None:
    adapted = case.adapted().eval()
    assert adapter_layers(adapted)
    assert torch.equal(case.score(adapted), case.score(case.model.eval()))
    _same_bits(base_state(adapted), case.model.state_dict())


def training_moves_adapters_alone(case: Foreign) -> None:
    model, before = case.trained(), case.score(case.base())
    _same_bits(base_state(model), case.model.state_dict())  # norm statistics are in there too
    for number, rows, _ in case.pieces():
        moved = (case.score(model) - before)[rows].abs().max()
        assert moved > 1e-2, f"domain {number} moved by {moved}"
    with disabled(model):
        assert torch.equal(case.score(model), before)
    assert torch.equal(case.routed_to(model, -1), before)


def each_row_gets_its_own_domain(case: Foreign) -> None:
    model = case.trained()
    mixed = case.score(model)
    answers = [case.routed_to(model, number) for number in range(NUM_DOMAINS)]
    for number, rows, x in case.pieces():
        assert (mixed[rows] - case.score(model, x)).abs().max() <= CLOSE
        assert (mixed[rows] - answers[number][rows]).abs().max() <= CLOSE
        assert (answers[number] - answers[number - 1]).abs().max() > 1e-2  # the same rows in two domains


def each_domain_gets_its_own_gradient(case: Foreign) -> None:
    model = case.trained().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    whole = _gradients(model, case.loss(model))
    for number, _, x in case.pieces():
        for name, own in _gradients(model, case.loss(model, x)).items():
            assert (whole[name][number] - own[number]).abs().max() <= 1e-5, name
            others = [other for other in range(NUM_DOMAINS) if other != number]
            assert not own[others].any(), name


def merging_gives_a_plain_model(case: Foreign) -> None:
    model = case.trained()
    mixed = case.score(model)
    for number, rows, x in case.pieces():
        merged = merge_(copy.deepcopy(model), number)
        assert (case.score(merged, x) - mixed[rows]).abs().max() <= CLOSE
        assert (case.score(merged) - case.routed_to(model, number)).abs().max() <= CLOSE
        assert list(merged.state_dict()) == list(case.model.state_dict())
        assert _types(merged) == _types(case.model)
    assert torch.equal(case.score(model), mixed)  # merging a copy leaves the original alone


def detaching_gives_the_base(case: Foreign) -> None:
    model = detach_(case.trained())
    assert torch.equal(case.score(model), case.score(case.base()))
    assert _types(model) == _types(case.model)
    _same_bits(model.state_dict(), case.model.state_dict())


def rows_travel(case: Foreign) -> None:
    model, other = case.trained(), freeze_(case.adapted()).eval()
    for number in range(NUM_DOMAINS):
        load_rows_(other, number, rows_of(model, number))
    assert torch.equal(case.score(other), case.score(model))


def files_travel(case: Foreign) -> None:
    model, other = case.trained(), freeze_(case.adapted()).eval()
    with TemporaryDirectory() as folder:
        for number in range(NUM_DOMAINS):
            save_adapter(model, number, Path(folder) / f"{number}")
            load_adapter_(other, number, Path(folder) / f"{number}")
    assert torch.equal(case.score(other), case.score(model))


LAWS = (
    fresh_adapter_is_the_base,
    training_moves_adapters_alone,
    each_row_gets_its_own_domain,
    each_domain_gets_its_own_gradient,
    merging_gives_a_plain_model,
    detaching_gives_the_base,
    rows_travel,
    files_travel,
)


@pytest.fixture(params=LAWS, ids=lambda law: law.__name__)
def law(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Every law in turn: ``law(model, x, domain)`` with the fields of :class:`Foreign`."""
    return lambda *args, **options: request.param(Foreign(*args, **options))


@pytest.fixture
def foreign() -> type[Foreign]:
    """For tests that ask more of a model than the laws."""
    return Foreign


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    banks = dict(adapter_parameters(model))
    found = torch.autograd.grad(loss, list(banks.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(banks, found, strict=True))


def _types(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def _same_bits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
