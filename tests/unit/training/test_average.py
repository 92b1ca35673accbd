from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from domlora.errors import ConfigError
from domlora.training.average import Average


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def walk(model: nn.Module, average: Average, steps: int) -> list[torch.Tensor]:
    """Random steps; the weights before and after each."""
    seen = [model.get_parameter("weight").detach().clone()]
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        seen.append(model.get_parameter("weight").detach().clone())
    return seen


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_formula(decay: float) -> None:
    model = line()
    average = Average(model, decay)
    seen = walk(model, average, 30)
    expected = seen[0].double()
    for step, weights in enumerate(seen[1:], start=1):
        momentum = min(decay, (1 + step) / (10 + step))
        expected = momentum * expected + (1 - momentum) * weights.double()
    with average.swapped_in():
        assert torch.allclose(model.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_model_has_its_own_weights_back_bit_for_bit() -> None:
    model = line()
    average = Average(model, 0.9)
    last = walk(model, average, 5)[-1]
    with average.swapped_in():
        inside = model.weight.detach().clone()
    assert torch.equal(model.weight, last)
    assert not torch.equal(inside, last)
    with pytest.raises(RuntimeError), average.swapped_in():
        raise RuntimeError
    assert torch.equal(model.weight, last)
    with average.swapped_in():
        assert torch.equal(model.weight, inside)


def test_without_decay_nothing_is_kept() -> None:
    model = line()
    average = Average(model, 0.0)
    last = walk(model, average, 3)[-1]
    with average.swapped_in():
        assert torch.equal(model.weight, last)
    assert set(average.state()) == {"steps"}


def test_frozen_parameters_are_not_averaged() -> None:
    model = line()
    model.bias.requires_grad_(False)
    assert set(Average(model, 0.9).state()) == {"weight", "steps"}


def test_state_round_trip() -> None:
    model = line()
    average = Average(model, 0.9)
    walk(model, average, 5)
    saved = {name: tensor.clone() for name, tensor in average.state().items()}
    other_model = line()
    other_model.load_state_dict(model.state_dict())
    other = Average(other_model, 0.9)
    other.load_state(saved)
    assert other.steps == 5
    for each_model, each in ((model, average), (other_model, other)):
        torch.manual_seed(1)
        walk(each_model, each, 4)
    with average.swapped_in(), other.swapped_in():
        assert torch.equal(model.weight, other_model.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, math.nan])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        Average(line(), decay)
