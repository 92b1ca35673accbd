"""A bundle of every kind of feature, its rows, and one exported folder that all tests read."""

from __future__ import annotations

import asyncio
import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.bundle import Bundle
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.models.growth import grown
from domlora.serving.export import Exported, export
from domlora.serving.folder import read_facts
from domlora.serving.http.app import make_app
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import Service
from domlora.serving.live import Live
from domlora.serving.payload import Payload, write_payload
from domlora.serving.program import Program
from domlora.serving.settings import Settings
from domlora.serving.store import Store

DOMAINS = ("app", "web", "mail")
SCHEMA = Schema(
    (
        Feature("item", num_ids=600),
        Feature("past", "sequence", num_ids=600, share="item", max_length=3),
        Feature("city", num_ids=6),
        Feature("age", "numeric"),
    ),
    domains=DOMAINS,
)
WORDS = {"item": [f"i{i}" for i in range(598)], "city": [f"c{i}" for i in range(4)]}
OPTIONS: dict[str, Any] = {"embedding_dim": 4, "hidden_units": [16, 8], "dropout": 0.3}


class Made(NamedTuple):
    """An exported bundle."""

    bundle: Bundle
    folder: Path
    exported: Exported


def make_rows(num_rows: int, seed: int = 0, num_domains: int = len(DOMAINS)) -> Batch:
    random = torch.Generator().manual_seed(seed)
    item, city = (torch.randint(0, size, (num_rows, 1), generator=random) for size in (600, 6))
    past = torch.randint(1, 600, (num_rows, 3), generator=random)
    past[torch.arange(3) >= torch.arange(num_rows).unsqueeze(1) % 4] = 0
    domain = torch.randint(-1, num_domains, (num_rows,), generator=random)
    dense = torch.randn(num_rows, 1, generator=random)
    return Batch(torch.cat([item, past, city], 1), dense, domain, torch.zeros(num_rows))


def stirred(model: nn.Module) -> nn.Module:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


def make_bundle(name: str = "mlp", *, adapters: dict[str, Any] | None = None, **options: Any) -> Bundle:
    torch.manual_seed(0)
    told = {"name": name, **OPTIONS, **options}
    model = stirred(build_model(schema=SCHEMA, **told))
    if adapters is not None:
        stirred(attach_(model, len(DOMAINS), **adapters))
    return Bundle(model, told, Encoder(SCHEMA, WORDS))


@pytest.fixture
def rows() -> Callable[..., Batch]:
    return make_rows


@pytest.fixture
def bundle_of() -> Callable[..., Bundle]:
    return make_bundle


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export") / "program"
    bundle = make_bundle(adapters={"temperature": 4.0, "lora_alpha": 6.0, "include": ["tower.*"]})
    return Made(bundle, folder, export(bundle, folder, [make_rows(50)]))


@pytest.fixture(scope="session")
def star(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export") / "program"
    bundle = make_bundle("star", adapters={"temperature": 4.0, "include": ["tower.*"]})
    return Made(bundle, folder, export(bundle, folder, [make_rows(50)]))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export") / "program"
    bundle = make_bundle("pepnet")
    return Made(bundle, folder, export(bundle, folder, [make_rows(50)]))


@pytest.fixture(scope="session")
def next_day(adapted: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``adapted`` with five words and a domain more, and with another vector for some words."""
    old = adapted.bundle
    features = tuple(
        replace(feature, num_ids=605) if feature.name in ("item", "past") else feature for feature in SCHEMA.features
    )
    schema = replace(SCHEMA, features=features, domains=(*DOMAINS, "tv"))
    model = grown(old.model, old.model_options, SCHEMA, schema)
    with torch.no_grad():
        model.embedding.weight[[7, 300, 602]] += 1.0
    words = {**WORDS, "item": [*WORDS["item"], *(f"new{i}" for i in range(5))]}
    bundle = Bundle(model.eval(), old.model_options, Encoder(schema, words))
    folder = tmp_path_factory.mktemp("export") / "program"
    return Made(bundle, folder, export(bundle, folder, [make_rows(50)]))


class Served:
    """A store with one version, and adapters for it whose numbers tell them apart."""

    def __init__(self, made: Made, folder: Path) -> None:
        self.store = Store.create(folder)
        self.store.add_version(made.folder)
        self.layers = Program.open(made.folder, domains=()).layers
        self.base = read_facts(made.folder)["base"]
        batch = make_rows(8, seed=9)
        self.rows = batch.ids.numpy(), batch.dense.numpy()

    def banks(self, seed: int, rank: int = 2) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            name: random.normal(size=[rank if size is None else size for size in shape]).astype(np.float32)
            for layer in self.layers
            for name, shape in layer.shapes.items()
        }

    def payload(self, domain: str, seed: int, rank: int = 2, **other: Any) -> bytes:
        told = {"domain": domain, "base": self.base, "version": str(seed), "banks": self.banks(seed, rank), **other}
        return write_payload(Payload(**told))

    def expected(self, seed: int, rank: int = 2) -> np.ndarray:
        """The logits of the eight rows with such an adapter."""
        program = Program.open(self.store.version_folder(1), domains=()).with_adapter("x", self.banks(seed, rank))
        return program(*self.rows, np.full(8, program.domains.index("x")))

    def logits(self, live: Live, domain: str | None, version: int | None = None) -> np.ndarray:
        """Those that are answered for a domain; for None the base's."""
        if domain is None:
            return live.of(version).logits(*self.rows, np.full(8, -1))
        snapshot = live.ensure(domain, version)
        return snapshot.logits(*self.rows, np.full(8, snapshot.number_of(domain)))


@pytest.fixture
def served(adapted: Made, tmp_path: Path) -> Served:
    return Served(adapted, tmp_path / "store")


class Client:
    """The whole application over a store, asked as an HTTP server asks it."""

    def __init__(self, store: Store, *, registry: Any = None, log: Any = None, **settings: Any) -> None:
        told = Settings(bundle=store.folder, name="ads", **settings)
        self.live = Live(store, name="ads", max_adapters=told.max_adapters)
        self.service = Service(self.live, told, Metrics(told.metrics_domains), registry, log)
        self.app = make_app(self.service)
        self._loop = asyncio.new_event_loop()

    def ask(self, method: str, path: str, body: Any = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; a body that is not bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        plain, _, query = path.partition("?")
        told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": plain, "query_string": query.encode(), "headers": told}
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            said.append(message)

        self._loop.run_until_complete(self.app(scope, receive, send))
        found = {name.decode(): value.decode() for name, value in said[0]["headers"]}
        assert int(found["content-length"]) == len(said[1]["body"])
        return said[0]["status"], found, said[1]["body"]

    def json(self, method: str, path: str, body: Any = b"", **headers: str) -> tuple[int, Any]:
        status, _, answer = self.ask(method, path, body, **headers)
        return status, json.loads(answer)


@pytest.fixture(scope="session")
def ads_store(adapted: Made, next_day: Made, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Versions 1 and 2, the first one live; nobody changes it."""
    store = Store.create(tmp_path_factory.mktemp("store") / "ads")
    store.add_version(adapted.folder)
    store.add_version(next_day.folder)
    store.set_live(1)
    return store


@pytest.fixture(scope="session")
def client(ads_store: Store) -> Client:
    return Client(ads_store)


@pytest.fixture
def client_of(ads_store: Store) -> Callable[..., Client]:
    def make(store: Store = ads_store, **options: Any) -> Client:
        return Client(store, **options)

    return make


@pytest.fixture(scope="session")
def strict(ads_store: Store) -> Client:
    """Takes 50 rows at the most."""
    return Client(ads_store, max_rows=50)
