# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import copy
import inspect
import io
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domlora.adapters.attach import attach_, detach_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, add_domain_, load_rows_, remove_domain_, rows_of
from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.root import disabled, find_route, route_of, routed
from domlora.errors import ConfigError, UnknownDomainError

DOMAIN = torch.tensor([2, 0, 1, 0, -1])


class Net(nn.Module):
    """What an adapted model should not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3, bias=False)
        self.tower = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        """Shapes (B, 4, 3) to (B,)."""
        logit: Tensor = self.head(self.tower(self.query(x).flatten(1))).squeeze(-1)
        return logit


def filled(model: nn.Module) -> nn.Module:
    """All banks filled, as after training."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.copy_(torch.randn(bank.shape, generator=random) * 0.3)
    return model


def adapted_net(kind: Callable[[], nn.Module] = Net, num_domains: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return filled(attach_(kind(), num_domains, **options)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapted() -> nn.Module:
    return adapted_net()


def is_empty(model: nn.Module) -> bool:
    """Whether no batch is left in the cell."""
    return route_of(model).segments is None


# an argument


def test_a_fresh_adapter_changes_no_bit(x: Tensor) -> None:
    model = Net().eval()
    expected = model(x, DOMAIN)
    assert torch.equal(attach_(model, 3)(x, DOMAIN), expected)


def test_a_mixed_batch_is_its_rows(adapted: nn.Module, x: Tensor) -> None:
    mixed = adapted(x, DOMAIN)
    alone = torch.cat([adapted(x[row : row + 1], DOMAIN[row : row + 1]) for row in range(5)])
    assert (mixed - alone).abs().max() <= 1e-6
    assert (mixed - detach_(adapted)(x, DOMAIN)).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["call", "forward"])
@pytest.mark.parametrize("arguments", ["positional", "keyword", "all keywords"])
def test_the_argument_is_found_however_it_is_given(adapted: nn.Module, x: Tensor, arguments: str, method: str) -> None:
    """Training loops exist that call forward, where hooks do not run."""
    with routed(adapted, DOMAIN):
        expected = adapted(x, DOMAIN)
    function = adapted if method == "call" else adapted.forward
    given = {
        "positional": lambda: function(x, DOMAIN),
        "keyword": lambda: function(x, domain=DOMAIN),
        "all keywords": lambda: function(domain=DOMAIN, x=x),
    }[arguments]()
    assert torch.equal(given, expected)
    assert is_empty(adapted)


class KeywordOnly(Net):
    def forward(self, *inputs: Tensor, domain: Tensor) -> Tensor:
        return super().forward(inputs[0], domain)


class First(Net):
    def forward(self, domain: Tensor, *inputs: Tensor, **rest: Tensor) -> Tensor:
        return super().forward(inputs[0], domain)


def test_an_argument_that_only_a_keyword_can_give(adapted: nn.Module, x: Tensor) -> None:
    """Whatever stands at its place among the positional ones is something else."""
    model = adapted_net(KeywordOnly)
    expected = adapted(x, DOMAIN)
    assert torch.equal(model(x, domain=DOMAIN), expected)
    assert torch.equal(model(x, torch.zeros(5, dtype=torch.int64), domain=DOMAIN), expected)


def test_an_argument_before_any_number_of_others(adapted: nn.Module, x: Tensor) -> None:
    model = adapted_net(First)
    assert torch.equal(model(DOMAIN, x, x, other=x), adapted(x, DOMAIN))


def test_a_wrong_argument_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Received: 'domains'. Did you mean 'domain'\?"):
        attach_(Net(), 3, domain="domains")


def test_a_foreign_sequential_has_no_domain_argument() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ConfigError, match=r"Sequential.*routed\(model, domain\)"):
        attach_(model, 2)


class Defaulted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("arguments", [(), (None,)], ids=["left out", "None"])
def test_a_domain_that_is_not_given_is_asked_for(arguments: tuple[None, ...]) -> None:
    model = attach_(Defaulted(), 2)
    with pytest.raises(ConfigError, match="domain"):
        model(torch.randn(2, 3), *arguments)
    with routed(model, torch.tensor([0, 1])):
        assert model(torch.randn(2, 3), *arguments).shape == (2, 4)
    with disabled(model):
        assert model(torch.randn(2, 3), *arguments).shape == (2, 4)
    assert model(torch.randn(2, 3), torch.tensor([0, 1])).shape == (2, 4)


