from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from domlora.adapters.lowrank import LowRankLinear, rank_for
from domlora.adapters.route import DomainRoute
from domlora.errors import ConfigError


def layer_with(
    num_domains: int = 3,
    in_features: int = 4,
    out_features: int = 5,
    rank: int = 2,
    *,
    bias: bool = True,
    base_bias: bool = True,
    lora_alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> LowRankLinear:
    """A layer whose banks are all filled, so that no term can hide."""
    torch.manual_seed(num_domains + 10 * in_features + 100 * out_features + 1000 * rank)
    base = nn.Linear(in_features, out_features, bias=base_bias, dtype=dtype)
    layer = LowRankLinear(base, DomainRoute(num_domains), rank, lora_alpha=lora_alpha, bias=bias)
    with torch.no_grad():
        for bank in (layer.lora_A, layer.lora_B, layer.lora_bias):
            if bank is not None:
                bank.normal_(std=0.5)
    return layer


def reference(layer: LowRankLinear, x: Tensor, domain: Tensor) -> Tensor:
    """Row by row and term by term, as the formula is written."""
    rows = []
    for row, number in zip(x, domain.tolist(), strict=True):
        y = row @ layer.base.weight.T
        if layer.base.bias is not None:
            y = y + layer.base.bias
        if number >= 0:
            y = y + layer.scale * (row @ layer.lora_A[number]) @ layer.lora_B[number]
            if layer.lora_bias is not None:
                y = y + layer.lora_bias[number]
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(*x.shape[:-1], layer.out_features)


def routed_call(layer: LowRankLinear, x: Tensor, domain: Tensor) -> Tensor:
    layer.route.fill(domain)
    try:
        result: Tensor = layer(x)
    finally:
        layer.route.clear()
    return result


def gradients(layer: LowRankLinear, out: Tensor, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    named = {"x": x, **dict(layer.named_parameters())}
    wanted = [tensor for tensor in named.values() if tensor.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, upstream, allow_unused=True, materialize_grads=True))
    return {name: next(found) for name, tensor in named.items() if tensor.requires_grad}


def check_against_reference(layer: LowRankLinear, x: Tensor, domain: Tensor, tolerance: float = 1e-6) -> None:
    x = x.detach().requires_grad_()
    ours, theirs = routed_call(layer, x, domain), reference(layer, x, domain)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(7))
    close(ours, theirs, tolerance)
    if not theirs.requires_grad:  # no rows: nothing to differentiate in the reference
        return
    mine, yours = gradients(layer, ours, x, upstream), gradients(layer, theirs, x, upstream)
    for name in yours:
        close(mine[name], yours[name], tolerance)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    assert ours.shape == theirs.shape
    if ours.numel():
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.detach().abs().max()))


DOMAINS = {
    "sorted": [0, 0, 1, 1, 1, 2],
    "unsorted": [2, 0, 1, 0, 2, 1],
    "one domain": [1, 1, 1, 1],
    "one row": [2],
    "no domain first": [-1, -1, 0, 2],
    "no domain between": [1, -1, 0, -1, 2],
    "no domain at all": [-1, -1],
    "gap": [0, 0, 2, 2],
    "descending": [2, 1, 0],
    "no rows": [],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"rank": 1},
    "bias only": {"rank": 0},
    "no bias": {"bias": False},
    "base without bias": {"base_bias": False},
    "lora_alpha": {"lora_alpha": 5.0},
    "wider than the layer": {"rank": 9},
}


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)], ids=str)
def test_forward_and_all_gradients(domain: list[int], options: dict[str, Any], middle: tuple[int, ...]) -> None:
    layer = layer_with(**options)
    x = torch.randn(len(domain), *middle, 4, generator=torch.Generator().manual_seed(0))
    check_against_reference(layer, x, torch.tensor(domain, dtype=torch.int64))


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], Tensor, Tensor]:
    sizes = {name: draw(st.integers(1, 6)) for name in ("num_domains", "in_features", "out_features")}
    bias, base_bias = draw(st.booleans()), draw(st.booleans())
    options = {
        **sizes,
        "rank": draw(st.integers(0 if bias and base_bias else 1, 4)),
        "bias": bias,
        "base_bias": base_bias,
        "lora_alpha": draw(st.none() | st.floats(0.1, 8)),
        "dtype": torch.float64,
    }
    domain = draw(st.lists(st.integers(-1, sizes["num_domains"] - 1), max_size=12))
    if draw(st.booleans()):
        domain.sort()
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    x = torch.randn(len(domain), *middle, sizes["in_features"], dtype=torch.float64)
    return options, x, torch.tensor(domain, dtype=torch.int64)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(cases())
