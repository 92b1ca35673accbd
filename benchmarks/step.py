"""How much of a training step is the network: rows/s as a share of the tower's bare matrix products.

One process, one thread (what a study's worker and ``domlora pretrain`` use), interleaved rounds, medians. ``--quick`` stays
under 40 seconds on two cores.

    python benchmarks/step.py --quick

The last line is one JSON object of ratios: ``base`` (rows/s of a full training step over rows/s of the bare forward and
backward products), ``adapted_over_base`` (the same step with adapters for two domains), ``plain_torch`` (the step written
with ``nn.Dropout`` and for-loop Adam, for orientation).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise

import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.data.dataset import Dataset
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training.fit import loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions

BATCH, UNITS, DIM = 1024, (256, 128, 64), 8
NUM_IDS = (6042, 3708, 4)  # users, items and genders of MovieLens-1M
STEPS = 5  # a round


def rows() -> Dataset:
    torch.manual_seed(0)
    features = tuple(
        Feature(name, num_ids=size) for name, size in zip(("user", "item", "gender"), NUM_IDS, strict=True)
    )
    schema = Schema(features, domains=("F", "M"))
    size = BATCH * 200
    domain = (torch.rand(size) < 0.75).long()
    ids = torch.stack([torch.randint(2, NUM_IDS[0], (size,)), torch.randint(2, NUM_IDS[1], (size,)), domain + 2], 1)
    label = (torch.rand(size) < 0.23).float()
    return Dataset.from_batches(schema, {"train": Batch(ids, torch.zeros(size, 0), domain, label)})


def endless(data: Dataset) -> Iterator[Batch]:
    return (batch for epoch in count() for batch in data.batches("train", BATCH, seed=1, epoch=epoch))


def training_step(model: nn.Module, data: Dataset) -> Callable[[], None]:
    """What the loop does with one batch, the making of the batch included."""
    batches, optimizer = endless(data), Optimizer(model.train(), OptimizerOptions())

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        loss = loss_of(model(batch.ids, batch.dense, batch.domain), batch)
        loss.item()
        loss.backward()
        optimizer.step()

    return step


def bare_products() -> Callable[[], None]:
    """Forward, gradient of the input and gradient of the weight of each layer, into buffers made once."""
    widths = (len(NUM_IDS) * DIM, *UNITS, 1)
    layers = []
    for size_in, size_out in pairwise(widths):
        x, weight, grad = torch.randn(BATCH, size_in), torch.randn(size_in, size_out), torch.randn(BATCH, size_out)
        layers.append((x, weight, grad, torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weight)))

    def step() -> None:
        for x, weight, grad, out, grad_x, grad_weight in layers:
            torch.mm(x, weight, out=out)
            torch.mm(grad, weight.t(), out=grad_x)
            torch.mm(x.t(), grad, out=grad_weight)

    return step


def plain_torch(data: Dataset) -> Callable[[], None]:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(size, DIM) for size in NUM_IDS)
            layers: list[nn.Module] = []
            for size_in, size_out in pairwise((len(NUM_IDS) * DIM, *UNITS)):
                layers += [nn.Linear(size_in, size_out), nn.ReLU(), nn.Dropout(0.5)]
            self.tower = nn.Sequential(*layers, nn.Linear(UNITS[-1], 1))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = torch.cat([table(ids[:, slot]) for slot, table in enumerate(self.tables)], 1)
            return self.tower(x).squeeze(1)

    model, batches = Plain(), endless(data)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch.ids), batch.label)
        loss.item()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = rows()
    torch.manual_seed(1)
    base = build_model("mlp", data.schema, embedding_dim=DIM, hidden_units=UNITS, dropout=0.5)
    adapted = build_model("mlp", data.schema, embedding_dim=DIM, hidden_units=UNITS, dropout=0.5)
    attach_(adapted, 2, temperature=16, include=["tower.*"])
    arms = {
        "bare": bare_products(),
        "base": training_step(base, data),
        "adapted": training_step(adapted, data),
        "plain_torch": plain_torch(data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(160 if arguments.quick else 800):
        for name, step in arms.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds[name].append((time.perf_counter() - start) / STEPS)
    median = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    for name, value in median.items():
        print(
            f"{name:<12} {1e3 * value:7.3f} ms a step  {BATCH / value:12,.0f} rows/s  {median['bare'] / value:5.2f} of bare"
        )

    def ratio(slow: str, fast: str) -> float:
        """Median over rounds, whose arms ran within a moment of each other on a machine whose speed drifts."""
        return statistics.median(f / s for s, f in zip(seconds[slow][2:], seconds[fast][2:], strict=True))

    ratios = {
        "base": ratio("base", "bare"),
        "adapted_over_base": ratio("adapted", "base"),
        "plain_torch": ratio("plain_torch", "bare"),
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
