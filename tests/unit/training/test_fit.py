# ruff: noqa: ARG002 - stand-ins keep the signatures of what they stand in for
from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, freeze_
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, DataError, DomloraError, EngineError
from domlora.evaluation.evaluate import Predictions, predict
from domlora.evaluation.metrics import log_loss, macro_auc, wauc
from domlora.features.batch import Batch
from domlora.files import only_one
from domlora.training.checkpoint import read_checkpoint, write_checkpoint
from domlora.training.fit import Fit, FitOptions, Progress, fit, loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule
from domlora.training.validation import figures_of

QUICK = FitOptions(batch_size=128, max_epochs=3, patience=9)
FAST = OptimizerOptions(Rule(lr=0.01), Rule(lr=0.01), Rule(lr=0.01))
LIKE_MAD = OptimizerOptions(*[Rule(lr=1.0)] * 3)


def scores(model: nn.Module, data: Dataset) -> dict[str, float]:
    said = predict(model, data.batches("valid", 16384))
    return {
        "wauc": wauc(said.label, said.probability, said.domain, said.weight),
        "macro_auc": macro_auc(said.label, said.probability, said.domain, said.weight),
        "log_loss": log_loss(said.label, said.probability, said.weight),
    }


def figures(found: Fit) -> str:
    """All of a result but how long it took."""
    return json.dumps([found.history, found.best_value, found.best_epoch])


