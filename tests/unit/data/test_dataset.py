from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.dataset import SPLITS, Dataset
from domlora.data.shards import row_bytes
from domlora.errors import ConfigError, DataError, SchemaError
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.files import sha256_of

SCHEMA = Schema((Feature("item", num_ids=3000), Feature("x", "numeric")), domains=("a", "b", "c"), user="u")
HASHED = replace(SCHEMA, features=(Feature("item", num_ids=3000, hash_buckets=2998), SCHEMA.features[1]), weight="w")
SHARDS = {"train": (70, 70, 60), "valid": (50,), "test": (40, 1)}


def make_columns(rows: int, first: int = 0) -> dict[str, np.ndarray]:
    """Rows whose item id is their position."""
    place = np.arange(first, first + rows)
    return {
        "item": place.astype(np.int32),
        "x": place.astype(np.float32) / 2,
        "__domain": (place * 7919 % 4 - 1).astype(np.int32),
        "__label": (place % 2).astype(np.float32),
        "__user": place * 10,
        "__weight": place.astype(np.float32) + 1,
    }


def shards_of(split: str) -> list[dict[str, np.ndarray]]:
    sizes = SHARDS[split]
    return [make_columns(size, sum(sizes[:number])) for number, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def prepared(write_prepared, tmp_path_factory) -> Path:
    vectors = {"item": np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)}
    splits = {split: shards_of(split) for split in SPLITS}
    folder = tmp_path_factory.mktemp("prepared") / "out"
    return write_prepared(folder, HASHED, splits, group_rows=16, vectors=vectors)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "seed": -1}, "seed"),
        ({"batch_size": 4, "epoch": -1}, "epoch"),
        ({"batch_size": 4, "start": -1}, "start"),
        ({"batch_size": 4, "shard": (2, 2)}, "shard"),
    ],
)
def test_options_are_checked_at_the_call(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        in_memory().batches("train", **options)


def test_more_workers_than_rows_are_refused_at_the_call() -> None:
    with pytest.raises(DataError, match=r"101 workers need at least a row each\. Received: 100"):
        in_memory(100).batches("train", 4, shard=(0, 101))
    assert list(in_memory(100).batches("test", 4, shard=(0, 101))) == []  # where there is no row, nobody waits


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


def test_values_are_needed_only_where_there_is_a_vocabulary() -> None:
    features = (
        Feature("item", num_ids=9),
        Feature("liked", "sequence", num_ids=9, share="item", max_length=3),
        Feature("query", num_ids=12, hash_buckets=10),
        Feature("price", "bucketed", num_ids=4, boundaries=(1.0,)),
    )
    schema = Schema(features, ("a",))
    rows = Batch(
        torch.tensor([[2, 8, 3, 0, 11, 3]]), torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), torch.ones(1)
    )
    dataset = Dataset.from_batches(schema, {"train": rows})
    raw = {"item": ["2"], "liked": [["8", "3"]], "query": ["?"], "price": [5.0], "domain": ["a"]}
    assert dataset.encoder.encode(raw).ids[0, [0, 1, 2, 3, 5]].tolist() == [2, 8, 3, 0, 3]
    with pytest.raises(SchemaError, match="liked of split 'train' must lie between 0 and 8"):
        Dataset.from_batches(schema, {"train": rows._replace(ids=torch.tensor([[2, 8, 3, 9, 11, 3]]))})


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


@pytest.mark.parametrize("in_memory", [True, False])
def test_open_and_read(prepared, in_memory) -> None:
    dataset = Dataset.open(str(prepared), in_memory=in_memory)
    assert dataset.manifest == json.loads((prepared / "manifest.json").read_text())
    assert dataset.schema == HASHED
    for split in SPLITS:
        batch = dataset.read(split)
        assert batch.num_rows == dataset.num_rows(split) == sum(SHARDS[split])
        assert batch is dataset.read(split)
        columns = make_columns(batch.num_rows)
        assert batch.user is not None
        assert batch.weight is not None
        pairs = {"item": batch.ids[:, 0], "x": batch.dense[:, 0], "__domain": batch.domain, "__label": batch.label}
        for name, tensor in (pairs | {"__user": batch.user, "__weight": batch.weight}).items():
            assert np.array_equal(tensor.numpy(), columns[name])
        types = [
            column.dtype for column in (batch.ids, batch.dense, batch.domain, batch.label, batch.weight, batch.user)
        ]
        assert types == [torch.int64, torch.float32, torch.int64, torch.float32, torch.float32, torch.int64]


def test_a_split_that_does_not_fit_is_streamed(prepared) -> None:
    """Which is seen by its order: in memory the permutation is drawn over all rows."""
    inside = positions(Dataset.open(prepared, in_memory=True).batches("train", 16, seed=1))
    streamed = positions(Dataset.open(prepared, in_memory=False).batches("train", 16, seed=1))
    assert inside != streamed
    needed = sum(SHARDS["train"]) * row_bytes(HASHED)
    for memory_bytes, expected in ((needed, inside), (needed - 1, streamed), (0, streamed)):
        dataset = Dataset.open(prepared, memory_bytes=memory_bytes)
        assert positions(dataset.batches("train", 16, seed=1)) == expected
    assert positions(Dataset.open(prepared).batches("train", 16, seed=1)) == inside
    dataset.read("train")  # changes nothing
    assert positions(dataset.batches("train", 16, seed=1)) == streamed


