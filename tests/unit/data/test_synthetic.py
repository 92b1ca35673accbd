from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.evaluation.metrics import auc
from domlora.features.schema import FIRST_ID

SMALL = World(num_domains=4, num_dense=5, hidden_units=8)


def gap(label: Tensor, probability: Tensor) -> float:
    """How many standard deviations the number of clicks lies from the number expected."""
    spread = (probability * (1 - probability)).sum().sqrt()
    return float((label.double() - probability).sum().abs() / spread)


@pytest.mark.parametrize("world", [SMALL, replace(SMALL, seed=3), replace(SMALL, sharpness=4.0, click_rate_spread=2.0)])
def test_probabilities_are_true_in_every_domain(world: World) -> None:
    batch, probability = world.sample(40_000, seed=1)
    for number in range(world.num_domains):
        rows = batch.domain == number
        assert gap(batch.label[rows], probability[rows]) < 4


def test_probabilities_are_true_at_every_height() -> None:
    batch, probability = SMALL.sample(100_000, seed=1)
    order = probability.argsort()
    for rows in order.chunk(20):
        assert gap(batch.label[rows], probability[rows]) < 4
    assert probability.std() > 0.2


def test_nothing_predicts_better_than_the_truth() -> None:
    batch, probability = SMALL.sample(100_000, seed=2)
    label, truth = batch.label.numpy(), probability.numpy()
    best = auc(label, truth)
    logit = np.log(truth / (1 - truth))
    random = np.random.default_rng(0)
    for noise in (0.3, 1.0, 3.0):
        assert auc(label, logit + noise * random.standard_normal(len(logit))) < best
    for column in range(SMALL.num_dense):
        assert auc(label, logit + 0.5 * batch.dense[:, column].numpy()) < best
    assert 0.7 < best < 0.95


def domain_logits(world: World, dense: Tensor) -> Tensor:
    """``(D, B)``: the same rows in every domain."""
    return torch.stack([world._logit(dense, torch.full((len(dense),), d)) for d in range(world.num_domains)])


def test_without_difference_and_spread_all_domains_are_one() -> None:
    dense = torch.randn(500, 5)
    logits = domain_logits(replace(SMALL, difference=0.0, click_rate_spread=0.0), dense)
    assert torch.equal(logits, logits[:1].expand_as(logits))


def test_without_difference_domains_differ_by_their_rates_alone() -> None:
    logits = domain_logits(replace(SMALL, difference=0.0), torch.randn(500, 5))
    shift = logits - logits[:1]
    assert (shift - shift[:, :1]).abs().max() < 1e-12
    assert shift[:, 0].unique().numel() == SMALL.num_domains


def test_difference_makes_domains_differ() -> None:
    dense = torch.randn(2000, 5)
    apart = []
    for difference in (0.0, 0.3, 1.0):
        logits = domain_logits(replace(SMALL, difference=difference, click_rate_spread=0.0), dense)
        apart.append((logits - logits.mean(0)).std().item())
    assert apart[0] < 1e-9 < apart[1] < apart[2]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_difference_has_its_rank_and_size(rank: int) -> None:
    world = replace(SMALL, difference_rank=rank, difference=0.7)
    matrix = world._teacher()[0]
    shared = replace(world, difference=0.0)._teacher()[0][0]
    for each in matrix - shared:
        assert torch.linalg.matrix_rank(each, rtol=1e-9) == rank
        assert each.norm() / shared.norm() == pytest.approx(0.7)


@pytest.mark.parametrize("sharpness", [0.5, 1.8, 4.0])
def test_sharpness_is_the_spread_of_the_logit(sharpness: float) -> None:
    world = World(sharpness=sharpness, difference=0.0, click_rate_spread=0.0)
    logit = torch.logit(world.sample(40_000, seed=0).probability)
    assert logit.std().item() == pytest.approx(sharpness, rel=0.1)
    assert abs(logit.mean()) < 0.2 * sharpness


