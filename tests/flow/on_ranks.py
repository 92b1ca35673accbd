"""What tests/flow/test_ranks.py starts on one rank and on several: trains small models and writes their weights."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, freeze_
from domlora.data.dataset import Dataset
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training import fit as loop
from domlora.training.distributed.ranks import joined
from domlora.training.engine import Engine
from domlora.training.fit import Fit, FitOptions, Progress, fit
from domlora.training.optimizers import OptimizerOptions, Rule

CASES = {  # name: model, adapters, rule of tables and adapters
    "dense": ("deepfm", True, "adam"),
    "lazy": ("deepfm", True, "lazy_adam"),
    "statistics": ("star", False, "rowwise_adagrad"),
    "clusters": ("adaptdhm", False, "adam"),
    "frozen": ("mlp", True, "lazy_adam"),
}


def rows(num_rows: int, dtype: torch.dtype = torch.float64) -> Dataset:
    """Four domains of unequal size, single ids and a sequence; in double precision, where equal means equal."""
    draw = torch.Generator().manual_seed(1)
    schema = Schema(
        (
            Feature("user", num_ids=300, hash_buckets=298),
            Feature("item", num_ids=200, hash_buckets=198),
            Feature("seen", "sequence", num_ids=200, hash_buckets=198, max_length=3, share="item"),
            Feature("price", "numeric"),
        ),
        domains=("a", "b", "c", "d"),
    )
    domain = (torch.rand(num_rows, generator=draw) ** 3 * 4).long() - (
        torch.rand(num_rows, generator=draw) < 0.02
    ).long()
    user = 2 + (torch.rand(num_rows, 1, generator=draw) ** 2 * 298).long()
    items = torch.randint(0, 200, (num_rows, 4), generator=draw)
    dense = torch.randn(num_rows, 1, generator=draw).double()
    logit = torch.sin(user[:, 0].double()) + dense[:, 0] * torch.cos(2.0 * domain.double())
    label = (torch.rand(num_rows, generator=draw) < torch.sigmoid(logit)).double()
    batch = Batch(torch.cat([user, items], 1), dense.to(dtype), domain.clamp(min=-1), label.to(dtype))
    first, second = num_rows * 6 // 10, num_rows * 8 // 10
    splits = {"train": slice(0, first), "valid": slice(first, second), "test": slice(second, num_rows)}
    return Dataset.from_batches(schema, {name: batch.take(part) for name, part in splits.items()})


def train_all(out: Path, data: Dataset, rank: int) -> None:
    """Each case from its start to its end."""
    for name, (model_name, adapted, rule) in CASES.items():
        torch.manual_seed(1)
        model = build_model(schema=data.schema, name=model_name, dropout=0.0)
        if adapted:
            attach_(model, 4, **asdict(AdapterOptions(temperature=8)))
        if name == "frozen":
            freeze_(model)
        rules = OptimizerOptions(tables=Rule(rule), adapters=Rule(rule))  # type: ignore[arg-type]
        found = fit(model, data, FitOptions(batch_size=100, max_epochs=2), rules)
        write(out / f"{name}.safetensors", model, found, rank)


def train_until(out: Path, data: Dataset, rank: int, last: int) -> None:
    """A run of four epochs with a checkpoint, which all ranks end when epoch ``last`` was validated."""

    def stop(progress: Progress) -> None:
        if progress.epoch == last and progress.rows == progress.total_rows:
            raise SystemExit

    loop._APART_S = 0.0  # epochs are shorter than a second
    torch.manual_seed(1)
    model = attach_(build_model(schema=data.schema, name="deepfm", dropout=0.0), 4, temperature=8)
    rules = OptimizerOptions(tables=Rule("lazy_adam"), adapters=Rule("lazy_adam"))
    options = FitOptions(batch_size=100, max_epochs=4)
    found = fit(model, data, options, rules, checkpoint=out / "checkpoint", on_progress=stop)
    write(out / "whole.safetensors", model, found, rank)


def write(path: Path, model: nn.Module, found: Fit, rank: int) -> None:
    figures = torch.tensor([[line["loss"], line["wauc"], line["log_loss"]] for line in found.history])
    if not rank:
        save_file({"figures": figures, **model.state_dict()}, path)


def main(out: Path, last: int | None) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    Engine.validation_rows = 600  # of 1,201: the last batch has one row, for one rank
    data = rows(6005)  # the last batch has three rows
    with joined() as here:
        if last is None:
            train_all(out, data, here.rank)
        else:
            train_until(out, data, here.rank, last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None)
