from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from domlora.adapters.bank import adapter_layers, base_state, is_adapter_parameter
from domlora.config import Config, parse
from domlora.data.dataset import Dataset
from domlora.errors import ConfigError
from domlora.models.build import build_model
from domlora.training.fit import Fit
from domlora.training.stages import Recipe, adapt, adapter_options_of, pretrain, seeded

MODEL = {"name": "mlp", "embedding_dim": 3, "hidden_units": [8, 4], "dropout": 0.3}
STAGE = {
    "fit": {"batch_size": 128, "max_epochs": 3, "patience": 9, "evaluations_per_epoch": 2, "average_decay": 0.9},
    "optimizer": {kind: {"lr": 0.02} for kind in ("tables", "dense", "adapters")},
}
TABLE: dict[str, Any] = {"adapter": {"temperature": 4.0}, "pretrain": STAGE, "joint": STAGE, "adapt": STAGE}


def recipe() -> Recipe:
    return parse(Config, {"train": TABLE}).train


def run(method: str, data: Any, recipe: Recipe, checkpoint: Path | None = None) -> tuple[nn.Module, Fit]:
    """One method from its own start; second stages start from an untrained base."""
    if method in ("base", "joint"):
        return pretrain(data, MODEL, recipe, method=method, checkpoint=checkpoint)
    torch.manual_seed(5)
    model = build_model(schema=data.schema, **MODEL)
    return model, adapt(model, data, recipe, method=method, checkpoint=checkpoint)


def figures(found: Fit) -> str:
    return json.dumps([found.history, found.best_value, found.best_epoch])


def absurd(recipe: Recipe) -> Recipe:
    """The second stage at a learning rate that wrecks any model."""
    stage = recipe.adapt
    rule = replace(stage.optimizer.adapters, lr=0.5)
    return replace(recipe, adapt=replace(stage, optimizer=replace(stage.optimizer, adapters=rule)))


def test_base_has_no_adapters_and_joint_has(data: Dataset) -> None:
    assert not adapter_layers(run("base", data, recipe())[0])
    model, _ = run("joint", data, recipe())
    assert [layer.rank for layer in adapter_layers(model).values()] == [2, 1]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(layer.lora_B.any() for layer in adapter_layers(model).values())


def test_bias_only_moves_biases_only(data: Dataset) -> None:
    model, _ = run("bias_only", data, recipe())
    for layer in adapter_layers(model).values():
        assert layer.lora_A.numel() == layer.lora_B.numel() == 0
        assert layer.lora_bias is not None
        assert layer.lora_bias.any()


@pytest.mark.parametrize("method", ["two_stage", "bias_only"])
def test_a_second_stage_leaves_the_bytes_of_the_base_alone(data: Dataset, method: str) -> None:
    base, _ = run("base", data, recipe())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapt(base, data, recipe(), method=method)
    after = base_state(base)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, p in base.named_parameters() if p.requires_grad] == [
        name for name, _ in base.named_parameters() if is_adapter_parameter(name)
    ]


@pytest.mark.parametrize("method", ["two_stage", "bias_only"])
def test_a_hopeless_second_stage_gives_the_base_back(data: Dataset, digest: Any, method: str) -> None:
    base, first = run("base", data, recipe())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = adapt(base, data, absurd(recipe()), method=method)
    assert found.best_epoch == 0.0
    assert found.best_value == first.best_value
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_state(base).items())
    assert not any(layer.lora_B.any() for layer in adapter_layers(base).values())
    assert not any(layer.lora_bias.any() for layer in adapter_layers(base).values() if layer.lora_bias is not None)


def test_a_second_stage_is_never_worse_than_its_base(data: Dataset) -> None:
    base, first = run("base", data, recipe())
    assert adapt(base, data, recipe()).best_value >= first.best_value


def test_moving_moves_more_than_adapters(data: Dataset) -> None:
    base, _ = run("base", data, recipe())
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    more = replace(recipe(), adapt=replace(recipe().adapt, moving=("embedding.*",)))
    adapt(base, data, replace(more, adapt=replace(more.adapt, fit=replace(more.adapt.fit, seed=3))))
    moved = {name for name, tensor in base_state(base).items() if not torch.equal(tensor, before[name])}
    assert moved <= {"embedding.weight"}


def test_moving_refuses_a_glob_without_a_match(data: Dataset) -> None:
    base = build_model(schema=data.schema, **MODEL)
    with pytest.raises(ConfigError, match="Received: 'embeding"):
        adapt(base, data, replace(recipe(), adapt=replace(recipe().adapt, moving=("embeding.*",))))


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from domlora.config import Config, parse
from domlora.data.synthetic import World
from domlora.training import fit
from domlora.training.stages import pretrain

fit._APART_S = 0.0
torch.set_num_threads(int(sys.argv[1]))
data = World(num_domains=3, num_dense=4, hidden_units=8).dataset(1500, seed=0)[0]
table, model = json.loads(sys.argv[3])
shown = []

def wait(at):
    shown.append(at.rows == at.total_rows)
    if shown[-1] and sum(shown) == 4:
        print("validated", flush=True)
        sys.stdin.read()  # until killed

pretrain(data, model, parse(Config, {"train": table}).train, method="joint", checkpoint=Path(sys.argv[2]), on_progress=wait)
"""


def test_a_killed_process_is_resumed_with_the_same_bits(data: Dataset, digest: Any, tmp_path: Path) -> None:
    straight, expected = run("joint", data, recipe())
    arguments = [str(torch.get_num_threads()), str(tmp_path / "run"), json.dumps([TABLE, MODEL])]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"validated\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert (tmp_path / "run" / "checkpoint.json").exists()
    resumed, found = run("joint", data, recipe(), tmp_path / "run")
    assert digest(resumed) == digest(straight)
    assert figures(found) == figures(expected)


@pytest.mark.parametrize("method", ["two_stage", "bias_only", "bse"])
def test_pretrain_knows_two_methods(data: Dataset, method: str) -> None:
    with pytest.raises(ConfigError, match="Known: 'base', 'joint'"):
        pretrain(data, MODEL, recipe(), method=method)


@pytest.mark.parametrize("method", ["base", "joint", "two-stage"])
def test_adapt_knows_two_methods_and_leaves_the_model_alone(data: Dataset, method: str) -> None:
    model = build_model(schema=data.schema, **MODEL)
    with pytest.raises(ConfigError, match=f"Received: '{method}'"):
        adapt(model, data, recipe(), method=method)
    assert not adapter_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapt_wants_a_model_without_adapters(data: Dataset) -> None:
    model, _ = run("joint", data, recipe())
    with pytest.raises(ConfigError, match="adapters already"):
        adapt(model, data, recipe())


def test_adapters_of_methods() -> None:
    options = recipe().adapter
    assert adapter_options_of("two_stage", recipe()) == adapter_options_of("joint", recipe()) == options
    only = adapter_options_of("bias_only", replace(recipe(), adapter=replace(options, bias=False, rank=3)))
    assert (only.rank, only.bias, only.include) == (0, True, options.include)
    with pytest.raises(ConfigError, match="no adapters in this method"):
        adapter_options_of("base", recipe())


def test_seeded_changes_seeds_and_nothing_else() -> None:
    changed = seeded(recipe(), 9)
    assert {stage.fit.seed for stage in (changed.pretrain, changed.joint, changed.adapt)} == {9}
    assert asdict(seeded(changed, 1)) == asdict(recipe())


def test_a_model_without_a_name_is_a_user_error(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="name"):
        pretrain(data, {"dropout": 0.1}, recipe())
