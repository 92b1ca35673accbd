"""What moves in a daily update, what does not, and what the gate says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from domlora.adapters.attach import attach_
from domlora.adapters.bank import adapter_parameters, base_state
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError, DataError, SchemaError
from domlora.evaluation.evaluate import predict
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import OOV_ID, Feature, Schema
from domlora.layers.experts import DomainEmbedding
from domlora.models.build import MODELS, build_model
from domlora.models.growth import pieces_of
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.replay import WithReplay
from domlora.training.stages import Recipe, Stage, Updating, pretrain
from domlora.training.update import REMEMBERED, gate, update

OPTIONS: dict[str, Any] = {"name": "deepfm", "hidden_units": [8, 4], "embedding_dim": 4, "dropout": 0.0}
FAST = OptimizerOptions(tables=Rule("lazy_adam", lr=0.05), adapters=Rule("lazy_adam", lr=0.01))
RECIPE = Recipe(
    joint=Stage(FitOptions(max_epochs=2, batch_size=128)),
    update=Updating(FitOptions(max_epochs=3, batch_size=128), FAST, replay_share=0.5),
)


def encoder(items: int, domains: tuple[str, ...] = ("app", "web")) -> Encoder:
    schema = Schema((Feature("user", num_ids=42), Feature("item", num_ids=items + 2)), domains=domains)
    return Encoder(schema, {"user": [f"u{k}" for k in range(40)], "item": [f"i{k}" for k in range(items)]})


def day(
    items: range, encoded: Encoder, seed: int, rows: int = 1500, users: range = range(40), shuffled: int | None = None
) -> Dataset:
    """Clicks that follow the item: even ones at 80 %, odd ones at 20 %."""
    dice = np.random.default_rng(seed)

    def split(count: int) -> Batch:
        item, user = dice.choice(items, count), dice.choice(users, count)
        domain = dice.integers(0, len(encoded.schema.domains), count)
        label = (dice.random(count) < np.where(item % 2 == 0, 0.8, 0.2)).astype("f4")
        if shuffled is not None:
            label[domain == shuffled] = dice.permutation(label[domain == shuffled])
        ids = torch.from_numpy(np.stack([user + 2, item + 2], 1))
        return Batch(ids, torch.zeros(count, 0), torch.from_numpy(domain), torch.from_numpy(label))

    splits = {"train": split(rows), "valid": split(1000), "test": split(2000)}
    return Dataset.from_batches(encoded.schema, splits, encoded)


def world(users_known: int, users: list[int] | None = None, domains: list[int] | None = None) -> Dataset:
    """Features of every kind, labels that follow the user; the same rows to learn from and to validate on."""
    item, seen = Feature("item", num_ids=5), Feature("seen", kind="sequence", num_ids=5, share="item", max_length=3)
    features = (Feature("user", num_ids=users_known), item, Feature("age", kind="numeric"), seen)
    schema = Schema(features, domains=("app", "web"))
    dice = np.random.default_rng(1)
    user = dice.choice(users or range(2, users_known), 256)
    others = dice.integers(2, 5, (256, 4))
    label = (dice.random(256) < np.where(user % 2, 0.8, 0.2)).astype("f4")
    ids, dense = np.concatenate([user[:, None], others], 1), dice.standard_normal((256, 1)).astype("f4")
    rows = Batch(*map(torch.from_numpy, (ids, dense, dice.choice(domains or [0, 1], 256), label)))
    return Dataset.from_batches(schema, {"train": rows, "valid": rows})


@pytest.fixture(scope="module")
def live() -> Bundle:
    first = day(range(10), encoder(10), seed=1)
    model, _ = pretrain(first, OPTIONS, RECIPE, method="joint")
    return Bundle(model, dict(OPTIONS), first.encoder)


@pytest.fixture(scope="module")
def second() -> Dataset:
    return day(range(5, 15), encoder(15), seed=2)


def test_tables_and_adapters_move_and_the_rest_stands_still(live: Bundle, second: Dataset) -> None:
    before = {name: tensor.clone() for name, tensor in base_state(live.model).items()}
    updated, found = update(live, second, RECIPE)
    assert found.best_epoch > 0
    after = base_state(updated.model)
    assert {name for name in before if not torch.equal(before[name], after[name][: len(before[name])])} == {
        name for name in before if "table" in name or "embedding" in name
    }
    banks = dict(adapter_parameters(live.model))
    assert any(not torch.equal(bank, banks[name]) for name, bank in adapter_parameters(updated.model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(live.model).items())
    assert all(parameter.requires_grad for parameter in updated.model.parameters())


@pytest.mark.parametrize("average_decay", [0.0, 0.9])
def test_rows_that_the_day_does_not_read_keep_their_bits(live: Bundle, average_decay: float) -> None:
    today = day(range(5, 15), encoder(15), seed=2, users=range(20))
    rules = replace(RECIPE.update, fit=replace(RECIPE.update.fit, average_decay=average_decay))
    updated, _ = update(live, today, replace(RECIPE, update=rules))
    for name, before in base_state(live.model).items():
        if "embedding" in name or "table" in name:
            after = base_state(updated.model)[name]
            assert torch.equal(after[22:42], before[22:42]), "users 20 to 39"
            assert not torch.equal(after[2:22], before[2:22])


def test_new_ids_learn(live: Bundle, second: Dataset) -> None:
    updated, _ = update(live, second, RECIPE)
    test = second.read("test")
    said = predict(updated.model, [test]).probability
    item = test.ids[:, 1].numpy() - 2
    good, bad = said[(item >= 10) & (item % 2 == 0)], said[(item >= 10) & (item % 2 == 1)]
    assert good.mean() > 0.65
    assert bad.mean() < 0.35


def test_named_dense_layers_move(live: Bundle, second: Dataset) -> None:
    recipe = replace(RECIPE, update=replace(RECIPE.update, moving=("tower.0.*",)))
    updated, _ = update(live, second, recipe)
    moved = [
        name for name, tensor in base_state(live.model).items()
        if tensor.shape == base_state(updated.model)[name].shape and not torch.equal(tensor, base_state(updated.model)[name])
    ]  # fmt: skip
    assert any(name.startswith("tower.0") for name in moved)
    assert not any(name.startswith("tower.") and not name.startswith("tower.0") for name in moved)


def test_a_day_that_misleads_changes_nothing(live: Bundle) -> None:
    honest = day(range(10), live.encoder, seed=3)
    train = honest.read("train")
    splits = {"train": train._replace(label=1 - train.label), "valid": honest.read("valid")}
    updated, found = update(live, Dataset.from_batches(honest.schema, splits, live.encoder), RECIPE)
    assert found.best_epoch == 0
    assert all(torch.equal(tensor, base_state(updated.model)[name]) for name, tensor in base_state(live.model).items())


def test_a_day_that_misleads_leaves_the_carried_moments_alone(live: Bundle, second: Dataset) -> None:
    recipe = replace(RECIPE, update=replace(RECIPE.update, optimizer_state="carry"))
    once, _ = update(live, second, recipe)
    kept = {name: tensor.clone() for name, tensor in once.optimizer.items()}
    train = second.read("train")
    splits = {"train": train._replace(label=1 - train.label), "valid": second.read("valid")}
    after, found = update(once, Dataset.from_batches(second.schema, splits, once.encoder), recipe)
    assert found.best_epoch == 0
    assert all(torch.equal(tensor, after.optimizer[name]) for name, tensor in kept.items())
    assert all(torch.equal(tensor, once.optimizer[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("policy", ["fresh", "carry"])
def test_moments_are_carried_by_choice(live: Bundle, second: Dataset, policy: Any) -> None:
    recipe = replace(RECIPE, update=replace(RECIPE.update, optimizer_state=policy))
    once, _ = update(live, second, recipe)
    assert bool(once.optimizer) == (policy == "carry")
    third = day(range(8, 18), encoder(18), seed=4)
    twice, _ = update(once, third, recipe)
    forgetful, _ = update(replace(once, optimizer={}), third, recipe)
    same = all(torch.equal(a, b) for a, b in zip(twice.model.parameters(), forgetful.model.parameters(), strict=True))
    assert same == (policy == "fresh")
    heights = {name: len(parameter) for name, parameter in twice.model.named_parameters()}
    assert all(t.dim() == 0 or len(t) == heights[key.split("/")[1]] for key, t in twice.optimizer.items())


def test_killed_and_started_again_it_ends_with_the_same_bits(live: Bundle, second: Dataset, tmp_path: Path) -> None:
    straight, _ = update(live, second, RECIPE)
    calls = []

    def killed(_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(live, second, RECIPE, checkpoint=tmp_path / "run", on_progress=killed)
    again, _ = update(live, second, RECIPE, checkpoint=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), again.model.parameters(), strict=True))


def test_killed_after_training_it_still_knows_the_moments(live: Bundle, second: Dataset, tmp_path: Path) -> None:
    recipe = replace(RECIPE, update=replace(RECIPE.update, optimizer_state="carry"))
    first, _ = update(live, second, recipe, checkpoint=tmp_path / "run")
    again, _ = update(live, second, recipe, checkpoint=tmp_path / "run")
    assert first.optimizer
    assert first.optimizer.keys() == again.optimizer.keys()
    assert all(torch.equal(tensor, again.optimizer[key]) for key, tensor in first.optimizer.items())


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_moves_what_the_day_touches_and_nothing_else(name: str, adapters: bool) -> None:
    began, options = world(6), {"name": name, "hidden_units": [8, 4], "embedding_dim": 4}
    torch.manual_seed(1)
    model = build_model(schema=began.schema, **options)
    if adapters:
        attach_(model, 2, include=["tower.*"])
    today = world(8, users=[2, 3, 7], domains=[0])
    rules = Updating(FitOptions(max_epochs=4, batch_size=32), FAST, replay_share=0.0)
    updated, found = update(Bundle(model, options, began.encoder), today, Recipe(update=rules))
    assert found.best_epoch > 0
    before, after, pieces = base_state(model), base_state(updated.model), pieces_of(model, updated.model)
    for table, (user, *_) in pieces.items():
        kept = slice(user.old + 4, user.old + 6), slice(user.new + 4, user.new + 6)
        assert torch.equal(after[table][kept[1]], before[table][kept[0]]), "users 4 and 5"
    assert any(not torch.equal(after[t][p[0].new + 7], before[t][p[0].old + OOV_ID]) for t, p in pieces.items()), (
        "user 7"
    )
    vectors = {f"{part}.weight" for part, module in model.named_modules() if isinstance(module, DomainEmbedding)}
    for still in before.keys() - pieces.keys() - vectors:
        assert torch.equal(after[still], before[still]), still
    assert all(torch.equal(after[each][1], before[each][1]) for each in vectors), "a domain without rows"
    banks = dict(adapter_parameters(updated.model))
    assert all(torch.equal(banks[bank][1], rows[1]) for bank, rows in adapter_parameters(model)), (
        "a domain without rows"
    )


def test_earlier_rows_fill_each_batch(live: Bundle, second: Dataset) -> None:
    first = day(range(10), encoder(10), seed=1, rows=333)
    both = WithReplay(second, first, 0.25, 100)
    batches = list(both.batches("train", 100, seed=1))
    assert sum(batch.num_rows for batch in batches) == both.num_rows("train")
    assert len(batches) == both.steps == 20
    whole = list(both.batches("train", 100, seed=1, epoch=1))
    rest = list(both.batches("train", 100, seed=1, epoch=1, start=7))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole[7:], rest, strict=True))
    assert both.num_rows("valid") == second.num_rows("valid")
    with_old, _ = update(live, second, RECIPE, replay=first)
    without, _ = update(live, second, RECIPE)
    assert not all(
        torch.equal(a, b) for a, b in zip(with_old.model.parameters(), without.model.parameters(), strict=True)
    )


def test_other_words_or_columns_are_refused(live: Bundle, second: Dataset) -> None:
    other = Encoder(second.schema, {"user": [f"x{k}" for k in range(40)], "item": [f"i{k}" for k in range(15)]})
    with pytest.raises(SchemaError):
        update(live, Dataset.from_batches(second.schema, {"train": second.read("train")}, other), RECIPE)
    narrow = Dataset.from_batches(
        Schema((Feature("user", num_ids=42),), domains=("app", "web")),
        {"train": second.read("train")._replace(ids=second.read("train").ids[:, :1])},
    )
    with pytest.raises(DataError, match="columns of the new ones"):
        WithReplay(second, narrow, 0.5, 100)
    earlier = Dataset.from_batches(second.schema, {"train": second.read("train")}, other)
    with pytest.raises(SchemaError, match=r"words of feature 'user'"):
        update(live, second, RECIPE, replay=earlier)
    with pytest.raises(ConfigError, match="replay_share"):
        Updating(replay_share=1.0)


def test_the_gate_passes_a_good_day_and_remembers(live: Bundle, second: Dataset) -> None:
    updated, _ = update(live, second, RECIPE)
    candidate, verdict = gate(live, updated, second, RECIPE.update)
    assert verdict.passed
    assert verdict.wauc.value > 0.02
    assert set(candidate.facts["auc"]) == {"app", "web"}


def test_the_gate_names_the_domain_whose_labels_are_shuffled(live: Bundle, second: Dataset) -> None:
    published, _ = gate(live, live, day(range(10), live.encoder, seed=5), RECIPE.update)
    poisoned = day(range(10), live.encoder, seed=6, shuffled=1)
    updated, _ = update(published, poisoned, RECIPE)
    _, verdict = gate(published, updated, poisoned, RECIPE.update)
    assert not verdict.passed
    assert [row.status for row in verdict.domains] == ["passed", "drifted"]
    assert verdict.reasons[0].startswith("web: AUC was")


def test_a_day_of_reversed_labels_is_stopped_though_it_is_learned(live: Bundle) -> None:
    honest = day(range(10), live.encoder, seed=6)
    splits = {split: honest.read(split) for split in ("train", "valid", "test")}
    splits = {split: rows._replace(label=1 - rows.label) for split, rows in splits.items()}
    spoiled = Dataset.from_batches(honest.schema, splits, live.encoder)
    updated, _ = update(live, spoiled, RECIPE)
    _, verdict = gate(live, updated, spoiled, RECIPE.update)
    assert all(row.candidate > 0.7 for row in verdict.domains)
    assert [row.status for row in verdict.domains] == ["reversed", "reversed"]


def test_a_domain_that_a_spoiled_neighbour_drags_down_is_named_too(live: Bundle) -> None:
    honest = day(range(10), live.encoder, seed=6)
    splits = {split: honest.read(split) for split in ("train", "valid", "test")}
    spoiled = Dataset.from_batches(
        honest.schema,
        {s: r._replace(label=torch.where(r.domain == 1, 1 - r.label, r.label)) for s, r in splits.items()},
        live.encoder,
    )
    updated, _ = update(live, spoiled, RECIPE)
    _, verdict = gate(live, updated, spoiled, RECIPE.update)
    assert [row.status for row in verdict.domains] == ["fell", "reversed"]
    assert [reason.split(":")[0] for reason in verdict.reasons[:2]] == ["app", "web"]


def test_a_domain_without_rows_today_is_remembered_as_it_was(live: Bundle) -> None:
    whole = day(range(10), live.encoder, seed=5)
    published, _ = gate(live, live, whole, RECIPE.update)
    test = whole.read("test")
    label = torch.where(test.domain == 1, 0.0, test.label)
    label[(test.domain == 1).nonzero()[:5, 0]] = 1.0
    app = test._replace(label=label)
    quiet = Dataset.from_batches(whole.schema, {"train": whole.read("train"), "test": app}, live.encoder)
    after, verdict = gate(published, published, quiet, RECIPE.update)
    assert verdict.domains[1].status == "unjudged"
    assert after.facts[REMEMBERED]["web"] == published.facts[REMEMBERED]["web"]
    empty = Dataset.from_batches(whole.schema, {"train": whole.read("train")}, live.encoder)
    with pytest.raises(DataError, match=r"rows of the test split.*Prepare the day"):
        gate(live, live, empty, RECIPE.update)
