"""What tests/flow/test_torchrec.py starts on one rank and on several: trains small models in single precision."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from on_ranks import rows, write
from torch import nn

from domlora.adapters.attach import AdapterOptions, attach_, freeze_
from domlora.data.dataset import Dataset
from domlora.models.build import build_model
from domlora.training import fit as loop
from domlora.training.distributed.fused import FusedRun
from domlora.training.distributed.ranks import joined
from domlora.training.engine import Engine
from domlora.training.fit import FitOptions, Progress, fit
from domlora.training.optimizers import FUSED, OptimizerOptions, Rule

CASES = {  # name: model, weight decay of tables, what else moves behind a frozen network
    "joint": ("deepfm", 0.0, None),
    "decay": ("mmoe", 0.1, None),
    "widths": ("dcn", 0.1, None),
    "tables": ("deepfm", 0.0, ("embedding.*", "linear.*")),
    "frozen": ("mlp", 0.0, ()),
}


def made(name: str, data: Dataset) -> nn.Module:
    model_name, _, moving = CASES[name]
    torch.manual_seed(1)
    options = {"embedding_dims": {"item": 6}} if name == "widths" else {}
    model = build_model(schema=data.schema, name=model_name, dropout=0.0, **options)
    attach_(model, 4, **asdict(AdapterOptions(temperature=8)))
    if moving is not None:
        freeze_(model, except_=moving)
    return model


def rules_of(name: str, tables: str) -> OptimizerOptions:
    rule = Rule(tables, lr=0.05, weight_decay=CASES[name][1])  # type: ignore[arg-type]
    return OptimizerOptions(tables=rule, adapters=Rule("rowwise_adagrad", lr=0.01))


def train_all(out: Path, data: Dataset, rank: int, tables: str) -> None:
    """Each case for a hundred steps, with a learning rate that falls."""
    for name in CASES:
        model = made(name, data)
        options = FitOptions(batch_size=73, max_epochs=2, schedule="cosine")
        found = fit(model, data, options, rules_of(name, tables), kind=FusedRun if tables == FUSED else None)
        write(out / f"{name}.safetensors", model, found, rank)


def train_until(out: Path, data: Dataset, rank: int, last: int) -> None:
    """A run of four epochs with a checkpoint, which all ranks end when epoch ``last`` was validated."""

    def stop(progress: Progress) -> None:
        if progress.epoch == last and progress.rows == progress.total_rows:
            raise SystemExit

    loop._APART_S = 0.0  # epochs are shorter than a second
    model, options = made("joint", data), FitOptions(batch_size=73, max_epochs=4)
    rules, checkpoint = rules_of("joint", FUSED), out / "checkpoint"
    found = fit(model, data, options, rules, checkpoint=checkpoint, on_progress=stop, kind=FusedRun)
    write(out / "whole.safetensors", model, found, rank)


def main(out: Path, tables: str, last: int | None) -> None:
    torch.set_num_threads(1)
    # a unit that rounding puts just above zero for one and just below for another parts them for good, if it is a ReLU
    torch.relu = nn.functional.silu
    Engine.validation_rows = 600  # of 1,201: the last batch has one row, for one rank
    data = rows(6005, torch.float32)  # 50 steps an epoch
    with joined() as here:
        if last is None:
            train_all(out, data, here.rank, tables)
        else:
            train_until(out, data, here.rank, last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else None)
