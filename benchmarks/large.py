"""A log that does not fit in memory: generated, prepared, trained for one epoch, each in a process of its own.

    python benchmarks/large.py --rows 50000000 --folder runs/large

Prints rows a second and the largest resident memory of each process. Twelve features (ten categorical, of 24 to 2,000,000
values, Zipf-like; two numbers), thirty domains of unequal size, a click that hangs on some of them. What is there already is
not made again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from adapters import peak_bytes

FILE_ROWS = 1_000_000
SIZES = {
    "user": 2_000_000,
    "item": 500_000,
    "category": 2_000,
    "brand": 20_000,
    "query": 100_000,
    "city": 3_000,
    "device": 50,
    "hour": 24,
    "age": 80,
    "position": 40,
}
DOMAINS = 30
PLAN = """
[source]
files = ["log/*.parquet"]
key = ["impression"]

[columns]
domain = "scene"
domain_is_feature = false
label = "click"
user = "user"
item = "item"

[split]
fractions = [0.8, 0.1, 0.1]

{features}
"""


def numbers(random: np.random.Generator, size: int, rows: int) -> np.ndarray:
    """Few frequent and many rare values: a power of a uniform number."""
    return (size * random.random(rows) ** 3).astype(np.int64)


def generate(folder: Path, rows: int) -> None:
    log = folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    share = np.arange(1, DOMAINS + 1) ** -0.7
    taste = np.random.default_rng(0).normal(size=(DOMAINS, 97))
    for number in range(-(-rows // FILE_ROWS)):
        path = log / f"part-{number:05d}.parquet"
        if path.exists():
            continue
        random, count = np.random.default_rng(number), min(FILE_ROWS, rows - number * FILE_ROWS)
        columns = {name: numbers(random, size, count) for name, size in SIZES.items()}
        columns["impression"] = np.arange(count) + number * FILE_ROWS
        scene = random.choice(DOMAINS, count, p=share / share.sum())
        price = np.exp(random.normal(size=count))
        logit = -2 + taste[scene, columns["item"] % 97] + 0.5 * taste[0, columns["user"] % 97] - 0.3 * np.log(price)
        columns |= {"price": price, "age_days": random.exponential(30, count)}
        columns["click"] = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int8)
        columns["scene"] = pa.array(scene).cast(pa.string())
        part = path.with_suffix(".tmp")
        pq.write_table(pa.table(columns), part)
        part.rename(path)
    features = [f"[features.{name}]" + ("\nmin_count = 2" if size > 10_000 else "") for name, size in SIZES.items()]
    features += ['[features.price]\nkind = "numeric"\ntransform = "log1p"', '[features.age_days]\nkind = "numeric"']
    (folder / "plan.toml").write_text(PLAN.format(features="\n".join(features)), encoding="utf-8")


def prepare(folder: Path) -> int:
    from rich.progress import Progress

    from domlora.config import load_plan
    from domlora.data.prepare import prepare as run

    with Progress() as bar:
        manifest = run(load_plan(str(folder / "plan.toml")), folder / "data", folder=folder, progress=bar)
    return int(manifest["rows"]["kept"])


def train(folder: Path) -> int:
    import torch

    from domlora.data.dataset import Dataset
    from domlora.models.build import build_model
    from domlora.training.fit import FitOptions, fit
    from domlora.training.optimizers import OptimizerOptions, Rule

    torch.set_num_threads(1)
    data = Dataset.open(folder / "data")
    model = build_model("mlp", data.schema, embedding_dim=16)
    rules = OptimizerOptions(tables=Rule("rowwise_adagrad", lr=0.02))
    found = fit(model, data, FitOptions(batch_size=8192, max_epochs=1), rules)
    print(f"validation WAUC {found.best_value:.4f}, training {found.rows_per_second:,.0f} rows/s")
    return data.num_rows("train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="needs about 400 bytes a row")
    parser.add_argument("--only", choices=("prepare", "train"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only is None:
        generate(arguments.folder, arguments.rows)
        for only in ("prepare", "train"):
            if only == "prepare" and (arguments.folder / "data").exists():
                continue
            subprocess.run([sys.executable, __file__, "--folder", str(arguments.folder), "--only", only], check=True)
        return
    started = time.perf_counter()
    rows = {"prepare": prepare, "train": train}[arguments.only](arguments.folder)
    seconds = time.perf_counter() - started
    facts = {
        "rows": rows,
        "seconds": round(seconds),
        "rows_per_s": round(rows / seconds),
        "peak_gib": peak_bytes() / 2**30,
    }
    print(json.dumps({arguments.only: facts}))


if __name__ == "__main__":
    main()
