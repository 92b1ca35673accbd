"""A bundle's life through the command line: onboard, update, export, merge, and its versions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from domlora import cli
from domlora.bundle import Bundle, versions
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError

QUICK = ["model.name=deepfm", "model.hidden_units=[16,8]", "model.embedding_dim=4"]
QUICK += [f"train.{stage}.fit.{what}" for stage in ("joint", "update") for what in ("max_epochs=2", "batch_size=128")]
QUICK += ["train.onboard.fit.max_epochs=2", "train.adapter.temperature=4"]
PLAN = """
[source]
files = ["{name}.csv"]

[columns]
label = "click"
domain = "scene"

[features.user]

[features.item]

[split]
kind = "random"
fractions = [0.6, 0.2, 0.2]
"""


def domlora(*words: object) -> None:
    """Run the command line in this process; what goes wrong is raised."""
    cli.app([str(word) for word in words], standalone_mode=False)


def options() -> list[str]:
    return [word for setting in QUICK for word in ("--set", setting)]


def log(folder: Path, name: str, scenes: list[str], items: range, seed: int, spoiled: str = "") -> Path:
    """Rows whose clicks follow the item, but in one scene, and the plan to prepare them."""
    dice, lines = random.Random(seed), ["user,item,scene,click"]
    for _ in range(2500):
        item, scene = dice.choice(items), dice.choice(scenes)
        rate = 0.5 if scene == spoiled else 0.85 if item % 2 else 0.15
        lines.append(f"u{dice.randrange(30)},i{item},{scene},{int(dice.random() < rate)}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}.toml").write_text(PLAN.format(name=name), encoding="utf-8")
    return folder / f"{name}.toml"


@pytest.fixture
def walk(tmp_path: Path) -> Path:
    domlora("prepare", log(tmp_path, "first", ["app", "web"], range(10), 1), "--out", tmp_path / "data")
    domlora("pretrain", "--data", tmp_path / "data", "--out", tmp_path / "live", "--method", "joint", *options())
    return tmp_path


@pytest.fixture
def next_day(walk: Path) -> Callable[..., Path]:
    def prepared(name: str, scenes: list[str], items: range, spoiled: str = "") -> Path:
        plan = log(walk, name, scenes, items, 2, spoiled)
        domlora("prepare", plan, "--grow", walk / "live", "--out", walk / name)
        return walk / name

    return prepared


def test_a_domain_comes_and_the_others_keep_their_bits(walk: Path, next_day: Callable[..., Path]) -> None:
    live, known = walk / "live", Dataset.open(walk / "data").read("test")
    before = Bundle.open(live).model(known.ids, known.dense, known.domain)
    day = next_day("tv", ["tv"], range(10))
    domlora("onboard", "--bundle", live, "--data", day, "--domain", "tv", *options())
    opened = Bundle.open(live)
    assert opened.encoder.schema.domains == ("app", "web", "tv")
    assert torch.equal(opened.model(known.ids, known.dense, known.domain), before)
    (_, second) = versions(live)
    assert (second.parent, second.default, second.written.get("base", 0)) == (1, True, 0)
    assert json.loads(json.dumps(second.facts))["onboarded"]["tv"]["chosen"]


def test_a_day_is_learned_published_and_taken_back(
    walk: Path, next_day: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    live, day = walk / "live", next_day("day", ["app", "web"], range(5, 15))
    domlora("update", "--bundle", live, "--data", day, "--replay", walk / "data", *options())
    assert [version.default for version in versions(live)] == [False, True]
    with pytest.raises(ConfigError, match="version 2 of the bundle has learned this day"):
        domlora("update", "--bundle", live, "--data", day, *options())
    domlora("evaluate", "--bundle", live, "--data", day)
    domlora("bundle", "show", live)
    domlora("bundle", "diff", live, 1, 2)
    domlora("bundle", "verify", live)
    printed = capsys.readouterr().out
    assert "2 versions" in printed
    assert '"item"' in printed
    domlora("bundle", "set-default", live, 1)
    assert Bundle.open(live).version == 1
    domlora("evaluate", "--bundle", live, "--data", walk / "data")
    domlora("evaluate", "--bundle", live, "--data", day, "--version", 2)
    domlora("bundle", "gc", live, "--keep", 0)
    assert [version.number for version in versions(live)] == [1]


def test_a_spoiled_day_stays_a_candidate_and_is_named(
    walk: Path, next_day: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    live, day = walk / "live", next_day("spoiled", ["app", "web"], range(10), "web")
    with pytest.raises(SystemExit) as stopped:
        cli.app(["update", "--bundle", str(live), "--data", str(day), *options()])
    assert stopped.value.code == 3
    assert [version.default for version in versions(live)] == [True, False]
    said = capsys.readouterr()
    assert "stopped by web" in said.err
    assert "stopped by app" not in said.err
    assert "a candidate" in said.out


def test_tracked(walk: Path, next_day: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow knows options, curves of each domain, and which version is live; an unknown method is still named."""
    from mlflow import MlflowClient

    track = ["--track", "mlflow", "--track-to", walk / "runs.db"]
    day = next_day("day", ["app", "web"], range(5, 15))
    domlora("update", "--bundle", walk / "live", "--data", day, *track, *options())
    client = MlflowClient(f"sqlite:///{walk / 'runs.db'}", f"sqlite:///{walk / 'runs.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("domlora").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["update.fit.batch_size"] == "128"
    assert 0.5 < run.data.metrics["valid/domain/web/auc"] < 1
    assert client.get_model_version_by_alias("live", "live").tags == {"domlora.version": "2"}
    monkeypatch.chdir(walk)
    domlora("pretrain", "--data", walk / "data", "--out", walk / "again", "--track", "tensorboard", *options())
    assert list((walk / "tensorboard" / "again").glob("events*"))
    with pytest.raises(ConfigError, match="no method has this name"):
        domlora("pretrain", "--data", walk / "data", "--out", walk / "x", "--method", "jiont", *track)


def test_exported_and_merged(walk: Path) -> None:
    live, data = walk / "live", walk / "data"
    domlora("export", "--bundle", live, "--data", data, "--out", walk / "onnx")
    from domlora.serving.program import Program

    rows = Dataset.open(data).read("test")
    opened = Bundle.open(live)
    expected = opened.model(rows.ids, rows.dense, rows.domain).detach().numpy()
    said = Program.open(walk / "onnx")(rows.ids.numpy(), rows.dense.numpy(), rows.domain.numpy())
    assert abs(said - expected).max() < 1e-5
    domlora("merge", "--bundle", live, "--domain", "web", "--out", walk / "web")
    plain, web = Bundle.open(walk / "web"), rows.domain == 1
    assert plain.adapter is None
    found = plain.model(rows.ids, rows.dense, rows.domain).detach().numpy()
    assert abs(found - expected)[web.numpy()].max() < 1e-5


def test_what_must_not_be(walk: Path) -> None:
    with pytest.raises(ConfigError, match="must not exist"):
        domlora("merge", "--bundle", walk / "live", "--domain", "web", "--out", walk / "data")
    with pytest.raises(ConfigError, match="--keep"):
        domlora("bundle", "gc", walk / "live", "--keep", -1)
