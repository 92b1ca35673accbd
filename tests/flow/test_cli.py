"""The whole walk through the command line on a small world: prepare, pretrain, adapt, evaluate, study, report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from domlora import cli
from domlora.errors import ConfigError

QUICK = [
    "--set", "model.hidden_units=[16,8]",
    "--set", "model.embedding_dim=4",
    "--set", "train.pretrain.fit.max_epochs=2",
    "--set", "train.adapt.fit.max_epochs=2",
    "--set", "train.pretrain.fit.batch_size=256",
    "--set", "train.adapt.fit.batch_size=256",
]  # fmt: skip


def domlora(*words: object) -> None:
    """Run the command line in this process; what goes wrong is raised."""
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens-100K's published layout, small."""
    folder = tmp_path_factory.mktemp("raw")
    dice = random.Random(1)
    users = [
        f"{u}|{20 + u % 30}|{'F' if u % 3 else 'M'}|{['artist', 'doctor'][u % 2]}|{10000 + u}" for u in range(1, 61)
    ]
    (folder / "u.user").write_text("\n".join(users) + "\n", encoding="latin-1")
    items = [f"{i}|Movie {i} (1995)|01-Jan-1995||http://x|" + "|".join("0" * 19) for i in range(1, 41)]
    (folder / "u.item").write_text("\n".join(items) + "\n", encoding="latin-1")
    rows = []
    for user in range(1, 61):
        for item in dice.sample(range(1, 41), 25):
            rows.append(
                f"{user}\t{item}\t{5 if dice.random() < item / 60 else dice.randint(1, 4)}\t{880000000 + len(rows)}"
            )
    (folder / "u.data").write_text("\n".join(rows) + "\n", encoding="latin-1")
    return folder


@pytest.fixture(scope="module")
def walked(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    domlora("prepare", "movielens-100k", "--raw", raw, "--domain", "gender", "--out", folder / "data")
    domlora("pretrain", "--data", folder / "data", "--out", folder / "base", *QUICK)
    domlora("adapt", "--data", folder / "data", "--bundle", folder / "base", "--out", folder / "adapted", *QUICK)
    return folder


def test_every_step_leaves_a_folder_that_describes_itself(walked: Path) -> None:
    for name, what in {"data": "files", "base": "versions", "adapted": "versions"}.items():
        assert json.loads((walked / name / "manifest.json").read_text(encoding="utf-8"))[what]
    assert sorted(path.name for path in (walked / "adapted" / "adapters").iterdir()) == ["F@1", "M@1"]
    assert not list(walked.glob(".*"))  # no checkpoint and no temporary folder is left


def test_evaluate_prints_a_line_a_domain(walked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domlora("evaluate", "--data", walked / "data", "--bundle", walked / "adapted", "--json", walked / "scores.json")
    said = capsys.readouterr().out
    assert "F" in said
    assert "M" in said
    scores = json.loads((walked / "scores.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in scores["domains"]] == ["F", "M"]


def test_a_file_says_where_a_stage_trains(walked: Path) -> None:
    words = ("pretrain", "--data", walked / "data", "--out", walked / "there", *QUICK)
    with pytest.raises(ConfigError, match="device must be one"):
        domlora(*words, "--set", "train.pretrain.fit.device=tpu9")


def test_adapt_does_not_change_the_model(walked: Path) -> None:
    words = ("adapt", "--data", walked / "data", "--bundle", walked / "base", "--out", walked / "other")
    with pytest.raises(ConfigError, match=r"model.dropout=0.5; the bundle has"):
        domlora(*words, "--set", "model.dropout=0.5")


def test_adapters_off_is_the_base(walked: Path) -> None:
    for name, words in (("off", ["--bundle", walked / "adapted", "--base"]), ("base", ["--bundle", walked / "base"])):
        domlora("evaluate", "--data", walked / "data", *words, "--json", walked / f"{name}.json")
    assert (walked / "off.json").read_bytes() == (walked / "base.json").read_bytes()


def test_study_resumes_and_reports(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "small.toml"
    plan.write_text(
        """
        name = "small"
        models = ["mlp"]
        methods = ["two_stage"]
        seeds = [1, 2]
        [datasets.small]
        source = "movielens-100k"
        settings = ["columns.domain=gender"]
        [config.model]
        hidden_units = [8]
        [config.train.pretrain.fit]
        max_epochs = 1
        [config.train.adapt.fit]
        max_epochs = 1
        """,
        encoding="utf-8",
    )
    words = ("study", plan, "--out", tmp_path / "runs", "--raw", raw, "--jobs", 1)
    domlora(*words)
    first = (tmp_path / "runs" / "results.jsonl").read_bytes()
    assert first.count(b"\n") == 4  # two seeds, base and two_stage
    domlora(*words, "--dataset", "small")
    assert (tmp_path / "runs" / "results.jsonl").read_bytes() == first
    assert "--dataset small" in (tmp_path / "runs" / "study.json").read_text(encoding="utf-8")
    domlora("report", tmp_path / "runs", "--out", tmp_path / "report.html", "--csv", tmp_path / "small.csv")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    head = (tmp_path / "small.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("dataset,model,method,seed,wauc,macro_auc,log_loss,params_total,params_adapters")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "movielens-1000k", "--out", "x"], "movielens-100k"),
        (["pretrain", "--data", "nowhere", "--out", "x"], "domlora prepare"),
        (["pretrain", "--data", "nowhere", "--out", "x", "--set", "modle.name=mlp"], "'model'"),
        (["evaluate", "--data", "nowhere", "--bundle", "nowhere"], "manifest.json"),
        (["report", "nowhere"], "domlora study"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["domlora", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert "Traceback" not in message
    assert message.count("\n") == 0
