"""The real server in processes of its own, a model of ordinary size, and what the machine says of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from load import request_of

ROOT = Path(__file__).parents[2]
DOMAINS = ("toys", "books", "games")
FEATURES, NUM_IDS, CANDIDATES = 5, 20_000, 64
START = """
import sys
from domlora.serving.http.supervisor import serve
from domlora.serving.settings import Settings
sys.exit(serve(Settings.from_json(sys.argv[1]), factory=sys.argv[2]))
"""
REAL, HANGING = "domlora.serving.http.service:make", "hanging:make"


def write_export(folder: Path, seed: int = 0) -> None:
    """A tower of 256, 128 and 64 units over five features, with adapters for three domains."""
    import torch

    from domlora.adapters.attach import attach_
    from domlora.bundle import Bundle
    from domlora.features.batch import Batch
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.serving.export import export

    torch.manual_seed(seed)
    schema = Schema(tuple(Feature(f"f{i}", num_ids=NUM_IDS) for i in range(FEATURES)), domains=DOMAINS)
    options = {"name": "mlp", "embedding_dim": 16, "hidden_units": [256, 128, 64]}
    model = build_model(schema=schema, **options)
    attach_(model, len(DOMAINS), temperature=16.0, include=["tower.*"])
    words = {f"f{i}": [f"v{n}" for n in range(NUM_IDS - 2)] for i in range(FEATURES)}
    ids = torch.randint(0, NUM_IDS, (100, FEATURES))
    rows = Batch(ids, torch.zeros(100, 0), torch.arange(100) % len(DOMAINS), torch.zeros(100))
    export(Bundle(model, options, Encoder(schema, words)), folder, [rows])


def infer_requests(number: int = 50, seed: int = 0, domains: tuple[str, ...] = DOMAINS) -> list[bytes]:
    """Requests of the Open Inference Protocol with binary tensors, 64 candidates of one domain each."""
    random = np.random.default_rng(seed)
    drawn = (random.integers(2, NUM_IDS, (CANDIDATES, FEATURES)) for _ in range(number))
    return [_infer(ids, domains[n % len(domains)]) for n, ids in enumerate(drawn)]


def _infer(ids: np.ndarray, domain: str, *headers: str) -> bytes:
    raw = ids.astype("<i8").tobytes()
    tensor = {
        "name": "ids",
        "shape": list(ids.shape),
        "datatype": "INT64",
        "parameters": {"binary_data_size": len(raw)},
    }
    output = {"name": "probability", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [output], "parameters": {"domain": domain}}).encode()
    told = (f"inference-header-content-length: {len(head)}", "content-type: application/octet-stream")
    return request_of("/v2/models/live/infer", head + raw, *told, *headers)


def hanging_request(seconds: float) -> bytes:
    return _infer(np.full((CANDIDATES, FEATURES), 5), "toys", f"x-hang-s: {seconds}")


class Started:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.url = self.wait(lambda: [line["url"] for line in self.lines() if line["event"] == "listening"])[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == name]

    def wait(self, seen: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        until = time.perf_counter() + timeout_s
        while not (found := seen()):
            assert time.perf_counter() < until, self.log.read_text()[-3000:]
            time.sleep(0.01)
        return found

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def rss_mb(self) -> float:
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.workers()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.workers()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=15)

    def counts(self) -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}


@contextmanager
def serving(folder: Path, log: Path, factory: str = REAL, *, ready: bool = True, **settings: Any) -> Iterator[Started]:
    told = {"bundle": str(folder), "name": "live", "port": 0, **settings}
    path = f"{ROOT / 'src'}:{Path(__file__).parent}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(told), factory],
            stderr=file,
            env={**os.environ, "PYTHONPATH": path},
        )
    try:
        server = Started(process, log)
        if ready:
            server.wait(lambda: len(server.events("ready")) >= told.get("workers", 1), 60)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()


def domlora(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    line = [sys.executable, "-c", "from domlora.cli import main; main()", *map(str, words)]
    told = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=told)


QUIET = os.environ.get("DOMLORA_QUIET") == "1"  # nothing else runs on this machine: limits in time hold
SAID: list[str] = []


def limit(quiet: float, busy: float = float("inf")) -> float:
    """A limit in time or speed: the promised one on a quiet machine, another one where the processor is shared."""
    return quiet if QUIET else busy


def say(text: str) -> None:
    """A figure; those of a script are one line at its end, for who runs with ``-s``."""
    SAID.append(text)


@contextmanager
def beside(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run a function in a thread; what it returns is in the list when the block has ended."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    yield found
    thread.join()
