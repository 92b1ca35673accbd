"""On a GPU: a training step with adapters over the same step without, by the number of domains in a batch.

    python benchmarks/gpu.py

DeepFM, eight features of 32 dimensions and 100,000 ids each, tower 256-128-64, temperature 16, batches of 4,096 rows in any
order, lazy Adam for tables and banks. All arms take turns in one process. ``tiles`` and ``masked`` are the two ways of
``domlora.adapters.accelerator``, each forced; the line without a word is what the library chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from rounds import interleave
from torch import nn

from domlora.adapters import masked
from domlora.adapters.attach import attach_
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training.fit import loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

ROWS, FEATURES, IDS = 4096, 8, 100_000
SCHEMA = Schema(tuple(Feature(f"f{n}", num_ids=IDS) for n in range(FEATURES)), domains=("one", "two"))
WAYS = {"": None, "masked": True, "tiles": False}


def batch(domains: int) -> Batch:
    random = torch.Generator().manual_seed(domains)
    ids = torch.randint(2, IDS, (ROWS, FEATURES), generator=random)
    domain = torch.randint(0, domains, (ROWS,), generator=random)
    return Batch(ids, torch.zeros(ROWS, 0), domain, (torch.rand(ROWS, generator=random) < 0.2).float()).to(
        torch.device("cuda")
    )


def step(model: nn.Module, rows: Batch) -> Callable[[], None]:
    lazy = Rule("lazy_adam")
    optimizer = Optimizer(model.train(), OptimizerOptions(tables=lazy, adapters=lazy))

    def once() -> None:
        optimizer.zero_grad()
        loss = loss_of(model(rows.ids, rows.dense, rows.domain), rows)
        loss.backward()
        optimizer.step(1.0)
        loss.item()

    return once


@contextmanager
def forced(choice: bool) -> Iterator[None]:
    chosen, masked.is_better = masked.is_better, lambda *_: choice
    try:
        yield
    finally:
        masked.is_better = chosen


def within(once: Callable[[], None], choice: bool | None) -> Callable[[], None]:
    def run() -> None:
        with nullcontext() if choice is None else forced(choice):
            once()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each number of domains")
    parser.add_argument("--domains", nargs="+", type=int, default=[2, 10, 100, 1000])
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for domains in args.domains:
        made = lambda: build_model("deepfm", SCHEMA, embedding_dim=32, hidden_units=[256, 128, 64]).to("cuda")  # noqa: E731
        rows = batch(domains)
        adapted = step(attach_(made(), domains, temperature=16), rows)
        arms = {"base": step(made(), rows)}
        arms |= {name: within(adapted, way) for name, way in WAYS.items() if name != "masked" or domains <= 100}
        found = interleave(arms, args.seconds)
        print(f"{domains:5} domains  base {1e3 * found.median('base'):.2f} ms", flush=True)
        for name in list(arms)[1:]:
            print(f"    {name:7} {found.ratio(name, 'base')}", flush=True)


if __name__ == "__main__":
    main()
