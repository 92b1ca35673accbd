"""What holds for every method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from domlora.bundle import Bundle
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.evaluation.evaluate import predict
from domlora.models.build import build_model
from domlora.training.fit import Fit
from domlora.training.methods import METHODS, Job, Trained, train
from domlora.training.stages import Recipe, seeded
from domlora.training.validation import scores_of

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.3}
STAGE = {
    "fit": {"batch_size": 128, "max_epochs": 3, "patience": 9, "evaluations_per_epoch": 2, "average_decay": 0.9},
    "optimizer": {kind: {"lr": 0.02} for kind in ("tables", "dense", "adapters")},
}
LEGACY = {
    "batch_size": 128,
    "max_epochs": 5,
    "patience": 9,
    "learning_rate": 0.02,
    "dead_dropout": False,
    "threshold_auc": False,
    "plain_mean": False,
    "temperature_of": "recipe",
}
TURNS = {
    "fit": {"batch_size": 128, "max_epochs": 3, "patience": 9},
    "optimizer": STAGE["optimizer"],
    "outer_lr": 0.5,
    "num_helpers": 1,
}
TABLE: dict[str, Any] = {
    "adapter": {"temperature": 4.0},
    "pretrain": STAGE,
    "joint": STAGE,
    "adapt": STAGE,
    "crossfit": {"tables": STAGE},
    "separate": STAGE,
    "finetune": STAGE,
    "negotiation": TURNS,
    "mixture": {"num_experts": 4, "experts": STAGE, "gate": STAGE},
    "legacy": LEGACY,
}


def recipe() -> Recipe:
    return parse(Config, {"train": TABLE}).train


def base_of(data: Any) -> nn.Module:
    torch.manual_seed(5)
    return build_model(schema=data.schema, **MODEL)


def run(method: str, data: Any, recipe: Recipe, checkpoint: Path | None = None) -> Trained:
    """One method; those that start from a base get an untrained one."""
    base = base_of(data) if METHODS[method].from_base else None
    return train(method, Job(data, MODEL, recipe, base, checkpoint))


def figures(found: Fit) -> str:
    return json.dumps([found.history, found.best_value, found.best_epoch])


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(data: Dataset, digest: Any, method: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.rand(seed * 3)
        model, _, found = run(method, data, seeded(recipe(), seed))
        results.append((digest(model), figures(found)))
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch, killed: Any) -> Any:
    """Lets so many steps pass inside the ``with`` block, whatever rows they read, and kills the next one."""

    @contextmanager
    def dying(steps: int) -> Iterator[None]:
        backward, left = torch.Tensor.backward, [steps]

        def mortal(*args: Any, **options: Any) -> None:
            if not left[0]:
                raise killed
            left[0] -= 1
            backward(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", mortal)
            yield

    return dying


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [2, 15, 22])
def test_killed_and_resumed_is_straight_through(
    data: Dataset, digest: Any, killed: Any, dies_after: Any, tmp_path: Path, method: str, steps: int
) -> None:
    straight, _, expected = run(method, data, recipe())
    with pytest.raises(killed), dies_after(steps):
        run(method, data, recipe(), tmp_path / "run")
    torch.rand(7)
    resumed, _, found = run(method, data, recipe(), tmp_path / "run")
    assert digest(resumed) == digest(straight)
    assert figures(found) == figures(expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_holds_what_was_trained(data: Dataset, tmp_path: Path, method: str) -> None:
    model, options, _ = run(method, data, recipe())
    Bundle(model, options, data.encoder).save(tmp_path / "bundle")
    said, again = (
        predict(scored, data.batches("test", 100)).probability
        for scored in (model, Bundle.open(tmp_path / "bundle").model)
    )
    assert said.tobytes() == again.tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_best_figure_is_that_of_the_model(data: Dataset, method: str) -> None:
    model, _, found = run(method, data, recipe())
    assert found.best_value == max(entry["wauc"] for entry in found.history) == scores_of(model, data)["wauc"]
    assert found.best_value == next(entry["wauc"] for entry in found.history if entry["epoch"] == found.best_epoch)
    assert not model.training
    assert found.seconds > 0
    assert found.rows_per_second > 0


def test_one_seed_goes_everywhere() -> None:
    def seeds(table: dict[str, Any]) -> list[int]:
        inner = [seed for value in table.values() if isinstance(value, dict) for seed in seeds(value)]
        return inner + ([table["seed"]] if "seed" in table else [])

    assert set(seeds(asdict(seeded(recipe(), 9)))) == {9}
    assert len(seeds(asdict(recipe()))) >= 8


def test_an_unknown_method(data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"Received: 'two-stage'\. Did you mean 'two_stage'"):
        train("two-stage", Job(data, MODEL, recipe()))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.from_base])
def test_a_second_stage_wants_a_base(data: Dataset, method: str) -> None:
    with pytest.raises(ConfigError, match="starts from a trained base"):
        train(method, Job(data, MODEL, recipe()))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.from_base])
def test_a_first_stage_wants_none(data: Dataset, method: str) -> None:
    with pytest.raises(ConfigError, match="starts from nothing"):
        train(method, Job(data, MODEL, recipe(), base_of(data)))
