from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.batching import Pass, _sorted_inside, rows_in_memory
from domlora.errors import ConfigError, DataError
from domlora.features.batch import Batch

SEEDS = st.none() | st.integers(0, 3)


def make_rows(rows: int) -> Batch:
    """Rows whose id is their position."""
    domain = torch.randint(-1, 3, (rows,), generator=torch.Generator().manual_seed(rows))
    place = torch.arange(rows)
    return Batch(place[:, None], place[:, None] / 2, domain, place % 2 / 1, weight=place / 3, user=place * 10)


def read(rows: Batch, asked: Pass) -> list[Batch]:
    return [batch for chunk in rows_in_memory(rows, asked) for batch in chunk]


def places(batches: list[Batch]) -> list[list[int]]:
    return [batch.ids[:, 0].tolist() for batch in batches]


@given(rows=st.integers(0, 10**9), workers=st.integers(1, 100), batch_size=st.integers(1, 10**5))
def test_shares_are_even_and_number_as_many_batches(rows, workers, batch_size) -> None:
    if 0 < rows < workers:
        with pytest.raises(DataError, match=f"{workers} workers need at least a row each. Received: {rows}"):
            Pass(batch_size, shard=(0, workers)).rows(rows)
        return
    asked = [Pass(batch_size, shard=(worker, workers)) for worker in range(workers)]
    shares = [each.rows(rows) for each in asked]
    assert (shares[0].start, shares[-1].stop) == (0, rows)
    assert all(before.stop == after.start for before, after in pairwise(shares))
    assert {len(share) for share in shares} <= {rows // workers, rows // workers + 1}
    (batches,) = {each.num_batches(rows) for each in asked}
    assert (batches == 0) == (rows == 0)
    for share in shares:
        last = len(share) - (batches - 1) * batch_size
        assert not batches or 0 < last <= batch_size + 1
        assert workers > 1 or not batches or last <= batch_size


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(0, 60), batch_size=st.integers(1, 20), seed=SEEDS, by_domain=st.booleans())
def test_workers_get_every_row_once(data, rows, batch_size, seed, by_domain) -> None:
    workers, whole = data.draw(st.integers(1, max(rows, 1))), make_rows(rows)
    found = [read(whole, Pass(batch_size, seed, 0, by_domain, 0, (worker, workers))) for worker in range(workers)]
    assert len({len(batches) for batches in found}) == 1
    assert sorted(place for batches in found for batch in places(batches) for place in batch) == list(range(rows))
    for batches in found:
        assert all(batch.num_rows == batch_size for batch in batches[:-1])
        for batch in batches:
            assert all(torch.equal(a, b) for a, b in zip(batch, whole.take(batch.ids[:, 0]), strict=True))
            assert not by_domain or batch.domain.tolist() == sorted(batch.domain.tolist())


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 60),
    batch_size=st.integers(1, 20),
    seed=SEEDS,
    start=st.integers(0, 25),
    worker=st.integers(0, 2),
)
def test_a_start_leaves_out_batches_and_changes_no_other(rows, batch_size, seed, start, worker) -> None:
    shard = (worker, 3) if rows >= 3 else (0, 1)
    whole = read(make_rows(rows), Pass(batch_size, seed, 1, True, 0, shard))
    assert places(read(make_rows(rows), Pass(batch_size, seed, 1, True, start, shard))) == places(whole[start:])


@pytest.mark.parametrize("seed", [None, 5])
def test_order(seed) -> None:
    """The order of seed and epoch is part of what a seed promises: earlier runs must come out alike."""
    order = np.arange(50) if seed is None else np.random.default_rng((seed, 2)).permutation(50)
    batches = read(make_rows(50), Pass(8, seed, 2, False))
    assert places(batches) == [order[start : start + 8].tolist() for start in range(0, 50, 8)]
    domain = make_rows(50).domain.numpy()
    for batch, plain in zip(read(make_rows(50), Pass(8, seed, 2)), batches, strict=True):
        rows = plain.ids[:, 0].numpy()
        assert batch.ids[:, 0].tolist() == rows[np.argsort(domain[rows], kind="stable")].tolist()


@pytest.mark.parametrize("size", ["_CHUNK_ROWS", "_CHUNK_BYTES"])
@pytest.mark.parametrize("by_domain", [True, False])
def test_chunks_do_not_show(monkeypatch, size, by_domain) -> None:
    asked = Pass(7, 1, 0, by_domain)
    expected = places(read(make_rows(100), asked))
    monkeypatch.setattr(f"domlora.data.batching.{size}", 20)
    assert places(read(make_rows(100), asked)) == expected


def test_rows_are_read_as_they_are_asked_for() -> None:
    rows = make_rows(200_000)
    (first,) = islice(rows_in_memory(rows, Pass(64, seed=0)), 1)
    assert sum(batch.num_rows for batch in first) <= 1 << 16


def test_more_domains_than_16_bits_hold() -> None:
    domain = np.array([69_999, 40_000, 5, 32_768, 32_767])
    assert domain[_sorted_inside(domain, np.arange(5), 5, 1)].tolist() == [5, 32_767, 32_768, 40_000, 69_999]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1. Received: 0"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
        ({"start": -1}, "start"),
        ({"shard": (2, 2)}, r"shard must be .* Received: \(2, 2\)"),
        ({"shard": (-1, 2)}, "shard"),
        ({"shard": (0, 0)}, "shard"),
    ],
)
def test_numbers_out_of_range(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Pass(**{"batch_size": 4} | change)
