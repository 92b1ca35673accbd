"""Against SQLite and event files on this disk; nothing is sent anywhere."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from domlora.bundle import Bundle
from domlora.data.dataset import Dataset
from domlora.data.synthetic import World
from domlora.errors import ConfigError
from domlora.evaluation.evaluate import by_domain, predict
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.tracking import Watching, log_fit, log_table, open_tracker
from domlora.training.fit import FitOptions, fit
from domlora.training.optimizers import OptimizerOptions

KINDS = ["mlflow", "tensorboard"]
QUICK = FitOptions(batch_size=128, max_epochs=3, patience=9)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return World(num_domains=3, num_dense=4, hidden_units=8).dataset(1500, seed=0)[0]


def model_of(data: Dataset) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name="mlp", schema=data.schema, hidden_units=[8])


def read_mlflow(where: Path) -> tuple[Any, Any, dict[str, list[tuple[int, float]]]]:
    """The client, the only run, and its curves."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{where}", registry_uri=f"sqlite:///{where}")
    (run,) = client.search_runs([client.get_experiment_by_name("domlora").experiment_id])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return client, run, {name: [(p.step, p.value) for p in points] for name, points in histories.items()}


def read_tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    return {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in tags["scalars"]}, texts


def curves_of(kind: str, place: Path) -> dict[str, list[tuple[int, float]]]:
    return read_mlflow(place)[2] if kind == "mlflow" else read_tensorboard(place / "run")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_gives_curves_also_of_each_domain(kind: Any, data: Dataset, tmp_path: Path) -> None:
    place, progress = tmp_path / "place", []
    with open_tracker(kind, place, "run") as tracker:
        watching = Watching(tracker, data.schema.domains, progress.append)
        model = model_of(data)
        found = fit(model, data, QUICK, OptimizerOptions(), on_progress=watching)
    curves = curves_of(kind, place)
    assert [value for _, value in curves["wauc"]] == pytest.approx([e["wauc"] for e in found.history], rel=1e-6)
    assert [step for step, _ in curves["loss"]] == [0, 1, 2]
    for row in range(3):
        assert [step for step, _ in curves[f"valid/domain/{data.schema.domains[row]}/auc"]] == [0, 1, 2]
    best = by_domain(predict(model, data.batches("valid", 4096)), data.schema.domains)
    at = [entry["wauc"] for entry in found.history].index(found.best_value)
    for line in best.domains:
        assert curves[f"valid/domain/{line.name}/log_loss"][at][1] == pytest.approx(line.log_loss, rel=1e-6)
    assert progress


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_left_out(kind: Any, tmp_path: Path) -> None:
    with open_tracker(kind, tmp_path / "place", "run") as tracker:
        tracker.figures(0, {"loss": math.nan, "wauc": 0.5})
        tracker.figures(1, {"loss": 0.25, "wauc": math.inf})
    assert curves_of(kind, tmp_path / "place") == {"wauc": [(0, 0.5)], "loss": [(1, 0.25)]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_and_a_table_at_the_end(kind: Any, data: Dataset, tmp_path: Path) -> None:
    model = model_of(data)
    found = fit(model, data, QUICK, OptimizerOptions(), start_is_candidate=True)
    table = by_domain(predict(model, data.batches("test", 4096)), data.schema.domains)
    with open_tracker(kind, tmp_path / "place", "run") as tracker:
        log_fit(tracker, found)
        log_table(tracker, table, prefix="test/")
    curves = curves_of(kind, tmp_path / "place")
    assert [step for step, _ in curves["loss"]] == [1, 2, 3]  # the start has no training loss
    assert [step for step, _ in curves["wauc"]] == [0, 1, 2, 3]
    assert curves["best_value"] == [(4, pytest.approx(found.best_value, rel=1e-6))]
    assert curves["test/wauc"][0][1] == pytest.approx(table.wauc, rel=1e-6)
    assert curves[f"test/domain/{table.domains[1].name}/rows"][0][1] == table.domains[1].rows


@pytest.mark.parametrize("kind", KINDS)
def test_any_name_of_a_domain(kind: Any, data: Dataset, tmp_path: Path) -> None:
    names = ["größe/€", "..", "a  b"]
    table = by_domain(predict(model_of(data), data.batches("test", 4096)), names)
    with warnings.catch_warnings(), open_tracker(kind, tmp_path / "place", "run") as tracker:
        warnings.simplefilter("error")
        log_table(tracker, table)
    told = {name.split("/")[1] for name in curves_of(kind, tmp_path / "place") if name.startswith("domain/")}
    assert told == {"gr__e__-0", "-1", "a  b"}


@pytest.mark.parametrize("kind", KINDS)
def test_fits_one_after_the_other_do_not_mix(kind: Any, data: Dataset, tmp_path: Path) -> None:
    with open_tracker(kind, tmp_path / "place", "run") as tracker:
        watching = Watching(tracker, data.schema.domains)
        for epochs in (1, 2):
            options = FitOptions(batch_size=128, max_epochs=epochs)
            fit(model_of(data), data, options, OptimizerOptions(), on_progress=watching)
    curves = curves_of(kind, tmp_path / "place")
    assert len(curves["wauc"]) == 1
    assert len(curves["2.wauc"]) == len(curves[f"2.valid/domain/{data.schema.domains[0]}/auc"]) == 2


def test_more_figures_than_one_call_takes(tmp_path: Path) -> None:
    with open_tracker("mlflow", tmp_path / "runs.db", "run") as tracker:
        tracker.figures(0, {f"f{number}": float(number) for number in range(2345)})
    assert len(read_mlflow(tmp_path / "runs.db")[1].data.metrics) == 2345


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    schema = Schema((Feature("item", num_ids=4),), domains=("app", "web"))
    options = {"name": "mlp", "hidden_units": [8]}
    torch.manual_seed(0)
    made = Bundle(build_model(schema=schema, **options), options, Encoder(schema, {"item": ["a", "b"]}))
    made.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_is_a_version_of_a_model_with_aliases(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "runs.db"
    (tmp_path / "notes.txt").write_text("as given")
    with open_tracker("mlflow", place, "base") as tracker:
        tracker.parameters({"model.name": "mlp", "model.hidden_units": [8], "seed": 1})
        tracker.artefact(tmp_path / "notes.txt")
        tracker.bundle(bundle, "ads", 1, ["champion"])
        opened = Bundle.open(bundle)
        opened.facts["note"] = "second"
        tracker.bundle(bundle, "ads", opened.publish(bundle), ["challenger", "champion"])
    client, run, _ = read_mlflow(place)
    assert run.info.run_name == "base"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.name": "mlp", "model.hidden_units": "[8]", "seed": "1"}
    assert Path(client.download_artifacts(run.info.run_id, "notes.txt")).read_text() == "as given"
    found = {alias: client.get_model_version_by_alias("ads", alias) for alias in ("champion", "challenger")}
    assert {alias: v.tags for alias, v in found.items()} == {alias: {"domlora.version": "2"} for alias in found}
    copy = Bundle.open(Path(client.get_model_version_download_uri("ads", found["champion"].version)[len("file://") :]))
    assert copy.version == 2
    assert copy.facts == {"note": "second"}
    for name, tensor in Bundle.open(bundle).model.state_dict().items():
        assert torch.equal(copy.model.state_dict()[name], tensor)


def test_tensorboard_tells_of_files_and_versions_as_text(bundle: Path, tmp_path: Path) -> None:
    with open_tracker("tensorboard", tmp_path / "events", "base") as tracker:
        tracker.parameters({"model.name": "mlp"})
        tracker.bundle(bundle, "ads", 1, ["champion"])
    texts = read_tensorboard(tmp_path / "events" / "base")[1]
    assert "| model.name | mlp |" in texts["parameters/text_summary"]
    assert texts["bundle/ads/text_summary"] == f"version 1 in {bundle}, champion"


def test_a_run_that_fails_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_tracker("mlflow", tmp_path / "runs.db", "run"):
        raise KeyError
    assert read_mlflow(tmp_path / "runs.db")[1].info.status == "FAILED"


def test_two_runs_of_one_store(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for _ in range(2):
        open_tracker("mlflow", f"sqlite:///{tmp_path / 'runs.db'}", "run").close()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    assert len(client.search_runs([client.get_experiment_by_name("domlora").experiment_id])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_later_is_one_warning_and_the_run_goes_on(kind: Any, data: Dataset, tmp_path: Path) -> None:
    place = tmp_path / "place"
    tracker = open_tracker(kind, place, "run")
    tracker.figures(0, {"loss": 1.0})
    if kind == "mlflow":
        place.write_bytes(b"no database any more" * 1000)
    else:
        tracker.inner.writer.close()
        shutil.rmtree(place)
        place.write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit(model_of(data), data, QUICK, OptimizerOptions(), on_progress=Watching(tracker, data.schema.domains))
        tracker.close()
    assert len(found.history) == 3
    assert [str(w.message)[:47] for w in caught] == ["tracking has failed, and the run goes on withou"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written_is_an_error_at_the_start(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="must be able to start"):
        open_tracker(kind, tmp_path / "file" / "place", "run")


def test_unknown_kinds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mlflow'"):
        open_tracker("mlfow", tmp_path, "run")  # type: ignore[arg-type]


MISSING = """
import sys
sys.modules[sys.argv[2]] = None
from domlora.errors import ConfigError
from domlora.tracking import open_tracker
try:
    open_tracker(sys.argv[1], sys.argv[3], "run")
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "library"), [("mlflow", "mlflow"), ("tensorboard", "tensorboard")])
def test_a_library_that_is_missing_is_named_with_its_extra(kind: str, library: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", MISSING, kind, library, str(tmp_path / "place")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"pip install 'domlora[{kind}]'" in said
