"""A small model, a store, a server, an experiment and its traffic, all on this machine: something to look at.

python -m domlora.simulation.demo --folder runs/serve
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from domlora.abtest.analysis import analyze
from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.adapters.attach import AdapterOptions
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, DataError, DomloraError, EngineError
from domlora.files import told
from domlora.serving.export import export
from domlora.serving.store import Store
from domlora.simulation.exact import Lift, true_lifts
from domlora.simulation.population import Population
from domlora.simulation.traffic import Traffic
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Stage, adapt, pretrain

__all__ = ["EXPERIMENT", "compare_with_truth", "demo", "make_store", "running_server", "start_experiment"]

EXPERIMENT = "own-adapters"
_TRAINED_ON = 10_000_000  # numbers of the visits that the model learns from; those that are simulated begin at 0
_STARTING_S = 60.0
Say = Callable[[str], object]


def demo(folder: Path, *, port: int = 8000, seconds: float | None = None, rate: float = 150.0, say: Say) -> None:
    """Train, serve, experiment; until it is interrupted, or for so many seconds of traffic.

    Half of the users get each domain's adapter, the other half the base alone. Both the estimate from clicks and the truth,
    which only the simulation knows, are said every now and then.

    Args:
        folder: where the store is made; one of an earlier demo is used again.
        port: of the server; 0 takes a free one.
        seconds: of traffic.
        rate: visits a second.
        say: takes lines.

    Raises:
        DataError: the folder cannot be written.
        ConfigError: a number out of range.
        EngineError: the server did not start, such as on a port that is taken.
    """
    if rate <= 0 or (seconds is not None and seconds <= 0):
        raise ConfigError("the demo's rate and seconds must be above 0", received=(rate, seconds))
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
    population = Population()
    store = folder / "store"
    if not (store / "state.json").exists():
        say("training a small model of four domains, and an adapter for each (half a minute)")
        make_store(store, population)
    experiment = start_experiment(store)
    truth = true_lifts(Store.open(store), experiment, population)
    with running_server(store, port) as url:
        say(f"serving at {url}; look at {url}/console/")
        say(
            f"experiment {EXPERIMENT!r}: half of the users without adapters, half with them; {rate:.0f} visits a second"
        )
        traffic = Traffic(url, population, rate=rate, first=_first_visit())
        began, pause = time.monotonic(), 10.0
        while seconds is None or time.monotonic() - began < seconds:
            left = pause if seconds is None else min(pause, seconds - (time.monotonic() - began))
            tally = traffic.run(seconds=left)
            with suppress(DataError):  # too early to say
                compared = compare_with_truth(store, EXPERIMENT, truth)
                say(f"{tally.visits:,} visits, {tally.clicks:,} clicks: {compared}")


def make_store(folder: Path, population: Population, *, num_rows: int = 40_000, epochs: int = 8) -> Store:
    """A model trained on what a log of random rankings would hold, exported into a store.

    Args:
        folder: the store, which must not exist yet.
        population: whose clicks are learned.
        num_rows: a fifth of them for validation.
        epochs: at most, of the base and again of the adapters.
    """
    rows, valid = population.rows(num_rows, first=_TRAINED_ON), num_rows // 5
    splits = {"train": rows.take(slice(valid, num_rows)), "valid": rows.take(slice(0, valid))}
    data = Dataset.from_batches(population.schema, splits, population.encoder)
    rules = OptimizerOptions(dense=Rule("adamw", lr=3e-3, weight_decay=1.0), adapters=Rule("adamw", lr=3e-3))
    stage = Stage(FitOptions(batch_size=1024, max_epochs=epochs, patience=3), rules)
    recipe = Recipe(adapter=AdapterOptions(temperature=8), pretrain=stage, adapt=stage)
    options = {"name": "mlp", "hidden_units": [64, 32]}
    model, _ = pretrain(data, options, recipe)
    adapt(model, data, recipe)
    bundle = Bundle(model, options, data.encoder, facts={"method": "two_stage"})
    bundle.save(folder.parent / "bundle", overwrite=True)
    exported = folder.parent / "export"
    export(Bundle.open(folder.parent / "bundle"), exported, [data.read("valid").take(slice(0, 500))], overwrite=True)
    store = Store.create(folder)
    store.add_version(exported)
    return store


def start_experiment(store: Path) -> Experiment:
    """The experiment of the demo, created and started unless it runs already."""
    registry = Registry.open(store / "experiments")
    if EXPERIMENT not in [each.name for each in registry.all()]:
        arms = (Arm("base", adapters=False), Arm("adapted"))
        registry.create(Experiment(EXPERIMENT, arms, effect=0.08, look_s=10.0, cuped_s=0.0))
        registry.start(EXPERIMENT)
    return registry.get(EXPERIMENT)


@contextmanager
def running_server(store: Path, port: int = 0, *options: str) -> Iterator[str]:
    """``domlora serve`` in a process of its own, from ready to drained; its address.

    Args:
        store: what it serves.
        port: where; 0 takes a free one.
        options: more of the command's, such as ``"--workers", "2"``.

    Raises:
        EngineError: it did not start.
    """
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from domlora.cli import main; main()", "serve"]
    words = ["--bundle", str(store), "--port", str(port), *options]
    lines = store.parent / "server.log"
    with lines.open("ab") as log, subprocess.Popen([*command, *words], stderr=log, process_group=0) as server:
        try:
            _wait_until_ready(url, server, lines)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGTERM)
            server.wait(30)


def compare_with_truth(store: Path, experiment: str, truth: Mapping[str, Lift]) -> str:
    """What the analysis says beside what the simulation knows, as a line.

    Args:
        store: whose log is analyzed.
        experiment: its name.
        truth: the lift of each arm.

    Raises:
        DataError: too little has happened.
    """
    found = Registry.open(store / "experiments").get(experiment)
    analysis = analyze(found, store)
    parts: list[str] = [analysis.decision.verdict]
    for lift in analysis.overall:
        if lift.metric == found.primary:
            said = f"{100 * lift.lift:+.1f} % [{100 * lift.low:+.1f}, {100 * lift.high:+.1f}]"
            parts.append(f"{lift.arm}: clicks say {said}, the truth is {truth[lift.arm]}")
    return "; ".join(parts)


def _first_visit() -> int:
    """Another one at each start, since no two days are alike."""
    return int(time.time()) % 100_000 * 50


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], lines: Path) -> None:
    until = time.monotonic() + _STARTING_S
    while time.monotonic() < until and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise EngineError("the server must become ready", received=f"exit code {server.poll()}", next_step=f"Read {lines}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rate", type=float, default=150.0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with it
    with suppress(KeyboardInterrupt):
        try:
            demo(**vars(given), say=lambda line: sys.stdout.write(f"{line}\n") and sys.stdout.flush())
        except DomloraError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)


if __name__ == "__main__":
    _main()
