"""(9) Exported equals eager, for every model in ``MODELS``, with adapters on every linear layer and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domlora.adapters.attach import attach_
from domlora.bundle import Bundle
from domlora.evaluation.metrics import auc
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.serving.export import export
from domlora.serving.program import Program

DOMAINS = ("app", "web", "mail", "shop")
SCHEMA = Schema(
    (
        Feature("user", num_ids=12),
        Feature("item", num_ids=9),
        Feature("past", "sequence", num_ids=9, share="item", max_length=3),
        Feature("hour", "bucketed", num_ids=5, boundaries=(8.0, 18.0)),
        Feature("age", "numeric"),
        Feature("price", "numeric"),
    ),
    domains=DOMAINS,
)
ENCODER = Encoder(SCHEMA, {"user": [f"u{i}" for i in range(10)], "item": [f"i{i}" for i in range(7)]})
OPTIONS: dict[str, Any] = {"embedding_dim": 4, "hidden_units": [12, 8], "dropout": 0.3}
PLAIN = ("mlp", "star")  # the same trace: what a model without adapters writes is shown on a few


def rows(num_rows: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, f.num_ids, (num_rows, f.max_length), generator=random) for f in SCHEMA.categorical]
    domain = torch.randint(-1, len(DOMAINS), (num_rows,), generator=random)
    label = torch.randint(0, 2, (num_rows,), generator=random).float()
    return Batch(torch.cat(ids, 1), torch.randn(num_rows, 2, generator=random), domain, label)


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """No parameter and no statistic is left at its start; logits stay of the size that trained models have."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=random))
    return model


def bundle_of(name: str, *, adapters: bool) -> Bundle:
    torch.manual_seed(0)
    options = {"name": name, **OPTIONS}
    model = stirred(build_model(schema=SCHEMA, **options))
    if adapters:
        stirred(attach_(model, len(DOMAINS), temperature=4.0, include=["*"]))
    return Bundle(model.eval(), options, ENCODER)


def check(bundle: Bundle, folder: Path, num_rows: int) -> None:
    export(bundle, folder, [rows(30, 1)])
    program, batch = Program.open(folder), rows(num_rows, 2)
    with torch.no_grad():
        expected = bundle.model(batch.ids, batch.dense, batch.domain).numpy()
    assert expected.std() > 0.01
    for plan in ("mixed", "by_domain", None):
        found = program(batch.ids.numpy(), batch.dense.numpy(), batch.domain.numpy(), plan=plan)  # type: ignore[arg-type]
        assert np.abs(found - expected).max() <= 1e-5
        assert abs(auc(batch.label.numpy(), found) - auc(batch.label.numpy(), expected)) <= 1e-6


@pytest.mark.parametrize("name", list(MODELS))
def test_9_exported_equals_eager(name: str, tmp_path: Path) -> None:
    check(bundle_of(name, adapters=True), tmp_path / "program", 10_000)


@pytest.mark.parametrize("name", PLAIN)
def test_9_exported_equals_eager_without_adapters(name: str, tmp_path: Path) -> None:
    check(bundle_of(name, adapters=False), tmp_path / "program", 10_000)
