from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import distinct_layers, load_rows_, rows_of
from domlora.data.dataset import Dataset
from domlora.features.batch import Batch
from domlora.models.build import build_model
from domlora.training.starts import averaged, calibrated, mixing_weights, say_all, shifts_of, sum_loss


def adapted(data: Dataset, num_domains: int = 3, *, rank: int = 2, include: tuple[str, ...] = ("*",)) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("mlp", data.schema, hidden_units=[12, 8], dropout=0.0)
    attach_(model, num_domains, rank=rank, lora_alpha=3.0, include=include)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def correction(model: nn.Module, domain: int) -> list[torch.Tensor]:
    return [layer.correction(domain)[0].detach() for layer in distinct_layers(model).values()]


def test_all_domains_in_mixed_batches_say_what_each_says(data: Dataset) -> None:
    model, rows = adapted(data), data.read("train").take(slice(0, 700))
    said = say_all(model, rows)
    assert said.others.shape == (700, 3)
    with torch.no_grad():
        for domain in range(3):
            alone = model(rows.ids, rows.dense, torch.full_like(rows.domain, domain))
            np.testing.assert_allclose(said.others[:, domain], alone.numpy(), rtol=1e-4, atol=1e-5)
        base = model(rows.ids, rows.dense, torch.full_like(rows.domain, -1))
    np.testing.assert_allclose(said.base, base.numpy(), rtol=1e-4, atol=1e-5)


def test_hundreds_of_domains_are_asked_in_seconds(data: Dataset) -> None:
    model = adapted(data, num_domains=600)
    began = time.perf_counter()
    said = say_all(model, data.read("train").take(slice(0, 500)))
    mixing_weights(said.base, said.others, said.label, said.weight)
    assert time.perf_counter() - began < 20
    assert said.others.shape == (500, 600)


