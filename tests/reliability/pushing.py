"""A store to serve, adapters to push to it, and clients that check every number of every answer."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from support import CANDIDATES, DOMAINS, FEATURES, NUM_IDS

from domlora.serving.folder import read_facts
from domlora.serving.payload import Payload, write_payload
from domlora.serving.program import Program
from domlora.serving.store import Store

IDS = np.random.default_rng(7).integers(2, NUM_IDS, (CANDIDATES, FEATURES))
CLOSE = 1e-5


@contextmanager
def memory() -> Iterator[Path]:
    """A folder in memory: to measure swaps, and not how long a disk takes to say that it has written."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


class Adapters:
    """Adapters for one export, told apart by their numbers, and what each of them answers."""

    def __init__(self, exported: Path) -> None:
        self.base = read_facts(exported)["base"]
        self._program = Program.open(exported)
        self._shapes = {name: shape for layer in self._program.layers for name, shape in layer.shapes.items()}

    def banks(self, seed: int, rank: int = 4) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            name: random.normal(0, 0.1, [rank if size is None else size for size in shape]).astype(np.float32)
            for name, shape in self._shapes.items()
        }

    def payload(self, domain: str, seed: int, rank: int = 4) -> bytes:
        return write_payload(Payload(domain, self.base, f"v{seed}", self.banks(seed, rank)))

    def expected(self, seed: int, rank: int = 4) -> np.ndarray:
        program = self._program.with_adapter("x", self.banks(seed, rank))
        return self._of(program, program.domains.index("x"))

    def exported(self, domain: str | None) -> np.ndarray:
        """What the export itself answers."""
        return self._of(self._program, -1 if domain is None else DOMAINS.index(domain))

    def _of(self, program: Program, number: int) -> np.ndarray:
        return program(IDS, np.empty((CANDIDATES, 0), np.float32), np.full(CANDIDATES, number))


def new_store(exported: Path, folder: Path) -> Store:
    store = Store.create(folder)
    store.add_version(exported)
    return store


def answer(client: httpx.Client, domain: str) -> tuple[httpx.Response, np.ndarray]:
    """The logits of the 64 candidates."""
    tensor = {"name": "ids", "shape": IDS.shape, "datatype": "INT64", "data": IDS.reshape(-1).tolist()}
    asked = {"inputs": [tensor], "outputs": [{"name": "logit"}], "parameters": {"domain": domain}}
    told = client.post("/v2/models/live/infer", json=asked)
    return told, np.array(told.json()["outputs"][0]["data"] if told.status_code == 200 else [], np.float32)


class Watched:
    """Clients that ask all the time; each answer must be one of those that there can be, and be called so."""

    def __init__(self, url: str, domain: str, expected: dict[str, np.ndarray], clients: int = 2) -> None:
        self.count, self.bad, self.seconds, self.seen = 0, [], [], set()
        self._url, self._domain, self._expected = url, domain, expected
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Watched:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def percentile(self, q: float) -> float:
        """Of the milliseconds."""
        return float(np.percentile(self.seconds, q) * 1e3)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10) as client:
            while not self._stopped.is_set():
                start = time.perf_counter()
                told, logits = answer(client, self._domain)
                self.seconds.append(time.perf_counter() - start)
                self.count += 1
                called = told.headers.get("x-domlora-adapter", "")
                self.seen.add(called)
                right = self._expected.get(called)
                if told.status_code != 200 or right is None or not np.abs(logits - right).max() <= CLOSE:
                    self.bad.append((told.status_code, called, told.text[:200]))


def wait_for(seen: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """How many seconds it took."""
    start = time.perf_counter()
    while not seen():
        assert time.perf_counter() - start < timeout_s
        time.sleep(0.002)
    return time.perf_counter() - start


def copy_of(exported: Path, folder: Path) -> Path:
    """An export whose files may be damaged."""
    shutil.copytree(exported, folder)
    return folder


def small_bundle() -> Any:
    """A bundle with the features of the export, and a smaller tower."""
    import torch

    from domlora.adapters.attach import attach_
    from domlora.bundle import Bundle
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model

    torch.manual_seed(0)
    schema = Schema(tuple(Feature(f"f{i}", num_ids=NUM_IDS) for i in range(FEATURES)), domains=DOMAINS)
    options = {"name": "mlp", "embedding_dim": 4, "hidden_units": [16]}
    model = attach_(build_model(schema=schema, **options), len(DOMAINS), temperature=4.0)
    words = {f"f{i}": [f"v{n}" for n in range(NUM_IDS - 2)] for i in range(FEATURES)}
    return Bundle(model, options, Encoder(schema, words))


def varied_export(folder: Path) -> None:
    """An export with a feature of every kind."""
    import torch

    from domlora.adapters.attach import attach_
    from domlora.bundle import Bundle
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.serving.export import export
    from domlora.serving.pack import random_rows

    torch.manual_seed(0)
    features = (
        Feature("item", num_ids=602),
        Feature("past", "sequence", num_ids=602, share="item", max_length=3),
        Feature("pair", columns=("city", "slot"), num_ids=102, hash_buckets=100),
        Feature("hour", "bucketed", num_ids=6, boundaries=(1.0, 2.0, 3.0)),
        Feature("age", "numeric", missing=True),
    )
    schema = Schema(features, domains=DOMAINS)
    options = {"name": "mlp", "embedding_dim": 4, "hidden_units": [16, 8]}
    model = attach_(build_model(schema=schema, **options), len(DOMAINS), temperature=4.0, include=["tower.*"])
    bundle = Bundle(model, options, Encoder(schema, {"item": [f"i{n}" for n in range(600)]}))
    export(bundle, folder, [random_rows(schema)])
