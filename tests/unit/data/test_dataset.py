from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.dataset import SPLITS, Dataset, _sorted_inside
from domlora.data.prepare import prepare
from domlora.data.sources import open_source
from domlora.errors import ConfigError, DataError, SchemaError
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema

SCHEMA = Schema((Feature("item", num_ids=3000), Feature("x", "numeric")), domains=("a", "b", "c"), user="u")


@pytest.fixture(scope="module")
def prepared(layouts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare(open_source("movielens-100k", layouts["ml-100k"]), folder, domain="age", shard_rows=70)
    return folder


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def make_batch(rows: int = 100, seed: int = 0) -> Batch:
    """Rows whose item id is their position, so that a row can be recognised anywhere."""
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        ids=torch.arange(rows).unsqueeze(1),
        dense=torch.arange(rows, dtype=torch.float32).unsqueeze(1) / 2,
        domain=torch.randint(-1, 3, (rows,), generator=draw),
        label=torch.randint(0, 2, (rows,), generator=draw).float(),
        user=torch.arange(rows) * 10,
    )


def in_memory(rows: int = 100) -> Dataset:
    return Dataset.from_batches(SCHEMA, {"train": make_batch(rows)})


def positions(batches) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in batches]


# --- batches ------------------------------------------------------------------------------------------------------------


def test_stored_order_without_a_seed() -> None:
    found = positions(in_memory(10).batches("train", 4, sort_by_domain=False))
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 60),
    batch_size=st.integers(1, 70),
    seed=st.none() | st.integers(0, 5),
    sort_by_domain=st.booleans(),
)
def test_every_row_comes_once_with_all_its_columns(rows, batch_size, seed, sort_by_domain) -> None:
    whole = make_batch(rows)
    dataset = Dataset.from_batches(SCHEMA, {"train": whole})
    batches = list(dataset.batches("train", batch_size, seed=seed, sort_by_domain=sort_by_domain))
    sizes = [batch.num_rows for batch in batches]
    assert sizes == [batch_size] * (rows // batch_size) + ([rows % batch_size] if rows % batch_size else [])
    assert sorted(row for batch in positions(batches) for row in batch) == list(range(rows))
    for batch in batches:
        same = whole.take(batch.ids[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True) if a is not None)


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_inside_a_batch_are_sorted_by_domain_and_stay_in_the_batch(seed) -> None:
    dataset = in_memory(3000)
    plain = list(dataset.batches("train", 512, seed=seed, sort_by_domain=False))
    for before, after in zip(plain, dataset.batches("train", 512, seed=seed), strict=True):
        order = torch.sort(before.domain, stable=True).indices
        assert after.ids.tolist() == before.take(order).ids.tolist()
        assert after.domain.tolist() == sorted(before.domain.tolist())


def test_more_domains_than_16_bits_hold() -> None:
    domain = np.array([69_999, 40_000, 5, 32_768, 32_767])
    assert domain[_sorted_inside(domain, None, 5)].tolist() == [5, 32_767, 32_768, 40_000, 69_999]


def test_the_permutation_hangs_on_seed_and_epoch_alone() -> None:
    dataset = in_memory(100)
    order = positions(dataset.batches("train", 16, seed=1, epoch=2))
    list(dataset.batches("train", 16, seed=1, epoch=0))
    torch.manual_seed(99)
    np.random.seed(99)
    assert positions(dataset.batches("train", 16, seed=1, epoch=2)) == order
    others = [
        positions(dataset.batches("train", 16, seed=seed, epoch=epoch)) for seed, epoch in ((1, 3), (2, 2), (2, 1))
    ]
    assert all(other != order for other in others)
    rows = [frozenset(batch) for batch in order]
    flat = positions(dataset.batches("train", 16, seed=1, epoch=2, sort_by_domain=False))
    assert [frozenset(batch) for batch in flat] == rows


def test_chunks_do_not_show(monkeypatch) -> None:
    expected = positions(in_memory(100).batches("train", 7, seed=1))
    monkeypatch.setattr("domlora.data.dataset._GATHER_ROWS", 20)
    assert positions(in_memory(100).batches("train", 7, seed=1)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "seed": -1}, "seed"),
        ({"batch_size": 4, "epoch": -1}, "epoch"),
    ],
)
def test_options_are_checked_at_the_call(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        in_memory().batches("train", **options)


@pytest.mark.parametrize("call", ["read", "num_rows"])
def test_an_unknown_split_is_refused_with_the_nearest(call) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'valid'"):
        getattr(in_memory(), call)("validation")


# --- in memory ----------------------------------------------------------------------------------------------------------


def test_a_split_that_is_left_out_is_empty() -> None:
    dataset = in_memory(10)
    assert [dataset.num_rows(split) for split in SPLITS] == [10, 0, 0]
    empty = dataset.read("test")
    assert (tuple(empty.ids.shape), tuple(empty.dense.shape)) == ((0, 1), (0, 1))
    assert list(dataset.batches("test", 4, seed=0)) == []


def test_an_id_in_memory_is_its_own_raw_value() -> None:
    schema = Schema((Feature("item", num_ids=9), Feature("site", num_ids=4)), domains=("b", "a"), domain="site")
    encoder = Dataset.from_batches(schema, {}).encoder
    batch = encoder.encode({"item": [2, "8", 9], "site": ["a", "b", "?"]})
    assert batch.ids.tolist() == [[2, 3], [8, 2], [1, 1]]
    assert batch.domain.tolist() == [1, 0, -1]


def test_an_encoder_may_be_given() -> None:
    encoder = Encoder(SCHEMA, {"item": [f"i{number}" for number in range(2998)]})
    assert Dataset.from_batches(SCHEMA, {}, encoder).encoder is encoder


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ids", torch.zeros(5, 2, dtype=torch.int64), r"ids of split 'train' must have the shape \(5, 1\)"),
        ("dense", torch.zeros(5, 0), "dense of split"),
        ("label", torch.zeros(4), "label of split"),
        ("user", torch.zeros(5, 1), "user of split"),
        (
            "ids",
            torch.full((5, 1), 3000),
            r"item of split 'train' must lie between 0 and 2999. Received: \(3000, 3000\)",
        ),
        ("ids", torch.full((5, 1), -1), "item of split"),
        ("domain", torch.full((5,), 3), "domain of split 'train' must lie between -1 and 2"),
    ],
)
def test_batches_that_do_not_fit_the_schema(column, value, message) -> None:
    with pytest.raises(SchemaError, match=message):
        Dataset.from_batches(SCHEMA, {"train": make_batch(5)._replace(**{column: value})})


