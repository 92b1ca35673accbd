"""Prepared folders without raw files: encoded columns straight into shards; and a disk that is soon full."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from domlora.data.shards import FORMAT, FORMAT_VERSION, write_shard
from domlora.features.encode import Encoder
from domlora.features.schema import Schema
from domlora.files import sha256_of

Columns = Mapping[str, Any]


def write_prepared_folder(
    folder: Path,
    schema: Schema,
    splits: Mapping[str, Sequence[Columns]],
    *,
    group_rows: int = 1 << 16,
    vectors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """``splits``: for each the columns of its shards. Without vocabularies: features are hashed, bucketed, numeric."""
    folder.mkdir(parents=True)
    encoder = Encoder(schema, {})
    encoder.save(folder)
    facts: dict[str, Any] = {split: {"rows": 0, "files": []} for split in ("train", "valid", "test")}
    for split, shards in splits.items():
        (folder / split).mkdir()
        for number, columns in enumerate(shards):
            facts[split]["files"].append(f"{split}/part-{number:05d}.parquet")
            facts[split]["rows"] += len(columns["__label"])
            with mock.patch("domlora.data.shards.ROW_GROUP_ROWS", group_rows):
                write_shard(columns, schema, folder / facts[split]["files"][-1])
    for name, matrix in (vectors or {}).items():
        (folder / "vectors").mkdir(exist_ok=True)
        save_file({"vectors": matrix}, folder / "vectors" / f"{name}.safetensors")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "splits": facts,
        "vectors": {n: {"width": m.shape[1], "trainable": n.endswith("s")} for n, m in (vectors or {}).items()},
        "encoder_fingerprint": encoder.fingerprint(),
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
            for path in files
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def write_prepared() -> Any:
    return write_prepared_folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)