@pytest.fixture(scope="module")
def streamed(data: Dataset, write_prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same rows from Parquet, in row groups of 100."""
    schema = data.schema
    hashed = tuple(replace(f, hash_buckets=f.num_ids - 2) if f.kind != "numeric" else f for f in schema.features)
    splits = {}
    for split in ("train", "valid"):
        rows = data.read(split)
        columns = {f.name: rows.ids[:, slot].numpy().astype(np.int32) for slot, f in enumerate(schema.categorical)}
        columns |= {f.name: rows.dense[:, place].numpy() for place, f in enumerate(schema.numeric)}
        columns |= {"__domain": rows.domain.numpy().astype(np.int32), "__label": rows.label.numpy()}
        splits[split] = [columns]
    folder = tmp_path_factory.mktemp("streamed") / "data"
    write_prepared(folder, replace(schema, features=hashed, user=None), splits, group_rows=100)
    return Dataset.open(folder, in_memory=False)


def adapted(click: Any) -> nn.Module:
    return freeze_(attach_(click(), 3, include=["tower.*"]))


# what one run does


def test_it_learns(click: Any, data: Dataset) -> None:
    model = click()
    before = scores(model, data)
    found = fit(model, data, replace(QUICK, max_epochs=6), FAST)
    assert scores(model, data)["wauc"] == found.best_value > before["wauc"] + 0.05
    assert found.seconds > 0
    assert found.rows_per_second > 0


@pytest.mark.parametrize("monitor", ["wauc", "macro_auc"])
def test_the_model_ends_with_the_weights_of_its_best_figure(click: Any, data: Dataset, monitor: Any) -> None:
    model = click()
    options = replace(QUICK, max_epochs=8, monitor=monitor)
    found = fit(model, data, options, OptimizerOptions(Rule(lr=0.1), Rule(lr=0.1), Rule(lr=0.1)))
    best = max(found.history, key=lambda entry: entry[monitor])
    assert found.best_value == best[monitor]
    assert found.best_epoch == best["epoch"] < 8  # overfits, so that the last is not the best
    now = scores(model, data)
    assert now == {name: best[name] for name in now}


def test_history(click: Any, data: Dataset) -> None:
    found = fit(click(), data, QUICK, FAST)
    assert [entry["epoch"] for entry in found.history] == [1.0, 2.0, 3.0]
    assert all(set(entry) == {"epoch", "loss", "wauc", "macro_auc", "log_loss"} for entry in found.history)
    assert found.history[-1]["loss"] < found.history[0]["loss"]


def test_reported_loss_is_the_mean_over_rows(click: Any, data: Dataset) -> None:
    """Also where the last batch is smaller: 900 rows in batches of 128."""
    model = click()
    for module in model.modules():  # no dropout, no statistics: the loss before the first step can be computed
        module.p = 0.0
    options = OptimizerOptions(*[Rule(lr=1e-12)] * 3)
    model.norm = nn.Identity()
    rows = data.read("train")
    expected = loss_of(model(rows.ids, rows.dense, rows.domain), rows).item()
    found = fit(model, data, replace(QUICK, max_epochs=1), options)
    assert found.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_of_an_epoch(click: Any, data: Dataset, watched: Any) -> None:
    rows = watched(data)
    fit(click(), rows, replace(QUICK, seed=7, max_epochs=2), FAST)
    assert [asked for asked in rows.asked if asked[0] == "train"] == [("train", 7, 0), ("train", 7, 1)]
    assert sum(rows.sizes) == 2 * data.num_rows("train")
    assert [asked for asked in rows.asked if asked[0] == "valid"] == [("valid", None, 0)] * 2
    assert not any(split == "test" for split, *_ in rows.asked)


def test_patience(click: Any, data: Dataset, watched: Any) -> None:
    rows = watched(data)
    still = OptimizerOptions(*[Rule(lr=1e-30)] * 3)
    model = click()
    model.norm = nn.Identity()  # nothing moves at all, so nothing improves
    found = fit(model, rows, replace(QUICK, max_epochs=50, patience=2), still)
    assert [entry["epoch"] for entry in found.history] == [1.0, 2.0, 3.0]
    assert found.best_epoch == 1.0


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_evaluations_inside_an_epoch(click: Any, data: Dataset, parts: int) -> None:
    options = replace(QUICK, max_epochs=2, evaluations_per_epoch=parts, patience=99)
    found = fit(click(), data, options, FAST)
    assert [entry["epoch"] for entry in found.history] == [number / parts for number in range(1, 2 * parts + 1)]


def test_evaluating_more_often_does_not_change_the_training(click: Any, data: Dataset, digest: Any) -> None:
    """The same steps on the same rows: only where it is looked at differs."""
    models = []
    for parts in (1, 4):
        model = click()
        options = replace(QUICK, evaluations_per_epoch=parts, patience=99)
        states: list[str] = []
        fit(model, data, options, FAST, on_progress=lambda _, m=model, s=states: s.append(digest(m)))
        models.append(states[-1])
    assert models[0] == models[1]


def test_more_evaluations_than_steps_are_refused_before_training(click: Any, data: Dataset) -> None:
    with pytest.raises(ConfigError, match="evaluations_per_epoch"):
        fit(click(), data, replace(QUICK, batch_size=4096, evaluations_per_epoch=2), FAST)


def test_an_empty_training_split_is_refused(click: Any, data: Dataset) -> None:
    empty = Dataset.from_batches(data.schema, {"valid": data.read("valid")})
    with pytest.raises((DataError, ConfigError), match="train"):
        fit(click(), empty, QUICK, FAST)


def test_an_empty_validation_split_is_refused(click: Any, data: Dataset) -> None:
    empty = Dataset.from_batches(data.schema, {"train": data.read("train")})
    with pytest.raises((DataError, ConfigError)):
        fit(click(), empty, QUICK, FAST)


def test_a_validation_split_of_one_class_is_refused(click: Any, data: Dataset) -> None:
    valid = data.read("valid")
    ones = valid._replace(label=torch.ones_like(valid.label))
    rows = Dataset.from_batches(data.schema, {"train": data.read("train"), "valid": ones})
    with pytest.raises(DataError, match="both classes"):
        fit(click(), rows, QUICK, FAST)


def test_weights_of_rows_count(data: Dataset) -> None:
    batch = data.read("train").take(slice(0, 4))
    logit = torch.tensor([0.3, -1.0, 2.0, 0.0])
    plain = nn.functional.binary_cross_entropy_with_logits(logit, batch.label, reduction="none")
    assert loss_of(logit, batch) == plain.mean()
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    assert torch.isclose(loss_of(logit, batch._replace(weight=weight)), (plain * weight).mean())


def test_cosine_ends_near_zero_and_constant_does_not(click: Any, data: Dataset) -> None:
    lengths = {}
    for schedule in ("constant", "cosine"):
        model = click()
        seen: list[Tensor] = []
        options = replace(QUICK, batch_size=900, max_epochs=10, schedule=schedule, patience=99)
        fit(model, data, options, FAST, on_progress=lambda _, m=model, s=seen: s.append(m.head.weight.detach().clone()))
        steps = [(after - before).abs().max().item() for before, after in pairwise(seen)]
        lengths[schedule] = steps[-1] / steps[0]
    assert lengths["cosine"] < 0.1 < lengths["constant"]


def test_cosine_formula(click: Any, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []

    class Recording(Optimizer):
        def step(self, lr_factor: float = 1.0) -> None:
            factors.append(lr_factor)
            super().step(lr_factor)

    monkeypatch.setattr("domlora.training.fit.Optimizer", Recording)
    fit(click(), data, FitOptions(batch_size=100, max_epochs=4, patience=9, schedule="cosine"), FAST)
    expected = [(1 + math.cos(math.pi * step / 36)) / 2 for step in range(36)]  # 900 rows: 9 steps an epoch
    assert factors == pytest.approx(expected, abs=1e-12)


def test_the_average_is_what_is_scored_and_kept(click: Any, data: Dataset) -> None:
    plain, averaged = click(), click()
    options = replace(QUICK, max_epochs=2)
    fit(plain, data, options, FAST)
    found = fit(averaged, data, replace(options, average_decay=0.9), FAST)
    assert not torch.equal(plain.head.weight, averaged.head.weight)
    assert scores(averaged, data)["wauc"] == found.best_value


def test_the_average_does_not_change_the_steps(click: Any, data: Dataset) -> None:
    losses = []
    for decay in (0.0, 0.9):
        found = fit(click(), data, replace(QUICK, average_decay=decay), FAST)
        losses.append([entry["loss"] for entry in found.history])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pause_s", [0.0, 0.11])
def test_progress(click: Any, data: Dataset, pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine too, where every step is told."""
    monkeypatch.setattr("domlora.training.fit.loss_of", lambda *given: time.sleep(pause_s) or loss_of(*given))
    seen: list[Progress] = []
    found = fit(click(), data, QUICK, FAST, on_progress=seen.append)
    ends = [at for at in seen if at.rows == at.total_rows]
    assert [at.epoch for at in ends] == [1, 2, 3]
    assert [at.value for at in ends] == [entry["wauc"] for entry in found.history]
    assert {at.total_rows for at in seen} == {data.num_rows("train")}
    assert all(0 < at.rows <= at.total_rows for at in seen)


# frozen, candidate, failing


def test_a_second_stage_moves_adapters_alone(click: Any, data: Dataset) -> None:
    model = adapted(click)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, data, QUICK, FAST)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"tower.0.lora_A", "tower.0.lora_B", "tower.0.lora_bias"}