def test_an_unknown_domain_stops_the_call_and_leaves_no_trace(adapted: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnknownDomainError):
        adapted(x, DOMAIN + 1)
    assert is_empty(adapted)
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 8))


def test_a_layer_outside_forward_is_refused(adapted: nn.Module, x: Tensor) -> None:
    adapted(x, DOMAIN)
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 8))


# a function


def test_a_function_reads_domains_from_the_call() -> None:
    model = filled(attach_(nn.Sequential(nn.Linear(3, 4)), 2, domain=lambda x: (x[:, 0] > 0).long()))
    x = torch.tensor([[1.0, 2, 3], [-1.0, 2, 3]])
    with routed(model, torch.tensor([1, 0])):
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_a_function_gets_every_argument_of_the_call(x: Tensor) -> None:
    seen: list[Any] = []

    def read(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return DOMAIN

    model = attach_(Net(), 3, domain=read)
    model(x, domain="kept")
    ((args, kwargs),) = seen
    assert args[0] is x
    assert kwargs == {"domain": "kept"}


# a with block


def test_routed_gives_domains_to_a_foreign_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    filled(attach_(model, 2, domain=None))
    x = torch.randn(2, 3)
    with routed(model, torch.tensor([0, 1])):
        mixed = model(x)
    for number in (0, 1):
        merged = merge_(copy.deepcopy(model), number)
        assert (merged(x)[number] - mixed[number]).abs().max() <= 1e-6
    with pytest.raises(ConfigError, match="routed"):
        model(x)


def test_routed_lets_one_layer_be_called_alone(adapted: nn.Module) -> None:
    head = adapted.get_submodule("head")
    h = torch.randn(2, 8)
    with routed(adapted, torch.tensor([1, -1])):
        alone = head(h)
    assert isinstance(head, LowRankLinear)
    assert torch.equal(alone[1], head.base(h)[1])
    assert not torch.equal(alone[0], head.base(h)[0])


def test_routed_wins_over_the_argument(adapted: nn.Module, x: Tensor) -> None:
    expected = adapted(x, DOMAIN)
    with routed(adapted, DOMAIN) as inside:
        assert inside is adapted
        assert torch.equal(adapted(x, torch.zeros_like(DOMAIN)), expected)
        assert torch.equal(adapted(x, torch.zeros_like(DOMAIN)), expected)  # for every call, not for the first
    assert not torch.equal(adapted(x, torch.zeros_like(DOMAIN)), expected)


@pytest.mark.parametrize("end", ["well", "with an error"])
def test_routed_ends_whatever_happens(adapted: nn.Module, x: Tensor, end: str) -> None:
    try:
        with routed(adapted, DOMAIN):
            if end != "well":
                raise RuntimeError
    except RuntimeError:
        pass
    assert is_empty(adapted)
    with pytest.raises(ConfigError, match="outside its model's forward"):
        adapted.get_submodule("head")(torch.randn(5, 8))
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
    with pytest.raises(ConfigError, match="outside its model's forward"):
        model.get_submodule("head")(torch.randn(5, 8))
    model.fails = False  # type: ignore[assignment]
    assert model(x[:2], DOMAIN[:2]).shape == (2,)


def test_a_model_that_calls_itself(x: Tensor) -> None:
    """On a part of its rows, before it goes on with all."""

    class Recursive(Net):
        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            half = self(x[:2], domain[:2]) if len(x) > 2 else 0.0
            return super().forward(x, domain) + (0.0 if isinstance(half, float) else half.sum())

    plain = adapted_net()
    expected = plain(x, DOMAIN) + plain(x[:2], DOMAIN[:2]).sum()
    assert (adapted_net(Recursive)(x, DOMAIN) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_inside_the_block(reentrant: bool) -> None:
    model = filled(attach_(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 2, domain=None))
    x, banks = torch.randn(2, 3, requires_grad=True), [bank for _, bank in adapter_parameters(model)]
    with routed(model, torch.tensor([1, 0])):
        expected = torch.autograd.grad(model(x).square().sum(), banks)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(bank.grad is not None for bank in banks)
    assert all(torch.equal(bank.grad, grad) for bank, grad in zip(banks, expected, strict=True))  # type: ignore[arg-type]


def test_activation_checkpointing_around_the_root_needs_no_block(adapted: nn.Module, x: Tensor) -> None:
    expected = torch.autograd.grad(adapted(x, DOMAIN).sum(), adapted.get_parameter("head.lora_A"))
    found = checkpoint(adapted, x, DOMAIN, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(found.sum(), adapted.get_parameter("head.lora_A"))[0], expected[0])
    assert is_empty(adapted)


# switching off


def test_disabled_is_the_base(adapted: nn.Module, x: Tensor) -> None:
    before = adapted(x, DOMAIN)
    base = detach_(copy.deepcopy(adapted))(x, DOMAIN)
    with disabled(adapted) as inside:
        assert inside is adapted
        assert torch.equal(adapted(x, DOMAIN), base)
        with disabled(adapted):
            assert torch.equal(adapted(x, DOMAIN), base)
        assert torch.equal(adapted(x, DOMAIN), base)  # the inner block did not switch them on
        adapted.get_submodule("head")(torch.randn(7, 8))  # needs no domains
    assert torch.equal(adapted(x, DOMAIN), before)


def test_disabled_ends_after_an_error(adapted: nn.Module, x: Tensor) -> None:
    before = adapted(x, DOMAIN)
    with pytest.raises(RuntimeError), disabled(adapted):
        raise RuntimeError
    assert torch.equal(adapted(x, DOMAIN), before)


def test_disabled_and_routed_in_either_order(adapted: nn.Module, x: Tensor) -> None:
    routed_out = adapted(x, DOMAIN)
    with disabled(adapted):
        base = adapted(x, DOMAIN)
        with routed(adapted, DOMAIN):
            assert torch.equal(adapted(x, DOMAIN), base)
    with routed(adapted, DOMAIN):
        with disabled(adapted):
            assert torch.equal(adapted(x, DOMAIN * 0), base)
        assert torch.equal(adapted(x, DOMAIN * 0), routed_out)


@pytest.mark.parametrize(
    "verb",
    [
        detach_,
        lambda m: merge_(m, 0),
        lambda m: disabled(m).__enter__(),
        lambda m: routed(m, DOMAIN).__enter__(),
        lambda m: rows_of(m, 0),
        lambda m: load_rows_(m, 0, {}),
        add_domain_,
        lambda m: remove_domain_(m, 0),
    ],
)
def test_a_model_without_adapters_is_told_so(verb: Any) -> None:
    with pytest.raises(ConfigError, match=r"no adapters.*attach_"):
        verb(Net())


# the class


def test_to_everyone_who_asks_the_class_is_the_same(adapted: nn.Module) -> None:
    assert isinstance(adapted, Net)
    found = type(adapted)
    assert (found.__name__, found.__qualname__, found.__module__) == (Net.__name__, Net.__qualname__, Net.__module__)
    assert found.__doc__ == Net.__doc__
    assert inspect.signature(adapted.forward) == inspect.signature(Net().forward)
    assert adapted.forward.__doc__ == Net.forward.__doc__
    assert repr(adapted).startswith("Net(\n")


@pytest.mark.parametrize("off", [detach_, lambda model: merge_(model, 1)], ids=["detach_", "merge_"])
def test_taken_off_it_has_its_own_class_again(x: Tensor, off: Any) -> None:
    model = off(adapted_net())
    assert type(model) is Net
    assert find_route(model) is None
    assert not any("domlora" in name for name in model.__dict__)
    assert model(x, DOMAIN + 100).shape == (5,)
    assert type(off(filled(attach_(model, 2)))) is Net


def test_models_of_one_class_have_nothing_in_common(x: Tensor) -> None:
    first, second, plain = adapted_net(), adapted_net(num_domains=7), Net()
    assert plain(x, DOMAIN + 100).shape == (5,)
    expected = second(x, DOMAIN + 4)
    with routed(first, DOMAIN), disabled(first):
        assert torch.equal(second(x, DOMAIN + 4), expected)
    detach_(first)
    assert torch.equal(second(x, DOMAIN + 4), expected)
    assert type(first) is Net
    with pytest.raises(ConfigError, match="no adapters"):
        route_of(first)


class Child(Net):
    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        return 2 * super().forward(x, domain)


def test_a_subclass_calls_the_forward_it_inherits(adapted: nn.Module, x: Tensor) -> None:
    model = adapted_net(Child)
    assert torch.equal(model(x, DOMAIN), 2 * adapted(x, DOMAIN))
    assert type(detach_(model)) is Child


def test_a_class_that_watches_its_instances(x: Tensor) -> None:
    """Slots, a metaclass and a __getattr__ of its own."""

    class Meta(type):
        pass

    class Watched(Net, metaclass=Meta):
        __slots__ = ("extra",)

        def __getattr__(self, name: str) -> Any:
            return "asked" if name == "unknown" else super().__getattr__(name)

    model = adapted_net(Watched)
    model.extra = 3  # type: ignore[assignment]
    assert (model.unknown, model.extra, type(type(model))) == ("asked", 3, Meta)
    assert torch.equal(model(x, DOMAIN), adapted_net()(x, DOMAIN))
    assert type(detach_(model)) is Watched


def test_a_forward_that_changes_later_is_the_one_that_is_called(
    adapted: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = -adapted(x, DOMAIN)
    own = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x, domain: -own(self, x, domain))
    assert torch.equal(adapted(x, DOMAIN), expected)


def test_a_forward_that_was_replaced_on_the_instance_is_refused_and_nothing_changes(x: Tensor) -> None:
    model = Net().eval()
    model.forward = types.MethodType(Net.forward, model)  # type: ignore[method-assign]
    keys, expected = list(model.state_dict()), model(x, DOMAIN)
    with pytest.raises(ConfigError, match=r"replaced on the instance.*before"):
        attach_(model, 3)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x, DOMAIN), expected)
    del model.forward
    assert torch.equal(attach_(model, 3)(x, DOMAIN), expected)


