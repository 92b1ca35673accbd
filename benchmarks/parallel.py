"""A thousand domains adapted in parallel: speed-up, cost of what is not training, kills, equal bytes.

``python benchmarks/parallel.py`` makes a world, cuts its rows, and adapts block after block of its domains twice: one after
another in this process, and by ``--workers`` processes. The last fifth is left to a run of its own that is killed (-9), goes
on and loses a worker. Every file must equal the one of the sequential pass. Leaves with 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.data.shards import DOMAIN_COLUMN, FORMAT, FORMAT_VERSION, LABEL_COLUMN, write_shard
from domlora.data.synthetic import World
from domlora.files import sha256_of
from domlora.training.fit import FitOptions
from domlora.training.parallel.cut import cut
from domlora.training.parallel.processes import in_workers
from domlora.training.parallel.run import adapt_apart
from domlora.training.parallel.work import Job, places_of, prepare
from domlora.training.parallel.worker import Outcome, Worker, adapt_one
from domlora.training.stages import Onboarding, Recipe, Stage, pretrain

MODEL: dict[str, Any] = {"name": "mlp", "hidden_units": [64, 32]}


@dataclass
class Spent:
    """Time of the clock and of all processes, and how long workers were at a domain, in seconds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float, busy: float = 0.0) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.busy.append(busy)


def recipe_of(epochs: int) -> Recipe:
    return Recipe(
        pretrain=Stage(FitOptions(max_epochs=2)), onboard=Onboarding(FitOptions(max_epochs=epochs, patience=3))
    )


def write_world(folder: Path, num_domains: int, rows_per_domain: int) -> None:
    """A prepared folder of a synthetic world."""
    folder.mkdir(parents=True)
    data = World(num_domains=num_domains).dataset(num_domains * rows_per_domain, seed=1)[0]
    data.encoder.save(folder)
    splits: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        rows, name = data.read(split), f"{split}/part-00000.parquet"
        (folder / split).mkdir()
        columns = {f"x{place}": rows.dense[:, place].numpy() for place in range(rows.dense.shape[1])}
        columns |= {"domain": rows.ids[:, 0].int().numpy(), DOMAIN_COLUMN: rows.domain.int().numpy()}
        write_shard({**columns, LABEL_COLUMN: rows.label.numpy()}, data.schema, folder / name)
        splits[split] = {"rows": rows.num_rows, "files": [name]}
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "splits": splits, "files": files}
    facts["encoder_fingerprint"] = data.encoder.fingerprint()
    (folder / "manifest.json").write_text(json.dumps(facts), encoding="utf-8")


def measure_cut(folder: Path, times: int) -> None:
    """Cut the rows ``times`` over, streamed from disk: to see what memory and time depend on."""
    data = Dataset.open(folder, in_memory=False)
    for split in ("train", "valid"):
        facts = data.manifest["splits"][split]
        facts["files"], facts["rows"] = facts["files"] * times, facts["rows"] * times
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder.parent) as there:
        cut(data, Path(there) / "rows", "")
        size = sum(path.stat().st_size for path in (Path(there) / "rows").iterdir())
    rows, peak = sum(data.num_rows(s) for s in ("train", "valid")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"cut {rows:,} rows: {time.perf_counter() - began:.1f} s, {time.process_time() - cpu:.1f} s CPU, "
        f"{size / 2**20:,.0f} MiB on disk, memory {before / 1024:,.0f} -> {peak / 1024:,.0f} MiB",
        flush=True,
    )


def sequential(job: Job, numbers: Sequence[int], spent: Spent) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        outcome = adapt_one(job, number)
        assert not outcome.error, outcome.error
    spent.add(time.perf_counter() - began, time.process_time() - cpu)


def parallel(job: Job, numbers: Sequence[int], workers: int, spent: Spent) -> None:
    """CPU time of the workers from their first moment on, and of this process."""
    began, cpu = time.perf_counter(), time.process_time()
    used: dict[int, float] = {}
    busy = 0.0
    for _, outcome in in_workers(partial(adapt_one, job), numbers, workers=workers):
        assert outcome is not None
        assert not outcome.error, outcome.error
        busy += outcome.seconds
        used[outcome.process] = max(used.get(outcome.process, 0.0), outcome.process_seconds)
    spent.add(time.perf_counter() - began, time.process_time() - cpu + sum(used.values()), busy)


