"""Domain negotiation and regularisation, beside the algorithm written out."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError, DataError
from domlora.models.build import build_model
from domlora.models.per_domain import PerDomain
from domlora.training.fit import FitOptions, loss_of
from domlora.training.negotiation import _SHARED, _Negotiation, negotiate, regularise
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.rows import OneDomain
from domlora.training.stages import Negotiation
from domlora.training.validation import scores_of

MODEL: dict[str, Any] = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.0}
FIT = FitOptions(batch_size=128, max_epochs=2, patience=9)
RULES = Negotiation(FIT, OptimizerOptions(*[Rule(lr=0.02)] * 3), outer_lr=0.5, num_helpers=1)

State = dict[str, Tensor]


def state(model: Any) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def close(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-6)


def started(data: Dataset, rules: Negotiation, **options: Any) -> _Negotiation:
    """A run that has not begun."""
    torch.manual_seed(rules.fit.seed)
    made = {**MODEL, "per_domain": True, "unknown_domains": "base"} if options.get("specific") else MODEL
    model = build_model(schema=data.schema, **made)
    torch.manual_seed(rules.fit.seed)
    return _Negotiation(model, data, rules, options["shared"], options["specific"], None, options.get("checkpoint"))


class Written:
    """MAMDR as its authors write it, with weights as dicts: shared ones, and what each domain adds."""

    def __init__(self, data: Dataset, rules: Negotiation) -> None:
        torch.manual_seed(rules.fit.seed)
        self.model = build_model(schema=data.schema, **MODEL).train()
        self.adam = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.shared = state(self.model)
        self.specific = [{name: torch.zeros_like(w) for name, w in self.shared.items()} for _ in range(3)]
        self.data, self.rules = data, rules

    def merged(self, domain: int) -> State:
        return {name: w + self.specific[domain][name] for name, w in self.shared.items()}

    def inner(self, domain: int, steps: int, number: int) -> None:
        rows = OneDomain(self.data, domain)
        for batch in islice(rows.batches("train", 128, seed=self.rules.fit.seed, epoch=number), steps):
            self.adam.zero_grad()
            loss_of(self.model(batch.ids, batch.dense, batch.domain), batch).backward()
            self.adam.step()

    def outer_pass(self, visits: Any, first: int) -> None:
        """``visits`` say which domains, in which order and how long: what is drawn is not what is tested."""
        begun: State = {}
        for number, visit in enumerate(visits, first):
            if visit.first:
                begun = dict(self.shared) if visit.target == _SHARED else self.merged(visit.target)
                self.model.load_state_dict(begun)
            self.inner(visit.domain, visit.steps, number)
            if visit.last:
                kept = self.shared if visit.target == _SHARED else self.specific[visit.target]
                for name, weights in state(self.model).items():
                    kept[name] = kept[name] + self.rules.outer_lr * (weights - begun[name])


@pytest.mark.parametrize("rules", [RULES, replace(RULES, outer_lr=1.0), replace(RULES, inner_steps=2, target_steps=1)])
@pytest.mark.parametrize("kind", [(True, False), (True, True), (False, True)], ids=["dn", "mamdr", "dr"])
def test_it_is_the_algorithm_written_out(data: Dataset, rules: Negotiation, kind: tuple[bool, bool]) -> None:
    run, written = started(data, rules, shared=kind[0], specific=kind[1]), Written(data, rules)
    for epoch in range(2):
        visits = run.visits(epoch)
        run.advance()
        written.outer_pass(visits, epoch * len(visits))
    if not kind[1]:
        close(state(run.model), written.shared)
        return
    assert isinstance(run.model, PerDomain)
    close(state(run.model.base), written.shared)
    for domain in range(3):
        close(state(run.model.copies[domain]), written.merged(domain))
        assert any(added.any() for added in written.specific[domain].values())


def test_negotiation_leaves_no_domain_behind(data: Dataset) -> None:
    """The copies move with the shared weights, by the same."""
    run = started(data, RULES, shared=True, specific=True)
    assert isinstance(run.model, PerDomain)
    before = state(run.model.base)
    with torch.no_grad():
        for number, each in enumerate(run.model.copies):
            for parameter in each.parameters():
                parameter.add_(number)
    with torch.no_grad():
        for parameter in run.stepped.parameters():
            parameter.add_(4.0)
    run.end(_SHARED)
    close(state(run.model.base), {name: tensor + 2.0 for name, tensor in before.items()})
    for number, each in enumerate(run.model.copies):
        close(state(each), {name: tensor + 2.0 + number for name, tensor in before.items()})


def test_regularisation_leaves_the_base_and_other_domains_alone(data: Dataset) -> None:
    torch.manual_seed(0)
    base = build_model(schema=data.schema, **MODEL)
    before = state(base)
    model, options, found = regularise(base, data, MODEL, RULES)
    assert isinstance(model, PerDomain)
    assert options == {**MODEL, "per_domain": True, "unknown_domains": "base"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(base).items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model.base).items())
    assert found.history[0]["epoch"] == 0
    assert found.best_value >= found.history[0]["wauc"]


def test_it_learns(data: Dataset) -> None:
    rules = replace(RULES, fit=replace(FIT, max_epochs=6), outer_lr=0.8)
    torch.manual_seed(1)
    before = scores_of(build_model(schema=data.schema, **MODEL), data)["wauc"]
    for regularised in (False, True):
        _, _, found = negotiate(data, MODEL, rules, regularised=regularised)
        assert found.best_value > before + 0.05


# the order of things


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
def test_what_an_outer_pass_visits(
    num_domains: int, num_helpers: int, inner_steps: int, target_steps: int, epoch: int
) -> None:
    data = World(num_domains=num_domains, num_dense=2, hidden_units=2, size_skew=1.0).dataset(3000, seed=1)[0]
    limits = {"num_helpers": num_helpers, "inner_steps": inner_steps, "target_steps": target_steps}
    run = started(data, replace(RULES, **limits), shared=True, specific=True)
    visits = run.visits(epoch)
    assert visits == run.visits(epoch)
    assert sum(visit.steps for visit in visits) == run.steps_per_epoch
    negotiated, regularised = visits[:num_domains], visits[num_domains:]
    assert sorted(visit.domain for visit in negotiated) == list(range(num_domains))
    assert {visit.target for visit in negotiated} == {_SHARED}
    pairs = [(a.target, a.domain) for a in regularised[::2]]
    assert all(b.domain == b.target == a.target for a, b in zip(regularised[::2], regularised[1::2], strict=True))
    helpers = min(num_helpers, num_domains - 1)
    assert len(set(pairs)) == len(pairs) == num_domains * (helpers + 1)
    assert all((domain, domain) in pairs for domain in range(num_domains))  # itself at last
    assert set(Counter(helper for _, helper in pairs).values()) == {helpers + 1}  # all help as often
    for visit in visits:
        most = inner_steps if visit.first or visit.target == _SHARED else target_steps
        whole = -(-run.views[visit.domain].num_rows("train") // 128)
        assert visit.steps == (min(whole, most) if most else whole)


def test_orders_differ_from_pass_to_pass_and_seed_to_seed(data: Dataset) -> None:
    run = started(data, RULES, shared=True, specific=True)
    other = started(data, replace(RULES, fit=replace(FIT, seed=2)), shared=True, specific=True)
    orders = {str([visit.domain for visit in each.visits(epoch)]) for each in (run, other) for epoch in range(20)}
    assert len(orders) > 5  # six orders of three domains


def test_each_visit_orders_its_rows_anew(data: Dataset) -> None:
    rules = replace(RULES, fit=replace(FIT, batch_size=32))
    run = started(data, rules, shared=True, specific=True)
    batches = [list(run.batches(epoch, 0)) for epoch in range(2)]
    firsts = {batch.dense[0, 0].item() for each in batches for batch in each}
    assert len(firsts) > 0.5 * sum(map(len, batches))  # most rows of 900 come first in one batch at the most
    assert all((batch.domain == batch.domain[0]).all() for each in batches for batch in each)


def test_progress_counts_the_rows_of_the_whole_outer_pass(data: Dataset) -> None:
    seen: list[Any] = []
    negotiate(data, MODEL, RULES, regularised=True, on_progress=seen.append)
    assert {progress.total_rows for progress in seen} == {900 * (1 + 2 * 2)}  # negotiation, a helper and oneself
    assert seen[-1].rows == seen[-1].total_rows


# going on


@pytest.mark.parametrize("kind", [(True, False), (True, True)], ids=["dn", "mamdr"])
@pytest.mark.parametrize("steps", [1, 3, 4, 10, 17])
def test_killed_in_the_middle_of_an_outer_pass(
    data: Dataset, digest: Any, killed: Any, tmp_path: Path, monkeypatch: Any, kind: tuple[bool, bool], steps: int
) -> None:
    """With a checkpoint after each step, so also before and after each outer one."""
    how = {"shared": kind[0], "specific": kind[1], "checkpoint": tmp_path / "run"}
    rules = replace(RULES, fit=replace(FIT, batch_size=150))  # two batches a domain
    straight = started(data, rules, shared=kind[0], specific=kind[1])
    expected = straight.go(False)
    backward, left = torch.Tensor.backward, [min(steps, straight.steps_per_epoch + 1)]

    def mortal(*args: Any, **options: Any) -> None:
        if not left[0]:
            raise killed
        left[0] -= 1
        backward(*args, **options)

    run = started(data, rules, **how)
    run.checkpoint_every_s = 0.0
    monkeypatch.setattr(torch.Tensor, "backward", mortal)
    with pytest.raises(killed):
        run.go(False)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    torch.rand(5)
    resumed = started(data, rules, **how)
    found = resumed.go(False)
    assert found.history == expected.history
    assert digest(resumed.model) == digest(straight.model)


@pytest.mark.parametrize("change", [{"outer_lr": 0.4}, {"num_helpers": 2}, {"inner_steps": 1}, {"target_steps": 1}])
def test_a_checkpoint_of_other_rules_is_refused(data: Dataset, tmp_path: Path, change: dict[str, Any]) -> None:
    negotiate(data, MODEL, RULES, checkpoint=tmp_path / "run")
    with pytest.raises(ConfigError, match="the negotiation it began with"):
        negotiate(data, MODEL, replace(RULES, **change), checkpoint=tmp_path / "run")


# odd domains


def missing(data: Dataset, domain: int) -> Dataset:
    rows = data.read("train")
    splits = {"train": rows.take(rows.domain != domain), "valid": data.read("valid"), "test": data.read("test")}
    return Dataset.from_batches(data.schema, splits)


def test_a_domain_without_training_rows_moves_with_the_shared_weights(data: Dataset) -> None:
    model, _, found = negotiate(missing(data, 1), MODEL, RULES, regularised=True)
    assert isinstance(model, PerDomain)
    assert len(found.history) == 2
    close(state(model.copies[1]), state(model.base))
    assert not torch.equal(model.copies[0].head.weight, model.base.head.weight)


def test_statistics_are_those_after_the_inner_steps(data: Dataset) -> None:
    run = started(data, RULES, shared=True, specific=True)
    assert isinstance(run.model, PerDomain)
    for each in (run.stepped, run.model.base, *run.model.copies):
        each.norm = nn.BatchNorm1d(2)
    run.stepped.norm.running_mean.fill_(3.0)
    run.end(0)
    assert run.model.copies[0].norm.running_mean.tolist() == [3.0, 3.0]
    assert run.model.copies[1].norm.running_mean.tolist() == [0.0, 0.0]
    run.begin(run.model.copies[1])
    assert run.stepped.norm.running_mean.tolist() == [0.0, 0.0]


def test_what_is_frozen_stays(data: Dataset) -> None:
    vectors = torch.randn(5, 2)
    options = {**MODEL, "pretrained": {"domain": vectors}}
    model, made, _ = negotiate(data, options, RULES, regularised=True)
    found = [p for p in model.parameters() if p.shape == (5, 2)]
    assert len(found) == 1
    assert torch.equal(found[0], vectors)
    assert made["per_domain"]


def test_no_rows_of_a_known_domain_is_a_user_error(data: Dataset) -> None:
    rows = data.read("train")
    unknown = rows._replace(domain=torch.full_like(rows.domain, -1))
    empty = Dataset.from_batches(data.schema, {"train": unknown, "valid": data.read("valid")})
    with pytest.raises(DataError, match="a row of a known domain"):
        negotiate(empty, MODEL, RULES)


@pytest.mark.parametrize(
    "change",
    [
        {"outer_lr": 0.0},
        {"outer_lr": 1.5},
        {"num_helpers": -1},
        {"inner_steps": -1},
        {"fit": FitOptions(average_decay=0.9)},
        {"fit": FitOptions(evaluations_per_epoch=2)},
    ],
)
def test_rules_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="negotiation"):
        Negotiation(**change)


def test_a_copy_of_the_run_is_not_needed_for_the_model_to_stay(data: Dataset) -> None:
    """What is stepped is not what is kept."""
    run = started(data, RULES, shared=True, specific=False)
    before = copy.deepcopy(run.model.state_dict())
    run.stepped.train()
    run.batches(0, 0)
    batch = next(OneDomain(data, 0).batches("train", 64))
    run.begins = {}
    run.step(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
