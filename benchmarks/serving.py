"""What a request costs: beside a hand-written endpoint with the same graph, with many adapters, beside other servers, while
adapters are swapped.

    python benchmarks/serving.py --plan full --json serving.json --mlserver ENV/bin/python --kserve ENV/bin/python

Each peer needs an environment of its own (serving_requirements.txt, serving_mlserver_requirements.txt),
or is left out. Every
server runs all the time and answers in its turn; what is reported is processor time of the server, which a busy machine
disturbs least.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from page import Section, Target, show, write
from rounds import Timings, digits, ratio_of, take_turns
from serving_model import FEATURES, FEW, NUM_IDS, exported, payload, store_of

from domlora.client import Client
from domlora.loadtest import Plan, Report, draw_domains, http_request, random_requests, run

HERE = Path(__file__).parent
ROWS, CLIENTS, MANY = 64, 8, 1_000
SERVE = "from domlora.cli import main; main()"
METADATA = {"name": "live", "inputs": [{"name": "ids", "parameters": {"num_ids": [NUM_IDS] * FEATURES}}]}
MOST_OVER_MINIMAL, MOST_DIFFERENCE, LEAST_OVER_PEERS, MOST_WHILE_SWAPPING = 1.15, 0.05, 3.0, 1.5


class Size(NamedTuple):
    """How long it is measured."""

    seconds: float
    warmup_s: float
    rounds: int


PLANS = {"smoke": Size(0.2, 0.1, 2), "quick": Size(1.0, 0.3, 5), "full": Size(2.0, 0.5, 15)}


@dataclass(slots=True)
class Server:
    """A process that answers."""

    url: str
    pid: int


@dataclass(slots=True)
class Arm:
    """A server and what it is asked; its figures are processor seconds of the server a request."""

    server: Server
    requests: Sequence[bytes]
    size: Size
    clients: int = CLIENTS
    reports: list[Report] = field(default_factory=list)

    def __call__(self) -> float:
        plan = Plan(self.server.url, None, self.clients, self.size.seconds, self.size.warmup_s, pid=self.server.pid)
        report = run(plan, self.requests)
        if set(report.statuses) != {"200"}:
            raise SystemExit(f"{self.server.url} answered {report.statuses}")
        self.reports.append(report)
        return (report.server_cpu_us or 0.0) / 1e6

    @property
    def answered(self) -> float:
        return float(np.median([report.answered for report in self.reports]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="quick")
    parser.add_argument("--mlserver", type=Path, help="Python of an environment that has it")
    parser.add_argument("--kserve", type=Path, help="Python of an environment that has it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = PLANS[arguments.plan]
    peers = {"mlserver": arguments.mlserver, "kserve": arguments.kserve}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        few, many = exported(Path(folder) / "live"), Path(folder) / "many" / "live"
        store_of(few, many, 20 if arguments.plan == "smoke" else MANY)
        start = partial(running.enter_context)
        servers = {name: start(serving(name, few, python)) for name, python in peers.items() if python is not None}
        servers |= {"minimal": start(serving("minimal", few)), "constant": start(serving("constant", few))}
        servers |= {"domlora": start(serving("domlora", few)), "many": start(serving("domlora", many))}
        sections = [costs(servers, size), resident(servers, size), swaps(servers["domlora"], few, size)]
        sections.append(limit(servers["constant"], size))
    for section in sections:
        show(section)
    if arguments.json is not None:
        write(arguments.json, sections)


@contextmanager
def serving(name: str, folder: Path, python: Path | None = None) -> Iterator[Server]:
    """A server on a free port, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    if name == "domlora":
        told = [
            "-c",
            SERVE,
            "serve",
            "--bundle",
            str(folder),
            "--name",
            "live",
            "--port",
            str(port),
            "--max-adapters",
            str(2 * MANY),
            "--max-wait",
            "5",  # what else runs on the machine must not make it refuse
        ]
    else:
        told = [str(HERE / "serving_peers.py"), name, str(folder), str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(python or sys.executable), *told], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait(process, url)
        yield Server(url, process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def wait(process: subprocess.Popen[bytes], url: str, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/v2/health/ready").status_code != 503:  # those without that route answer 404
                return
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} does not serve")


def requests_for(domains: int, form: str, url: str) -> list[bytes]:
    names = draw_domains([f"d{number}" for number in range(domains)], 2_000)
    made = random_requests(METADATA, names, len(names), rows=ROWS, form=form)
    return [http_request(path, body, url, header_length=length) for path, body, length in made]


def require_equal(servers: Mapping[str, Server]) -> None:
    """All of them answer the same question alike."""
    path, body, _ = random_requests(METADATA, ["d3"], 1, rows=ROWS, form="json")[0]
    answers = {}
    for name, server in servers.items():
        outputs = httpx.post(f"{server.url}{path}", content=body, headers={"content-type": "application/json"}).json()[
            "outputs"
        ]
        answers[name] = next(np.ravel(output["data"]) for output in outputs if output["name"] == "probability")
    for name, found in answers.items():
        if not np.allclose(found, answers["domlora"], atol=1e-5):
            raise SystemExit(f"{name} answers something else")


def costs(servers: Mapping[str, Server], size: Size) -> Section:
    """Each server and each kind of body."""
    asked = {name: servers[name] for name in ("domlora", "minimal", "mlserver", "kserve") if name in servers}
    require_equal(asked)
    forms = {
        name: ("json",) if name == "mlserver" else ("binary", "json") for name in asked
    }  # it reads no binary tensors
    arms = {
        f"{name}, {form}": Arm(server, requests_for(FEW, form, server.url), size)
        for name, server in asked.items()
        for form in forms[name]
    }
    timings = take_turns(arms, 0.0, size.rounds)
    targets = [
        Target.of(
            f"processor time a request over the hand-written endpoint, {form}",
            timings.ratio(f"domlora, {form}", f"minimal, {form}"),
            MOST_OVER_MINIMAL,
            at_most=True,
        )
        for form in ("binary", "json")
    ]
    targets += [
        Target.of(
            f"processor time a request of {name}, {form}, over ours",
            timings.ratio(f"{name}, {form}", f"domlora, {form}"),
            LEAST_OVER_PEERS,
            at_most=False,
        )
        for name in ("mlserver", "kserve")
        if name in asked
        for form in forms[name]
    ]
    text = (
        f"Processor time of the server a request of {ROWS} rows with {FEATURES} ids, one of {FEW} domains; {CLIENTS} "
        "clients that ask again when they are answered, one process, one thread of inference; binary tensors or JSON of the "
        "Open Inference Protocol. All serve the same exported graph and answer alike."
    )
    return Section(
        "A request",
        text,
        ["server, body", "us a request", "over ours", "requests/s"],
        rows_of(arms, timings, "domlora"),
        targets,
    )


def rows_of(arms: Mapping[str, Arm], timings: Timings, ours: str) -> list[list[str]]:
    lines = []
    for name, arm in arms.items():
        against = next(
            other for other in arms if other.startswith(ours) and other.partition(", ")[2] == name.partition(", ")[2]
        )
        lines.append(
            [name, digits(1e6 * timings.median(name)), str(timings.ratio(name, against)), digits(arm.answered)]
        )
    return lines


def resident(servers: Mapping[str, Server], size: Size) -> Section:
    """Few and many adapters in memory."""
    few, many = servers["domlora"], servers["many"]
    with Client(many.url) as client:
        number = len(client.adapters())
    run(Plan(many.url, seconds=1.0, warmup_s=2.0), requests_for(number, "binary", many.url))  # all of them into memory
    arms = {
        f"{FEW} in memory": Arm(few, requests_for(FEW, "binary", few.url), size),
        f"{number} in memory, {FEW} of them asked for": Arm(many, requests_for(FEW, "binary", many.url), size),
        f"{number} in memory, all asked for": Arm(many, requests_for(number, "binary", many.url), size),
    }
    timings = take_turns(arms, 0.0, size.rounds)
    first, *others = arms
    lines = [
        [name, digits(1e6 * timings.median(name)), str(timings.ratio(name, first)), digits(arm.answered)]
        for name, arm in arms.items()
    ]
    targets = [
        Target.of(
            f"processor time a request, {name}, over {first}",
            timings.ratio(name, first),
            1 + MOST_DIFFERENCE,
            at_most=True,
        )
        for name in others
    ]
    text = "Processor time of the server a request, by the number of adapters in its memory. Binary tensors."
    return Section("Many adapters", text, ["adapters", "us a request", f"over {FEW}", "requests/s"], lines, targets)


def swaps(server: Server, export: Path, size: Size) -> Section:
    """Another adapter for one domain again and again, while it is asked for."""
    payloads = [payload(export, "d0", seed) for seed in (1, 2)]
    requests = requests_for(1, "binary", server.url)
    capacity = run(Plan(server.url, None, CLIENTS, size.seconds, size.warmup_s), requests).answered
    plan = Plan(server.url, capacity / 2, 256, max(2 * size.seconds, 1.0), size.warmup_s)
    quiet, swapping, counts = list[Report](), list[Report](), list[float]()

    def swapped() -> float:
        with swapped_again_and_again(server.url, payloads) as done:
            swapping.append(run(plan, requests))
        counts.append(len(done) / (plan.seconds + plan.warmup_s))
        return swapping[-1].latency_ms["p99"] / 1e3

    def undisturbed() -> float:
        quiet.append(run(plan, requests))
        return quiet[-1].latency_ms["p99"] / 1e3

    timings = take_turns({"none": undisturbed, "swaps": swapped}, 0.0, size.rounds)
    failed = sum(number for report in swapping for said, number in report.statuses.items() if said != "200")
    lines = [
        [
            name,
            digits(rate),
            digits(median_of(reports, "p50")),
            digits(1e3 * timings.median(arm)),
            str(timings.ratio(arm, "none")),
        ]
        for name, arm, rate, reports in (
            ("none", "none", 0.0, quiet),
            ("one domain's, one after another", "swaps", float(np.median(counts)), swapping),
        )
    ]
    targets = [
        Target.of(
            "99th percentile while swapping over undisturbed",
            timings.ratio("swaps", "none"),
            MOST_WHILE_SWAPPING,
            at_most=True,
        ),
        Target("requests not answered with 200 while swapping", float(failed), 0.0, True, "requests"),
    ]
    text = (
        f"Latency at {digits(capacity / 2)} requests/s, half of what the server can do, open loop, while "
        "`PUT /v1/adapters/d0` pushes another adapter for the domain that is asked for as soon as the one before is served."
    )
    return Section(
        "Swaps under load", text, ["swaps", "swaps/s", "p50, ms", "p99, ms", "p99 over none"], lines, targets
    )


def median_of(reports: Sequence[Report], level: str) -> float:
    return float(np.median([report.latency_ms[level] for report in reports]))


@contextmanager
def swapped_again_and_again(url: str, payloads: Sequence[bytes]) -> Iterator[list[int]]:
    done, stop = list[int](), threading.Event()

    def push() -> None:
        with Client(url) as client:
            while not stop.is_set():
                client.put_adapter("d0", payloads[len(done) % len(payloads)])
                done.append(1)

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def limit(server: Server, size: Size) -> Section:
    """What the load generator itself can do, before a server that answers the same bytes to everything."""
    arm = Arm(server, requests_for(FEW, "binary", server.url), size, clients=32)
    own = ratio_of([arm_cost(arm) for _ in range(size.rounds)])
    text = "One process before a server that does nothing: so much processor time the generator needs a request itself."
    return Section(
        "The load generator", text, ["", "us a request", "requests/s"], [["generator", str(own), digits(arm.answered)]]
    )


def arm_cost(arm: Arm) -> float:
    """Microseconds of the generator a request."""
    arm()
    return 1e6 * arm.reports[-1].generator_cpu / arm.reports[-1].answered


if __name__ == "__main__":
    main()
