"""A bundle of every kind of feature, its rows, and one exported folder that all tests read."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.bundle import Bundle
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.serving.export import Exported, export

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
