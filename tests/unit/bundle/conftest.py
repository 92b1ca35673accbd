from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import adapter_parameters, base_state
from domlora.bundle import Bundle
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.models.growth import pieces_of

OPTIONS: dict[str, Any] = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4, "dropout": 0.2}
Make = Callable[..., Bundle]


def encoder(words: int = 30, domains: Sequence[str] = ("app", "web", "tv")) -> Encoder:
    schema = Schema((Feature("user", num_ids=words + 2), Feature("item", num_ids=words + 2)), domains=tuple(domains))
    return Encoder(schema, {name: [f"{name} {k}" for k in range(words)] for name in ("user", "item")})


@pytest.fixture
def make() -> Make:
    """A bundle with two tables and filled adapters."""

    def made(words: int = 30, domains: Sequence[str] = ("app", "web", "tv"), seed: int = 0) -> Bundle:
        torch.manual_seed(seed)
        made_for = encoder(words, domains)
        model = build_model(schema=made_for.schema, **OPTIONS)
        attach_(model, len(domains), **dataclasses.asdict(AdapterOptions(temperature=4.0)))
        with torch.no_grad():
            for _, bank in adapter_parameters(model):
                bank.uniform_(0.5, 1.5)
        return Bundle(model.eval(), dict(OPTIONS), made_for, {"seed": seed})

    return made


@pytest.fixture
def grow(make: Make) -> Callable[[Bundle, int, Sequence[str]], Bundle]:
    """A bundle with more words and more domains, whose old rows and adapters are the old ones'."""

    def grown(old: Bundle, words: int, domains: Sequence[str]) -> Bundle:
        new = make(words, domains, seed=words)
        pieces, before, after = pieces_of(old.model, new.model), base_state(old.model), base_state(new.model)
        for name, tensor in after.items():
            if name in pieces:
                for start, to, size in pieces[name]:
                    tensor[to : to + size] = before[name][start : start + size]
            else:
                tensor.copy_(before[name])
        with torch.no_grad():
            for (_, bank), (_, fresh) in zip(adapter_parameters(old.model), adapter_parameters(new.model), strict=True):
                fresh[: len(bank)] = bank
        new.version = old.version
        return new

    return grown


@pytest.fixture
def saved(make: Make, tmp_path: Path) -> Path:
    make().save(tmp_path / "bundle")
    return tmp_path / "bundle"
