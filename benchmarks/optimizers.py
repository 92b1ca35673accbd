"""What a table's optimizer costs: one training step of a DeepFM as its tables grow.

8 features of 16 numbers, tower 256-128-64, dropout 0.5, batches of 4,096 rows with uniform ids (few repeats: the worst case
for optimizers that follow the batch). Everything runs interleaved in one process, on one thread.

    python benchmarks/optimizers.py --quick

Arms: the dense ``adam``, the lazy ``lazy_adam`` and ``rowwise_adagrad`` of ``training/optimizers.py``; ``sparse_adam``, that
is ``torch.optim.SparseAdam`` on the same tables; ``plain_torch``, the model as most write it: ``nn.Embedding``,
``nn.Dropout`` and ``torch.optim.Adam`` as it comes. The last line is one JSON object: by values a feature, how many times
as long as a step with ``lazy_adam`` each takes. A million values a feature want 8 GB of memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import warnings
from collections.abc import Callable
from itertools import cycle, pairwise

import torch
from rounds import interleave
from torch import Tensor, nn

from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training.fit import loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule, parameter_groups

BATCH, FIELDS, DIM, UNITS = 4096, 8, 16, (256, 128, 64)
POOL = 16  # batches that an arm takes in turn
LR = 1e-6  # so small that no unit dies while the clock runs; a step costs the same
FASTEST = "lazy_adam"

Step = Callable[[], None]


def batches_of(num_ids: int) -> list[Batch]:
    random = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randint(0, num_ids, (BATCH, FIELDS), generator=random),
            torch.zeros(BATCH, 0),
            torch.zeros(BATCH, dtype=torch.int64),
            (torch.rand(BATCH, generator=random) < 0.25).float(),
        )
        for _ in range(POOL)
    ]


def deepfm(num_ids: int) -> nn.Module:
    features = tuple(Feature(f"feature_{number}", num_ids=num_ids) for number in range(FIELDS))
    schema = Schema(features, domains=("app",))
    return build_model("deepfm", schema, embedding_dim=DIM, hidden_units=UNITS, dropout=0.5).train()


def ours(num_ids: int, rule: str) -> Step:
    model = deepfm(num_ids)
    options = OptimizerOptions(tables=Rule(rule, lr=LR), dense=Rule(lr=LR))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a dense rule is slow here is the point
        optimizer = Optimizer(model, options)
    return step_of(model, num_ids, [optimizer])


def sparse_adam(num_ids: int) -> Step:
    model = deepfm(num_ids)
    groups = parameter_groups(model)
    for module in model.modules():
        if hasattr(module, "sparse"):
            module.sparse = True
    dense = torch.optim.Adam(groups["dense"], lr=LR, fused=True)
    return step_of(model, num_ids, [torch.optim.SparseAdam(groups["tables"], lr=LR), dense])


def plain_torch(num_ids: int) -> Step:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(num_ids, DIM) for _ in range(FIELDS))
            self.weights = nn.ModuleList(nn.Embedding(num_ids, 1) for _ in range(FIELDS))
            layers: list[nn.Module] = []
            for size_in, size_out in pairwise((FIELDS * DIM, *UNITS)):
                layers += [nn.Linear(size_in, size_out), nn.ReLU(), nn.Dropout(0.5)]
            self.tower = nn.Sequential(*layers, nn.Linear(UNITS[-1], 1))

        def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:  # noqa: ARG002
            x = torch.stack([table(ids[:, slot]) for slot, table in enumerate(self.tables)], 1)
            first = torch.cat([weight(ids[:, slot]) for slot, weight in enumerate(self.weights)], 1).sum(1)
            pairs = 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1)
            return first + pairs + self.tower(x.flatten(1)).squeeze(1)

    model = Plain().train()
    return step_of(model, num_ids, [torch.optim.Adam(model.parameters(), lr=LR)])


def step_of(model: nn.Module, num_ids: int, optimizers: list[Optimizer | torch.optim.Optimizer]) -> Step:
    batches = cycle(batches_of(num_ids))

    def step() -> None:
        batch = next(batches)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model(batch.ids, batch.dense, batch.domain), batch)
        loss.item()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def compare(num_ids: int, seconds: float) -> dict[str, float]:
    makers: dict[str, Callable[[], Step]] = {
        **{rule: (lambda rule=rule: ours(num_ids, rule)) for rule in ("adam", "lazy_adam", "rowwise_adagrad")},
        "sparse_adam": lambda: sparse_adam(num_ids),
        "plain_torch": lambda: plain_torch(num_ids),
    }
    timings = interleave({name: make() for name, make in makers.items()}, seconds)
    print(f"\n{num_ids:,} values a feature, {num_ids * FIELDS * (DIM + 1):,} numbers in tables")
    ratios = {}
    for name in makers:
        ratio, took = timings.ratio(name, FASTEST), timings.median(name)
        ratios[name] = round(ratio.median, 2)
        print(f"{name:<16}{1e3 * took:10.1f} ms a step{BATCH / took:12,.0f} rows/s   {ratio} of {FASTEST}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="ten thousand and a hundred thousand values, half a minute"
    )
    parser.add_argument("--values", type=float, nargs="+", help="values a feature, such as 1e4 1e6")
    parser.add_argument("--seconds", type=float, help="of each size")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = arguments.values or ([1e4, 1e5] if arguments.quick else [1e4, 1e5, 1e6])
    seconds = arguments.seconds or (12.0 if arguments.quick else 40.0)
    print(json.dumps({f"{int(size):,}": compare(int(size), seconds) for size in sizes}))


if __name__ == "__main__":
    main()
