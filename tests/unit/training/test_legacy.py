from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import distinct_layers
from domlora.config import Config, parse, read_toml
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema
from domlora.models.build import MODELS, build_model
from domlora.studies.study import Study
from domlora.training import legacy, validation
from domlora.training.legacy import fit_legacy
from domlora.training.quirks import TEMPERATURES, LegacyOptions

MODEL = {"name": "mlp", "embedding_dim": 4, "hidden_units": [16, 8], "dropout": 0.5}
SMALL = LegacyOptions(batch_size=128, max_epochs=3, patience=9, learning_rate=0.01, temperature_of="recipe")
AUTHORS = LegacyOptions()
SWITCHES = [field.name for field in fields(LegacyOptions) if field.type == "bool"]


def started(options: LegacyOptions = AUTHORS, *, name: str = "mlp", adapted: bool = False, rows: int = 4000) -> Any:
    """A model of three large features at the authors' start."""
    features = (Feature("user", num_ids=rows), Feature("item", num_ids=rows), Feature("where", num_ids=rows))
    schema = Schema(features, domains=tuple("abcd"), domain="where")
    torch.manual_seed(1)
    model = build_model(name, schema, hidden_units=(256, 128))
    if adapted:
        attach_(model, schema.num_domains, include=("tower.*",))
    legacy._start_(model, schema, options, keras=adapted and name == "mlp")
    return model


def spread(model: Any, rows: int = 4000) -> list[float]:
    """Standard deviations of the three features' vectors."""
    return [float(part.std()) for part in model.embedding.weight.detach().split(rows)]


class TestStart:
    def test_vectors_of_each_arm(self) -> None:
        assert spread(started()) == pytest.approx([1e-4] * 3, rel=0.05)
        assert spread(started(name="deepfm", adapted=True)) == pytest.approx([1e-2, 1e-2, 1e-4], rel=0.05)
        keras = started(adapted=True).embedding.weight.detach()
        assert spread(started(adapted=True)) == pytest.approx([0.1 / math.sqrt(12)] * 3, rel=0.05)
        assert float(keras.abs().max()) <= 0.05

    @pytest.mark.parametrize("adapted", [False, True])
    def test_vectors_without_the_quirk_are_alike(self, adapted: bool) -> None:
        off = LegacyOptions(embedding_start=False)
        assert spread(started(off, adapted=adapted)) == pytest.approx([1e-2] * 3, rel=0.05)

    @pytest.mark.parametrize(("name", "adapted"), [("mlp", False), ("deepfm", True), ("mlp", True)])
    def test_kernels_have_the_spread_and_the_ends_of_their_family(self, name: str, adapted: bool) -> None:
        keras = name == "mlp" and adapted
        layer = started(name=name, adapted=adapted).tower[1]
        weight = getattr(layer, "base", layer).weight.detach()
        std = math.sqrt(2 / (256 + 128))
        assert float(weight.std()) == pytest.approx(std, rel=0.03)
        most = math.sqrt(3) * std if keras else 2 * std / 0.8796
        assert 0.95 * most < float(weight.abs().max()) <= most * 1.0001

    def test_kernels_without_the_quirk_have_no_ends(self) -> None:
        weight = started(LegacyOptions(kernel_start=False)).tower[1].weight.detach()
        assert float(weight.abs().max()) > 3 * math.sqrt(2 / (256 + 128))

    @pytest.mark.parametrize("name", ["mlp", "deepfm"])
    def test_banks_are_smaller_by_the_root_of_the_domains(self, name: str) -> None:
        on = started(name=name, adapted=True)
        off = started(LegacyOptions(adapter_start=False), name=name, adapted=True)
        for small, large in zip(distinct_layers(on).values(), distinct_layers(off).values(), strict=True):
            assert float((large.lora_A.std() / small.lora_A.std()).detach()) == pytest.approx(math.sqrt(4), rel=0.05)
            assert not small.lora_B.any()

    def test_the_domains_rows_behind_a_sequence(self) -> None:
        features = (Feature("past", "sequence", num_ids=50, max_length=5), Feature("where", num_ids=3000))
        schema = Schema(features, domains=("a", "b"), domain="where")
        model: Any = attach_(build_model("wdl", schema), 2, include=("tower.*",))
        legacy._start_(model, schema, LegacyOptions(), keras=False)
        assert float(model.embedding.weight.detach()[50:].std()) == pytest.approx(1e-4, rel=0.05)
        assert float(model.embedding.weight.detach()[:50].std()) == pytest.approx(1e-2, rel=0.2)