def test_the_start_is_a_candidate(click: Any, data: Dataset, digest: Any) -> None:
    model = adapted(click)
    before, value = digest(model), scores(model, data)["wauc"]
    found = fit(model, data, replace(QUICK, patience=2), LIKE_MAD, start_is_candidate=True)
    assert found.history[0]["epoch"] == 0.0
    assert math.isnan(found.history[0]["loss"])
    if found.best_epoch == 0.0:
        assert digest(model) == before
        assert found.best_value == value
    assert found.best_value >= value


def test_a_start_that_cannot_be_beaten_is_returned_bit_for_bit(click: Any, data: Dataset, digest: Any) -> None:
    base = click()
    fit(base, data, replace(QUICK, max_epochs=8), FAST)
    model = freeze_(attach_(base, 3, include=["tower.*"]))
    before = digest(model)
    found = fit(model, data, replace(QUICK, patience=2), LIKE_MAD, start_is_candidate=True)
    assert found.best_epoch == 0.0
    assert digest(model) == before
    assert len(found.history) == 3


class Exploding(nn.Module):
    def __init__(self, value: float, at: int = 3) -> None:
        super().__init__()
        self.weight, self.value, self.at, self.calls = nn.Parameter(torch.zeros(4)), value, at, 0

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.calls += self.training
        return dense @ self.weight + (self.value if self.training and self.calls >= self.at else 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(data: Dataset, value: float) -> None:
    model = Exploding(value)
    with pytest.raises(EngineError, match=r"step 2 .*must be finite.*Lower the learning rate"):
        fit(model, data, QUICK, FAST)
    assert model.weight.isfinite().all()


def test_nan_in_validation_is_an_error_too(click: Any, data: Dataset) -> None:
    valid = data.read("valid")
    broken = valid._replace(dense=torch.full_like(valid.dense, math.nan))
    rows = Dataset.from_batches(data.schema, {"train": data.read("train"), "valid": broken})
    with pytest.raises(EngineError):
        fit(click(), rows, QUICK, FAST)


def test_a_model_that_cannot_move_is_refused(click: Any, data: Dataset) -> None:
    with pytest.raises(ConfigError, match="moves"):
        fit(freeze_(click()), data, QUICK, FAST)


# same bits


def test_same_seed_same_bits(click: Any, data: Dataset, digest: Any) -> None:
    results = []
    for seed in (1, 1, 2):
        model = click()
        torch.rand(seed * 7)  # whatever was drawn before
        results.append((figures(fit(model, data, replace(QUICK, seed=seed), FAST)), digest(model)))
    assert results[0] == results[1]
    assert results[0] != results[2]


RUNS = {
    "plain": (QUICK, False),
    "inside an epoch": (replace(QUICK, evaluations_per_epoch=3), False),
    "average and cosine": (replace(QUICK, average_decay=0.9, schedule="cosine"), False),
    "second stage": (replace(QUICK, patience=2, evaluations_per_epoch=2), True),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("kill_after", [0, 1, 8, 12, 20])
def test_killed_and_resumed_is_straight_through(
    click: Any, data: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path, options: Any, kill_after: int
) -> None:
    how, second = options
    make = (lambda: adapted(click)) if second else click
    straight = make()
    expected = fit(straight, data, how, FAST, start_is_candidate=second)
    with pytest.raises(killed):
        fit(make(), watched(data, kill_after), how, FAST, start_is_candidate=second, checkpoint=tmp_path / "run")
    resumed = make()
    torch.rand(99)
    found = fit(resumed, data, how, FAST, start_is_candidate=second, checkpoint=tmp_path / "run")
    assert figures(found) == figures(expected)
    assert digest(resumed) == digest(straight)


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_killed_while_validating(
    click: Any, data: Dataset, digest: Any, killed: Any, tmp_path: Path, kill_at: int
) -> None:
    """Progress is shown after a validation and before its checkpoint."""
    how = replace(QUICK, average_decay=0.9)
    straight = click()
    expected = fit(straight, data, how, FAST)
    seen = []

    def kill(at: Progress) -> None:
        seen.append(at)
        if at.rows == at.total_rows and at.epoch == kill_at:
            raise killed

    with pytest.raises(killed):
        fit(click(), data, how, FAST, checkpoint=tmp_path / "run", on_progress=kill)
    resumed = click()
    found = fit(resumed, data, how, FAST, checkpoint=tmp_path / "run")
    assert figures(found) == figures(expected)
    assert digest(resumed) == digest(straight)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("kill_after", range(0, 24, 3))
def test_killed_inside_an_epoch_goes_on_at_the_very_step(
    click: Any, data: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path, options: Any, kill_after: int
) -> None:
    how, second = options
    make = (lambda: adapted(click)) if second else click
    straight, plain = make(), watched(data)
    expected = fit(straight, plain, how, FAST, start_is_candidate=second)
    where = {"start_is_candidate": second, "checkpoint": tmp_path / "run", "checkpoint_every_s": 0.0}
    before, after = watched(data, kill_after), watched(data)
    try:
        fit(make(), before, how, FAST, **where)
    except killed:
        torch.rand(99)
    resumed = make()
    found = fit(resumed, after, how, FAST, **where)
    assert figures(found) == figures(expected)
    assert digest(resumed) == digest(straight)
    assert before.sizes + after.sizes == plain.sizes


def test_killed_after_each_step_of_a_stream(
    click: Any, streamed: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path
) -> None:
    how = replace(QUICK, batch_size=150, max_epochs=2, average_decay=0.9, schedule="cosine")
    straight = click()
    expected = fit(straight, streamed, how, FAST)
    deaths = 0
    while True:
        resumed = click()
        try:
            found = fit(resumed, watched(streamed, 1), how, FAST, checkpoint=tmp_path / "run", checkpoint_every_s=0)
            break
        except killed:
            deaths += 1
    assert deaths == 11  # of 12 steps
    assert figures(found) == figures(expected)
    assert digest(resumed) == digest(straight)


def test_a_run_on_rows_in_memory_does_not_go_on_with_streamed_ones(
    click: Any, streamed: Dataset, watched: Any, killed: Any, tmp_path: Path
) -> None:
    """Their order is another."""
    with pytest.raises(killed):
        fit(click(), watched(streamed, 2), QUICK, FAST, checkpoint=tmp_path / "run", checkpoint_every_s=0)
    with pytest.raises(ConfigError, match="the data it began with"):
        fit(click(), Dataset.open(streamed._folder), QUICK, FAST, checkpoint=tmp_path / "run")


def test_when_a_checkpoint_is_written(
    click: Any, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []

    def watched(folder: Path, tensors: Any, facts: Any) -> None:
        written.append((facts["position"], facts["part"]["steps"]))
        write_checkpoint(folder, tensors, facts)

    monkeypatch.setattr("domlora.training.fit.write_checkpoint", watched)
    how = replace(QUICK, batch_size=450, max_epochs=2)
    digests = set()
    cases = (
        (600.0, 0.0, [(1, 0), (2, 0)]),
        (600.0, 60.0, [(2, 0)]),
        (0.0, 60.0, [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]),
    )
    for every_s, apart_s, expected in cases:
        written.clear()
        monkeypatch.setattr("domlora.training.fit._APART_S", apart_s)
        found = fit(click(), data, how, FAST, checkpoint=tmp_path / f"{every_s} {apart_s}", checkpoint_every_s=every_s)
        digests.add(figures(found))
        assert written == expected
    assert len(digests) == 1


def test_a_checkpoint_from_before_there_were_parts(
    click: Any, data: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path
) -> None:
    straight = click()
    expected = fit(straight, data, QUICK, FAST)
    with pytest.raises(killed):
        fit(click(), watched(data, 10), QUICK, FAST, checkpoint=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert facts.pop("part") == {"steps": 0, "rows": 0, "loss": 0.0, "seconds": 0.0}
    (tmp_path / "run" / "checkpoint.json").write_text(json.dumps(facts))
    resumed = click()
    assert figures(fit(resumed, data, QUICK, FAST, checkpoint=tmp_path / "run")) == figures(expected)
    assert digest(resumed) == digest(straight)


@pytest.mark.parametrize("every_s", [-1.0, math.nan])
def test_a_period_out_of_range(click: Any, data: Dataset, every_s: float) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_s must be at least 0"):
        fit(click(), data, QUICK, FAST, checkpoint_every_s=every_s)


def test_killed_again_and_again(
    click: Any, data: Dataset, digest: Any, watched: Any, killed: Any, tmp_path: Path
) -> None:
    straight = click()
    expected = fit(straight, data, QUICK, FAST)
    for _ in range(3):
        try:
            fit(click(), watched(data, 10), QUICK, FAST, checkpoint=tmp_path / "run")
        except killed:
            continue
    resumed = click()
    assert figures(fit(resumed, data, QUICK, FAST, checkpoint=tmp_path / "run")) == figures(expected)
    assert digest(resumed) == digest(straight)


def test_a_run_that_had_ended_is_not_trained_again(
    click: Any, data: Dataset, digest: Any, watched: Any, tmp_path: Path
) -> None:
    first = click()
    expected = fit(first, data, QUICK, FAST, checkpoint=tmp_path / "run")
    rows, again = watched(data), click()
    found = fit(again, rows, QUICK, FAST, checkpoint=tmp_path / "run")
    assert rows.sizes == []
    assert figures(found) == figures(expected)
    assert digest(again) == digest(first)
    assert found.seconds == expected.seconds
    assert found.rows_per_second == expected.rows_per_second


def test_only_the_checkpoint_is_left(click: Any, data: Dataset, tmp_path: Path) -> None:
    fit(click(), data, QUICK, FAST, checkpoint=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# a checkpoint of something else


@pytest.fixture
def checkpoint(click: Any, data: Dataset, watched: Any, killed: Any, tmp_path: Path) -> Path:
    with pytest.raises(killed):
        fit(click(), watched(data, 10), QUICK, FAST, checkpoint=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_size": 64}, {"max_epochs": 5}])
def test_other_options_are_refused(click: Any, data: Dataset, checkpoint: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes on only with the options it began with"):
        fit(click(), data, replace(QUICK, **change), FAST, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "optimizer", [OptimizerOptions(), replace(FAST, dense=Rule("adamw", lr=0.01)), replace(FAST, tables=Rule(lr=0.5))]
)
def test_another_optimizer_is_refused(click: Any, data: Dataset, checkpoint: Path, optimizer: OptimizerOptions) -> None:
    """Half a run at one learning rate and half at another is neither."""
    with pytest.raises(ConfigError, match="began with"):
        fit(click(), data, QUICK, optimizer, checkpoint=checkpoint)


def test_other_rows_are_refused(click: Any, data: Dataset, checkpoint: Path) -> None:
    train = data.read("train")
    other = Dataset.from_batches(
        data.schema, {"train": train._replace(label=1 - train.label), "valid": data.read("valid")}
    )
    with pytest.raises(DomloraError):
        fit(click(), other, QUICK, FAST, checkpoint=checkpoint)


def test_another_model_is_refused_as_a_user_error(data: Dataset, click: Any, checkpoint: Path) -> None:
    model = click()
    model.head = nn.Sequential(model.head)
    with pytest.raises(DomloraError):
        fit(model, data, QUICK, FAST, checkpoint=checkpoint)


def test_another_start_is_refused(click: Any, data: Dataset, checkpoint: Path) -> None:
    """A second stage on another base would silently go on with the first one."""
    with pytest.raises(DomloraError):
        fit(click(seed=1), data, QUICK, FAST, checkpoint=checkpoint)


def test_a_damaged_checkpoint_is_refused(click: Any, data: Dataset, checkpoint: Path) -> None:
    path = checkpoint / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="Remove the folder"):
        fit(click(), data, QUICK, FAST, checkpoint=checkpoint)
    shutil.rmtree(checkpoint)
    fit(click(), data, QUICK, FAST, checkpoint=checkpoint)


# options


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"max_epochs": 0},
        {"patience": 0},
        {"evaluations_per_epoch": 0},
        {"average_decay": 1.0},
        {"average_decay": math.nan},
        {"seed": -1},
    ],
)
def test_numbers_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(QUICK, **change)


@pytest.mark.parametrize(("change", "guess"), [({"monitor": "wuac"}, "wauc"), ({"schedule": "cosin"}, "cosine")])
def test_unknown_names_are_refused_with_the_nearest(change: dict[str, Any], guess: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{guess}'"):
        replace(QUICK, **change)


def test_rows_need_no_dataset(click: Any, data: Dataset) -> None:
    """Anything with the members of the protocol will do."""

    class Rows:
        schema = data.schema

        def num_rows(self, split: str) -> int:
            return 200

        def fingerprint(self) -> str:
            return data.fingerprint()

        def batches(
            self, split: str, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0
        ) -> Iterator[Batch]:
            rows = data.read(split)
            for first in range(start * batch_size, 200, batch_size):
                yield rows.take(slice(first, min(first + batch_size, 200)))

    assert len(fit(click(), Rows(), QUICK, FAST).history) == 3


# a run that goes wrong


def broken_at(data: Dataset, row: int, **columns: Any) -> Dataset:
    """The rows with one of the training split changed."""
    train = data.read("train")
    changed = train._replace(**{name: tensor.clone() for name, tensor in train._asdict().items() if tensor is not None})
    for name, value in columns.items():
        getattr(changed, name)[row] = value
    return Dataset.from_batches(data.schema, {"train": changed, "valid": data.read("valid")})


class Plain(nn.Module):
    """Without a normalisation, which would spread a bad value over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        return self.head(dense).squeeze(1)


def batch_with(rows: Dataset, options: FitOptions, epoch: int, is_bad: Any) -> int:
    found = rows.batches("train", options.batch_size, seed=options.seed, epoch=epoch)
    return next(number for number, batch in enumerate(found) if is_bad(batch.dense))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_value_is_named_with_its_batch_and_feature(data: Dataset, tmp_path: Path, value: float) -> None:
    rows = broken_at(data, 17, dense=torch.tensor([0.0, value, 0.0, 0.0]))
    number = batch_with(rows, QUICK, 0, lambda dense: not dense.isfinite().all())
    name = data.schema.numeric[1].name
    told = (
        rf"step {number} \(epoch 0, batch {number} of it\) must be finite: dense feature '{name}' is not finite in 1 of"
    )
    with pytest.raises(EngineError, match=told):
        fit(Plain(), rows, QUICK, FAST, checkpoint=tmp_path / "run", checkpoint_every_s=0)
    assert read_checkpoint(tmp_path / "run")[1]["steps"] == number  # the state just before
    assert all(t.isfinite().all() for t in read_checkpoint(tmp_path / "run")[0].values() if t.is_floating_point())


def test_a_loss_that_explodes_is_named_with_its_batch_and_largest_value(data: Dataset) -> None:
    rows = broken_at(data, 17, dense=torch.tensor([0.0, 0.0, 1e6, 0.0]), label=0.0)
    model, number = Plain(), batch_with(rows, QUICK, 0, lambda dense: bool((dense > 1e5).any()))
    with torch.no_grad():
        model.head.weight.fill_(0.1)
    name = data.schema.numeric[2].name
    told = rf"batch {number} of it\) must not explode.*largest dense value is 1e\+06, feature '{name}'"
    with pytest.raises(EngineError, match=told):
        fit(model, rows, QUICK, FAST)


def test_a_learning_rate_that_explodes_is_caught_at_the_next_step(click: Any, data: Dataset) -> None:
    with pytest.raises(EngineError, match=r"the loss of step [12] .*must not explode.*Lower the learning rate"):
        fit(click(), data, QUICK, OptimizerOptions(*[Rule(lr=1e4)] * 3))


def test_columns_that_nobody_scaled_are_no_explosion(data: Dataset) -> None:
    train = data.read("train")
    rows = Dataset.from_batches(
        data.schema, {"train": train._replace(dense=train.dense * 1e4), "valid": data.read("valid")}
    )
    assert fit(Plain(), rows, QUICK, FAST).history[0]["loss"] > 100


class BreaksARow(nn.Module):
    """A table whose row 0 gets a gradient that is not finite from a loss that is, and is never read again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.calls = nn.Embedding(2, 4), nn.Linear(4, 1), 0

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.calls += self.training
        logit = self.head(dense).squeeze(1)
        if self.calls == 4 and self.training:
            logit = logit + (self.table.weight[0] * 0.0).norm()  # the root of 0 has no slope
            self.table.weight.register_hook(lambda grad: torch.full_like(grad, math.nan))
        return logit


@pytest.mark.parametrize(("every_s", "kept"), [(0.0, 3), (600.0, 2)])
def test_broken_weights_are_never_kept(data: Dataset, tmp_path: Path, every_s: float, kept: int) -> None:
    options = replace(QUICK, evaluations_per_epoch=3)  # of 8 steps, the first after 2
    with pytest.raises(EngineError, match=r"weights must be finite before step \d+.*model/table\.weight"):
        fit(BreaksARow(), data, options, FAST, checkpoint=tmp_path / "run", checkpoint_every_s=every_s)
    tensors, facts = read_checkpoint(tmp_path / "run")
    assert facts["steps"] == kept
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


def test_infinite_buffers_are_no_error(data: Dataset, tmp_path: Path) -> None:
    model = Plain()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    fit(model, data, QUICK, FAST, checkpoint=tmp_path / "run", checkpoint_every_s=0)


# two runs, and disks


def test_a_checkpoint_in_use_is_refused_at_once(click: Any, data: Dataset, tmp_path: Path) -> None:
    with only_one(tmp_path / "run"), pytest.raises(DataError, match=rf"process {os.getpid()} is writing this one"):
        fit(click(), data, QUICK, FAST, checkpoint=tmp_path / "run")
    fit(click(), data, QUICK, FAST, checkpoint=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Heard:
    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []
        self.said: list[Predictions] = []

    def __call__(self, progress: Progress) -> None:
        pass

    def validated(self, history: list[dict[str, float]], said: Predictions) -> None:
        self.entries.append(history[-1])
        self.said.append(said)


def test_a_watcher_hears_each_validation_and_changes_nothing(click: Any, data: Dataset, digest: Any) -> None:
    plain, watched, heard = click(), click(), Heard()
    expected = fit(plain, data, QUICK, FAST)
    found = fit(watched, data, QUICK, FAST, on_progress=heard)
    assert heard.entries == found.history
    assert figures(found) == figures(expected)
    assert digest(watched) == digest(plain)
    assert [figures_of(said)["wauc"] for said in heard.said] == [entry["wauc"] for entry in found.history]
