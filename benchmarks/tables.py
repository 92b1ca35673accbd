"""What a training step costs with tables of 1e5 to 1e7 rows: in the model, in FBGEMM's table, and cut between two ranks.

    python benchmarks/tables.py --json tables.json

Needs TorchRec and FBGEMM (``domlora[torchrec]``). A DeepFM of five features of 16 numbers, batches of 4,096 rows with
uniform ids, which repeat as little as ids can; forward, backward and all optimizers. Every arm is a process of one thread,
or two of them, that waits until it is told to take some steps; arms take turns. Processor time is what a busy machine
disturbs least; it has no waiting for the other rank.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from page import Section, show, write
from rounds import Timings, digits, take_turns

BATCH, FEATURES, BATCHES = 4096, 5, 8
ARMS = {  # name: rule, ranks
    "in the model": ("rowwise_adagrad", 1),
    "FBGEMM": ("fused_rowwise_adagrad", 1),
    "two ranks": ("fused_rowwise_adagrad", 2),
}


class Plan(NamedTuple):
    """How much is measured."""

    num_rows: Sequence[int]
    steps: int
    seconds: float
    rounds: int


PLANS = {"smoke": Plan((1_000,), 1, 0.0, 2), "full": Plan((100_000, 1_000_000, 10_000_000), 20, 30.0, 7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS, metavar=("RULE", "ROWS", "STEPS"))
    arguments = parser.parse_args()
    if arguments.arm is not None:
        rule, num_rows, steps = arguments.arm
        return take_steps(rule, int(num_rows), int(steps))
    section = measure(PLANS[arguments.plan])
    show(section)
    if arguments.json is not None:
        write(arguments.json, [section])
    return None


def take_steps(rule: str, num_rows: int, steps: int) -> None:
    """Be an arm: for each line that is read, some steps and the seconds of one."""
    import torch

    from domlora.data.dataset import Dataset
    from domlora.features.batch import Batch
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.training.distributed.fused import FusedRun
    from domlora.training.distributed.ranks import joined
    from domlora.training.fit import FitOptions, Run
    from domlora.training.optimizers import FUSED, OptimizerOptions, Rule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = num_rows // FEATURES
    schema = Schema(tuple(Feature(f"f{i}", num_ids=size, hash_buckets=size - 2) for i in range(FEATURES)), ("all",))
    ids, label = torch.randint(2, size, (BATCHES * BATCH, FEATURES)), torch.randint(2, (BATCHES * BATCH,)).float()
    rows = Batch(ids, torch.zeros(len(ids), 0), torch.zeros(len(ids), dtype=torch.int64), label)
    data = Dataset.from_batches(schema, dict.fromkeys(("train", "valid", "test"), rows))
    model = build_model(schema=schema, name="deepfm", embedding_dim=16, hidden_units=[256, 128, 64])
    with joined():
        kind = FusedRun if rule == FUSED else Run
        tables = OptimizerOptions(tables=Rule(rule, lr=0.02))  # type: ignore[arg-type]
        run = kind(model.train(), data, FitOptions(batch_size=BATCH), tables)
        batches = [rows.take(slice(i * BATCH, (i + 1) * BATCH)) for i in range(BATCHES)]
        run.step(batches[0])
        print("ready", flush=True)
        for _ in sys.stdin:
            run.step(batches[-1])
            wall, processor = time.perf_counter(), time.process_time()
            for step in range(steps):
                run.step(batches[step % BATCHES])
            spent = time.perf_counter() - wall, time.process_time() - processor
            print(*(each / steps for each in spent), flush=True)


def measure(plan: Plan) -> Section:
    """All arms with all sizes at once, in turns."""
    arms = {
        (name, rows): start(rule, ranks, rows, plan) for name, (rule, ranks) in ARMS.items() for rows in plan.num_rows
    }
    try:
        for processes in arms.values():
            told(processes)
        processor = Timings({f"{name} {rows}": [] for name, rows in arms})
        turns = {
            f"{name} {rows}": partial(visit, processes, processor.seconds[f"{name} {rows}"])
            for (name, rows), processes in arms.items()
        }
        timings = take_turns(turns, plan.seconds, plan.rounds)
    finally:
        for process in [each for processes in arms.values() for each in processes]:
            process.kill()
            process.wait()
    lines = [line(name, plan.num_rows, timings, processor) for name in ARMS]
    head = ("tables", *(f"{rows:,} rows" for rows in plan.num_rows), "processor time, longest over shortest table")
    told_by = "Milliseconds of a step by the clock / of processor time of a rank"
    text = f"{told_by}; {rounds_of(timings)} rounds of {plan.steps} steps."
    return Section("A training step as tables grow", text, head, lines)


def start(rule: str, ranks: int, rows: int, plan: Plan) -> list[subprocess.Popen[str]]:
    """The processes of an arm; ranks find each other at a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    meeting = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-W", "ignore", __file__, "--arm", rule, str(rows), str(plan.steps)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **meeting, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def visit(processes: Sequence[subprocess.Popen[str]], processor: list[float]) -> float:
    """Seconds of a step by the clock, of the slowest rank; ``processor`` gets those of the busiest rank's processor."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    spent = [[float(each) for each in said.split()] for said in told(processes)]
    processor.append(max(each[1] for each in spent))
    return max(each[0] for each in spent)


def told(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    said = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    if not all(said):
        raise SystemExit("an arm has ended by itself")
    return said


def rounds_of(timings: Timings) -> int:
    return len(next(iter(timings.seconds.values())))


def line(name: str, sizes: Sequence[int], clock: Timings, processor: Timings) -> list[str]:
    arms = [f"{name} {rows}" for rows in sizes]
    figures = [f"{digits(1e3 * clock.median(arm))} / {digits(1e3 * processor.median(arm))}" for arm in arms]
    return [name, *figures, str(processor.ratio(arms[-1], arms[0]))]


if __name__ == "__main__":
    main()
