"""A layer of each domain's own: read and written where the weights lie, beside autograd's gathers and one Linear a domain.

    python benchmarks/grouped.py
    python benchmarks/grouped.py --device cuda

A training step's forward and backward pass of three such layers, 24-256-128-64, rows of domains drawn uniformly, one
thread; no optimizer. On a GPU the library takes one batched product a layer. Ratios of interleaved rounds, median
[10th, 90th percentile].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from rounds import interleave
from torch import Tensor, nn

from domlora.layers.domain_linear import DomainLinear, DomainRows, StarLinear

WIDTHS = (24, 256, 128, 64)
Layer = Callable[[nn.Module, Tensor], Tensor]


def gathered(layer: nn.Module, x: Tensor) -> Tensor:
    """What a ``DomainLinear`` or a ``StarLinear`` gives, in operations of torch alone."""
    rows, star = layer.rows, isinstance(layer, StarLinear)
    weight, bias = (layer.domain_weight, layer.domain_bias) if star else (layer.weight, layer.bias)
    weights = F.embedding(rows.present, weight).view(-1, layer.out_features, layer.in_features)
    biases = F.embedding(rows.present, bias)
    if star:
        weights, biases = layer.weight * weights, layer.bias + biases
    return rows.join([F.linear(*each) for each in zip(rows.split(x), weights.unbind(), biases.unbind(), strict=True)])


def step(layers: Sequence[nn.Module], call: Layer, x: Tensor, domain: Tensor) -> list[Tensor]:
    """The gradients of a pass through the layers."""
    layers[0].rows.group_(domain)
    for layer in layers:
        x = torch.relu(call(layer, x))
    return list(torch.autograd.grad(x.square().sum(), [each for layer in layers for each in layer.parameters()]))


def done(gradients: Sequence[Tensor]) -> float:
    """Wait for a GPU to end."""
    return gradients[-1][0].sum().item()


CALLS: dict[str, Layer] = {"gathered": gathered, "grouped": lambda layer, x: layer(x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each comparison")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    print("| layer | domains | batch | times as fast |\n| --- | ---: | ---: | ---: |")
    for kind in (DomainLinear, StarLinear):
        for num_domains, batch_size in ((10, 2048), (100, 2048), (1000, 2048), (1000, 8192)):
            rows = DomainRows()
            layers = [kind(width, units, num_domains, rows) for width, units in pairwise(WIDTHS)]
            x, domain = torch.randn(batch_size, WIDTHS[0]), torch.randint(num_domains, (batch_size,))
            arms = {name: (layers, call, x, domain) for name, call in CALLS.items()}
            torch.testing.assert_close(*(step(*arm) for arm in arms.values()), rtol=1e-3, atol=1e-3)
            timings = interleave({name: lambda arm=arm: done(step(*arm)) for name, arm in arms.items()}, args.seconds)
            ratio = timings.ratio("gathered", over="grouped")
            print(f"| {kind.__name__} | {num_domains:,} | {batch_size:,} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
