"""On a GPU every model gives the CPU's logits and gradients, trains, and comes back whole; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import adapter_layers
from domlora.adapters.root import disabled
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.evaluation.evaluate import predict
from domlora.features.batch import Batch
from domlora.features.schema import Feature
from domlora.models.build import MODELS, build_model
from domlora.training.fit import FitOptions, fit, loss_of
from domlora.training.onboard import onboard
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Stage, placed, pretrain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch finds")

CUDA = torch.device("cuda")
STAGE = Stage(FitOptions(batch_size=512, max_epochs=2), OptimizerOptions(*[Rule(lr=0.01)] * 3))
RECIPE = Recipe(AdapterOptions(temperature=4.0), STAGE, STAGE, STAGE)
LAZY = OptimizerOptions(Rule("lazy_adam", lr=0.01), Rule(lr=0.01), Rule("lazy_adam", lr=0.01))


@pytest.fixture(scope="module")
def data() -> Dataset:
    """A world's rows with random users and sequences of them, so that models of crosses have something to cross."""
    world, _ = World(num_domains=5).dataset(6000, seed=1)
    extra = (Feature("user", num_ids=40), Feature("past", "sequence", num_ids=40, share="user", max_length=3))
    schema = replace(world.schema, features=(*extra, *world.schema.numeric))
    random = torch.Generator().manual_seed(2)

    def wider(rows: Batch) -> Batch:
        return rows._replace(ids=torch.randint(1, 40, (len(rows.ids), 4), generator=random))

    return Dataset.from_batches(schema, {split: wider(world.read(split)) for split in ("train", "valid", "test")})


@pytest.fixture(scope="module")
def batch(data: Dataset) -> Batch:
    return next(iter(data.batches("train", 512, seed=3)))


def models(name: str, data: Dataset, domains: int | None = None) -> tuple[nn.Module, nn.Module]:
    """The same adapted model on the CPU and on the GPU, in double precision, with adapters that do something."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"embedding_dim": 4, "hidden_units": [12, 8], "dropout": 0.0}
    model = attach_(build_model(name, data.schema, **options), domains or data.schema.num_domains, temperature=4.0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.normal_(0, 0.1)
    other = attach_(build_model(name, data.schema, **options), domains or data.schema.num_domains, temperature=4.0)
    other.load_state_dict(model.state_dict())
    return model.double(), other.double().to(CUDA)


def told(model: nn.Module, rows: Batch) -> Tensor:
    logit: Tensor = model(rows.ids, rows.dense.double(), rows.domain)
    return logit


def gradients(model: nn.Module, rows: Batch) -> dict[str, Tensor]:
    loss_of(told(model, rows), rows._replace(label=rows.label.double())).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: (grad.to_dense() if grad.is_sparse else grad).cpu() for name, grad in found.items()}


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_and_gradients_are_those_of_the_cpu(name: str, data: Dataset, batch: Batch) -> None:
    here, there = models(name, data)
    far = batch.to(CUDA)
    torch.testing.assert_close(told(there, far).cpu(), told(here, batch), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(gradients(there, far), gradients(here, batch), atol=1e-9, rtol=1e-6)


def test_a_thousand_domains_of_few_rows_each(data: Dataset, batch: Batch) -> None:
    here, there = models("deepfm", data, 1000)
    rows = batch._replace(domain=torch.arange(len(batch.domain)) * 7 % 1000)
    torch.testing.assert_close(told(there, rows.to(CUDA)).cpu(), told(here, rows), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(gradients(there, rows.to(CUDA)), gradients(here, rows), atol=1e-9, rtol=1e-6)


def test_fresh_adapters_leave_every_bit_of_the_base(data: Dataset, batch: Batch) -> None:
    model = build_model("deepfm", data.schema).eval().to(CUDA)
    far = batch.to(CUDA)
    before = model(far.ids, far.dense, far.domain)
    attach_(model, data.schema.num_domains, temperature=4.0)
    assert torch.equal(model(far.ids, far.dense, far.domain), before)
    with disabled(model):
        assert torch.equal(model(far.ids, far.dense, far.domain), before)


@pytest.mark.parametrize("optimizer", [STAGE.optimizer, LAZY], ids=["adam", "lazy"])
@pytest.mark.parametrize("name", ["deepfm", "autoint", "star", "ple"])
def test_training_ends_near_the_cpus_and_on_the_cpu(name: str, optimizer: OptimizerOptions, data: Dataset) -> None:
    recipe = replace(RECIPE, joint=replace(STAGE, optimizer=optimizer))
    options = {"name": name, "dropout": 0.0}
    here, slow = pretrain(data, options, recipe, method="joint")
    there, fast = pretrain(data, options, placed(recipe, "cuda"), method="joint")
    assert {p.device.type for p in there.parameters()} == {"cpu"}
    assert fast.best_value == pytest.approx(slow.best_value, abs=0.01)
    near, far = (predict(model, data.batches("test", 4096)) for model in (here, there))
    assert abs(near.probability - far.probability).mean() < 0.02


def test_a_checkpoint_of_the_gpu_goes_on(data: Dataset, tmp_path: Path) -> None:
    def trained(epochs: int, checkpoint: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = build_model("mlp", data.schema, dropout=0.3)
        fit(model, Mortal(data, epochs), STAGE.fit.__class__(batch_size=512, max_epochs=2, device="cuda"),
            STAGE.optimizer, checkpoint=checkpoint)  # fmt: skip
        return model.state_dict()

    with pytest.raises(KilledError):
        trained(1, tmp_path / "state")
    resumed, straight = trained(2, tmp_path / "state"), trained(2, None)
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


class KilledError(Exception):
    """What a run is killed with."""


class Mortal:
    """Rows whose reader dies when an epoch begins that it does not live to see."""

    def __init__(self, data: Dataset, epochs: int) -> None:
        self.data, self.epochs, self.schema = data, epochs, data.schema
        self.num_rows, self.fingerprint = data.num_rows, data.fingerprint

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, **options: Any) -> Any:
        if split == "train" and epoch >= self.epochs:
            raise KilledError
        return self.data.batches(split, batch_size, epoch=epoch, **options)


def test_onboarding_leaves_the_others_bits(data: Dataset, tmp_path: Path) -> None:
    rows = {split: data.read(split) for split in ("train", "valid", "test")}
    last = data.schema.num_domains - 1
    small = replace(data.schema, domains=data.schema.domains[:-1])
    others = Dataset.from_batches(small, {split: part.take(part.domain < last) for split, part in rows.items()})
    options = {"name": "deepfm"}
    model, _ = pretrain(others, options, RECIPE, method="joint")
    bundle = Bundle(model, options, others.encoder)
    before = predict(model, others.batches("test", 4096)).probability
    grown, _ = onboard(bundle, data, data.schema.domains[-1], placed(RECIPE, "cuda"))
    assert (predict(grown.model, others.batches("test", 4096)).probability == before).all()
