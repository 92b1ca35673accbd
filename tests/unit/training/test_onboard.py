from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from domlora.adapters.bank import adapter_layers, base_state, rows_of
from domlora.bundle import Bundle
from domlora.config import Config, parse
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError, DataError, SchemaError, UnknownDomainError
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import log_loss, wauc
from domlora.features.schema import FIRST_ID, OOV_ID, Feature
from domlora.training.fit import FitOptions
from domlora.training.new_rows import NewRows
from domlora.training.onboard import Onboarded, onboard
from domlora.training.stages import Onboarding, Recipe, pretrain

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [16, 8], "dropout": 0.0}
JOINT = {"fit": {"batch_size": 256, "max_epochs": 12}, "optimizer": {n: {"lr": 5e-3} for n in ("dense", "adapters")}}
ONBOARD = {"fit": {"batch_size": 256, "max_epochs": 20}, "optimizer": {"adapters": {"lr": 5e-3}}, "prior_rows": 30.0}


def recipe(**onboard: Any) -> Recipe:
    return parse(Config, {"train": {"adapter": {"rank": 4}, "joint": JOINT, "onboard": {**ONBOARD, **onboard}}}).train


class Late(World):
    """The last domain is a copy of the second, with clicks of its own."""

    def _teacher(self) -> Any:
        matrix, hidden_bias, readout, offset = super()._teacher()
        matrix, offset = matrix.clone(), offset.clone()
        matrix[-1], offset[-1] = matrix[1], offset[1] - 1.0
        return matrix, hidden_bias, readout, offset


@pytest.fixture(scope="module")
def everything() -> Dataset:
    return Late(num_domains=5, num_dense=6, hidden_units=8, difference=1.5).dataset(12_000, seed=3)[0]


@pytest.fixture(scope="module")
def bundle(everything: Dataset) -> Bundle:
    data = without_last(everything)
    model, _ = pretrain(data, MODEL, recipe(), method="joint")
    return Bundle(model, MODEL, data.encoder)


def without_last(data: Dataset) -> Dataset:
    names = data.schema.domains[:-1]
    features = (replace(data.schema.features[0], num_ids=FIRST_ID + len(names)), *data.schema.features[1:])
    schema = replace(data.schema, domains=names, features=features)
    splits = {split: data.read(split) for split in SPLITS}
    return Dataset.from_batches(schema, {s: rows.take(rows.domain < len(names)) for s, rows in splits.items()})


def cut(data: Dataset, **most: int) -> Dataset:
    """At most so many rows of the last domain in each split that is named."""
    splits = {}
    for split in SPLITS:
        rows = data.read(split)
        own = rows.domain == data.schema.num_domains - 1
        splits[split] = rows.take(~own | (own.cumsum(0) <= most.get(split, rows.num_rows)))
    return Dataset.from_batches(data.schema, splits)


def relabelled(data: Dataset, split: str, label: float) -> Dataset:
    splits = {s: data.read(s) for s in SPLITS}
    own = splits[split].domain == data.schema.num_domains - 1
    splits[split] = splits[split]._replace(label=torch.where(own, label, splits[split].label))
    return Dataset.from_batches(data.schema, splits)


def of_new(bundle: Bundle, data: Dataset, split: str = "test") -> tuple[float, float]:
    """AUC and log loss on the new domain's rows."""
    number = bundle.encoder.schema.num_domains - 1
    said = predict(bundle.model, NewRows(data, "d4", bundle.encoder.schema, number).batches(split, 4096))
    return wauc(said.label, said.probability, said.domain), log_loss(said.label, said.probability)


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_neighbour_is_found_and_helps(bundle: Bundle, everything: Dataset) -> None:
    few = cut(everything, train=100)
    after, found = onboard(bundle, few, "d4", recipe())
    assert found.nearest == "d1"
    assert max(found.weights, key=found.weights.__getitem__) == "d1"
    assert found.candidates["nearest"]["auc"] > found.candidates["base"]["auc"] + 0.05
    assert found.candidates["nearest"]["log_loss"] < found.candidates["base"]["log_loss"]
    assert found.chosen != "base"
    base, _ = onboard(bundle, few, "d4", recipe(starts=[], min_gain=1e6))
    assert of_new(after, everything)[0] > of_new(base, everything)[0] + 0.05
    assert of_new(after, everything)[1] < of_new(base, everything)[1] - 0.02