def test_splits_are_streamed_each_by_its_size(prepared) -> None:
    dataset = Dataset.open(prepared, memory_bytes=50 * row_bytes(HASHED))
    order = {s: positions(dataset.batches(s, 16, seed=1)) for s in ("train", "valid")}
    whole = {s: positions(Dataset.open(prepared, in_memory=s == "valid").batches(s, 16, seed=1)) for s in order}
    assert order == whole


@pytest.mark.parametrize("in_memory", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    batch_size=st.integers(1, 60),
    seed=st.none() | st.integers(0, 2),
    start=st.integers(0, 20),
    workers=st.integers(1, 4),
    by_domain=st.booleans(),
)
def test_a_pass_from_disk(prepared, in_memory, batch_size, seed, start, workers, by_domain) -> None:
    dataset = Dataset.open(prepared, in_memory=in_memory)
    options: dict[str, Any] = {"seed": seed, "epoch": 1, "sort_by_domain": by_domain}
    found = []
    for worker in range(workers):
        whole = list(dataset.batches("train", batch_size, **options, shard=(worker, workers)))
        later = dataset.batches("train", batch_size, **options, shard=(worker, workers), start=start)
        assert positions(later) == positions(whole[start:])
        found.append(whole)
    assert len({len(whole) for whole in found}) == 1
    assert Counter(row for whole in found for rows in positions(whole) for row in rows) == Counter(range(200))
    rows = dataset.read("train")
    for batch in (batch for whole in found for batch in whole):
        assert all(torch.equal(a, b) for a, b in zip(batch, rows.take(batch.ids[:, 0]), strict=True))
        assert not by_domain or batch.domain.tolist() == sorted(batch.domain.tolist())


def test_an_empty_split_on_disk(write_prepared, tmp_path) -> None:
    folder = write_prepared(tmp_path / "out", HASHED, {"train": shards_of("train")})
    for in_memory in (True, False):
        dataset = Dataset.open(folder, in_memory=in_memory)
        assert dataset.read("test").num_rows == 0
        assert list(dataset.batches("test", 4, seed=0)) == []


def test_fingerprint_on_disk(prepared, copy) -> None:
    assert Dataset.open(prepared).fingerprint() == Dataset.open(copy).fingerprint()
    assert (
        Dataset.open(prepared, memory_bytes=100 * row_bytes(HASHED)).fingerprint()
        != Dataset.open(prepared).fingerprint()
    )
    assert Dataset.open(prepared).fingerprint() == Dataset.open(prepared, in_memory=True).fingerprint()


def test_vectors(prepared, copy) -> None:
    dataset = Dataset.open(prepared)
    assert set(dataset.vectors) == {"item"}
    assert dataset.vectors["item"].shape == (3000, 4)
    assert dataset.vectors["item"].dtype == torch.float32
    assert dataset.vectors is dataset.vectors
    assert dataset.trainable_vectors == frozenset()
    assert Dataset.from_batches(SCHEMA, {}).vectors == {}
    assert Dataset.from_batches(SCHEMA, {}).trainable_vectors == frozenset()
    path = copy / "vectors" / "item.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"sha256.*vectors/item\.safetensors"):
        _ = Dataset.open(copy).vectors


def test_vectors_that_are_learned_on(write_prepared, tmp_path) -> None:
    schema = replace(HASHED, features=(replace(HASHED.features[0], name="items"), HASHED.features[1]))
    vectors = {"items": np.zeros((3000, 2), np.float32)}
    assert Dataset.open(write_prepared(tmp_path / "out", schema, {}, vectors=vectors)).trainable_vectors == {"items"}


def test_vectors_of_another_number_of_ids(write_prepared, tmp_path) -> None:
    folder = write_prepared(tmp_path / "out", HASHED, {}, vectors={"item": np.zeros((9, 2), np.float32)})
    with pytest.raises(DataError, match="vectors of feature 'item' must be one for each of 3000 ids"):
        _ = Dataset.open(folder).vectors


def test_a_folder_that_was_not_prepared(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="Run domlora prepare first"):
            Dataset.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "domlora-dataset", "format_version": 99}'])
def test_a_manifest_that_is_none(copy, text) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset.open(copy)


def test_the_version_before_is_refused(copy) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(DataError, match=r"of version 2.*Prepare the dataset again"):
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


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("place", [40, -40])
def test_a_flipped_bit_is_found(copy, place, in_memory) -> None:
    """Among the rows, or in the end of the file, which says where they are."""
    path = copy / "valid" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    dataset = Dataset.open(copy, in_memory=in_memory)
    assert next(dataset.batches("train", 10)).num_rows == 10
    with pytest.raises(DataError, match=r"valid/part-00000\.parquet"):
        next(dataset.batches("valid", 10))


def test_a_file_is_checked_once(prepared, monkeypatch) -> None:
    read: list[str] = []

    def watched(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("domlora.data.dataset.sha256_of", watched)
    dataset = Dataset.open(prepared, in_memory=False)
    assert not [name for name in read if name.endswith("parquet")]
    list(islice(dataset.batches("train", 10), 1))
    for epoch in range(2):
        list(dataset.batches("train", 10, seed=0, epoch=epoch))
    assert sorted(name for name in read if name.endswith("parquet")) == [f"part-0000{n}.parquet" for n in range(3)]


@pytest.mark.parametrize(("name", "old", "new"), [("schema.json", "1", "2"), ("vocabularies.json", "{}", "[]")])
def test_another_encoder_is_found(copy, name, old, new) -> None:
    path = copy / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=f"sha256.*{name}"):
        Dataset.open(copy)


def test_the_encoder_must_have_the_fingerprint_of_the_manifest(copy) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"encoder_fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"those of the manifest.*schema\.json"):
        Dataset.open(copy)
