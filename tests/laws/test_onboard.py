"""Law 6: onboarding a domain changes no bit of the base and of what any other domain gets, for every model in ``MODELS``."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import base_state, rows_of
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.errors import SchemaError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.models.growth import grown as larger
from domlora.training.fit import FitOptions
from domlora.training.new_words import NewWords
from domlora.training.onboard import onboard
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Onboarding, Recipe

OLD, NEW = ("app", "web", "mail"), ("app", "web", "mail", "radio", "shop")
OPTIONS: dict[str, Any] = {"embedding_dim": 4, "hidden_units": [12, 8], "dropout": 0.3}
OF_DOMAINS = set(MODELS) - {"mlp", "wdl", "nfm", "autoint", "pnn", "dcn", "fibinet", "deepfm", "xdeepfm", "adaptdhm"}
RECIPE = Recipe(
    onboard=Onboarding(
        FitOptions(batch_size=256, max_epochs=2),
        OptimizerOptions(adapters=Rule("adamw", lr=0.03, weight_decay=0.5)),
        starts=("zero", "mean", "nearest", "mix"),
        min_gain=0.0,
        new_words=False,
    )
)


def schema_of(domains: tuple[str, ...], num_users: int) -> Schema:
    return Schema(
        (
            Feature("user", num_ids=num_users),
            Feature("item", num_ids=9),
            Feature("domain", num_ids=2 + len(domains)),
            Feature("past", "sequence", num_ids=9, share="item", max_length=3),
            Feature("age", "numeric"),
        ),
        domains=domains,
    )


def rows(schema: Schema, num_rows: int, seed: int) -> Batch:
    random = torch.Generator().manual_seed(seed)
    domain = torch.randint(0, schema.num_domains, (num_rows,), generator=random)
    user, item = (torch.randint(0, f.num_ids, (num_rows,), generator=random) for f in schema.features[:2])
    past = torch.randint(0, 9, (num_rows, 3), generator=random)
    dense = torch.randn(num_rows, 1, generator=random)
    sign = 1 - 2 * (domain == schema.num_domains - 1).float()  # the last domain is the others turned over
    label = (torch.rand(num_rows, generator=random) < torch.sigmoid(2 * sign * dense[:, 0] + 0.2 * item - 1)).float()
    return Batch(torch.cat([torch.stack([user, item, domain + 2], 1), past], 1), dense, domain, label)


def dataset(schema: Schema) -> Dataset:
    sizes = {"train": 900, "valid": 600, "test": 60}
    return Dataset.from_batches(schema, {split: rows(schema, size, len(split)) for split, size in sizes.items()})


@pytest.fixture(scope="module")
def grown() -> Dataset:
    return dataset(schema_of(NEW, 14))


@pytest.fixture(scope="module")
def known() -> Dataset:
    return dataset(schema_of(OLD, 12))


def bundle_of(name: str, data: Dataset, *, adapted: bool = True) -> Bundle:
    torch.manual_seed(0)
    model = build_model(name, data.schema, **OPTIONS)
    if adapted:
        attach_(model, data.schema.num_domains, temperature=4.0, include=["*"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Bundle(model.eval(), {"name": name, **OPTIONS}, data.encoder)


def digest(model: nn.Module, batch: Batch) -> str:
    with torch.no_grad():
        logit = model(batch.ids, batch.dense, batch.domain)
    return hashlib.sha256(logit.numpy().tobytes()).hexdigest()


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in base_state(model).items()}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_DOMAINS])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "no adapters"])
def test_no_other_domain_moves_by_a_bit(name: str, adapted: bool, known: Dataset, grown: Dataset) -> None:
    bundle = bundle_of(name, known, adapted=adapted)
    batch = rows(known.schema, 200, 9)
    batch.domain[::7] = -1
    before, base = digest(bundle.model, batch), base_bits(bundle.model)
    after, found = onboard(bundle, grown, "shop", RECIPE)
    assert digest(after.model, batch) == digest(bundle.model, batch) == before
    assert base_bits(after.model) == base_bits(bundle.model) == base
    assert after.encoder.schema.domains == (*OLD, "shop")
    assert after.encoder.vocabularies == bundle.encoder.vocabularies
    assert found.chosen.startswith("trained")  # else nothing was put to the test
    assert any(value.any() for value in rows_of(after.model, 3).values())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OF_DOMAINS])
def test_nor_when_new_words_learn(name: str, known: Dataset, grown: Dataset) -> None:
    bundle = bundle_of(name, known)
    batch = rows(known.schema, 200, 9)  # every word that the bundle knows, and unknown ones
    before, base = digest(bundle.model, batch), base_bits(bundle.model)
    after, found = onboard(bundle, grown, "shop", replace(RECIPE, onboard=replace(RECIPE.onboard, new_words=True)))
    assert digest(after.model, batch) == digest(bundle.model, batch) == before
    assert base_bits(bundle.model) == base
    assert after.encoder.vocabularies == grown.encoder.vocabularies
    assert found.chosen.startswith("trained")
    words, state = NewWords(bundle.model, after.model), base_state(after.model)
    for name, old in base_state(bundle.model).items():
        kept = torch.ones(len(state[name]), dtype=torch.bool) if state[name].dim() else torch.tensor(True)
        if name in words.rows:
            kept[words.rows[name]] = False
        assert torch.equal(state[name][kept].flatten(), old.flatten())
    untrained = larger(bundle.model, {"name": bundle.model_options["name"], **OPTIONS}, known.schema, words_of(after))
    assert any(bool((words.of(after.model)[name] != start).any()) for name, start in words.of(untrained).items())


def words_of(bundle: Bundle) -> Schema:
    return replace(bundle.encoder.schema, domains=OLD)


@pytest.mark.parametrize("name", sorted(OF_DOMAINS))
def test_a_base_with_weights_of_each_domain_is_refused(name: str, known: Dataset, grown: Dataset) -> None:
    with pytest.raises(SchemaError, match=f"model '{name}' has weights of each domain"):
        onboard(bundle_of(name, known), grown, "shop", RECIPE)


@pytest.mark.parametrize("more", [{"per_domain": True}, {"mixture": {"num_experts": 4}}], ids=str)
def test_so_are_copies_and_mixtures(more: dict[str, Any], known: Dataset, grown: Dataset) -> None:
    options = {"name": "mlp", **OPTIONS, **more}
    with pytest.raises(SchemaError, match="weights of each domain"):
        onboard(Bundle(build_model(schema=known.schema, **options), options, known.encoder), grown, "shop", RECIPE)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_known_domain_is_trained_anew_on_any_base(name: str, known: Dataset) -> None:
    bundle = bundle_of(name, known)
    batch = rows(known.schema, 300, 9)
    others, own = batch.take(batch.domain != 1), batch.take(batch.domain == 1)
    before, base = digest(bundle.model, others), base_bits(bundle.model)
    after, found = onboard(bundle, known, "web", replace(RECIPE, onboard=replace(RECIPE.onboard, starts=("zero",))))
    assert digest(after.model, others) == before
    assert base_bits(after.model) == base
    assert after.encoder.fingerprint() == bundle.encoder.fingerprint()
    assert next(iter(found.candidates)) == "own"
    assert (digest(after.model, own) == digest(bundle.model, own)) == (found.chosen == "own")
