"""How much memory each rank takes to train a table and to write its bundle: cut between ranks, and in the model.

    python benchmarks/table_memory.py --ranks 1 2 4 --json table_memory.json

Needs TorchRec and FBGEMM (``domlora[torchrec]``). Runs ``domlora pretrain``, with its checkpoints, on a log of 60,000
rows whose one long table has ``--rows`` rows of 32 numbers, and again with a table of 1,000 rows. Counts the largest
anonymous memory of each rank, seen from outside 50 times a second, less that of the run with the short table. Pages of
files that are mapped are no such memory: the system takes them back when it is short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHORT, WIDTH, LOG_ROWS = 1_000, 32, 60_000
FUSED = "fused_rowwise_adagrad"
PLAN = """
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.user]
hash_buckets = {}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--folder", type=Path, help="where data and bundles are for a while; else where temporary files are"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = 4 * WIDTH * arguments.rows
    found = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        place = Path(folder)
        long, short = prepared(place / "long", arguments.rows), prepared(place / "short", SHORT)
        arms = [(f"{FUSED}, ranks: {size}", FUSED, size) for size in arguments.ranks]
        for name, rule, size in [*arms, ("rowwise_adagrad, in the model", "rowwise_adagrad", 1)]:
            more = peak(long, rule, size) - peak(short, rule, size)
            found[name] = more / table
            print(
                f"{name}: {more / 2**20:,.0f} MiB a rank, {found[name]:.2f} times the table of {table / 2**20:,.0f} MiB"
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def prepared(folder: Path, buckets: int) -> Path:
    """A dataset whose users have so many rows of a table."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    ids = {name: draw.integers(500, size=LOG_ROWS) for name in ("item", "user")}
    scene = pa.array(draw.choice(["home", "cart"], LOG_ROWS))
    pq.write_table(pa.table({**ids, "scene": scene, "click": draw.integers(2, size=LOG_ROWS)}), folder / "log.parquet")
    (folder / "plan.toml").write_text(PLAN.format(buckets), encoding="utf-8")
    command = [sys.executable, "-m", "domlora", "prepare", str(folder / "plan.toml"), "--out", str(folder / "rows")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "rows"


def peak(data: Path, rule: str, size: int) -> int:
    """The most anonymous memory that a rank had, in bytes."""
    settings = {
        "model.name": "mlp",
        "model.embedding_dim": WIDTH,
        "train.pretrain.fit.batch_size": 1000,
        "train.pretrain.fit.max_epochs": 2,
        "train.pretrain.optimizer.tables.name": rule,
    }
    words = ["-m", "domlora", "pretrain", "--data", str(data), "--out", str(data.parent / "base"), "--overwrite"]
    words += [f"--set={name}={value}" for name, value in settings.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, *launcher, *words]
    most = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            for process in children(run.pid) if size > 1 else [run.pid]:
                most = max(most, anonymous(process))
            time.sleep(0.02)
    if run.returncode:
        raise SystemExit(run.returncode)
    return most


def children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def anonymous(process: int) -> int:
    """Bytes that are of no file; 0 of a process that has ended."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 0


if __name__ == "__main__":
    main()