def test_any_shape_domains_rank_and_order(case: tuple[dict[str, Any], Tensor, Tensor]) -> None:
    options, x, domain = case
    check_against_reference(layer_with(**options), x, domain, tolerance=1e-12)


@pytest.mark.parametrize("middle", [(), (3,)], ids=str)
@pytest.mark.parametrize("shuffled", [False, True])
def test_training_on_many_rows(middle: tuple[int, ...], shuffled: bool) -> None:
    """Where merging a domain's weights is cheaper than correcting its rows."""
    layer = layer_with().train()
    domain = torch.arange(120) % 4 - 1
    x = torch.randn(120, *middle, 4, generator=torch.Generator().manual_seed(0))
    check_against_reference(layer, x, domain if shuffled else domain.sort().values)


def test_training_and_evaluation_agree() -> None:
    layer, x, domain = layer_with(), torch.randn(120, 4), torch.arange(120) % 3
    close(routed_call(layer.train(), x, domain), routed_call(layer.eval(), x, domain))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_the_output(case: tuple[dict[str, Any], Tensor, Tensor], random: Any) -> None:
    options, x, domain = case
    layer = layer_with(**options)
    order = list(range(len(domain)))
    random.shuffle(order)
    shuffled = torch.tensor(order, dtype=torch.int64)
    close(routed_call(layer, x[shuffled], domain[shuffled]), routed_call(layer, x, domain)[shuffled], 1e-12)


def test_gradcheck() -> None:
    layer = layer_with(dtype=torch.float64, lora_alpha=3.0)
    parameters = (layer.lora_A, layer.lora_B, layer.lora_bias, layer.base.weight, layer.base.bias)
    for numbers in ([0, 0, 1], [2, 0, 2], [1, -1, 0]):
        domain = torch.tensor(numbers)

        def call(x: Tensor, *_: Tensor, domain: Tensor = domain) -> Tensor:
            return routed_call(layer, x, domain)

        x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("numbers", [[0, 0, 2], [2, 0, 0], [-1, 0, 2]])
def test_absent_domains_get_exactly_zero(numbers: list[int]) -> None:
    layer = layer_with(num_domains=5)
    routed_call(layer, torch.randn(3, 4), torch.tensor(numbers)).square().sum().backward()
    for bank in (layer.lora_A, layer.lora_B, layer.lora_bias):
        assert bank is not None
        assert bank.grad is not None
        assert not bank.grad[[1, 3, 4]].any()
        assert bank.grad[0].any()
        assert bank.grad[2].any()


def test_a_frozen_base_and_a_constant_input_get_no_gradient() -> None:
    layer = layer_with()
    layer.base.requires_grad_(False)
    x = torch.randn(3, 4)
    routed_call(layer, x, torch.tensor([0, 1, 1])).sum().backward()
    assert x.grad is None
    assert layer.base.weight.grad is None
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_bias"])
def test_one_bank_frozen_leaves_the_others_their_gradients(frozen: str) -> None:
    layer, free = layer_with(), layer_with()
    getattr(layer, frozen).requires_grad_(False)
    x, domain = torch.randn(4, 4), torch.tensor([2, 0, 0, 1])
    routed_call(layer, x, domain).square().sum().backward()
    routed_call(free, x, domain).square().sum().backward()
    for name, parameter in layer.named_parameters():
        other = free.get_parameter(name).grad
        assert (parameter.grad is None) == (name == frozen)
        assert parameter.grad is None or (other is not None and torch.equal(parameter.grad, other))


