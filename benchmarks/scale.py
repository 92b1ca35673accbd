"""How a training step grows, and what a plan for many machines needs: measured points, a fitted model, your own numbers.

    torchrun --nproc-per-node 2 benchmarks/scale.py measure --json points.json     # adds to the file; about 3 minutes
    python benchmarks/scale.py fit --json points.json
    python benchmarks/scale.py plan --ids 1e9 --dim 32 --rows-per-day 1e11 --domains 10000 --requests-per-second 2e5

Two processes, one thread each: the first steps alone, then both share the same batches, and shapes take turns in an order
that is drawn anew each round. A shape's figure is the median over rounds of a visit's median step. ``HELD_OUT`` was written
down before anything was fitted: each of its shapes is larger than all fitted ones in at least one direction.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from costs import TERMS, UNITS, Shape, fit, seconds
from plan import Wishes, needs
from rounds import digits

from domlora.adapters.attach import attach_
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.training.distributed.ranks import joined
from domlora.training.engine import Engine
from domlora.training.fit import loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

FITTED = [
    *(Shape(batch=batch) for batch in (1024, 2048, 4096, 8192)),
    *(Shape(units=units) for units in ((64, 32), (512, 256, 128))),
    *(Shape(dim=dim) for dim in (8, 32)),
    *(Shape(slots=slots) for slots in (4, 16)),
    *(Shape(domains=domains) for domains in (10, 100, 300, 1000)),
    Shape(batch=8192, dim=32, domains=10),
    Shape(batch=1024, slots=16, domains=10),
    Shape(batch=2048, units=(512, 256, 128), domains=10),
    Shape(batch=8192, units=(64, 32), slots=16),
]
HELD_OUT = [
    Shape(batch=16384),
    Shape(units=(1024, 512, 256)),
    Shape(dim=64),
    Shape(slots=32),
    Shape(domains=3000),
    Shape(batch=8192, domains=1000),
    Shape(batch=16384, dim=32, domains=10),
]
SETS = {"fitted": FITTED, "held_out": HELD_OUT}
CANDIDATES = (16, 64, 256, 1024)
FACTS = Path(__file__).parents[1] / "docs" / "results" / "scale.json"
RULES = OptimizerOptions(tables=Rule("lazy_adam", lr=1e-6), adapters=Rule("lazy_adam", lr=1e-6), dense=Rule(lr=1e-6))
VISIT_S, MIN_STEPS = 0.3, 3

Step = Callable[[], None]


def batches_of(shape: Shape, rank_seed: int = 0) -> Iterator[Batch]:
    """Uniform ids: few repeats, the worst case. All ranks draw the same."""
    draw = torch.Generator().manual_seed(rank_seed)
    size, slots = shape.batch, shape.slots
    made = [
        Batch(
            torch.randint(0, shape.ids, (size, slots), generator=draw),
            torch.zeros(size, 0),
            torch.randint(0, max(shape.domains, 1), (size,), generator=draw),
            (torch.rand(size, generator=draw) < 0.25).float(),
        )
        for _ in range(3)
    ]
    return cycle(made)


def model_of(shape: Shape) -> torch.nn.Module:
    features = tuple(Feature(f"f{number}", num_ids=shape.ids) for number in range(shape.slots))
    schema = Schema(features, tuple(f"d{number}" for number in range(max(shape.domains, 1))))
    model = build_model("deepfm", schema, embedding_dim=shape.dim, hidden_units=shape.units)
    if shape.domains:
        attach_(model, shape.domains, temperature=shape.temperature, include=["tower.*"])
    return model.train()


def step_of(shape: Shape, engine: Engine) -> Step:
    """What the loop does with a batch, as ``training/fit.py`` has it."""
    torch.manual_seed(0)
    model, batches = model_of(shape), batches_of(shape)
    optimizer = Optimizer(model, RULES)
    called, numbers = engine.called(model, optimizer.lazy), iter(range(1 << 40))

    def step() -> None:
        mine, share = engine.share(next(batches))
        engine.begin_step(1, next(numbers))
        optimizer.zero_grad()
        loss = share * loss_of(called(mine.ids, mine.dense, mine.domain), mine)
        engine.mean(loss.item())
        loss.backward()
        engine.add_up(optimizer.lazy)
        optimizer.step()

    step()
    for moments in optimizer.state().values():
        moments.add_(0)  # pages that no step has touched yet would cost more than what is done with them
    step()
    return step


class Took(NamedTuple):
    """Seconds of a step: of the clock, median and fastest of a visit, and median of this process's cores."""

    clock: float
    fastest: float
    processor: float