def bytes_of(world: World, seed: int) -> list[bytes]:
    batch, probability = world.sample(500, seed)
    return [column.numpy().tobytes() for column in (batch.ids, batch.dense, batch.domain, batch.label, probability)]


def test_same_seeds_same_bytes_whatever_else_was_drawn() -> None:
    first = bytes_of(SMALL, 1)
    torch.manual_seed(99)
    torch.rand(5)
    assert bytes_of(SMALL, 1) == first
    state = torch.get_rng_state()
    assert bytes_of(SMALL, 2) != first
    assert bytes_of(replace(SMALL, seed=1), 1) != first
    assert bytes_of(replace(SMALL, seed=1), 0) != bytes_of(replace(SMALL, seed=0), 1)
    assert torch.equal(torch.get_rng_state(), state)  # and nobody else's draws change


def test_another_sample_is_of_the_same_world() -> None:
    dense = torch.randn(10, 5)
    assert torch.equal(domain_logits(SMALL, dense), domain_logits(replace(SMALL), dense))


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_skew(skew: float) -> None:
    counts = torch.bincount(replace(SMALL, size_skew=skew).sample(40_000, seed=0).batch.domain, minlength=4) / 40_000
    share = torch.arange(1, 5, dtype=torch.float64) ** -skew
    share /= share.sum()
    assert ((counts - share).abs() < 4 * (share * (1 - share) / 40_000).sqrt()).all()


def test_dense_columns_are_standard_normal() -> None:
    dense = SMALL.sample(40_000, seed=0).batch.dense
    assert dense.mean(0).abs().max() < 4 / math.sqrt(40_000)
    assert (dense.std(0) - 1).abs().max() < 4 / math.sqrt(2 * 40_000)


def test_the_batch_fits_the_schema() -> None:
    batch, probability = SMALL.sample(1000, seed=0)
    assert torch.equal(batch.ids[:, 0], batch.domain + FIRST_ID)
    assert SMALL.schema.num_domains == 4
    assert (SMALL.schema.num_slots, SMALL.schema.num_dense) == (1, 5)
    assert SMALL.schema.categorical[0].num_ids > batch.ids.max()
    assert (probability.dtype, batch.dense.dtype, batch.label.dtype) == (torch.float64, torch.float32, torch.float32)


def test_dataset_splits_what_sample_draws() -> None:
    dataset, truth = SMALL.dataset(1001, seed=3)
    batch, probability = SMALL.sample(1001, seed=3)
    splits = [dataset.read(name) for name in ("train", "valid", "test")]
    assert [split.num_rows for split in splits] == [600, 200, 201]
    assert torch.equal(torch.cat([split.dense for split in splits]), batch.dense)
    assert torch.equal(torch.cat([split.label for split in splits]), batch.label)
    assert torch.equal(truth, probability[800:])
    assert dataset.schema == SMALL.schema


def test_its_encoder_reads_the_names_of_its_domains() -> None:
    dataset, _ = SMALL.dataset(100, seed=0)
    rows = {"domain": ["d2", "d0", "other"], **{f"x{number}": [0.5, 1.0, None] for number in range(5)}}
    batch = dataset.encoder.encode(rows)
    assert batch.domain.tolist() == [2, 0, -1]
    assert batch.ids[:2, 0].tolist() == [2 + FIRST_ID, FIRST_ID]


@pytest.mark.parametrize(
    "change",
    [
        {"num_domains": 0},
        {"num_dense": 0},
        {"hidden_units": 0},
        {"difference_rank": 0},
        {"difference": -0.1},
        {"sharpness": 0.0},
        {"sharpness": math.nan},
        {"difference": math.nan},
        {"click_rate_spread": -1.0},
        {"click_rate_spread": math.nan},
        {"size_skew": math.nan},
    ],
)
def test_numbers_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **change)


@pytest.mark.parametrize("num_rows", [0, -5])
def test_a_sample_needs_rows(num_rows: int) -> None:
    with pytest.raises(ConfigError, match="rows"):
        SMALL.sample(num_rows, seed=0)
