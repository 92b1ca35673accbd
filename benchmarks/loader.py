"""How much faster rows come out of Parquet than a model learns from them.

    python benchmarks/loader.py --rows 4000000

Writes a prepared folder of random rows (twelve features, ten of them of 24 to 2,000,000 ids, Zipf-like; thirty domains) and
reads it as training does, from the page cache. Prints rows a second of the loader alone (streaming, and from memory), of an
MLP's training steps on batches that are ready, and of both together; ``per_cpu`` is a second of processor time, which other
work on the machine does not stretch. Then one JSON object: ``streaming_over_model`` is how many times more processor time a
row costs in the model than in the loader.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from adapters import peak_bytes

from domlora.data.dataset import FORMAT, FORMAT_VERSION, SPLITS, Dataset
from domlora.data.shards import DOMAIN_COLUMN, LABEL_COLUMN, USER_COLUMN, row_bytes, write_shard
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, Feature, Schema
from domlora.files import sha256_of
from domlora.models.build import build_model
from domlora.training.fit import loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

SIZES = (2_000_000, 500_000, 100_000, 20_000, 3_000, 2_000, 80, 50, 40, 24)
DOMAINS, SHARD_ROWS = 30, 1 << 20


def schema() -> Schema:
    ids = [Feature(f"c{size}", num_ids=FIRST_ID + size, hash_buckets=size) for size in SIZES]
    return Schema((*ids, *(Feature(name, "numeric") for name in "xy")), tuple(map(str, range(DOMAINS))), user="user")


def columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made = {f"c{size}": (FIRST_ID + size * random.random(rows) ** 3).astype(np.int32) for size in SIZES}
    made |= {name: random.standard_normal(rows, np.float32) for name in "xy"}
    made[DOMAIN_COLUMN] = (DOMAINS * random.random(rows) ** 2).astype(np.int32)
    made[LABEL_COLUMN] = (random.random(rows) < 0.2).astype(np.float32)
    return made | {USER_COLUMN: random.integers(0, 1 << 60, rows)}


def write(folder: Path, rows: int) -> None:
    """A prepared folder whose rows are all in the training split."""
    encoder = Encoder(schema(), {})
    encoder.save(folder)
    (folder / "train").mkdir()
    names = []
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        names.append(f"train/part-{number:05d}.parquet")
        write_shard(columns(min(SHARD_ROWS, rows - first), number), encoder.schema, folder / names[-1])
    facts = {
        name: {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
        for name in (*names, "schema.json", "vocabularies.json")
    }
    splits = {
        split: {"rows": rows if split == "train" else 0, "files": names if split == "train" else []} for split in SPLITS
    }
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "splits": splits, "files": facts}
    manifest["encoder_fingerprint"] = encoder.fingerprint()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class Steps:
    """What training does with a batch that is there."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = build_model("mlp", schema(), embedding_dim=16, hidden_units=(256, 128, 64)).train()
        self.optimizer = Optimizer(self.model, OptimizerOptions(tables=Rule("lazy_adam")))

    def __call__(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        loss = loss_of(self.model(batch.ids, batch.dense, batch.domain), batch)
        loss.item()
        loss.backward()
        self.optimizer.step()


def rates(batches: Iterable[Batch], work: Steps | None = None) -> tuple[float, float]:
    """Rows a second, of the clock and of the processor, of reading batches and, with ``work``, of learning from them."""
    started, cpu_started, rows = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        rows += batch.num_rows
        if work is not None:
            work(batch)
    return rows / (time.perf_counter() - started), rows / (time.process_time() - cpu_started)


def measure(folder: Path, batch_size: int, kind: str) -> dict[str, float]:
    """One kind of reading, in a process of its own because memory is counted by the process."""
    data = Dataset.open(folder, in_memory=kind == "in_memory")
    found = {"first_pass": rates(data.batches("train", batch_size, seed=0))[0]}
    passes = [rates(data.batches("train", batch_size, seed=seed)) for seed in range(1, 4)]
    found["loader"], found["loader_per_cpu"] = map(max, zip(*passes, strict=True))
    found["peak_mib"] = peak_bytes() / 2**20
    steps, ready = Steps(), list(islice(data.batches("train", batch_size, seed=0), 60))
    rates(ready[:20], steps)  # the states of the optimizer touch their memory
    found["model"], found["model_per_cpu"] = rates(ready[20:], steps)
    reader = data.batches("train", batch_size, seed=5)
    next(reader)  # the first window is not yet ahead
    found["together"] = rates(islice(reader, max(1, int(5 * found["model"] / batch_size))), steps)[0]  # five seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the rows here, or read those that are here")
    parser.add_argument("--kind", choices=("streaming", "in_memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.kind is not None:
        print(json.dumps(measure(arguments.folder, arguments.batch_size, arguments.kind)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists():
            write(folder, arguments.rows)
        report(folder, arguments)


def report(folder: Path, arguments: argparse.Namespace) -> None:
    options = ["--folder", str(folder), "--batch-size", str(arguments.batch_size), "--threads", str(arguments.threads)]
    found = {}
    for kind in ("streaming", "in_memory"):
        command = [sys.executable, __file__, *options, "--kind", kind]
        found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        line = "  ".join(f"{name} {value:,.0f}" for name, value in found[kind].items())
        print(f"{kind:<10} {line}")
    decoded_mib = Dataset.open(folder).num_rows("train") * row_bytes(schema()) / 2**20
    ratios = {f"{kind}_over_model": round(f["loader_per_cpu"] / f["model_per_cpu"], 2) for kind, f in found.items()}
    print(json.dumps(ratios | {"decoded_mib": round(decoded_mib)}))


if __name__ == "__main__":
    main()
