"""The rows of one domain."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.training.rows import OneDomain

SCHEMA = Schema((Feature("item", num_ids=50),), domains=("a", "b", "c"))


def dataset(train: list[int], valid: list[tuple[int, int]], weight: float | None = None) -> Dataset:
    """Domains of the training rows, domains and labels of the validation rows."""

    def rows(domains: list[int], labels: list[int]) -> Batch:
        number = torch.arange(len(domains))
        domain, label = torch.tensor(domains, dtype=torch.int64), torch.tensor(labels, dtype=torch.float32)
        weights = None if weight is None else torch.full((len(domains),), weight)
        return Batch(number.unsqueeze(1) % 50, torch.zeros(len(domains), 0), domain, label, weights, number)

    split = {"train": rows(train, [0] * len(train)), "valid": rows([d for d, _ in valid], [y for _, y in valid])}
    return Dataset.from_batches(SCHEMA, split)


def chained(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def read(view: OneDomain, size: int, **options: Any) -> list[list[int]]:
    return [batch.user.tolist() for batch in view.batches("train", size, **options) if batch.user is not None]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 2), max_size=40), st.integers(1, 7))
def test_the_views_hold_every_row_once(domains: list[int], size: int) -> None:
    data = dataset(domains, [])
    found = []
    for domain in range(-1, 3):
        view = OneDomain(data, domain)
        batches = list(view.batches("train", size))
        assert all(batch.domain.tolist() == [domain] * batch.num_rows for batch in batches)
        assert [batch.num_rows for batch in batches[:-1]] == [size] * len(batches[:-1])
        assert view.num_rows("train") == sum(batch.num_rows for batch in batches) == domains.count(domain)
        found += chained(read(view, size))
    assert sorted(found) == list(range(len(domains)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))
def test_an_order_is_a_matter_of_seed_and_epoch_and_can_be_gone_on_with(
    num_rows: int, size: int, seed: int, epoch: int, start: int
) -> None:
    data = dataset([1] * num_rows, [])
    whole = read(OneDomain(data, 1), size, seed=seed, epoch=epoch)
    assert read(OneDomain(data, 1), size, seed=seed, epoch=epoch, start=start) == whole[start:]
    assert sorted(chained(whole)) == list(range(num_rows))


def test_orders_differ() -> None:
    view = OneDomain(dataset([0, 1] * 30, []), 1)
    orders = [chained(read(view, 8, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert chained(read(view, 8)) == list(range(1, 60, 2))  # stored order without a seed


def test_rows_are_picked_once_and_only_when_asked_for(data: Dataset, watched: Any) -> None:
    rows = watched(data)
    view = OneDomain(rows, 1)
    assert rows.asked == []
    for epoch in range(3):
        list(view.batches("train", 64, seed=1, epoch=epoch))
        assert view.num_rows("train") > 0
    assert [asked[0] for asked in rows.asked] == ["train"]


def test_streamed_or_not_the_rows_are_the_same(data: Dataset, write_prepared: Any, tmp_path: Any) -> None:
    schema = Schema((Feature("item", num_ids=50, hash_buckets=48),), domains=("a", "b", "c"))
    rows = dataset([0, 1, 2, 1] * 60, [(1, 1), (1, 0)]).read("train")
    columns = {"item": rows.ids[:, 0], "__domain": rows.domain, "__label": rows.label}
    columns = {
        name: column.float().numpy() if name == "__label" else column.int().numpy() for name, column in columns.items()
    }
    write_prepared(tmp_path / "data", schema, {"train": [columns]}, group_rows=50)
    kept, streamed = (
        [batch.ids.tolist() for batch in OneDomain(opened, 1).batches("train", 16, seed=3)]
        for opened in (Dataset.open(tmp_path / "data", in_memory=in_memory) for in_memory in (True, False))
    )
    assert kept == streamed
    assert sum(map(len, kept)) == 120


def test_fingerprints_tell_domains_and_data_apart(data: Dataset) -> None:
    other = dataset([0], [])
    found = {OneDomain(each, domain).fingerprint() for each in (data, other) for domain in (0, 1)}
    assert len(found) == 4
    assert OneDomain(data, 0).fingerprint() == OneDomain(data, 0).fingerprint()


@pytest.mark.parametrize(
    ("train", "valid", "weight", "expected"),
    [
        ([0, 1], [(1, 0), (1, 1)], None, True),
        ([0, 0], [(1, 0), (1, 1)], None, False),
        ([1, 1], [(1, 1), (0, 0)], None, False),
        ([1, 1], [(0, 1), (0, 0)], None, False),
        ([1, 1], [], None, False),
        ([1, 1], [(1, 0), (1, 1)], 2.0, True),
        ([1, 1], [(1, 0), (1, 1)], 0.0, False),
    ],
)
def test_what_a_domain_can_be_trained_on(
    train: list[int], valid: list[tuple[int, int]], weight: float | None, expected: bool
) -> None:
    assert OneDomain(dataset(train, valid, weight), 1).can_be_trained is expected


def test_numbers_out_of_range_are_refused(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        list(OneDomain(data, 0).batches("train", 0))