@pytest.mark.parametrize("numbers", [[0, 0, 1, 2], [2, 1, 0, 0], [-1, 1, 0, 1]])
def test_a_fresh_adapter_is_its_base_bit_for_bit(numbers: list[int]) -> None:
    base = nn.Linear(4, 8)
    x = torch.randn(4, 4)
    expected = base(x)
    layer = LowRankLinear(base, DomainRoute(3), 2)
    assert torch.equal(routed_call(layer, x, torch.tensor(numbers)), expected)


@pytest.mark.parametrize("sorted_rows", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type[torch.no_grad], sorted_rows: bool) -> None:
    layer = layer_with()
    domain = torch.tensor([0, 1, 2] if sorted_rows else [2, 0, 1])
    for x in (torch.randn(3, 4), torch.randn(3, 2, 4)):
        with mode():
            found = routed_call(layer, x, domain)
        close(found.clone(), reference(layer, x, domain))
    routed_call(layer, torch.randn(3, 4), domain).sum().backward()  # and training goes on afterwards


@pytest.mark.parametrize("sorted_rows", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_a_base_that_runs_without_gradients(shape: tuple[int, ...], sorted_rows: bool) -> None:
    """A frozen base may save memory by running under no_grad; the adapter beside it still learns."""

    class Silent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    layer = LowRankLinear(Silent(4, 5), DomainRoute(3), 2)
    domain = torch.tensor([0, 1, 2] if sorted_rows else [2, 0, 1])
    routed_call(layer, torch.randn(shape), domain).sum().backward()
    assert layer.base.weight.grad is None
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize("numbers", [[0, 1], [1, 0]])
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.tanh, torch.exp])
def test_a_base_that_saves_its_output_for_the_backward_pass(activation: Any, numbers: list[int]) -> None:
    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = activation(super().forward(x))
            return out

    layer = LowRankLinear(Squashed(4, 5), DomainRoute(3), 2)
    x = torch.randn(2, 4)
    base = layer.base(x)
    (expected,) = torch.autograd.grad(base.sum(), layer.base.weight)
    (found,) = torch.autograd.grad(routed_call(layer, x, torch.tensor(numbers)).sum(), layer.base.weight)
    close(found, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("numbers", [[0, 1], [1, 0]])
@pytest.mark.parametrize("repeats", [1, 50])
def test_a_hook_that_keeps_the_bases_output_sees_the_bases_output(
    numbers: list[int], repeats: int, training: bool
) -> None:
    layer = layer_with().train(training)
    kept: list[Tensor] = []
    layer.base.register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    x = torch.randn(2 * repeats, 4)
    routed_call(layer, x, torch.tensor(numbers * repeats))
    assert torch.equal(kept[0], nn.functional.linear(x, layer.base.weight, layer.base.bias))


@pytest.mark.parametrize("training", [False, True])
def test_a_hook_that_prepares_the_base_is_run(training: bool) -> None:
    """The older spectral_norm computes the weight of a plain nn.Linear in a hook before each call."""
    layer = layer_with(in_features=4, out_features=4, rank=2)
    nn.utils.spectral_norm(layer.base)
    layer.train(training)
    x, domain = torch.randn(200, 4), torch.arange(200) % 3
    with torch.no_grad():
        for _ in range(30):  # until the norm has settled
            layer.base(x)
        found = routed_call(layer, x, domain)
        close(found, reference(layer, x, domain), 1e-4)


def test_inputs_are_left_alone() -> None:
    layer = layer_with()
    x, domain = torch.randn(3, 4), torch.tensor([2, 0, 1])
    kept = x.clone(), domain.clone()
    routed_call(layer, x, domain)
    assert torch.equal(x, kept[0])
    assert torch.equal(domain, kept[1])


@pytest.mark.parametrize("numbers", [[0, 0, 1], [2, 0, 1]])
def test_strided_inputs_and_gradients(numbers: list[int]) -> None:
    layer, domain = layer_with(), torch.tensor(numbers)
    for x in (torch.randn(4, 3).t(), torch.randn(2, 3, 4).transpose(0, 1), torch.randn(3, 4, 2).transpose(1, 2)):
        check_against_reference(layer, x, domain)
    expanded = torch.randn(1, 4).expand(3, 4)
    check_against_reference(layer, expanded, domain)
    x = torch.randn(3, 4, requires_grad=True)
    (found,) = torch.autograd.grad(routed_call(layer, x, domain).sum(), x)  # an expanded upstream gradient
    (expected,) = torch.autograd.grad(reference(layer, x, domain).sum(), x)
    close(found, expected)


def test_a_layer_twice_in_one_batch_and_two_batches_in_one_graph() -> None:
    layer = layer_with(in_features=4, out_features=4)
    x, domain = torch.randn(3, 4), torch.tensor([2, 0, 1])
    layer.route.fill(domain)
    twice = layer(layer(x))
    layer.route.clear()
    close(twice, reference(layer, reference(layer, x, domain), domain))
    other = torch.tensor([0, 0, 1])
    total = routed_call(layer, x, domain).square().sum() + routed_call(layer, x, other).square().sum()
    (found,) = torch.autograd.grad(total, layer.lora_A)
    plain = reference(layer, x, domain).square().sum() + reference(layer, x, other).square().sum()
    close(found, torch.autograd.grad(plain, layer.lora_A)[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("repeats", [1, 50])
@pytest.mark.parametrize("middle", [(), (2,)], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_gives_the_type_that_the_base_gives(
    training: bool, repeats: int, middle: tuple[int, ...], sparse: bool
) -> None:
    layer = layer_with().train(training)
    layer.sparse = sparse
    x, domain = torch.randn(3 * repeats, *middle, 4, requires_grad=True), torch.tensor([0, 2, 1] * repeats)
    with torch.autocast("cpu", torch.bfloat16):
        found = routed_call(layer, x, domain)
    expected = reference(layer, x, domain)
    assert found.dtype == torch.bfloat16
    close(found.float(), expected, 0.05)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    mine, yours = gradients(layer, found, x, upstream.bfloat16()), gradients(layer, expected, x, upstream)
    for name, gradient in mine.items():
        assert gradient.dtype == torch.float32
        close(gradient.to_dense(), yours[name], 0.05)


def test_banks_may_be_finer_than_the_base() -> None:
    """A frozen base in bfloat16 and adapters that learn in float32."""
    layer = layer_with()
    layer.base.bfloat16().requires_grad_(False)
    x, domain = torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 0, -1])
    found = routed_call(layer, x.bfloat16(), domain)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    layer.base.float()
    close(found.float(), reference(layer, x, domain), 0.05)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("repeats", [1, 50])
@pytest.mark.parametrize("middle", [(), (2,)], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_an_activation_in_place_may_follow(
    training: bool, repeats: int, middle: tuple[int, ...], ordered: bool
) -> None:
    layer = layer_with().train(training)
    domain = torch.tensor([-1, 0, 1, 2] if ordered else [2, 0, -1, 1]).repeat_interleave(repeats)
    x = torch.randn(len(domain), *middle, 4, requires_grad=True)
    ours, theirs = torch.relu_(routed_call(layer, x, domain)), torch.relu(reference(layer, x, domain))
    upstream = torch.randn_like(theirs)
    mine, yours = gradients(layer, ours, x, upstream), gradients(layer, theirs, x, upstream)
    for name, gradient in yours.items():
        close(mine[name], gradient)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("repeats", [1, 50])
def test_sparse_gradients_hold_the_domains_of_the_batch(training: bool, repeats: int) -> None:
    layer, dense = layer_with(num_domains=9).train(training), layer_with(num_domains=9).train(training)
    layer.sparse = True
    x, domain = torch.randn(4 * repeats, 4), torch.tensor([7, -1, 2, 7] * repeats)
    for each in (layer, dense):
        routed_call(each, x, domain).square().sum().backward()
    for name in ("lora_A", "lora_B", "lora_bias"):
        found, expected = getattr(layer, name).grad, getattr(dense, name).grad
        assert found._indices().tolist() == [[2, 7]]  # each once, ascending; torch's own sum takes the mark of it away
        assert torch.equal(found.to_dense(), expected)
    assert layer.base.weight.grad is not None
    assert layer.base.weight.grad.layout == torch.strided


def test_sparse_gradients_of_a_layer_used_twice_add_up() -> None:
    layer, dense = layer_with(in_features=4, out_features=4), layer_with(in_features=4, out_features=4)
    layer.sparse = True
    x, domain = torch.randn(3, 4), torch.tensor([2, 0, 2])
    for each in (layer, dense):
        each.route.fill(domain)
        each(each(x)).sum().backward()
        each.route.clear()
    for name in ("lora_A", "lora_B", "lora_bias"):
        close(getattr(layer, name).grad.to_dense(), getattr(dense, name).grad)


@pytest.mark.parametrize("rows", [4, 3000])
def test_a_fresh_adapter_is_its_base_bit_for_bit_in_evaluation_whatever_the_number_of_rows(rows: int) -> None:
    """A domain of one row among large ones: a product of that row alone would give other bits."""
    base = nn.Linear(130, 70)
    layer = LowRankLinear(base, DomainRoute(3), 4).eval()
    x, domain = torch.randn(rows, 130), torch.zeros(rows, dtype=torch.int64)
    domain[1], domain[3] = 1, -1
    assert torch.equal(routed_call(layer, x, domain), base(x))


def test_a_base_without_bias_gets_none() -> None:
    layer = layer_with(base_bias=False)
    assert layer.lora_bias is None
    assert layer.correction(0)[1] is None
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B", "base.weight"]
    layer.reset_adapter()
    assert not layer.lora_B.any()


def test_switched_off_it_is_the_base_and_needs_no_domains() -> None:
    layer, x = layer_with(), torch.randn(3, 4)
    layer.route.enabled = False
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer(x[0]), layer.base(x[0]))
    layer.route.enabled = True
    with pytest.raises(ConfigError, match="outside its model's forward"):
        layer(x)


def test_a_backward_hook_on_the_base_is_run() -> None:
    layer = layer_with()
    seen: list[Tensor] = []
    layer.base.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    routed_call(layer, torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.ones(3, 5))


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_was_replaced_on_the_base_is_called(training: bool) -> None:
    """As libraries do that move weights between devices."""
    layer, plain = layer_with().train(training), layer_with().train(training)
    own = layer.base.forward
    layer.base.forward = lambda x: own(x) + 1.0  # type: ignore[method-assign]
    x, domain = torch.randn(90, 4), torch.arange(90) % 3
    close(routed_call(layer, x, domain), routed_call(plain, x, domain) + 1.0)


# the weight of an adapted layer


def test_type_shape_and_device_of_the_weight_may_be_asked() -> None:
    layer = layer_with(dtype=torch.float64)
    for ours, base in ((layer.weight, layer.base.weight), (layer.bias, layer.base.bias)):
        assert ours is not None
        assert (ours.dtype, ours.device, ours.shape, ours.ndim) == (base.dtype, base.device, base.shape, base.ndim)
        assert (ours.size(), ours.size(0), ours.dim(), ours.numel()) == (
            base.size(),
            base.size(0),
            base.dim(),
            base.numel(),
        )
        assert torch.zeros(2).to(ours.dtype).dtype == torch.float64
        assert ours.is_floating_point()
    assert layer_with(base_bias=False).bias is None


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: nn.functional.linear(torch.ones(1, 4), w),
        lambda w: torch.ones(1, 4) @ w.T,
        lambda w: w + 1,
        lambda w: w.sum(),
        lambda w: w[0],
        lambda w: w.data,
        lambda w: torch.cat([w, w]),
        lambda w: nn.init.zeros_(w),
        lambda w: w.copy_(torch.zeros(5, 4)),
    ],
)
def test_computing_with_the_weight_is_refused(compute: Any) -> None:
    """Whoever reads it instead of calling the layer would miss the adapter, or write where nothing is read."""
    layer = layer_with()
    kept = layer.base.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"must be called.*Exclude the layer"):
        compute(layer.weight)
    assert torch.equal(layer.base.weight, kept)