def test_one_domain_alone_keeps_its_correction(data: Dataset) -> None:
    model = adapted(data)
    want = correction(model, 1)
    load_rows_(model, 0, averaged(model, np.array([0.0, 1.0, 0.0])))
    for one, two in zip(correction(model, 0), want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(rows_of(model, 0)["tower.0.lora_bias"], rows_of(model, 1)["tower.0.lora_bias"])


def test_the_mean_of_corrections_is_nearer_than_that_of_factors(data: Dataset) -> None:
    model = adapted(data)
    weights = np.array([0.5, 0.3, 0.2])
    want = [
        sum(w * each for w, each in zip(weights, of, strict=True))
        for of in zip(*(correction(model, d) for d in range(3)), strict=True)
    ]
    factors = {
        name: sum(w * rows_of(model, d)[name] for d, w in enumerate(weights.tolist())) for name in rows_of(model, 0)
    }
    found, best = averaged(model, weights), []
    for matrix in want:
        sizes = torch.linalg.svdvals(matrix)
        best.append(float(sizes[2:].norm()))
    error = {}
    for name, row in (("svd", found), ("factors", factors)):
        load_rows_(model, 0, row)
        error[name] = [float((one - two).norm()) for one, two in zip(correction(model, 0), want, strict=True)]
    assert error["svd"] == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert all(one < two for one, two in zip(error["svd"][:2], error["factors"][:2], strict=True))


def test_empty_directions_can_be_learned(data: Dataset) -> None:
    model = adapted(data, rank=4)
    row = rows_of(model, 1)
    for name in row:
        if name.endswith("lora_B"):
            row[name][1:] = 0  # of rank 1
    load_rows_(model, 1, row)
    want = correction(model, 1)
    found = averaged(model, np.array([0.0, 1.0, 0.0]))
    assert (found["tower.0.lora_A"].abs().sum(0) > 0).all()
    assert found["tower.0.lora_B"].abs().sum(1).count_nonzero() == 1
    load_rows_(model, 0, found)
    for one, two in zip(correction(model, 0), want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    nothing = averaged(model, np.zeros(3))
    assert not nothing["tower.0.lora_B"].any()
    assert nothing["tower.0.lora_A"].all()


def test_a_bank_of_biases_alone(data: Dataset) -> None:
    model = adapted(data, rank=0)
    found = averaged(model, np.array([0.5, 0.5, 0.0]))
    mean = (rows_of(model, 0)["head.lora_bias"] + rows_of(model, 1)["head.lora_bias"]) / 2
    torch.testing.assert_close(found["head.lora_bias"], mean)


def planted(num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A base, five others, and clicks of a domain that is 0.7 of the second and 0.3 of the fourth."""
    random = np.random.default_rng(0)
    base, others = random.normal(size=num_rows), 2 * random.normal(size=(num_rows, 5))
    true = 0.7 * others[:, 1] + 0.3 * others[:, 3]
    return base, others, (random.random(num_rows) < 1 / (1 + np.exp(-true))).astype(float)


def test_the_mix_is_found_with_many_rows() -> None:
    base, others, label = planted(40_000)
    found = mixing_weights(base, others, label, np.ones(len(label)))
    np.testing.assert_allclose(found, [0, 0.7, 0, 0.3, 0], atol=0.04)


def test_and_stays_near_uniform_with_few() -> None:
    base, others, label = planted(3)
    found = mixing_weights(0.1 * base, 0.1 * others, label, np.ones(3))
    np.testing.assert_allclose(found, np.full(5, 1 / 6), atol=0.05)
    assert found.min() >= 0
    assert found.sum() <= 1 + 1e-12


def test_weights_count_as_repeated_rows() -> None:
    base, others, label = planted(60)
    twice = [np.concatenate([part, part[:20]]) for part in (base, others, label)]
    weight = np.ones(60)
    weight[:20] = 2
    np.testing.assert_allclose(
        mixing_weights(base, others, label, weight), mixing_weights(*twice, np.ones(80)), atol=1e-9
    )
    np.testing.assert_allclose(sum_loss(others, label, weight), sum_loss(twice[1], twice[2], np.ones(80)))
    np.testing.assert_allclose(shifts_of(others, label, weight), shifts_of(twice[1], twice[2], np.ones(80)), atol=1e-9)


def test_a_shift_brings_the_click_rate() -> None:
    logit, label = np.random.default_rng(1).normal(size=(5000, 2)), np.zeros(5000)
    label[:500] = 1
    found = logit + shifts_of(logit, label, np.ones(5000))
    np.testing.assert_allclose((1 / (1 + np.exp(-found))).mean(0), 0.1, atol=1e-3)
    none = shifts_of(logit, np.zeros(5000), np.ones(5000))
    assert np.isfinite(none).all()
    assert (none < -4).all()


def alone_with(data: Dataset, include: tuple[str, ...]) -> tuple[nn.Module, Batch]:
    rows = data.read("train")
    rows = rows._replace(domain=torch.zeros_like(rows.domain), label=(torch.arange(rows.num_rows) % 10 == 0).float())
    return adapted(data, 1, include=include), rows


@pytest.mark.parametrize("include", [("*",), ("tower.*",)], ids=["head", "tower"])
def test_one_number_sets_the_click_rate(data: Dataset, include: tuple[str, ...]) -> None:
    model, rows = alone_with(data, include)
    row = rows_of(model, 0)
    before = model(rows.ids, rows.dense, rows.domain).detach()
    found = calibrated(model, row, rows)
    assert found is not None
    load_rows_(model, 0, found)
    after = model(rows.ids, rows.dense, rows.domain).detach()
    off = [abs(float(logit.sigmoid().mean()) - 0.1) for logit in (before, after)]
    assert off[0] > 0.05
    changed = {name for name in row if not torch.equal(row[name], found[name])}
    if include == ("*",):
        assert changed == {"head.lora_bias"}
        assert float((after - before).std()) < 1e-6
        assert off[1] < 0.005
    else:
        assert len(changed) == 1
        assert off[1] < 0.25 * off[0]  # units that are silent cannot be turned further down
        assert np.corrcoef(after, before)[0, 1] > 0.9


def test_nothing_to_calibrate_with(data: Dataset) -> None:
    torch.manual_seed(0)
    model = attach_(build_model("mlp", data.schema, hidden_units=[4]), 1, rank=1, bias=False)
    assert calibrated(model, rows_of(model, 0), data.read("train")) is None