def visit(step: Step, steps: int) -> Took:
    clock, processor = [], []
    for _ in range(steps):
        start, busy = time.perf_counter(), time.process_time()
        step()
        processor.append(time.process_time() - busy)
        clock.append(time.perf_counter() - start)
    return Took(statistics.median(clock), min(clock), statistics.median(processor))


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    path: Path = arguments.json
    points = json.loads(path.read_text()) if path.exists() else {}
    shapes, draw = [*FITTED, *HELD_OUT], random.Random(arguments.seed)
    with joined(timeout_s=300) as ranks:
        if ranks.size != 2:
            raise SystemExit("start it with: torchrun --nproc-per-node 2 benchmarks/scale.py measure --json FILE")
        for _ in range(arguments.rounds):
            draw.shuffle(shapes)
            for shape in shapes:
                for name, took in both(shape, ranks).items():
                    points.setdefault(name, []).append([round(each, 7) for each in took])
                if not ranks.rank:
                    path.write_text(json.dumps(points, indent=1))


def both(shape: Shape, ranks: Engine) -> dict[str, Took]:
    """A step of the first rank alone, the other waiting, and of both together."""
    alone = Took(0.0, 0.0, 0.0)
    if not ranks.rank:
        step = step_of(shape, Engine())
        alone = visit(step, max(MIN_STEPS, round(VISIT_S / visit(step, 1).clock)))
        del step
    gc.collect()
    ranks.mean(0.0)  # the other waits here
    step = step_of(shape, ranks)
    steps = max(MIN_STEPS, round(VISIT_S / ranks.mean(visit(step, 1).clock)))
    found = visit(step, steps)
    together = Took(*(ranks.mean(each) for each in found))
    del step
    gc.collect()
    return {key_of(shape): alone, key_of(replace(shape, ranks=2)): together}


def key_of(shape: Shape) -> str:
    return json.dumps(asdict(shape))


def shape_of(key: str) -> Shape:
    facts: dict[str, Any] = json.loads(key)
    return Shape(**{**facts, "units": tuple(facts["units"])})


def fitted(arguments: argparse.Namespace) -> None:
    """Fit the constants and say how far off each shape is; writes them into the file of facts."""
    points: dict[Shape, list[Took]] = {}
    for path in arguments.json:
        for name, visits in json.loads(path.read_text()).items():
            points.setdefault(shape_of(name), []).extend(Took(*each) for each in visits)
    took = {shape: statistics.median(each.processor for each in visits) for shape, visits in points.items()}
    of = {name: [replace(s, ranks=r) for s in shapes for r in (1, 2)] for name, shapes in SETS.items()}
    constants = fit([(shape, took[shape]) for shape in of["fitted"]])
    print("| batch | slots | dim | tower | domains | ranks | measured, ms | model, ms | off |\n" + "|---:" * 9 + "|")
    lines = []
    for name, shapes in of.items():
        for shape in shapes:
            said = seconds(shape, constants)
            spread = sorted(each.processor for each in points[shape])
            facts = {"set": name, **asdict(shape), "visits": len(spread), "spread_s": [spread[0], spread[-1]]}
            lines.append({**facts, "measured_s": took[shape], "model_s": said, "off": said / took[shape] - 1})
            print(line_of(shape, lines[-1]))
    for term in TERMS:
        print(f"{UNITS[term]:<45}{in_units(term, constants[term]):10.2f}")
    write_facts(arguments.facts, {"constants": constants, "points": lines})


def line_of(shape: Shape, found: dict[str, Any]) -> str:
    tower = "-".join(map(str, shape.units))
    low, high = (1e3 * each for each in found["spread_s"])
    cells = [shape.batch, shape.slots, shape.dim, tower, shape.domains, shape.ranks]
    cells += [f"{1e3 * found['measured_s']:.1f} [{low:.1f}, {high:.1f}]", f"{1e3 * found['model_s']:.1f}"]
    bold = "**" if found["set"] == "held_out" else ""
    return f"| {' | '.join(map(str, cells))} | {bold}{100 * found['off']:+.0f} %{bold} |"


def in_units(term: str, constant: float) -> float:
    """A constant as :data:`costs.UNITS` names it."""
    unit = UNITS[term]
    if unit.startswith("ms"):
        return 1e3 * constant
    return 1e9 * constant if unit.startswith("ns") else 1e-9 / constant if constant else float("inf")