def fixed_share(job: Job, numbers: Sequence[int]) -> float:
    """The part of a domain's CPU time that is not its training: reading rows, writing files."""
    worker, inside = Worker(job), 0.0
    trained = worker.trained

    def timed(*args: Any) -> Any:
        nonlocal inside
        cpu = time.process_time()
        found = trained(*args)
        inside += time.process_time() - cpu
        return found

    setattr(worker, "trained", timed)  # noqa: B010 - a method
    cpu = time.process_time()
    for number in numbers:
        worker.adapt(number)
    return 1 - inside / (time.process_time() - cpu)


def whole_run(folder: Path, workers: int, epochs: int) -> None:
    """What is killed: the rest of all domains, and the bundle."""
    bundle, data = Bundle.open(folder / "base"), Dataset.open(folder / "data")
    engine = partial(in_workers, workers=workers)

    def told(name: str, outcome: Outcome | None) -> None:
        print(name, outcome.process if outcome else 0, flush=True)

    bundle, found = adapt_apart(bundle, data, recipe_of(epochs), folder / "work", engine, on_outcome=told)
    bundle.save(folder / "out")
    print(found, flush=True)


def killed_run(folder: Path, args: argparse.Namespace) -> str:
    """Kill the parent, then in the next try a worker; what the last one says."""
    words = [
        sys.executable,
        __file__,
        "--run",
        str(folder),
        "--workers",
        str(args.workers),
        "--epochs",
        str(args.epochs),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(max(args.domains // 20, 1)):
        process.stdout.readline()
    process.kill()
    process.wait()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(max(args.domains // 50, 1)):
        worker = int(process.stdout.readline().split()[1])
    os.kill(worker, signal.SIGKILL)
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0
    return lines[-1]


def differing(folder: Path, domains: Sequence[str]) -> list[str]:
    """Domains whose files are not those of the sequential pass."""
    found = []
    for one, two in zip(places_of(folder / "work", domains), places_of(folder / "alone", domains), strict=True):
        names = sorted(path.name for path in two.iterdir())
        same = sorted(path.name for path in one.iterdir()) == names and len(names) == 4
        if not same or any((one / name).read_bytes() != (two / name).read_bytes() for name in names):
            found.append(two.name)
    return found


def measure(folder: Path, args: argparse.Namespace) -> bool:
    torch.set_num_threads(1)
    write_world(folder / "data", args.domains, args.rows)
    for times in (1, args.cut_times):
        subprocess.run([sys.executable, __file__, "--cut", str(folder / "data"), "--cut-times", str(times)], check=True)
    data, recipe = Dataset.open(folder / "data"), recipe_of(args.epochs)
    model, _ = pretrain(data, MODEL, recipe)
    bundle = Bundle(model, MODEL, data.encoder)
    bundle.save(folder / "base")
    jobs = {name: prepare(bundle, data, recipe, folder / name) for name in ("alone", "work", "profiled")}
    print(f"what is not training: {fixed_share(jobs['profiled'], range(20)):.1%} of a domain's CPU time", flush=True)
    one, many, last = Spent(), Spent(), args.domains * 4 // 5
    for first in range(0, last, args.block):
        numbers = range(first, min(first + args.block, last))
        sequential(jobs["alone"], numbers, one)
        parallel(jobs["work"], numbers, args.workers, many)
        print(
            f"domains {first}..: sequential {one.wall[-1]:.1f} s, {one.cpu[-1]:.1f} s CPU; {args.workers} workers "
            f"{many.wall[-1]:.1f} s, {many.cpu[-1]:.1f} s CPU; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    sequential(jobs["alone"], range(last, args.domains), Spent())
    print(killed_run(folder, args))
    print(
        f"{last} domains: speed-up {sum(one.wall) / sum(many.wall):.2f} with {args.workers} workers; CPU time a domain "
        f"{1000 * sum(one.cpu) / last:.0f} ms alone, {1000 * sum(many.cpu) / last:.0f} ms in parallel; workers were at a "
        f"domain {sum(many.busy) / sum(many.wall) / args.workers:.1%} of the time",
        flush=True,
    )
    wrong = differing(folder, data.schema.domains)
    print(f"{args.domains - len(wrong)} of {args.domains} domains equal the sequential ones byte for byte", wrong[:5])
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=2500, help="of a domain; 60 % train, 20 % valid")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--block", type=int, default=400, help="domains that are adapted before the other way has its turn"
    )
    parser.add_argument("--cut-times", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--cut", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cut:
        measure_cut(args.cut, args.cut_times)
    elif args.run:
        whole_run(args.run, args.workers, args.epochs)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as there:
            return 0 if measure(Path(there), args) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