def test_hooks_of_the_root_are_run_and_may_change_the_domain(adapted: nn.Module, x: Tensor) -> None:
    expected = adapted(x, DOMAIN * 0)
    seen: list[Tensor] = []
    adapted.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    handle = adapted.register_forward_pre_hook(lambda _module, inputs: (inputs[0], inputs[1] * 0))
    assert torch.equal(adapted(x, DOMAIN), expected)
    assert len(seen) == 1
    handle.remove()
    assert not torch.equal(adapted(x, DOMAIN), expected)


def test_a_class_that_somebody_swapped_afterwards_is_not_lost() -> None:
    """Torch's parametrisations swap classes as well: taking adapters off underneath is right or refused."""

    class Doubled(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 2 * value

    model = adapted_net()
    model.gain = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(model, "gain", Doubled())
    try:
        detach_(model)
    except ConfigError:
        assert list(adapter_layers(model)) == ["query", "tower.0", "tower.2", "head"]
    assert model.gain == 2


def test_an_adapted_model_inside_another(adapted: nn.Module, x: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = adapted

        def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
            out: Tensor = self.inner(x, numbers)
            return -out

    assert torch.equal(Outer()(x, DOMAIN), -adapted(x, DOMAIN))


# copies


def rebuilt(model: nn.Module) -> nn.Module:
    """As whatever stores whole objects does it."""
    make, args, state, *_ = model.__reduce_ex__(4)
    other: nn.Module = make(*args)
    other.__setstate__(copy.deepcopy(state))
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, rebuilt])
def test_a_copy_is_adapted_and_independent(adapted: nn.Module, x: Tensor, copied: Any) -> None:
    expected = adapted(x, DOMAIN)
    with routed(adapted, torch.tensor([0, 0])), disabled(adapted):
        other = copied(adapted)
    assert type(other) is type(adapted)
    assert torch.equal(other(x, DOMAIN), expected)  # neither the batch nor the switch was copied
    assert route_of(other) is not route_of(adapted)
    assert {id(layer.route) for layer in adapter_layers(other).values()} == {id(route_of(other))}
    with routed(other, torch.tensor([0, 0])):
        assert torch.equal(adapted(x, DOMAIN), expected)
    with torch.no_grad():
        for _, bank in adapter_parameters(other):
            bank.zero_()
    add_domain_(other)
    assert torch.equal(adapted(x, DOMAIN), expected)
    assert route_of(adapted).num_domains == 3
    assert type(detach_(other)) is Net
    assert torch.equal(adapted(x, DOMAIN), expected)


