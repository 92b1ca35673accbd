from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.batching import Pass
from domlora.data.shards import write_shard
from domlora.data.stream import Stream
from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema

SCHEMA = Schema(
    (Feature("row", num_ids=1000), Feature("list", "sequence", num_ids=1000, max_length=2), Feature("x", "numeric")),
    domains=("a", "b", "c"),
    user="u",
    weight="w",
)
SEEDS = st.none() | st.integers(0, 3)


def make_columns(first: int, rows: int) -> dict[str, Any]:
    """Rows that show in every column which they are."""
    row = np.arange(first, first + rows, dtype=np.int32)
    return {
        "row": row,
        "list": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(row, 2)), 2),
        "x": row.astype(np.float32) / 2,
        "__domain": (row * 7919 % 4 - 1).astype(np.int32),
        "__label": (row % 2).astype(np.float32),
        "__user": row.astype(np.int64) * 10,
        "__weight": row.astype(np.float32) + 1,
    }


def is_whole(batch: Batch) -> bool:
    """Every column of every row is that row's own."""
    row = batch.ids[:, 0]
    assert batch.weight is not None
    assert batch.user is not None
    same = [
        torch.equal(batch.ids, row[:, None].expand(-1, 3)),
        torch.equal(batch.dense, row[:, None] / 2),
        torch.equal(batch.domain, row * 7919 % 4 - 1),
        torch.equal(batch.label, row % 2 / 1),
        torch.equal(batch.user, row * 10),
        torch.equal(batch.weight, row + 1.0),
    ]
    return all(same)


def write(folder: Path, sizes: list[int], group_rows: int) -> list[Path]:
    files, first = [], 0
    for number, size in enumerate(sizes):
        files.append(folder / f"part-{number:05d}.parquet")
        with mock.patch("domlora.data.shards.ROW_GROUP_ROWS", group_rows):
            write_shard(make_columns(first, size), SCHEMA, files[-1])
        first += size
    return files


class Watched(Stream):
    """A stream that counts the row groups it decodes, with windows of ``window_rows``."""

    def __init__(self, files: list[Path], rows: int, window_rows: int) -> None:
        super().__init__(files, SCHEMA, rows, lambda _: None)
        self.window_rows, self.decoded = window_rows, 0

    def _window_rows(self, asked: Pass) -> int:  # noqa: ARG002 - the signature of what it stands in for
        return self.window_rows

    def _fill(self, batch: Batch, pieces: Any) -> None:
        pieces = list(pieces)
        self.decoded += len(pieces)
        super()._fill(batch, pieces)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """Streams of many sizes, each written once."""
    known: dict[Any, list[Path]] = {}

    def stream(sizes: tuple[int, ...], group_rows: int = 10, window_rows: int = 30) -> Watched:
        key = (sizes, group_rows)
        if key not in known:
            known[key] = write(tmp_path_factory.mktemp("split"), list(sizes), group_rows)
        return Watched(known[key], sum(sizes), window_rows)

    return stream


def places(batches: Any) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [row for batch in places(batches) for row in batch]


SIZES = st.lists(st.integers(0, 40), max_size=4).map(tuple)
GROUPS = st.integers(1, 15)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    sizes=SIZES,
    group_rows=GROUPS,
    window_rows=st.integers(1, 50),
    batch_size=st.integers(1, 30),
    seed=SEEDS,
    by_domain=st.booleans(),
)
def test_workers_get_every_row_once(made, data, sizes, group_rows, window_rows, batch_size, seed, by_domain) -> None:
    rows, stream = sum(sizes), made(sizes, group_rows, window_rows)
    workers = data.draw(st.integers(1, min(max(rows, 1), 5)))
    found = [list(stream.batches(Pass(batch_size, seed, 3, by_domain, 0, (w, workers)))) for w in range(workers)]
    assert sorted(row for batches in found for row in flat(batches)) == list(range(rows))
    for worker, batches in enumerate(found):
        asked = Pass(batch_size, shard=(worker, workers))
        assert len(batches) == asked.num_batches(rows)
        assert all(batch.num_rows == batch_size for batch in batches[:-1])
        assert sum(batch.num_rows for batch in batches) == len(asked.rows(rows))
        assert all(map(is_whole, batches))
        assert not by_domain or all(b.domain.tolist() == sorted(b.domain.tolist()) for b in batches)


@settings(max_examples=150, deadline=None)
@given(
    sizes=SIZES,
    group_rows=GROUPS,
    window_rows=st.integers(1, 50),
    batch_size=st.integers(1, 30),
    seed=SEEDS,
    start=st.integers(0, 30),
    worker=st.integers(0, 1),
)
def test_a_start_leaves_out_batches_and_changes_no_other(
    made, sizes, group_rows, window_rows, batch_size, seed, start, worker
) -> None:
    stream, shard = made(sizes, group_rows, window_rows), (worker, 2) if sum(sizes) > 1 else (0, 1)
    whole = places(stream.batches(Pass(batch_size, seed, 1, True, 0, shard)))
    assert places(stream.batches(Pass(batch_size, seed, 1, True, start, shard))) == whole[start:]


def test_stored_order_without_a_seed(made) -> None:
    stream = made((25, 0, 31))
    assert flat(stream.batches(Pass(7, sort_by_domain=False))) == list(range(56))
    assert flat([stream.read()]) == list(range(56))
    assert is_whole(stream.read())