def test_with_many_rows_it_is_trained(bundle: Bundle, everything: Dataset) -> None:
    after, found = onboard(bundle, everything, "d4", recipe(starts=["zero", "mean", "nearest", "mix"]))
    trained = [name for name in found.candidates if name.startswith("trained")]
    assert trained == ["trained_zero", "trained_mean", "trained_nearest", "trained_mix"]
    assert found.fits.keys() == set(trained)
    for name in trained:  # never worse on validation than where it started
        start = {"trained_zero": "calibrated"}.get(name, name.removeprefix("trained_"))
        assert found.candidates[name]["auc"] >= found.candidates[start]["auc"]
    assert found.candidates["trained_zero"]["auc"] > found.candidates["calibrated"]["auc"] + 0.05
    assert found.candidates[found.chosen]["auc"] == of_new(after, everything, "valid")[0]
    assert found.fit is found.fits.get(found.chosen)


def test_the_bundle_given_stays_as_it_was(bundle: Bundle, everything: Dataset) -> None:
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    gradients = {name: p.requires_grad for name, p in bundle.model.named_parameters()}
    after, found = onboard(bundle, cut(everything, train=300), "d4", recipe(new_words=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundle.model.state_dict().items())
    assert gradients == {name: p.requires_grad for name, p in bundle.model.named_parameters()}
    assert gradients == {name: p.requires_grad for name, p in after.model.named_parameters()}
    assert not after.model.training
    assert "onboarded" not in bundle.facts
    assert after.facts["onboarded"]["d4"]["chosen"] == found.chosen
    shared = {tensor.data_ptr() for tensor in base_state(bundle.model).values()}
    assert {base_state(after.model)["embedding.weight"].data_ptr()} <= shared  # no second table


def test_it_opens_again(bundle: Bundle, everything: Dataset, tmp_path: Path) -> None:
    after, _ = onboard(bundle, cut(everything, train=300), "d4", recipe())
    after.save(tmp_path / "bundle")
    again = Bundle.open(tmp_path / "bundle")
    assert again.encoder.schema.domains[-1] == "d4"
    assert again.facts == json.loads(json.dumps(after.facts))
    assert of_new(again, everything) == of_new(after, everything)


def test_a_version_of_it_is_one_small_file_more(bundle: Bundle, everything: Dataset, tmp_path: Path) -> None:
    bundle.save(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    before = set((tmp_path / "bundle").rglob("*"))
    after, _ = onboard(opened, cut(everything, train=300), "d4", recipe(new_words=False))
    after.publish(tmp_path / "bundle")
    fresh = {
        path.relative_to(tmp_path / "bundle").as_posix() for path in set((tmp_path / "bundle").rglob("*")) - before
    }
    assert not any("base" in name for name in fresh), fresh
    again = Bundle.open(tmp_path / "bundle")
    assert of_new(again, everything) == of_new(after, everything)
    assert Bundle.open(tmp_path / "bundle", version=1).encoder.schema.num_domains == 4


def test_one_after_the_other_and_only_the_one_that_is_named(bundle: Bundle, everything: Dataset) -> None:
    data = without_last(without_last(everything))
    model, _ = pretrain(data, MODEL, recipe(), method="joint")
    first, _ = onboard(Bundle(model, MODEL, data.encoder), everything, "d4", recipe())
    assert first.encoder.schema.domains == ("d0", "d1", "d2", "d4")
    with pytest.raises(SchemaError, match="must begin with the domains"):
        onboard(first, everything, "d3", recipe())  # data prepared before d4 had a number


def test_equal_runs_have_equal_bits(bundle: Bundle, everything: Dataset) -> None:
    few = cut(everything, train=200)
    one, two = (onboard(bundle, few, "d4", recipe(starts=["zero", "mix"]))[0] for _ in range(2))
    assert same(one.model, two.model)


@pytest.mark.parametrize("new_words", [False, True])
def test_a_killed_run_goes_on_with_the_same_bits(
    bundle: Bundle, everything: Dataset, tmp_path: Path, new_words: bool
) -> None:
    few, options = cut(everything, train=400), recipe(starts=["zero", "mix"], new_words=new_words)
    straight, found = onboard(bundle, few, "d4", options)
    for calls in (3, len(found.fits["trained_zero"].history) + 3):  # in the first training, and in the second
        left = iter(range(calls))
        with pytest.raises(StopIteration):
            onboard(bundle, few, "d4", options, checkpoint=tmp_path, on_progress=lambda _, left=left: next(left))
    resumed, again = onboard(bundle, few, "d4", options, checkpoint=tmp_path)
    assert same(resumed.model, straight.model)
    assert again.candidates == found.candidates
    tensors = load_file(tmp_path / "mix" / "tensors.safetensors")
    held = {len(tensor) for name, tensor in tensors.items() if "embedding" in name}
    assert held == ({1} if new_words else set())  # of the tables' weights no more than the rows that learn


def test_a_checkpoint_of_another_base_is_refused(bundle: Bundle, everything: Dataset, tmp_path: Path) -> None:
    few = cut(everything, train=300)
    onboard(bundle, few, "d4", recipe(), checkpoint=tmp_path)
    model, _ = pretrain(without_last(everything), MODEL, recipe(), method="joint")
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    with pytest.raises(ConfigError, match="goes on only with the"):
        onboard(Bundle(model, MODEL, bundle.encoder), few, "d4", recipe(), checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="goes on only with the pull"):
        onboard(bundle, few, "d4", recipe(prior_rows=31.0), checkpoint=tmp_path)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_validation_rows_of_one_class(bundle: Bundle, everything: Dataset, label: float) -> None:
    after, found = onboard(bundle, relabelled(everything, "valid", label), "d4", recipe())
    assert all(math.isnan(figures["auc"]) for figures in found.candidates.values())
    chosen = found.candidates[found.chosen]["log_loss"]
    assert chosen <= found.candidates["base"]["log_loss"]
    assert json.loads(json.dumps(found.facts(), allow_nan=False))["candidates"]["base"]["auc"] is None
    assert after.encoder.schema.num_domains == 5


@pytest.mark.parametrize(
    "sizes", [{"train": 1, "valid": 1}, {"train": 3, "valid": 2}, {"train": 40, "valid": 5}], ids=str
)
def test_hardly_any_rows(bundle: Bundle, everything: Dataset, sizes: dict[str, int]) -> None:
    after, found = onboard(bundle, cut(everything, **sizes), "d4", recipe(starts=["zero", "mix"]))
    assert found.num_rows == sizes
    assert all(torch.isfinite(value).all() for value in rows_of(after.model, 4).values())
    assert of_new(after, everything)[1] < 2 * math.log(2)


def test_clicks_only(bundle: Bundle, everything: Dataset) -> None:
    after, _ = onboard(bundle, relabelled(cut(everything, train=50), "train", 1.0), "d4", recipe())
    assert all(torch.isfinite(value).all() for value in rows_of(after.model, 4).values())


def test_without_validation_rows_nothing_is_trained(bundle: Bundle, everything: Dataset) -> None:
    after, found = onboard(bundle, cut(everything, valid=0), "d4", recipe())
    assert (found.chosen, dict(found.fits)) == ("base", {})
    assert all(not value.any() for name, value in rows_of(after.model, 4).items() if not name.endswith("lora_A"))


def test_without_training_rows(bundle: Bundle, everything: Dataset) -> None:
    with pytest.raises(DataError, match=r"a new domain needs training rows\. Received: 'd4'"):
        onboard(bundle, cut(everything, train=0), "d4", recipe())


def test_ids_that_the_bundle_does_not_know(bundle: Bundle, everything: Dataset) -> None:
    _, found = onboard(bundle, everything, "d4", recipe(starts=[]))
    assert found.unknown == {"domain": found.num_rows["train"]}  # the domain is itself a feature
    assert f"did not know: domain {found.num_rows['train']:,}" in str(found)
    rows = NewRows(everything, "d4", bundle.encoder.schema, 4)
    assert rows.read("train").ids.unique().tolist() == [OOV_ID]
    assert (everything.read("train").ids > OOV_ID).all()  # the data's own rows are not written into


def test_a_bundle_without_adapters_gets_them(everything: Dataset) -> None:
    data = without_last(everything)
    model, _ = pretrain(data, MODEL, recipe())
    base = Bundle(model, MODEL, data.encoder)
    after, found = onboard(base, everything, "d4", recipe(starts=["mix"]))
    assert list(found.candidates) == ["base", "calibrated", "trained_zero"]  # there is nobody to learn from
    assert (found.nearest, found.weights) == ("", {})
    assert not adapter_layers(model)
    assert after.adapter == recipe().adapter
    assert of_new(after, everything)[0] > wauc_of_base(base, everything) + 0.02


def wauc_of_base(bundle: Bundle, data: Dataset) -> float:
    said = predict(bundle.model, NewRows(data, "d4", bundle.encoder.schema, -1).batches("test", 4096))
    return wauc(said.label, said.probability, said.domain)


def test_a_domain_that_is_known_but_was_not_trained(bundle: Bundle, everything: Dataset) -> None:
    untrained, _ = onboard(bundle, cut(everything, valid=0), "d4", recipe())
    again, found = onboard(untrained, cut(everything, train=300), "d4", recipe())
    assert "own" not in found.candidates
    assert found.nearest == "d1"
    assert again.encoder.schema.domains == untrained.encoder.schema.domains
    _, third = onboard(again, cut(everything, train=300), "d4", recipe(min_gain=1e6))
    assert third.chosen == next(iter(third.candidates)) == "own"


def test_the_start_weighs_more_the_fewer_the_rows(bundle: Bundle, everything: Dataset) -> None:
    """Equal steps, so that nothing but the pull differs."""
    moved = {}
    for prior in (0.0, 1e3, 1e9):
        options = recipe(starts=["mix"], prior_rows=prior, min_gain=0.0)
        after, _ = onboard(bundle, cut(everything, train=400), "d4", options)
        start, _ = onboard(bundle, cut(everything, train=400), "d4", recipe(starts=[], min_gain=0.0))
        one, two = rows_of(after.model, 4), rows_of(start.model, 4)
        moved[prior] = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert moved[1e9] < 1e-6
    assert moved[0.0] > moved[1e9]


def test_other_data_are_refused(bundle: Bundle, everything: Dataset) -> None:
    with pytest.raises(UnknownDomainError, match="the data must have the domain"):
        onboard(bundle, everything, "d5", recipe())
    features = (*everything.schema.features[:-1], Feature("x5", "numeric", mean=2.0))
    other = Dataset.from_batches(replace(everything.schema, features=features), {s: everything.read(s) for s in SPLITS})
    with pytest.raises(SchemaError, match="feature 'x5' must be as it was"):
        onboard(bundle, other, "d4", recipe())


@pytest.mark.parametrize(
    "wrong",
    [
        {"starts": ("best",)},
        {"prior_rows": -1.0},
        {"min_gain": math.inf},
        {"min_steps": 0},
        {"max_scored_rows": 0},
        {"max_valid_rows": 0},
    ],
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Onboarding(FitOptions(), **wrong)


def test_it_says_what_it_did(bundle: Bundle, everything: Dataset) -> None:
    _, found = onboard(bundle, cut(everything, train=100), "d4", recipe())
    assert isinstance(found, Onboarded)
    text = str(found)
    assert text.startswith(f"d4: {found.chosen}, from 100 train and ")
    assert "nearest domain: d1" in text
    assert all(name in text for name in found.candidates)


def test_candidates_are_scored_on_no_more_rows_than_wanted(bundle: Bundle, everything: Dataset) -> None:
    few, found = onboard(bundle, everything, "d4", recipe(max_valid_rows=50))
    assert found.num_rows["valid"] == 50
    rows = NewRows(everything, "d4", few.encoder.schema, 4, most_valid=50)
    said = predict(few.model, rows.batches("valid", 4096))
    assert len(said.label) == 50
    assert found.candidates[found.chosen]["auc"] == wauc(said.label, said.probability, said.domain)
    assert NewRows(everything, "d4", few.encoder.schema, 4).fingerprint() != rows.fingerprint()
