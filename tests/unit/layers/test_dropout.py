from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from domlora.errors import ConfigError
from domlora.layers.dropout import Dropout, keep_mask, relu_dropout

SHAPES = [(0,), (), (1,), (63,), (64,), (65,), (3, 7, 11), (5, 0, 2), (128, 3)]


def four_sigma(probability: float, num_draws: int) -> float:
    return 4 * math.sqrt(probability * (1 - probability) / num_draws)


def seeded(call: object, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = call()  # type: ignore[operator]
    return result


@pytest.mark.parametrize("p", [0.01, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.75, 0.9, 0.99, 0.999])
def test_keep_rate_and_scale(p: float) -> None:
    torch.manual_seed(3)
    mask, scale = keep_mask(torch.Size([1000, 1000]), p)
    keep = max(round((1 - p) * 256), 1) / 256
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert abs(mask.double().mean().item() - keep) < four_sigma(keep, mask.numel())
    assert scale == 1 / keep
    assert abs(keep - (1 - p)) <= 1 / 256


@pytest.mark.parametrize(("p", "scale"), [(0.5, 2.0), (0.25, 4 / 3), (0.75, 4.0)])
def test_powers_of_two_are_exact(p: float, scale: float) -> None:
    assert keep_mask(torch.Size([8]), p)[1] == scale


def test_less_than_half_a_step_drops_nothing() -> None:
    mask, scale = keep_mask(torch.Size([100_000]), 0.0019)
    assert bool(mask.all())
    assert scale == 1.0


@pytest.mark.parametrize("p", [0.5, 0.3, 0.1])
def test_every_position_of_a_word_is_drawn_alike(p: float) -> None:
    """A generator that leaves a bit at zero shows here."""
    torch.manual_seed(0)
    mask, scale = keep_mask(torch.Size([20_000, 64]), p)
    bound = 1.25 * four_sigma(1 / scale, 20_000)  # 64 positions: 5 sigma
    assert (mask.mean(0) - 1 / scale).abs().max() < bound


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("distance", [1, 2, 7, 8, 9, 32, 63, 64, 128])
def test_neighbours_are_independent(p: float, distance: int) -> None:
    torch.manual_seed(1)
    mask, _ = keep_mask(torch.Size([400_000]), p)
    centred = mask.double() - mask.double().mean()
    correlation = (centred[:-distance] * centred[distance:]).mean() / centred.var()
    assert abs(correlation) < 4 / math.sqrt(len(mask))


def test_units_and_calls_are_independent() -> None:
    torch.manual_seed(2)
    masks = torch.stack([keep_mask(torch.Size([20_000, 8]), 0.3)[0] for _ in range(3)])  # (calls, rows, units)
    columns = masks.permute(0, 2, 1).reshape(24, -1)
    correlation = torch.corrcoef(columns) - torch.eye(24)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_draws_follow_the_seed() -> None:
    x = torch.ones(1000)
    layer = Dropout(0.3)
    assert torch.equal(seeded(lambda: layer(x)), seeded(lambda: layer(x)))
    assert not torch.equal(seeded(lambda: layer(x), 0), seeded(lambda: layer(x), 1))
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))


def test_draws_follow_the_state_of_the_generator() -> None:
    torch.manual_seed(0)
    torch.rand(3)
    state = torch.get_rng_state()
    first = keep_mask(torch.Size([100]), 0.3)[0]
    torch.set_rng_state(state)
    assert torch.equal(keep_mask(torch.Size([100]), 0.3)[0], first)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_shapes(shape: tuple[int, ...], p: float) -> None:
    x = torch.randn(shape)
    assert Dropout(p)(x).shape == x.shape
    assert relu_dropout(x, p, True).shape == x.shape


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_output_is_zero_or_scaled(p: float) -> None:
    x = torch.randn(513)
    mask, scale = (seeded(lambda: keep_mask(x.shape, p)[0]), keep_mask(x.shape, p)[1])
    assert torch.equal(seeded(lambda: Dropout(p)(x)), x * (mask * scale))


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_gradient_is_the_mask(p: float) -> None:
    x = torch.randn(7, 19, requires_grad=True)
    upstream = torch.randn(7, 19)
    mask, scale = (seeded(lambda: keep_mask(x.shape, p)[0]), keep_mask(x.shape, p)[1])
    seeded(lambda: Dropout(p)(x)).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * (mask * scale))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
def test_relu_dropout_is_relu_then_the_same_mask(p: float) -> None:
    start = torch.randn(33, 21)
    start[0] = 0.0  # a unit that relu shuts is shut, at zero too
    upstream = torch.randn_like(start)
    fused, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    ours = seeded(lambda: relu_dropout(fused, p, True))
    theirs = seeded(lambda: Dropout(p)(torch.relu(plain)))
    ours.backward(upstream)
    theirs.backward(upstream)
    assert fused.grad is not None
    assert plain.grad is not None
    assert torch.equal(ours, theirs)
    assert torch.allclose(fused.grad, plain.grad, rtol=1e-6, atol=0)
    assert torch.equal(fused.grad == 0, plain.grad == 0)


def test_relu_dropout_leaves_its_input_alone() -> None:
    x = torch.randn(100)
    kept = x.clone()
    relu_dropout(x, 0.5, True)
    Dropout(0.5)(x)
    assert torch.equal(x, kept)


def test_relu_dropout_has_a_second_derivative() -> None:
    x = torch.tensor([1.0, 2.0, -1.0] * 20, requires_grad=True)
    out = seeded(lambda: relu_dropout(x, 0.5, True))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.where(out > 0, 8.0, 0.0))  # (2 x)^2 twice


@pytest.mark.parametrize("call", [lambda x: Dropout(0.3)(x), lambda x: relu_dropout(x, 0.3, True)])
def test_other_precisions_take_torchs_own(call: object) -> None:
    def repeated(x: Tensor) -> Tensor:
        return seeded(lambda: call(x))  # type: ignore[operator]

    assert torch.autograd.gradcheck(repeated, torch.randn(4, 9, dtype=torch.float64, requires_grad=True))
    assert repeated(torch.ones(8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_evaluation_and_zero_return_the_input_itself() -> None:
    x = torch.randn(4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(relu_dropout(x, 0.5, False), torch.relu(x))
    assert torch.equal(relu_dropout(x, 0.0, True), torch.relu(x))


def test_a_strided_input_is_masked_like_a_packed_one() -> None:
    x = torch.randn(9, 13)
    strided = x.t().contiguous().t()
    assert torch.equal(seeded(lambda: Dropout(0.3)(strided)), seeded(lambda: Dropout(0.3)(x)))
    assert torch.equal(seeded(lambda: relu_dropout(strided, 0.3, True)), seeded(lambda: relu_dropout(x, 0.3, True)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type[torch.no_grad]) -> None:
    x = torch.randn(100)
    with mode():
        assert Dropout(0.5)(x).shape == relu_dropout(x, 0.5, True).shape == x.shape


def test_nan_and_infinity_are_not_hidden() -> None:
    x = torch.tensor([float("nan"), float("inf")] * 500)
    assert bool(Dropout(0.5)(x).isfinite().logical_not().any())
    assert bool(relu_dropout(x, 0.5, True).isfinite().logical_not().any())


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_probabilities_out_of_range_are_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="dropout"):
        Dropout(p)


def test_it_says_what_it_is() -> None:
    assert repr(nn.Sequential(Dropout(0.25))[0]) == "Dropout(p=0.25)"