def test_a_copy_of_a_copy_trains(adapted: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(copy.deepcopy(adapted))
    other(x, DOMAIN).sum().backward()
    assert all(bank.grad is None for _, bank in adapter_parameters(adapted))
    assert all(bank.grad is not None for _, bank in adapter_parameters(other))


def test_a_whole_model_can_be_stored_as_torch_users_do(adapted: nn.Module) -> None:
    """Under its own class's name, which another process can find; reading back is what ``rebuilt`` above does."""
    stored = io.BytesIO()
    torch.save(adapted, stored)
    assert b"Net" in stored.getvalue()
    make, args, *_ = adapted.__reduce_ex__(4)
    assert args == (Net,)
    assert getattr(sys.modules[make.__module__], make.__name__) is make


# threads


NUM_THREADS, ROUNDS = 6, 40


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns all the time rather than every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], int]) -> int:
    """The sum of what all threads return, which begin at the same time; errors in them are errors here."""
    start = threading.Barrier(NUM_THREADS)

    def task(number: int) -> int:
        start.wait(timeout=30)
        return work(number)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return sum(pool.map(task, range(NUM_THREADS)))


def batches_of(number: int) -> list[tuple[Tensor, Tensor]]:
    """Equally many rows in all threads: a batch mixed up with another's fits, and gives a wrong answer."""
    random = torch.Generator().manual_seed(number)
    return [
        (torch.randn(6, 4, 3, generator=random), torch.randint(-1, 8, (6,), generator=random)) for _ in range(ROUNDS)
    ]