def test_weights_that_are_asked_for_are_in_no_state() -> None:
    layer = layer_with()
    layer.weight, layer.bias  # noqa: B018 - asked for
    assert list(layer.state_dict()) == ["lora_A", "lora_B", "lora_bias", "base.weight", "base.bias"]


@pytest.mark.parametrize("training", [False, True])
def test_a_second_derivative_is_right_or_refused(training: bool) -> None:
    """A gradient penalty must not train on a wrong number."""
    layer = layer_with(dtype=torch.float64).train(training)
    x, domain = torch.randn(90, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2] * 30)

    def second(out: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.lora_A)[0]

    expected = second(reference(layer, x, domain))
    try:
        found = second(routed_call(layer, x, domain))
    except RuntimeError:
        return
    close(found, expected, 1e-12)


def test_correction_is_what_the_layer_adds() -> None:
    layer = layer_with(lora_alpha=3.0)
    weight, bias = layer.correction(1)
    assert weight.shape == layer.base.weight.shape
    assert bias is not None
    x = torch.randn(6, 4)
    added = routed_call(layer, x, torch.ones(6, dtype=torch.int64)) - layer.base(x)
    close(x @ weight.T + bias, added)


def test_the_start() -> None:
    layer = LowRankLinear(nn.Linear(300, 200), DomainRoute(4), 8)
    assert layer.lora_bias is not None
    assert not layer.lora_B.any()
    assert not layer.lora_bias.any()
    std = math.sqrt(2 / (300 + 8))
    for bank in layer.lora_A:  # every domain has the spread of one matrix, whatever the number of domains
        assert abs(bank.std().item() / std - 1) < 4 / math.sqrt(2 * bank.numel())
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])


