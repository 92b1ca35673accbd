"""Domains adapted each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from domlora.adapters.bank import rows_of
from domlora.adapters.file import base_fingerprint
from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError, EngineError, UnknownDomainError
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.parallel.processes import in_workers
from domlora.training.parallel.run import adapt_apart
from domlora.training.parallel.work import places_of, prepare
from domlora.training.parallel.worker import Outcome, adapt_one
from domlora.training.stages import Onboarding, Recipe, Stage, pretrain
from domlora.training.validation import scores_of

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.1}
ONBOARD = Onboarding(
    FitOptions(max_epochs=6, patience=3), OptimizerOptions(adapters=Rule(lr=0.02)), prior_rows=10.0, min_gain=0.0
)
RECIPE = Recipe(pretrain=Stage(FitOptions(batch_size=256, max_epochs=2)), onboard=ONBOARD)


def here(work: Callable[[int], Outcome], numbers: Sequence[int]) -> Iterator[tuple[int, Outcome | None]]:
    """The simplest engine there is."""
    return ((number, work(number)) for number in numbers)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return World(num_domains=4, num_dense=4, difference=2.0).dataset(4000, seed=1)[0]


@pytest.fixture
def bundle(data: Dataset) -> Bundle:
    model, _ = pretrain(data, MODEL, RECIPE)
    return Bundle(model, MODEL, data.encoder, {"note": "base"})


def files(folder: Path, names: Sequence[str]) -> list[dict[str, bytes]]:
    return [{path.name: path.read_bytes() for path in place.iterdir()} for place in places_of(folder, names)]


def test_each_domain_gets_better_and_the_base_stays(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    before, base = scores_of(bundle.model, data), base_fingerprint(bundle.model)
    adapted, found = adapt_apart(bundle, data, RECIPE, tmp_path / "work", here)
    assert scores_of(adapted.model, data)["wauc"] == found.valid > before["wauc"] + 0.01
    assert base_fingerprint(adapted.model) == base
    assert adapted.facts["base"] == {"note": "base"}
    for number, facts in enumerate(adapted.facts["domains"].values()):
        row = rows_of(adapted.model, number)
        assert (facts["chosen"] == "trained") == bool(row["tower.0.lora_B"].any())
        assert facts["candidates"]["trained"]["auc"] >= facts["candidates"]["start"]["auc"]
    assert "4 domains adapted" in str(found)


def test_workers_order_and_engine_do_not_matter(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    jobs = {name: prepare(bundle, data, RECIPE, tmp_path / name) for name in ("forwards", "backwards", "processes")}
    for number in range(4):
        adapt_one(jobs["forwards"], number)
    for number in (2, 3, 0, 1):
        adapt_one(jobs["backwards"], number)
    outcomes = dict(in_workers(partial(adapt_one, jobs["processes"]), range(4), workers=2))
    assert len({outcome.process for outcome in outcomes.values() if outcome}) == 2
    one, two, three = (files(job.folder, data.schema.domains) for job in jobs.values())
    assert one == two == three
    assert len(one[0]) == 4


def test_a_domain_with_too_few_rows_keeps_its_start(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    rows, judged = data.read("train"), data.read("valid")
    label = torch.where(judged.domain == 2, 0.0, judged.label)
    few = {"train": rows.take(rows.domain != 1), "valid": judged._replace(label=label)}
    poor = Dataset.from_batches(data.schema, few)
    adapted, found = adapt_apart(replace(bundle, encoder=poor.encoder), poor, RECIPE, tmp_path / "work", here)
    assert found.untrained == ("d1", "d2")
    assert "2 keep their start, of which 2 have too few rows: d1, d2" in str(found)
    for number in (1, 2):
        assert not rows_of(adapted.model, number)["tower.0.lora_B"].any()


def test_it_starts_from_the_adapters_that_are_there(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    adapted, found = adapt_apart(bundle, data, RECIPE, tmp_path / "one", here)
    own = [rows_of(adapted.model, number) for number in range(4)]
    strict = replace(RECIPE, onboard=replace(ONBOARD, min_gain=1e9))
    again, second = adapt_apart(adapted, data, strict, tmp_path / "two", here)
    assert second.chosen == {"trained": 0, "start": 4}
    assert second.valid == found.valid
    for number in range(4):
        assert all(own[number][name].equal(row) for name, row in rows_of(again.model, number).items())


def test_some_domains_first_and_the_others_later(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    told: list[str] = []
    partly, found = adapt_apart(
        bundle, data, RECIPE, tmp_path / "work", here, domains=["d2"], on_outcome=lambda name, _: told.append(name)
    )
    assert (told, found.made) == (["d2"], 1)
    assert not rows_of(partly.model, 1)["tower.0.lora_B"].any()
    fresh = Bundle(pretrain(data, MODEL, RECIPE)[0], MODEL, data.encoder)
    _, found = adapt_apart(fresh, data, RECIPE, tmp_path / "work", here)
    assert found.made == 3
    with pytest.raises(UnknownDomainError, match="d2"):
        adapt_apart(fresh, data, RECIPE, tmp_path / "work", here, domains=["d22"])


def test_a_folder_is_of_one_base_recipe_and_data(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    prepare(bundle, data, RECIPE, tmp_path / "work")
    prepare(bundle, data, RECIPE, tmp_path / "work")
    with pytest.raises(ConfigError, match="only with the recipe"):
        prepare(bundle, data, replace(RECIPE, onboard=Onboarding()), tmp_path / "work")
    other = World(num_domains=4, num_dense=4).dataset(4000, seed=2)[0]
    with pytest.raises(ConfigError, match="only with the data"):
        prepare(bundle, other, RECIPE, tmp_path / "work")
    bundle.model.get_parameter("tower.0.weight").data.mul_(2)
    with pytest.raises(ConfigError, match="only with the base"):
        prepare(bundle, data, RECIPE, tmp_path / "work")


def test_a_domain_that_fails_is_named_and_all_others_are_kept(bundle: Bundle, data: Dataset, tmp_path: Path) -> None:
    rows = data.read("train")
    dense = torch.where((rows.domain == 1)[:, None], torch.nan, rows.dense)
    splits = {"train": rows._replace(dense=dense), "valid": data.read("valid")}
    broken = Dataset.from_batches(data.schema, splits)

    def dying(work: Callable[[int], Outcome], numbers: Sequence[int]) -> Iterator[tuple[int, Outcome | None]]:
        """Real work, but the workers of domain 2 have died."""
        return ((number, None if number == 2 else work(number)) for number in numbers)

    with pytest.raises(EngineError, match="2 could not be") as refused:
        adapt_apart(bundle, broken, RECIPE, tmp_path / "work", dying)
    assert "'d2': 'its workers died" in str(refused.value)
    assert "'d1': " in str(refused.value)
    assert [place.exists() for place in places_of(tmp_path / "work", data.schema.domains)] == [True, False, False, True]
    assert bundle.adapter is None
