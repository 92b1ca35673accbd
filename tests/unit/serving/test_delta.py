"""A delta gives the new folder bit for bit, costs what changed, and nothing else is taken for one."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from domlora.errors import BundleError, DataError
from domlora.serving import delta
from domlora.serving.store import Store


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def written(adapted, next_day, tmp_path):
    delta.write(adapted.folder, next_day.folder, tmp_path / "delta")
    return tmp_path / "delta"


def test_it_gives_the_new_folder(adapted, next_day, written, tmp_path):
    delta.apply(adapted.folder, written, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(next_day.folder)


def test_it_holds_what_changed_alone(adapted, next_day, tmp_path):
    told = delta.write(adapted.folder, next_day.folder, tmp_path / "delta")
    assert (
        told.rows == 3
    )  # new words but one begin as the out-of-vocabulary row; the rows of another feature have moved
    assert told.of_rows == 611
    assert "adapters/00000.safetensors" not in told.files
    assert "adapters/00003.safetensors" in told.files
    assert {"mixed.onnx", "vocabularies.json"} <= set(told.files)
    assert sorted(load_file(tmp_path / "delta" / "rows.safetensors")) == ["0/at", "0/rows"]


def test_nothing_changed_is_next_to_nothing(adapted, tmp_path):
    told = delta.write(adapted.folder, adapted.folder, tmp_path / "delta")
    assert (told.rows, told.files) == (0, ())
    delta.apply(adapted.folder, tmp_path / "delta", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(adapted.folder)


def test_it_goes_back_too(adapted, next_day, tmp_path):
    delta.write(next_day.folder, adapted.folder, tmp_path / "delta")
    delta.apply(next_day.folder, tmp_path / "delta", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(adapted.folder)


def test_another_model_is_sent_whole(adapted, star, tmp_path):
    delta.write(adapted.folder, star.folder, tmp_path / "delta")
    delta.apply(adapted.folder, tmp_path / "delta", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(star.folder)


@pytest.mark.parametrize("name", ["delta.json", "rows.safetensors", "files/mixed.onnx", "files/manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_one_gives_nothing(adapted, written, tmp_path, name, damage):
    place = written / name
    content = place.read_bytes()
    place.unlink()
    if damage == "bit":
        place.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "truncated":
        place.write_bytes(content[:-1])
    with pytest.raises(BundleError):
        delta.apply(adapted.folder, written, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_one_of_another_folder_is_refused(next_day, written, tmp_path):
    with pytest.raises(BundleError, match="made from"):
        delta.apply(next_day.folder, written, tmp_path / "new")


def test_one_that_leads_out_of_the_folder_is_refused(adapted, written, tmp_path):
    facts = json.loads((written / "delta.json").read_text())
    facts.pop("sha256")
    facts["kept"].append("../../secret")
    facts["sha256"] = delta._digest(facts)
    (written / "delta.json").write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="names files that no export has"):
        delta.apply(adapted.folder, written, tmp_path / "new")


def test_a_full_disk_leaves_nothing(adapted, next_day, written, small_disk):
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 16384))
    with pytest.raises(DataError, match="disk must have room"):
        delta.apply(adapted.folder, written, small_disk / "new")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_store_takes_it(adapted, next_day, written, tmp_path):
    store = Store.create(tmp_path / "store")
    store.add_version(adapted.folder)
    assert store.add_delta(written) == 2
    assert contents(store.version_folder(2)) == contents(next_day.folder)
    assert (store.versions(), store.state().live) == ([1, 2], 1)
    assert store.add_delta(written) == 2
    other = Store.create(tmp_path / "other")
    other.add_version(next_day.folder)
    with pytest.raises(BundleError, match="has no version"):
        other.add_delta(written)


@pytest.mark.parametrize("seed", range(6))
def test_rows_inserted_removed_and_changed_anywhere(seed):
    """The pieces and rows of a table, whatever happened to it, give it again; and rows that stayed are not sent."""
    random = np.random.default_rng(seed)
    old = random.integers(0, 256, (500, 8), dtype=np.uint8)
    old[random.integers(0, 500, 50)] = 0  # many alike
    new = np.delete(old, random.integers(0, 500, 20 * (seed % 3)), axis=0)
    for place in sorted(random.integers(0, len(new), seed)):
        new = np.insert(new, place, random.integers(0, 256, (4, 8), dtype=np.uint8), axis=0)
    new[random.integers(0, len(new), 10)] += 1
    pieces, at, rows = delta.difference(old, new)
    offsets = [(start * 8, to, size) for start, to, size in pieces]
    tensor = delta._Tensor("t", 0, new.nbytes, 8)
    assert (np.concatenate(list(delta._rebuilt(old.reshape(-1), offsets, tensor, at, rows))) == new).all()
    assert len(at) <= 10 + 4 * seed + 20 * (seed % 3)


def test_a_large_table_takes_seconds(tmp_path):
    random = np.random.default_rng(0)
    old = random.integers(0, 256, (400_000, 64), dtype=np.uint8)
    new = np.insert(old, 100_000, random.integers(0, 256, (50, 64), dtype=np.uint8), axis=0)
    new[random.integers(0, len(new), 4_000)] += 1
    start = time.perf_counter()
    _, at, rows = delta.difference(old, new)
    assert time.perf_counter() - start < 10
    assert rows.nbytes < 0.02 * new.nbytes
    assert len(at) <= 4_050
