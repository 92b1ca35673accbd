"""What benchmarks of serving serve: a tower with adapters for ten domains, and as many more as are pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FEATURES, NUM_IDS, FEW = 5, 100_000, 10


def exported(folder: Path) -> Path:
    """A tower of 256, 128 and 64 units over five features, with adapters for ten domains."""
    import torch

    from domlora.adapters.attach import attach_
    from domlora.bundle import Bundle
    from domlora.features.batch import Batch
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.serving.export import export

    torch.manual_seed(0)
    domains = tuple(f"d{number}" for number in range(FEW))
    schema = Schema(
        tuple(Feature(f"f{i}", num_ids=NUM_IDS, hash_buckets=NUM_IDS - 2) for i in range(FEATURES)), domains
    )
    options: dict[str, Any] = {"name": "mlp", "embedding_dim": 16, "hidden_units": [256, 128, 64]}
    model = build_model(schema=schema, **options)
    bank = attach_(model, FEW, temperature=16.0, include=["tower.*"])
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(0.0, 0.05)
    ids = torch.randint(0, NUM_IDS, (200, FEATURES))
    rows = Batch(ids, torch.zeros(200, 0), torch.arange(200) % FEW, torch.zeros(200))
    export(Bundle(model, options, Encoder(schema, {})), folder, [rows])
    return folder


def store_of(export: Path, folder: Path, number: int) -> None:
    """A store with the same version, and adapters pushed for more domains."""
    from domlora.serving.store import Store

    store = Store.create(folder)
    store.add_version(export)
    for place in range(FEW, number):
        store.put_adapter(f"d{place}", payload(export, f"d{place}", place))


def payload(export: Path, domain: str, seed: int) -> bytes:
    """An adapter of random numbers that fits."""
    from safetensors.numpy import load_file

    from domlora.serving.folder import adapter_file, read_facts
    from domlora.serving.payload import Payload, write_payload

    random = np.random.default_rng(seed)
    banks = {
        name: (0.05 * random.standard_normal(bank.shape)).astype(np.float32)
        for name, bank in load_file(export / adapter_file(0)).items()
    }
    return write_payload(Payload(domain, read_facts(export)["base"], str(seed), banks))
