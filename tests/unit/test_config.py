from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from domlora.config import Config, load_config, merged, parse, read_toml, with_settings
from domlora.errors import ConfigError
from domlora.studies.study import Study

STUDY: dict[str, Any] = {"name": "s", "models": ["mlp"], "datasets": {"a": {"world": {"num_domains": 3}}}}


def test_everything_has_a_default() -> None:
    config = load_config(None)
    assert config == Config()
    assert config.model == {"name": "mlp"}
    assert config.train.adapter.include == ("tower.*",)


def test_options_of_a_model_leave_its_default_name(tmp_path: Path) -> None:
    assert load_config(None, ["model.dropout=0.1"]).model == {"name": "mlp", "dropout": 0.1}
    (tmp_path / "c.toml").write_text("[model]\ndropout = 0.1")
    assert load_config(tmp_path / "c.toml").model == {"name": "mlp", "dropout": 0.1}


def test_a_file_and_settings_on_top(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        """
        [model]
        name = "deepfm"
        dropout = 0.1
        [train.adapter]
        include = ["tower.0"]
        [train.pretrain.fit]
        batch_size = 512
        max_epochs = 7
        """
    )
    config = load_config(path, ["train.pretrain.fit.batch_size=64", "model.name=dcn", 'train.adapt.moving=["head.*"]'])
    assert config.model == {"name": "dcn", "dropout": 0.1}
    assert config.train.adapter.include == ("tower.0",)
    assert (config.train.pretrain.fit.batch_size, config.train.pretrain.fit.max_epochs) == (64, 7)
    assert config.train.joint.fit == Config().train.joint.fit
    assert config.train.adapt.moving == ("head.*",)


@pytest.mark.parametrize(
    ("table", "path", "received", "guess"),
    [
        ({"modl": {}}, "", "modl", "model"),
        ({"train": {"pretain": {}}}, "[train]", "pretain", "pretrain"),
        ({"train": {"pretrain": {"fit": {"batchsize": 1}}}}, "[train.pretrain.fit]", "batchsize", "batch_size"),
        ({"train": {"joint": {"optimizer": {"dense": {"l_r": 1}}}}}, "[train.joint.optimizer.dense]", "l_r", "lr"),
        ({"train": {"adapter": {"inclde": []}}}, "[train.adapter]", "inclde", "include"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest(
    table: dict[str, Any], path: str, received: str, guess: str
) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        parse(Config, table)
    said = str(caught.value)
    assert path in said
    assert f"Received: {received!r}" in said
    assert f"Did you mean {guess!r}?" in said


@pytest.mark.parametrize(
    ("datasets", "received"),
    [({"a": {"folder": "x", "lable": "rating>=4"}}, "lable"), ({"a": {"world": {"num_domain": 3}}}, "num_domain")],
)
def test_unknown_keys_of_named_tables_are_refused_too(datasets: dict[str, Any], received: str) -> None:
    with pytest.raises(ConfigError, match=f"datasets.a.*Received: '{received}'"):
        parse(Study, {**STUDY, "datasets": datasets})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.pretrain.fit.batch_size", "many"),
        ("train.pretrain.fit.batch_size", 1.5),
        ("train.pretrain.fit.batch_size", True),
        ("train.pretrain.fit.batch_size", "32"),
        ("train.pretrain.fit", 3),
        ("train", 3),
        ("model", 3),
        ("train.pretrain.fit.monitor", "wauk"),
        ("train.adapter.bias", "perhaps"),
        ("train.adapter.bias", 1),
        ("train.adapter.include", "tower.*"),
        ("train.adapter.include", [1]),
        ("train.pretrain.optimizer.dense.lr", "fast"),
    ],
)
def test_values_of_another_type_are_refused_with_their_path(key: str, value: Any) -> None:
    table = value
    for part in reversed(key.split(".")):
        table = {part: table}
    with pytest.raises(ConfigError) as caught:
        parse(Config, table)
    assert key in str(caught.value)


def test_whole_numbers_are_numbers() -> None:
    assert parse(Config, {"train": {"adapter": {"temperature": 4}}}).train.adapter.temperature == 4.0


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.pretrain.fit.batch_size", 0, "counts of at least 1"),
        ("train.pretrain.fit.average_decay", 1.0, "average_decay"),
        ("train.pretrain.optimizer.dense.lr", -1.0, "lr above 0"),
        ("train.pretrain.optimizer.dense.lr", float("nan"), "lr above 0"),
        ("train.pretrain.optimizer.dense.weight_decay", float("nan"), "weight_decay"),
    ],
)
def test_values_out_of_range_say_the_rule_once(key: str, value: Any, rule: str) -> None:
    table: Any = value
    for part in reversed(key.split(".")):
        table = {part: table}
    with pytest.raises(ConfigError, match=rule) as caught:
        parse(Config, table)
    said = str(caught.value)
    assert key.rpartition(".")[0] in said
    assert said.count("Received:") == 1
    assert "Value error" not in said
    assert ".." not in said


@pytest.mark.parametrize("key", ["temperature", "lora_alpha", "rank"])
def test_options_of_adapters_are_checked_when_they_are_read(key: str) -> None:
    """A base may train for hours before its adapters are attached."""
    with pytest.raises(ConfigError, match=key):
        parse(Config, {"train": {"adapter": {key: -1}}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ('"7"', "7"),
        ("dcn", "dcn"),
        ("[1, 2]", [1, 2]),
        ("", ""),
        ("x=y", "x=y"),
        ("rating>=4", "rating>=4"),
        ("{ a = 1 }", {"a": 1}),
        ("None", "None"),
    ],
)
def test_settings_are_toml_or_text(text: str, value: Any) -> None:
    assert with_settings({}, [f"a.b={text}"]) == {"a": {"b": value}}


def test_a_setting_holds_one_value() -> None:
    assert with_settings({}, ["a=1\nb=2"])["a"] != 1


@pytest.mark.parametrize("setting", ["a.b", "=1", "a..b=1", ".a=1", "a.=1", ""])
def test_settings_of_another_form_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        with_settings({}, [setting])


def test_later_settings_win_and_the_table_stays() -> None:
    table = {"a": {"b": 1, "c": 2}}
    assert with_settings(table, ["a.b=3", "a.b=4"]) == {"a": {"b": 4, "c": 2}}
    assert table == {"a": {"b": 1, "c": 2}}


def test_merged() -> None:
    table = {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert merged(table, {"a": {"b": {"f": 4}}, "e": {"g": 5}}) == {"a": {"b": {"c": 1, "f": 4}, "d": 2}, "e": {"g": 5}}
    assert table == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


def test_a_study_reads_its_models_options_when_it_is_read() -> None:
    with pytest.raises(ConfigError, match="batchsize"):
        parse(Study, {**STUDY, "config": {"train": {"pretrain": {"fit": {"batchsize": 1}}}}})
    with pytest.raises(ConfigError, match="Did you mean 'deepfm'"):
        parse(Study, {**STUDY, "models": ["depfm"]})
    study = parse(
        Study,
        {
            **STUDY,
            "config": {"model": {"dropout": 0.1}, "train": {"adapter": {"temperature": 8}}},
            "overrides": {"mlp": {"train": {"adapter": {"temperature": 4}}}},
        },
    )
    assert study.config_of("a", "mlp").model == {"dropout": 0.1, "name": "mlp"}
    assert study.config_of("a", "mlp").train.adapter.temperature == 4


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.toml"):
        read_toml(tmp_path / "c.toml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match="TOML file"):
            read_toml(path)