def test_fingerprint_in_memory() -> None:
    one = in_memory(10)
    assert one.fingerprint() == in_memory(10).fingerprint()
    assert one.encoder.fingerprint()  # making the encoder changes nothing
    assert one.fingerprint() == in_memory(10).fingerprint()
    changed = make_batch(10)
    changed.label[3] = 1 - changed.label[3]
    assert Dataset.from_batches(SCHEMA, {"train": changed}).fingerprint() != one.fingerprint()
    assert Dataset.from_batches(SCHEMA, {"valid": make_batch(10)}).fingerprint() != one.fingerprint()


# --- on disk ------------------------------------------------------------------------------------------------------------


def test_open_and_read(prepared) -> None:
    dataset = Dataset.open(str(prepared))
    assert dataset.manifest == json.loads((prepared / "manifest.json").read_text())
    for split in SPLITS:
        batch = dataset.read(split)
        assert batch.num_rows == dataset.num_rows(split) == dataset.manifest["splits"][split]["rows"]
        assert batch is dataset.read(split)
        for position, (domain, facts) in enumerate(dataset.manifest["splits"][split]["domains"].items()):
            assert dataset.schema.domains[position] == domain
            of_domain = batch.domain == position
            assert (int(of_domain.sum()), int(batch.label[of_domain].sum())) == (facts["rows"], facts["positives"])
        assert batch.user is not None
        types = [column.dtype for column in (batch.ids, batch.dense, batch.domain, batch.label, batch.user)]
        assert types == [torch.int64, torch.float32, torch.int64, torch.float32, torch.int64]
        assert int(batch.ids.min()) >= 1
        assert all(int(batch.ids[:, slot].max()) < f.num_ids for slot, f in enumerate(dataset.schema.categorical))


def test_fingerprint_on_disk(prepared, copy) -> None:
    assert Dataset.open(prepared).fingerprint() == Dataset.open(copy).fingerprint()


def test_a_folder_that_was_not_prepared(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="Run domlora prepare first"):
            Dataset.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "domlora-dataset", "format_version": 99}'])
def test_a_manifest_that_is_none(copy, text) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset.open(copy)


@pytest.mark.parametrize("name", ["schema.json", "vocabularies.json", "train/part-00001.parquet"])
def test_a_missing_file_is_named(copy, name) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"missing.*{name}"):
        Dataset.open(copy)


def test_a_shortened_file_is_named(copy) -> None:
    path = copy / "test" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"bytes.*test/part-00000\.parquet"):
        Dataset.open(copy)


def test_a_flipped_bit_is_found(copy) -> None:
    path = copy / "valid" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    dataset = Dataset.open(copy)
    assert dataset.read("train").num_rows
    with pytest.raises(DataError, match=r"sha256.*valid/part-00000\.parquet"):
        dataset.read("valid")


@pytest.mark.parametrize("name", ["schema.json", "vocabularies.json"])
def test_another_encoder_is_found(copy, name) -> None:
    path = copy / name
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(DataError, match=name):
        Dataset.open(copy)


def test_the_encoder_must_have_the_fingerprint_of_the_manifest(copy) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"encoder_fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"those of the manifest.*schema\.json"):
        Dataset.open(copy)