def score(model: nn.Module, x: Tensor, domain: Tensor, way: str) -> Tensor:
    if way == "routed":
        with routed(model, domain):
            result: Tensor = model(x, domain * 0)
        return result
    with disabled(model) if way == "disabled" else nullcontext():
        return model.forward(x, domain) if way == "forward" else model(x, domain)  # type: ignore[no-any-return]


WAYS = {
    "by argument": ["argument"] * NUM_THREADS,
    "routed": ["routed"] * NUM_THREADS,
    "some of them disabled": ["argument", "disabled", "routed", "disabled", "forward", "routed"],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_six_threads_on_one_model_get_no_wrong_answer(hasty: None, ways: list[str], training: bool) -> None:
    model = adapted_net(num_domains=8).train(training)
    batches = {number: batches_of(number) for number in range(NUM_THREADS)}
    with torch.no_grad():
        expected = {n: [score(model, x, d, way) for x, d in batches[n]] for n, way in enumerate(ways)}

    def work(number: int) -> int:
        wrong = 0
        with torch.no_grad():
            for (x, domain), answer in zip(batches[number], expected[number], strict=True):
                wrong += not torch.equal(score(model, x, domain, ways[number]), answer)
        return wrong

    assert together(work) == 0
    assert is_empty(model)


def test_a_thread_that_waits_inside_forward_keeps_its_batch() -> None:
    """Not left to chance: all threads have told the model their domains before any layer computes."""
    inside = threading.Barrier(NUM_THREADS)

    class Waiting(Net):
        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            inside.wait(timeout=30)
            hidden = self.query(x)
            inside.wait(timeout=30)
            logit: Tensor = self.head(self.tower(hidden.flatten(1))).squeeze(-1)
            return logit

    plain, model = adapted_net(num_domains=8), adapted_net(Waiting, num_domains=8)
    ways = ["argument", "routed", "disabled"] * 2

    def work(number: int) -> int:
        wrong = 0
        for x, domain in batches_of(number)[:5]:
            wrong += not torch.equal(score(model, x, domain, ways[number]), score(plain, x, domain, ways[number]))
        return wrong

    assert together(work) == 0


def gradients(model: nn.Module, x: Tensor, domain: Tensor) -> list[Tensor]:
    loss = model(x, domain).square().sum()
    return [grad.to_dense() for grad in torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("sparse", [False, True])
def test_six_threads_get_the_gradients_of_their_own_batches(hasty: None, sparse: bool) -> None:
    model = adapted_net(num_domains=8).train()
    for layer in adapter_layers(model).values():
        layer.sparse = sparse
    batches = {number: batches_of(number)[:20] for number in range(NUM_THREADS)}
    expected = {number: [gradients(model, *batch) for batch in batches[number]] for number in batches}

    def work(number: int) -> int:
        pairs = zip(batches[number], expected[number], strict=True)
        return sum(
            not all(torch.equal(a, b) for a, b in zip(gradients(model, *batch), answer, strict=True))
            for batch, answer in pairs
        )

    assert together(work) == 0


def test_six_threads_train_copies_of_one_model(hasty: None) -> None:
    origin = adapted_net(num_domains=8).train()

    def trained(number: int) -> nn.Module:
        model = copy.deepcopy(origin)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for x, domain in batches_of(number)[:20]:
            optimizer.zero_grad()
            model(x, domain).square().sum().backward()
            optimizer.step()
        return model

    expected = {number: trained(number).state_dict() for number in range(NUM_THREADS)}

    def work(number: int) -> int:
        found = trained(number).state_dict()
        return sum(not torch.equal(tensor, expected[number][name]) for name, tensor in found.items())

    assert together(work) == 0
    assert not torch.equal(expected[0]["head.lora_A"], expected[1]["head.lora_A"])