class TestDropout:
    def outputs(self, **quirks: Any) -> Any:
        """Twice what the first layer of an adapted tower gives, before and after relu, while training."""
        data, model = world(), self.model()
        batch = data.read("train").take(slice(0, 64))
        seen: list[Any] = []
        model.tower[0].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
        model.tower[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        with legacy._dropout_of(model, LegacyOptions(**quirks)):
            model.train()
            for _ in range(2):
                model(batch.ids, batch.dense, batch.domain)
        return seen

    def model(self) -> Any:
        torch.manual_seed(3)
        model: Any = attach_(build_model(schema=world().schema, **MODEL), 3, include=("tower.*",))  # type: ignore[arg-type]
        for layer in distinct_layers(model).values():
            torch.nn.init.constant_(layer.lora_bias, 7.0)
        return model

    def test_dead(self) -> None:
        before, after, again, _ = self.outputs()
        assert torch.equal(before, again)
        assert torch.equal(after, before.relu())

    def test_alive_before_the_activation_on_the_shared_branch_alone(self) -> None:
        before, after, again, _ = self.outputs(dead_dropout=False)
        assert not torch.equal(before, again)
        assert 0.4 < float((before == 7.0).float().mean()) < 0.6  # of a dropped unit the domain's bias is left
        assert torch.equal(after, before.relu())

    def test_alive_behind_the_activation(self) -> None:
        before, after, again, _ = self.outputs(dead_dropout=False, dropout_before_activation=False)
        assert torch.equal(before, again)
        assert 0.4 < float((after == 0.0).float().mean()) < 0.6

    @pytest.mark.parametrize("dead", [True, False])
    def test_nothing_is_left_behind(self, dead: bool) -> None:
        model = self.model()
        batch = world().read("train")
        expected = model.eval()(batch.ids, batch.dense, batch.domain)
        with legacy._dropout_of(model, LegacyOptions(dead_dropout=dead)):
            model.train()
            model.eval()
            assert torch.equal(model(batch.ids, batch.dense, batch.domain), expected)
        assert model.tower.dropout == 0.5
        assert not any(layer.base._forward_hooks for layer in distinct_layers(model).values())

    def test_the_base_drops_as_ever(self) -> None:
        model: Any = build_model(schema=world().schema, **MODEL)  # type: ignore[arg-type]
        with legacy._dropout_of(model, LegacyOptions()):
            assert model.tower.dropout == 0.5


def world() -> Dataset:
    return World(num_domains=3, num_dense=4, hidden_units=8).dataset(1500, seed=0)[0]


class TestAdam:
    def steps(self, tensorflow: bool) -> tuple[Any, Any]:
        """A table through four steps, and the same by the formulas of TensorFlow 1's documentation."""
        model = build_model("mlp", Schema((Feature("item", num_ids=3),), domains=("a",)), embedding_dim=2)
        options = LegacyOptions(tensorflow_adam=tensorflow)
        run = legacy._Legacy(model, world(), options, legacy._Adam(model, options, keras=False))
        weight: Any = model.embedding.weight
        torch.nn.init.constant_(weight, 1e-4)
        batch = Batch(torch.tensor([[1]]), torch.zeros(1, 0), torch.tensor([0]), torch.ones(1))
        w, m, v = weight.detach().double().clone(), 0.0, 0.0
        for t in range(1, 5):
            with torch.no_grad():
                weight.copy_(w)
            model.eval()  # no dropout
            model(batch.ids, batch.dense, batch.domain).sum().neg().backward()
            run.step(batch)
            gradient = weight.grad.double() + 2e-5 * w
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            lr = 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            w = w - lr * m / (v**0.5 + 1e-8)
        return weight.detach(), w

    def test_epsilon_stands_where_tensorflow_has_it(self) -> None:
        ours, theirs = self.steps(tensorflow=True)
        assert ours.double() == pytest.approx(theirs, rel=1e-4)

    def test_torchs_epsilon_is_another_where_gradients_are_tiny(self) -> None:
        ours, theirs = self.steps(tensorflow=False)
        idle = ours.double()[0], theirs[0]  # moved by the penalty alone
        assert not np.allclose(*idle, rtol=1e-3, atol=0)

    @pytest.mark.parametrize(
        ("rule", "keras", "expected"),
        [("by_arm", False, 2e-5), ("by_arm", True, 0.0), ("always", True, 2e-5), ("never", False, 0.0)],
    )
    def test_whose_tables_are_penalised(self, rule: Any, keras: bool, expected: float) -> None:
        """From gradients of zero the first step of Adam is the sign of the penalty's."""
        model: Any = attach_(build_model(schema=featured().schema, name="dcn"), 3, include=("tower.*",))
        adam = legacy._Adam(model, LegacyOptions(tables_l2=rule), keras=keras)
        before = {name: p.detach().clone().fill_(1.0) for name, p in model.named_parameters()}
        model.load_state_dict({name: before.get(name, value) for name, value in model.state_dict().items()})
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        tables = {"embedding.weight", "linear.table.weight", "cross.kernels.0.weight", "cross.kernels.1.weight"}
        assert moved == (tables if expected else set())
        if expected:
            for name in tables:
                moment = adam._parts["adam"].state[model.get_parameter(name)]["exp_avg"]
                assert moment.numpy() == pytest.approx(0.1 * expected, rel=1e-5)


class TestDomainsInTurn:
    def run_over(self, domain: list[int], batch_size: int, seed: int = 1) -> Any:
        rows = len(domain)
        number = torch.arange(rows)
        schema = Schema((Feature("row", num_ids=rows + 1),), domains=tuple("abcd"))
        whole = Batch(number[:, None], torch.zeros(rows, 0), torch.tensor(domain), torch.zeros(rows))
        data = Dataset.from_batches(schema, {"train": whole, "valid": whole})
        model, options = build_model("mlp", schema), replace(SMALL, batch_size=batch_size, seed=seed)
        return legacy._Legacy(model, data, options, legacy._Adam(model, options, keras=False))

    @settings(max_examples=40, deadline=None)
    @given(
        domain=st.lists(st.integers(-1, 3), min_size=1, max_size=60),
        batch_size=st.integers(1, 17),
        epoch=st.integers(0, 5),
        start=st.integers(0, 70),
    )
    def test_every_row_once_and_each_domain_in_one_stretch(
        self, domain: list[int], batch_size: int, epoch: int, start: int
    ) -> None:
        run = self.run_over(domain, batch_size)
        batches = list(run.batches(epoch, 0))
        assert len(batches) == run.steps_per_epoch
        assert sorted(int(i) for batch in batches for i in batch.ids) == list(range(len(domain)))
        met = [int(batch.domain[0]) for batch in batches]
        assert all((batch.domain == batch.domain[0]).all() for batch in batches)
        assert sum(i == 0 or met[i - 1] != d for i, d in enumerate(met)) == len(set(domain))
        for d in set(domain):
            sizes = [batch.num_rows for batch in batches if batch.domain[0] == d]
            assert all(size == batch_size for size in sizes[:-1])
        rest = list(run.batches(epoch, start))
        assert [batch.ids.tolist() for batch in rest] == [batch.ids.tolist() for batch in batches[start:]]

    def test_the_order_of_domains_and_of_rows_changes(self) -> None:
        domain = [0, 1, 2, 3] * 5
        passes = [list(self.run_over(domain, 8, seed).batches(epoch, 0)) for seed in (1, 2) for epoch in range(6)]
        assert len({tuple(int(batch.domain[0]) for batch in batches) for batches in passes}) > 6
        assert len({str([batch.ids.tolist() for batch in batches]) for batches in passes}) == 12


class TestLoop:
    def test_patience_and_rollback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Epochs of figures that we say: when it stops, and with which weights."""
        figures = iter([0.5, 0.6, 0.6, 0.55, 0.7, 0.7, 0.1, 0.69, 0.9])
        monkeypatch.setattr(validation, "macro_auc", _each(figures))
        after: list[float] = []
        original = legacy._Legacy.judge

        def judge(run: Any, *args: Any) -> None:
            original(run, *args)
            after.append(float(run.model.head.weight.detach().sum()))

        monkeypatch.setattr(legacy._Legacy, "judge", judge)
        options = replace(SMALL, max_epochs=50, patience=3, threshold_auc=False)
        model, _, found = fit_legacy(world(), MODEL, options)
        assert [entry["macro_auc"] for entry in found.history] == [0.5, 0.6, 0.6, 0.55, 0.7, 0.7, 0.1, 0.69]
        assert (found.best_value, found.best_epoch) == (0.7, 5.0)
        weight: Any = model.get_parameter("head.weight")
        assert float(weight.detach().sum()) == after[4]

    def test_an_epoch_that_did_not_improve_begins_again_from_the_best(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for rollback in (True, False):
            monkeypatch.setattr(validation, "macro_auc", _each(iter([0.9, 0.8, 0.8])))
            starts: list[Any] = []
            original = legacy._Legacy.train

            def train(run: Any, starts: Any = starts, original: Any = original) -> float:
                starts.append({name: p.detach().clone() for name, p in run.model.named_parameters()})
                moved = original(run)
                starts.append(run.steps)
                return float(moved)

            with monkeypatch.context() as patch:
                patch.setattr(legacy._Legacy, "train", train)
                fit_legacy(world(), MODEL, replace(SMALL, rollback=rollback, threshold_auc=False))
            second, third = starts[2], starts[4]
            assert all(torch.equal(second[name], third[name]) for name in second) == rollback
            assert starts[5] == 3 * starts[1]  # Adam counts on

    @pytest.mark.parametrize("switch", SWITCHES)
    def test_every_switch_matters(self, digest: Any, switch: str) -> None:
        """In a run in which everything is alive; the two that act in a run's course alone have tests of their own."""
        if switch in ("rollback", "deepfm_for_xdeepfm"):
            return
        on = replace(SMALL, dead_dropout=switch == "dead_dropout", max_epochs=2, patience=1)
        results = []
        for options in (on, replace(on, **{switch: False})):
            model, _, found = fit_legacy(featured(), MODEL, options, AdapterOptions(temperature=4.0))
            results.append((digest(model), found.best_value))
        assert results[0] != results[1]

    @pytest.mark.parametrize("name", TEMPERATURES)
    def test_every_backbone(self, name: str) -> None:
        options = {**MODEL, "name": name}
        for adapter in (None, AdapterOptions()):
            model, made, found = fit_legacy(featured(), options, replace(SMALL, max_epochs=1), adapter)
            assert math.isfinite(found.best_value)
            assert made["name"] == ("deepfm" if name == "xdeepfm" else name)
            assert type(model) is MODELS[made["name"]] or adapter is not None

    def test_history_has_both_kinds_of_figures(self) -> None:
        _, _, found = fit_legacy(world(), MODEL, SMALL)
        assert found.best_value == max(entry["threshold_macro_auc"] for entry in found.history)
        for entry in found.history:
            assert abs(entry["threshold_wauc"] - entry["wauc"]) < 0.02
            assert set(entry) >= {"epoch", "loss", "wauc", "macro_auc", "log_loss"}

    def test_a_checkpoint_of_another_run(self, tmp_path: Path) -> None:
        fit_legacy(world(), MODEL, SMALL, checkpoint=tmp_path / "run")
        with pytest.raises(ConfigError, match="goes on only with the switches"):
            fit_legacy(world(), MODEL, replace(SMALL, rollback=False), checkpoint=tmp_path / "run")

    def test_progress(self) -> None:
        said: list[Any] = []
        fit_legacy(world(), MODEL, SMALL, on_progress=said.append)
        assert [each.epoch for each in said if each.rows == each.total_rows][-1] == 3
        assert said[-1].value is not None


class TestOptions:
    def test_the_authors_temperature(self) -> None:
        for of, expected in (("movielens", 32.0), ("amazon-6", 16.0), ("taobao-10", 256.0), ("recipe", 5.0)):
            options = LegacyOptions(temperature_of=of)  # type: ignore[arg-type]
            _, adapter = legacy._as_released({"name": "deepfm"}, options, AdapterOptions(temperature=5.0))
            assert adapter is not None
            assert adapter.temperature == expected

    def test_xdeepfm_is_deepfm_and_keeps_what_deepfm_has(self) -> None:
        given = {"name": "xdeepfm", "cin_units": [4], "embedding_dim": 3}
        made, _ = legacy._as_released(given, LegacyOptions(), None)
        assert made == {"name": "deepfm", "embedding_dim": 3}
        assert legacy._as_released(given, LegacyOptions(deepfm_for_xdeepfm=False), None)[0] == given

    def test_a_backbone_that_is_not_theirs(self) -> None:
        with pytest.raises(ConfigError, match=r"nine backbones\. Received: 'star'"):
            fit_legacy(world(), {"name": "star"}, LegacyOptions())

    def test_from_a_configuration(self) -> None:
        table = {"train": {"legacy": {"dead_dropout": False, "tables_l2": "never"}}}
        assert parse(Config, table).train.legacy == LegacyOptions(dead_dropout=False, tables_l2="never")
        with pytest.raises(ConfigError, match=r"legacy\.tables_l2: Input should be 'by_arm'"):
            parse(Config, {"train": {"legacy": {"tables_l2": "by_arms"}}})
        with pytest.raises(ConfigError, match=r"Received: 'by_arms'\. Did you mean 'by_arm'"):
            LegacyOptions(tables_l2="by_arms")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="counts of at least 1"):
            LegacyOptions(patience=0)
        with pytest.raises(ConfigError, match="learning_rate must be above 0"):
            LegacyOptions(learning_rate=0.0)