def test_reset_adapter_begins_again() -> None:
    layer = layer_with()
    x = torch.randn(2, 4)
    layer.reset_adapter()
    assert torch.equal(routed_call(layer, x, torch.tensor([0, 1])), layer.base(x))


def test_banks_follow_the_base() -> None:
    layer = layer_with(dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert (layer.in_features, layer.out_features) == (4, 5)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "lora" in name} == {
        "lora_A": (3, 4, 2),
        "lora_B": (3, 2, 5),
        "lora_bias": (3, 5),
    }
    assert "num_domains=3, rank=2" in repr(layer)


@pytest.mark.parametrize(("alpha", "rank", "scale"), [(None, 4, 1.0), (8.0, 4, 2.0), (3.0, 1, 3.0)])
def test_scale(alpha: float | None, rank: int, scale: float) -> None:
    assert layer_with(rank=rank, lora_alpha=alpha).scale == scale


@pytest.mark.parametrize(
    "options",
    [
        {"rank": -1},
        {"rank": 0, "bias": False},
        {"lora_alpha": 0.0},
        {"lora_alpha": -1.0},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"rank": 0, "base": nn.Linear(4, 5, bias=False)},
    ],
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LowRankLinear(**{"base": nn.Linear(4, 5), "route": DomainRoute(3), "rank": 2, **options})


def test_a_call_without_domains_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="outside its model's forward"):
        layer_with()(torch.randn(2, 4))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (8, 4), (4,)])
def test_a_domain_is_needed_for_each_row(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="one domain for each row"):
        routed_call(layer_with(), torch.randn(shape), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(("units", "temperature", "rank"), [(256, 4, 64), (64, 256, 1), (100, 16, 6), (100, 0.5, 200)])
def test_rank_for(units: int, temperature: float, rank: int) -> None:
    assert rank_for(units, temperature) == rank


@pytest.mark.parametrize("temperature", [0, -1, math.nan, -math.inf])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        rank_for(8, temperature)
