"""Rows cut by domain are the rows of each domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.training.parallel.cut import CutDomain, CutRows, cut
from domlora.training.rows import OneDomain


def equal(left: Batch, right: Batch) -> bool:
    return all(
        (one is None and two is None)
        or (one is not None and two is not None and one.dtype == two.dtype and one.equal(two))
        for one, two in zip(left, right, strict=True)
    )


def some_rows(schema: Schema, num_rows: int) -> Batch:
    """With weights, users, unknown domains, and no row of domain 1."""
    draw = np.random.default_rng(1)
    domain = draw.choice([-1, 0, 2], num_rows)
    ids = torch.from_numpy(draw.integers(5, size=(num_rows, schema.num_slots)))
    dense, label, weight = (
        torch.from_numpy(draw.random(shape, np.float32)) for shape in ((num_rows, 2), num_rows, num_rows)
    )
    return Batch(ids, dense, torch.from_numpy(domain), label.round(), weight, torch.arange(num_rows))


@pytest.mark.parametrize("piece_bytes", [1 << 28, 5000])
def test_a_domain_has_the_rows_that_one_pass_for_it_would_pick(tmp_path: Path, piece_bytes: int) -> None:
    features = (Feature("item", num_ids=5), Feature("seen", "sequence", num_ids=5, max_length=3))
    numbers = tuple(Feature(f"x{n}", "numeric") for n in range(2))
    schema = Schema((*features, *numbers), ("a", "b", "c"), weight="w", user="u")
    data = Dataset.from_batches(schema, {"train": some_rows(schema, 500), "valid": some_rows(schema, 90)})
    with mock.patch("domlora.training.parallel.cut.PIECE_BYTES", piece_bytes):
        cut(data, tmp_path / "rows", data.fingerprint())
    assert (len(list((tmp_path / "rows").iterdir())) > 5) == (piece_bytes < 10_000)
    rows = CutRows(tmp_path / "rows", schema)
    for domain in range(3):
        mine, picked = CutDomain(rows, domain), OneDomain(data, domain)
        for split in ("train", "valid"):
            assert equal(mine.read(split), picked.read(split)._replace(user=None))
        assert mine.can_be_trained == picked.can_be_trained == (domain != 1)
        drawn = [list(each.batches("train", 64, seed=3, epoch=1)) for each in (mine, picked)]
        assert all(equal(one, two._replace(user=None)) for one, two in zip(*drawn, strict=True))
    assert rows.num_rows.tolist() == [OneDomain(data, domain).num_rows("train") for domain in range(3)]


def test_rows_are_cut_once_for_the_same_data_and_anew_for_others(tmp_path: Path) -> None:
    data, folder = World(num_domains=3).dataset(300, seed=1)[0], tmp_path / "rows"
    cut(data, folder, "one")
    before = (folder / "train-00000.safetensors").stat().st_mtime_ns
    unread: Any = object()
    cut(unread, folder, "one")  # not read again
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns == before
    cut(World(num_domains=3).dataset(300, seed=2)[0], folder, "two")
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns != before


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    data, folder = World(num_domains=3).dataset(300, seed=1)[0], tmp_path / "rows"
    cut(data, folder, "one")
    file = folder / "valid-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        cut(data, folder, "one")
    file.write_bytes(content[:50])
    with pytest.raises(DataError, match="cannot be read"):
        CutRows(folder, data.schema)
    (folder / "manifest.json").write_text("[")
    with pytest.raises(DataError, match="manifest"):
        cut(data, folder, "one")