def serve(arguments: argparse.Namespace) -> None:
    """Processor time of a request by its candidates, without HTTP: a line through three numbers, a fourth held out."""
    from serving_model import FEATURES, NUM_IDS, exported

    from domlora.serving.program import Program

    draw, took = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        program = Program.open(exported(Path(folder) / "model"))
        for _ in range(arguments.rounds):
            for number in CANDIDATES:
                ids, dense = draw.integers(0, NUM_IDS, (100, number, FEATURES)), np.zeros((number, 0), np.float32)
                program(ids[0], dense, 1)
                start = time.process_time()
                for each in ids:
                    program(each, dense, 1)
                took.setdefault(number, []).append((time.process_time() - start) / len(ids))
    found = {number: statistics.median(times) for number, times in took.items()}
    slope, start = np.polyfit(
        CANDIDATES[:-1], [found[n] for n in CANDIDATES[:-1]], 1, w=[1 / found[n] for n in CANDIDATES[:-1]]
    )
    off = (start + slope * CANDIDATES[-1]) / found[CANDIDATES[-1]] - 1
    for number, each in found.items():
        print(f"{number:5} candidates {1e6 * each:8.0f} us, the line {1e6 * (start + slope * number):8.0f}")
    print(
        f"{1e6 * start:.0f} us a request and {1e6 * slope:.2f} us a candidate; held out {CANDIDATES[-1]}: {100 * off:+.0f} %"
    )
    write_facts(arguments.facts, {"serving": {"request_s": start, "candidate_s": slope, "off": off}})


def prepare(arguments: argparse.Namespace) -> None:
    """Processor time and bytes of a row that is prepared, and of one that is read again for training."""
    from large import generate

    from domlora.config import load_plan
    from domlora.data.dataset import Dataset
    from domlora.data.prepare import prepare as run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, arguments.rows)
        start = time.process_time()
        run(load_plan(str(folder / "plan.toml")), folder / "data", folder=folder)
        took = (time.process_time() - start) / arguments.rows
        data = Dataset.open(folder / "data")
        size = sum(path.stat().st_size for path in (folder / "data").rglob("*.parquet")) / arguments.rows
        raw = sum(path.stat().st_size for path in (folder / "log").iterdir()) / arguments.rows
        start = time.process_time()
        read = sum(batch.num_rows for batch in data.batches("train", 8192, seed=1))
        reading = (time.process_time() - start) / read
    print(
        f"{1 / took:,.0f} rows a core second; {raw:.0f} bytes a row of log, {size:.0f} prepared; {1 / reading:,.0f} read"
    )
    found = {"core_seconds_per_row": took, "bytes_per_row": size, "loader_core_seconds_per_row": reading}
    write_facts(arguments.facts, {"preparing": found})


def planned(arguments: argparse.Namespace) -> None:
    """Needs by stage, the first to break at the top."""
    facts = json.loads(arguments.facts.read_text())
    wishes = Wishes(**{field.name: getattr(arguments, field.name) for field in fields(Wishes)})
    print("| stage | what | needed | there | times | where it breaks |\n|---|---|---:|---:|---:|---|")
    for need in needs(wishes, facts):
        numbers = " | ".join(f"{digits(each)} {need.unit}".strip() for each in (need.needed, need.there))
        answer = need.switch if need.load > 1 else "holds"
        print(f"| {need.stage} | {need.what} | {numbers} | {digits(need.load)} | {answer} |")


def write_facts(path: Path | None, found: dict[str, Any]) -> None:
    """Put some facts beside those that are in the file."""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        for name, facts in found.items():
            known[name] = {**known.get(name, {}), **facts} if isinstance(facts, dict) else facts
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = {name: verbs.add_parser(name) for name in RUN}
    one["measure"].add_argument("--json", type=Path, required=True)
    one["measure"].add_argument("--seed", type=int, default=0, help="of the order of shapes")
    for name, rounds in (("measure", 3), ("serve", 15)):
        one[name].add_argument("--rounds", type=int, default=rounds)
    one["fit"].add_argument("--json", type=Path, nargs="+", required=True, help="what measure wrote")
    one["prepare"].add_argument("--rows", type=int, default=1_000_000)
    for name in ("fit", "serve", "prepare"):
        one[name].add_argument(
            "--facts", type=Path, help="JSON to write what was found into, such as docs/results/scale.json"
        )
    one["plan"].add_argument("--facts", type=Path, default=FACTS)
    for field in fields(Wishes):
        words, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, tuple):
            one["plan"].add_argument(words, type=int, nargs="+", default=default)
        else:
            kind = (lambda text: int(float(text))) if isinstance(default, int) else float
            one["plan"].add_argument(words, type=kind, default=default)
    arguments = parser.parse_args()
    if "units" in arguments:
        arguments.units = tuple(arguments.units)
    RUN[arguments.verb](arguments)


RUN = {"measure": measure, "fit": fitted, "serve": serve, "prepare": prepare, "plan": planned}

if __name__ == "__main__":
    main()
