"""Words that only the new domain has: their rows learn, and nothing else of the tables moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from domlora.adapters.bank import base_state
from domlora.bundle import Bundle, versions
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import wauc
from domlora.features.batch import Batch
from domlora.features.schema import FIRST_ID, Feature, Schema
from domlora.training.new_rows import NewRows
from domlora.training.new_words import NewWords
from domlora.training.onboard import onboard
from domlora.training.stages import Recipe, pretrain
from domlora.training.update import update

KNOWN, ALL = FIRST_ID + 40, FIRST_ID + 80
MODEL: dict[str, Any] = {"name": "deepfm", "embedding_dim": 4, "hidden_units": [16, 8], "dropout": 0.0}
FIT = {"batch_size": 128, "max_epochs": 15}
QUICK = {name: {"lr": 1e-2} for name in ("tables", "dense", "adapters")}


def recipe(**of_onboard: Any) -> Recipe:
    on = {"fit": FIT, "optimizer": {"adapters": {"lr": 5e-3}, "tables": {"lr": 2e-2}}, **of_onboard}
    joint = {"fit": FIT, "optimizer": QUICK}
    carry = {"optimizer_state": "carry", "fit": {"batch_size": 128, "max_epochs": 1}}
    return parse(Config, {"train": {"adapter": {"rank": 2}, "joint": joint, "onboard": on, "update": carry}}).train


def rows(domains: list[int], users: range, num_rows: int, seed: int) -> Batch:
    """Users click or they do not; of each domain ``users`` or, of the last, those behind them."""
    dice = torch.Generator().manual_seed(seed)
    domain = torch.tensor(domains)[torch.randint(0, len(domains), (num_rows,), generator=dice)]
    user = torch.randint(users.start, users.stop, (num_rows,), generator=dice)
    item = torch.randint(FIRST_ID, FIRST_ID + 5, (num_rows,), generator=dice)
    label = (torch.rand(num_rows, generator=dice) < torch.where(user % 2 > 0, 0.8, 0.2)).float()
    return Batch(torch.stack([user, item], 1), torch.zeros(num_rows, 0), domain, label)


def data(schema: Schema, domains: list[int], users: range) -> Dataset:
    sizes = {"train": 1500, "valid": 600, "test": 600}
    return Dataset.from_batches(schema, {s: rows(domains, users, n, len(s)) for s, n in sizes.items()})


def schema_of(num_users: int, domains: tuple[str, ...]) -> Schema:
    return Schema((Feature("user", num_ids=num_users), Feature("item", num_ids=FIRST_ID + 5)), domains=domains)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    known = data(schema_of(KNOWN, ("app", "web")), [0, 1], range(FIRST_ID, KNOWN))
    model, _ = pretrain(known, MODEL, recipe(), method="joint")
    return Bundle(model, MODEL, known.encoder)


@pytest.fixture(scope="module")
def late() -> Dataset:
    return data(schema_of(ALL, ("app", "web", "tv")), [2], range(KNOWN, ALL))


def auc_of(bundle: Bundle, late: Dataset) -> float:
    said = predict(bundle.model, NewRows(late, "tv", bundle.encoder.schema, 2).batches("test", 4096))
    return wauc(said.label, said.probability, said.domain)


def logits(bundle: Bundle) -> torch.Tensor:
    """Of the domains that were there before."""
    batch = rows([0, 1, -1], range(KNOWN), 500, 9)
    with torch.no_grad():
        logit: torch.Tensor = bundle.model(batch.ids, batch.dense, batch.domain)
    return logit


def test_they_learn_and_nothing_else_moves(bundle: Bundle, late: Dataset, tmp_path: Path) -> None:
    before = logits(bundle)
    still, _ = onboard(bundle, late, "tv", recipe(new_words=False))
    after, found = onboard(bundle, late, "tv", recipe())
    assert found.unknown == {"user": 1500, "item": 0}
    assert auc_of(still, late) < 0.6
    assert auc_of(after, late) > 0.7
    assert torch.equal(logits(after), before)
    assert after.encoder.fingerprint() == late.encoder.fingerprint()
    bundle.save(tmp_path / "live")
    opened = Bundle.open(tmp_path / "live")
    grown, _ = onboard(opened, late, "tv", recipe())
    grown.publish(tmp_path / "live")
    again = Bundle.open(tmp_path / "live")
    assert torch.equal(logits(again), before)
    assert auc_of(again, late) == auc_of(after, late)
    assert [version.number for version in versions(tmp_path / "live")] == [1, 2]
    assert torch.equal(logits(Bundle.open(tmp_path / "live", version=1)), before)


def test_each_start_begins_with_rows_that_know_nothing(bundle: Bundle, late: Dataset) -> None:
    one, _ = onboard(bundle, late, "tv", recipe(starts=["mix"], min_gain=0.0))
    _, two = onboard(bundle, late, "tv", recipe(starts=["nearest", "mix"], min_gain=0.0))
    assert two.candidates["trained_mix"]["auc"] == pytest.approx(
        onboard(bundle, late, "tv", recipe(starts=["mix"]))[1].candidates["trained_mix"]["auc"]
    )
    assert auc_of(one, late) > 0.7


def test_where_none_learns_the_base_stays(bundle: Bundle, late: Dataset) -> None:
    after, found = onboard(bundle, late, "tv", recipe(min_gain=1e6))
    assert found.chosen == "base"
    assert after.encoder.vocabularies == bundle.encoder.vocabularies
    assert (
        base_state(after.model)["embedding.weight"].data_ptr()
        == base_state(bundle.model)["embedding.weight"].data_ptr()
    )


def test_words_that_no_row_has_stay_unknown(bundle: Bundle, late: Dataset) -> None:
    few = {split: late.read(split).take(late.read(split).ids[:, 0] < ALL - 10) for split in ("train", "valid", "test")}
    after, _ = onboard(bundle, Dataset.from_batches(late.schema, few), "tv", recipe())
    table = base_state(after.model)["embedding.weight"]
    assert torch.equal(table[ALL - 10 : ALL], table[1].expand(10, -1))
    assert not torch.equal(table[KNOWN : ALL - 10], table[1].expand(ALL - 10 - KNOWN, -1))


def test_an_update_goes_on_with_what_its_optimizer_remembers(bundle: Bundle, late: Dataset) -> None:
    known = data(bundle.encoder.schema, [0, 1], range(FIRST_ID, KNOWN))
    updated, _ = update(bundle, known, recipe())
    assert updated.optimizer
    after, _ = onboard(updated, late, "tv", recipe())
    heights = {name: len(p) for name, p in after.model.named_parameters() if p.dim()}
    moments = {key: len(value) for key, value in after.optimizer.items() if key.endswith("embedding.weight/exp_avg")}
    assert set(moments.values()) == {heights["embedding.weight"]}
    again, _ = update(after, late, recipe())
    assert again.optimizer.keys() == after.optimizer.keys()


def test_a_rule_that_moves_every_row_is_made_a_lazy_one(bundle: Bundle, late: Dataset) -> None:
    rule = {"name": "adamw", "lr": 2e-2, "weight_decay": 0.5}
    before = logits(bundle)
    after, found = onboard(bundle, late, "tv", recipe(optimizer={"tables": rule}))
    assert found.chosen.startswith("trained")
    assert torch.equal(logits(after), before)
    assert NewWords(bundle.model, after.model).rows.keys() == {"embedding.weight", "linear.table.weight"}
