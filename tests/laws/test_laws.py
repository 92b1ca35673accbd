"""What must hold for every model in ``MODELS``; the numbers are those of the list in the design."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_, detach_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state
from domlora.adapters.root import disabled
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.evaluation.evaluate import predict
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Stage, adapt, pretrain

DOMAINS = ("app", "web", "mail", "shop")
SCHEMA = Schema(
    (
        Feature("user", num_ids=12),
        Feature("item", num_ids=9),
        Feature("domain", num_ids=2 + len(DOMAINS)),
        Feature("past", "sequence", num_ids=9, share="item", max_length=3),
        Feature("hour", "bucketed", num_ids=5, boundaries=(8.0, 18.0)),
        Feature("age", "numeric"),
        Feature("price", "numeric"),
    ),
    domains=DOMAINS,
)
OPTIONS: dict[str, Any] = {"embedding_dim": 4, "hidden_units": [12, 8], "dropout": 0.3}
LINEARS = {"tower": ("tower.*",), "everything": ("*",)}
STAGE = Stage(FitOptions(batch_size=64, max_epochs=2, evaluations_per_epoch=2), OptimizerOptions(*[Rule(lr=0.01)] * 3))
RECIPE = Recipe(AdapterOptions(temperature=4.0), STAGE, STAGE, STAGE)


class KilledError(Exception):
    """What a run is killed with."""


class Mortal:
    """Rows whose reader dies after some training batches."""

    schema = SCHEMA

    def __init__(self, data: Dataset, batches_left: int) -> None:
        self.data, self.left = data, batches_left

    def num_rows(self, split: str) -> int:
        return self.data.num_rows(split)

    def fingerprint(self) -> str:
        return self.data.fingerprint()

    def batches(
        self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0, **order: Any
    ) -> Iterator[Batch]:
        for batch in self.data.batches(split, batch_size, seed=seed, epoch=epoch, **order):
            if split == "train":
                self.left -= 1
                if self.left < 0:
                    raise KilledError
            yield batch


def rows(num_rows: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    domain = torch.randint(0, len(DOMAINS), (num_rows,), generator=random)
    ids = [torch.randint(0, f.num_ids, (num_rows,), generator=random) for f in SCHEMA.categorical[:2]]
    dense = torch.randn(num_rows, 2, generator=random)
    past = torch.randint(1, 9, (num_rows, 3), generator=random)
    past[torch.arange(3) >= torch.arange(num_rows).unsqueeze(1) % 4] = 0  # of every length, none too
    hour = torch.randint(0, 5, (num_rows, 1), generator=random)
    label = (torch.rand(num_rows, generator=random) < torch.sigmoid(dense[:, 0] + 0.2 * ids[0] - 1)).float()
    return Batch(torch.cat([torch.stack([*ids, domain + 2], 1), past, hour], 1), dense, domain, label)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset.from_batches(SCHEMA, {"train": rows(240, 0), "valid": rows(200, 1), "test": rows(200, 2)})


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scrambled(model: nn.Module) -> nn.Module:
    """No parameter and no statistic is left at a start that would hide a term (zeros, ones)."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(parameter))
        if hasattr(model, "senet"):  # its bottleneck of one relu silences each feature in half of all starts
            for parameter in model.senet.parameters():
                parameter.abs_()
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=random, dtype=torch.float64).to(buffer))
    return model


def fresh(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(build_model(name, SCHEMA, **OPTIONS).to(dtype)).eval()


def adapted(name: str, include: tuple[str, ...] = ("*",)) -> nn.Module:
    return scrambled(attach_(fresh(name), len(DOMAINS), temperature=4.0, include=include))


def logits(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch.ids, batch.dense.to(dtype), batch.domain)
    return found


def some_rows() -> Batch:
    """Mixed domains, and some rows of none."""
    batch = rows(40, 5)
    return batch._replace(domain=torch.where(torch.arange(40) % 9 == 0, -1, batch.domain))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, float(theirs.abs().max()))


def digest(model: nn.Module) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("include", LINEARS.values(), ids=LINEARS)
def test_1_a_fresh_adapter_equals_its_base_bit_for_bit(name: str, include: tuple[str, ...]) -> None:
    model, batch = fresh(name, torch.float32), some_rows()
    ordered = batch.take(batch.domain.argsort(stable=True))
    expected = [logits(model, each, torch.float32) for each in (batch, ordered)]
    attach_(model, len(DOMAINS), include=include)
    found = [logits(model, each, torch.float32) for each in (batch, ordered)]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_1_switched_off_equals_taken_off(name: str) -> None:
    model, batch = adapted(name), some_rows()
    with disabled(model):
        off = logits(model, batch)
    assert not torch.equal(off, logits(model, batch))
    assert torch.equal(off, logits(detach_(model), batch))