def test_order_of_a_seed(made) -> None:
    """Spelled out, since a run that was interrupted must find the same order in a later version."""
    stream = made((25, 31), group_rows=10, window_rows=25)
    starts, sizes = [0, 10, 20, 25, 35, 45, 55], [10, 10, 5, 10, 10, 10, 1]
    groups = [list(range(starts[g], starts[g] + sizes[g])) for g in np.random.default_rng((4, 2)).permutation(7)]
    expected: list[int] = []
    window: list[int] = []
    for group in [*groups, None]:
        if window and (group is None or len(window) + len(group) > 25):
            order = np.random.default_rng((4, 2, len(expected) + 1)).permutation(len(window))
            expected += [window[place] for place in order]
            window = []
        window += group or []
    for batch_size in (1, 8, 100):
        assert flat(stream.batches(Pass(batch_size, 4, 2, sort_by_domain=False))) == expected


def test_the_order_hangs_on_seed_and_epoch_alone(made) -> None:
    order = flat(made((100,)).batches(Pass(8, 1, 2)))
    torch.manual_seed(99)
    np.random.seed(99)
    again = made((100,))
    list(again.batches(Pass(8, 1, 0)))
    assert flat(again.batches(Pass(8, 1, 2))) == order
    others = [flat(again.batches(Pass(8, seed, epoch))) for seed, epoch in ((1, 3), (2, 2), (2, 1), (None, 2), (0, 0))]
    assert all(other != order for other in others)


def test_rows_of_many_row_groups_meet_in_a_batch(made) -> None:
    stream = made((400,), group_rows=10, window_rows=200)
    groups = [{row // 10 for row in batch} for batch in places(stream.batches(Pass(50, 0)))]
    assert all(len(found) > 12 for found in groups)


def test_passes_do_not_disturb_each_other(made) -> None:
    stream = made((100,))
    first, second = (iter(stream.batches(Pass(7, 1, epoch))) for epoch in (0, 1))
    together = [[], []]
    for one, other in zip(first, second, strict=True):
        together[0].append(one)
        together[1].append(other)
    assert [places(found) for found in together] == [places(stream.batches(Pass(7, 1, epoch))) for epoch in (0, 1)]


# what is read


@pytest.mark.parametrize("seed", [None, 1])
def test_a_start_decodes_only_windows_that_are_needed(made, seed) -> None:
    stream = made((1000,), group_rows=10, window_rows=30)  # 34 windows, the last of one row group
    list(stream.batches(Pass(30, seed, start=32)))
    assert stream.decoded == 4  # rows 960 to 999
    stream.decoded = 0
    assert list(stream.batches(Pass(30, seed, start=34))) == []
    assert stream.decoded == 0


def test_without_a_seed_a_start_inside_a_window_decodes_only_what_comes_after(made) -> None:
    stream = made((1000,), group_rows=10, window_rows=500)
    assert flat(stream.batches(Pass(15, start=33))) == sorted(
        range(495, 1000), key=lambda row: (row // 15, row * 7919 % 4)
    )
    assert stream.decoded == 51


def test_a_worker_decodes_its_share_alone(made) -> None:
    for worker in range(4):
        stream = made((1000,), group_rows=10)
        list(stream.batches(Pass(30, 1, shard=(worker, 4))))
        assert stream.decoded == 25


def test_a_reader_that_stops_early_reads_little(made) -> None:
    stream = made((1000,), group_rows=10, window_rows=30)
    reader = stream.batches(Pass(30, 1))
    assert stream.decoded == 0
    next(reader)
    reader.close()
    time.sleep(0.2)
    assert 3 <= stream.decoded <= 3 * 6  # the first, four ahead and the one in the making


def test_files_are_checked_before_they_are_read(made) -> None:
    checked: list[str] = []
    files = made((20, 20, 20)).files
    stream = Stream(files, SCHEMA, 60, lambda path: checked.append(path.name))
    list(stream.batches(Pass(5, start=8)))
    assert checked == ["part-00002.parquet"] * 2  # rows 40 to 59, of two row groups
    list(stream.batches(Pass(5, seed=1)))
    assert set(checked) == {path.name for path in files}


# what can go wrong


def test_an_error_of_a_check_reaches_the_reader(made) -> None:
    def check(path: Path) -> None:
        raise DataError("not the prepared one", received=path.name)

    reader = Stream(made((20,)).files, SCHEMA, 20, check).batches(Pass(5))
    with pytest.raises(DataError, match=r"not the prepared one\. Received: 'part-00000\.parquet'"):
        next(reader)


@pytest.mark.parametrize("damage", ["missing", "emptied", "another format"])
def test_a_file_that_is_no_shard(tmp_path, damage) -> None:
    files = write(tmp_path, [20, 20], 10)
    if damage == "missing":
        files[1].unlink()
    else:
        files[1].write_bytes(b"" if damage == "emptied" else b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=r"cannot be read.*part-00001\.parquet.*Prepare the dataset again"):
        list(Stream(files, SCHEMA, 40, lambda _: None).batches(Pass(5)))


def test_another_number_of_rows(made) -> None:
    with pytest.raises(DataError, match=r"must have 21 rows, not 20"):
        list(Stream(made((20,)).files, SCHEMA, 21, lambda _: None).batches(Pass(5)))


def test_more_workers_than_rows(made) -> None:
    with pytest.raises(DataError, match="3 workers need at least a row each"):
        list(made((2,)).batches(Pass(5, shard=(0, 3))))


def test_no_thread_is_left(made) -> None:
    stream = made((1000,), group_rows=10, window_rows=30)
    list(stream.batches(Pass(30)))
    for _ in stream.batches(Pass(30)):
        break
    reader = stream.batches(Pass(30))
    next(reader)
    del reader
    gc.collect()
    for _ in range(200):
        left = [thread for thread in threading.enumerate() if thread.name.startswith("domlora-ahead")]
        if not left:
            break
        time.sleep(0.01)
    assert not left