def test_the_study_turns_each_switch_by_itself() -> None:
    """All but those that a multilayer perceptron on MovieLens cannot show."""
    file = Path(__file__).parents[3] / "studies" / "legacy.toml"
    study = parse(Study, read_toml(file))
    turned = {tuple(arm.config["train"]["legacy"]) for arm in study.arms.values()}
    alone = {switches[0] for switches in turned if len(switches) == 1}
    assert {*SWITCHES, "tables_l2"} - alone == {"dropout_before_activation", "deepfm_for_xdeepfm"}
    assert ("dead_dropout", "dropout_before_activation") in turned  # the second does nothing without the first
    sound = study.config_of("ml-1m-gender", "mlp", "mlora_sound").train.legacy
    assert not any(getattr(sound, switch) for switch in SWITCHES if switch != "deepfm_for_xdeepfm")


def featured() -> Dataset:
    """Three features of ids, one of them the domain, and a label that they decide."""
    random = np.random.default_rng(0)
    user, item, domain = (torch.from_numpy(random.integers(0, n, 1500)) for n in (40, 30, 3))
    chance = 1 / (1 + np.exp(-random.normal(size=40)[user] - random.normal(size=(3, 30))[domain, item]))
    label = torch.from_numpy((random.random(1500) < chance).astype(np.float32))
    features = (Feature("user", num_ids=42), Feature("item", num_ids=32), Feature("where", num_ids=5))
    schema = Schema(features, domains=("a", "b", "c"), domain="where")
    rows = Batch(torch.stack([user + 2, item + 2, domain + 2], 1), torch.zeros(1500, 0), domain, label)
    cut = {"train": slice(0, 900), "valid": slice(900, 1200), "test": slice(1200, 1500)}
    return Dataset.from_batches(schema, {name: rows.take(part) for name, part in cut.items()})


def _each(figures: Any) -> Any:
    """Stands in for ``macro_auc``."""

    def figure(*_: Any) -> float:
        return float(next(figures))

    return figure