@pytest.mark.parametrize("training", [False, True])
def test_2_permuting_rows_permutes_logits(name: str, training: bool) -> None:
    model, batch = adapted(name), some_rows()
    if training:  # with a tower that drops nothing: statistics of a batch do not depend on the order of its rows
        torch.manual_seed(0)
        model = scrambled(attach_(build_model(name, SCHEMA, **{**OPTIONS, "dropout": 0.0}).double(), len(DOMAINS)))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    expected = logits(copy.deepcopy(model), batch)[order]
    close(logits(model, batch.take(order)), expected)


def test_3_a_mixed_batch_equals_its_pieces(name: str) -> None:
    model, batch = adapted(name), some_rows()
    mixed = logits(model, batch)
    for domain in batch.domain.unique():
        close(logits(model, batch.take(batch.domain == domain)), mixed[batch.domain == domain])
    close(torch.cat([logits(model, batch.take(slice(row, row + 1))) for row in range(40)]), mixed)


@pytest.mark.parametrize("include", LINEARS.values(), ids=LINEARS)
def test_4_merged_weights_equal_the_routed_path(name: str, include: tuple[str, ...]) -> None:
    model, batch = adapted(name, include), some_rows()
    expected = logits(model, batch)
    for number in range(len(DOMAINS)):
        merged = merge_(copy.deepcopy(model), number)
        here = batch.domain == number
        close(logits(merged, batch)[here], expected[here])
        assert type(merged) is MODELS[name]
        assert not adapter_layers(merged)
        if include != ("*",):  # a layer without a bias gets one; STAR's become plain ones, without rows of domains
            assert set(merged.state_dict()) <= set(fresh(name).state_dict())


def test_every_linear_is_called_so_that_an_adapter_on_it_counts(name: str) -> None:
    model, batch = adapted(name), some_rows()
    expected = logits(model, batch)
    for layer in adapter_layers(model).values():
        kept = layer.lora_B.detach().clone()
        with torch.no_grad():
            layer.lora_B.zero_()
            changed = not torch.equal(logits(model, batch), expected)
            layer.lora_B.copy_(kept)
        assert changed
    assert torch.equal(logits(model, batch), expected)


def test_gradients_of_a_mixed_batch_are_the_sum_of_its_pieces(name: str) -> None:
    model, batch = adapted(name), some_rows()
    banks = [p for n, p in model.named_parameters() if "lora" in n]

    def gradients(part: Batch) -> tuple[Tensor, ...]:
        out = model(part.ids, part.dense.double(), part.domain).square().sum()
        return torch.autograd.grad(out, banks, allow_unused=True, materialize_grads=True)

    pieces = [gradients(batch.take(batch.domain == domain)) for domain in batch.domain.unique()]
    whole = gradients(batch)
    largest = max(float(gradient.abs().max()) for gradient in whole)  # of a key's bias it is zero: softmax ignores it
    for mixed, *parts in zip(whole, *pieces, strict=True):
        assert (mixed - torch.stack(parts).sum(0)).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("method", ["two_stage", "bias_only"])
def test_5_and_7_adapt_leaves_the_base_alone_and_survives_the_disk(
    name: str, method: str, data: Dataset, tmp_path: Path
) -> None:
    options = {"name": name, **OPTIONS}
    torch.manual_seed(1)
    model = build_model(schema=SCHEMA, **options)
    before = digest(model)
    found = adapt(model, data, RECIPE, method=method)
    assert len(found.history) > 2  # it was trained, whether or not the start was the best
    assert {key: tensor.numpy().tobytes() for key, tensor in base_state(model).items()} == before
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.normal_()
    Bundle(model, options, data.encoder).save(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle").model
    ours, theirs = (predict(each, data.batches("test", 64)) for each in (model, opened))
    assert np.array_equal(ours.probability, theirs.probability)
    assert digest(opened) == digest(model)


def test_10_and_11_same_seed_same_bytes_killed_or_not(
    name: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("domlora.training.fit._APART_S", 0.0)  # it is killed long before a second is over
    options = {"name": name, **OPTIONS}
    straight, expected = pretrain(data, options, RECIPE, method="joint")
    torch.rand(5)
    with pytest.raises(KilledError):
        pretrain(Mortal(data, 5), options, RECIPE, method="joint", checkpoint=tmp_path / "run")
    resumed, found = pretrain(data, options, RECIPE, method="joint", checkpoint=tmp_path / "run")
    again, other = pretrain(data, options, RECIPE, method="joint")
    assert digest(resumed) == digest(straight) == digest(again)
    assert found.history == expected.history == other.history
