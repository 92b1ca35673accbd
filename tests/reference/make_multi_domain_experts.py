"""Makes ``multi_domain_experts.safetensors``: what DeepCTR-Torch's multi-task models answer for fixed inputs and weights.

Made with deepctr-torch 0.3.0 and torch 2.13.0 in an environment of its own:

    pip install torch==2.13.0 safetensors scikit-learn tqdm
    pip install --no-deps deepctr-torch==0.3.0
    python tests/reference/make_multi_domain_experts.py

Keys are ``case/what``; ``y (rows, tasks)`` holds the logit of each task, weights keep the peer's own layout, the test moves
them into ours. All in float64, so that agreement means the same formula and not the same rounding. Its PLE makes as many
shared experts as own ones, and a shared gate over the experts of all tasks, so that one level of one and one is what
both have.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, WIDTH, TASKS = 6, 5, 3


def main() -> None:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    package = load_deepctr()
    column = [package["inputs"].DenseFeat("x", WIDTH)]
    tasks = {"task_types": ["regression"] * TASKS, "task_names": [f"task{task}" for task in range(TASKS)]}
    tower = {"tower_dnn_hidden_units": (3,), **tasks}
    experts = {"expert_dnn_hidden_units": (6, 4), "gate_dnn_hidden_units": (), **tower}
    peers = package["multitask"]
    x = torch.randn(ROWS, WIDTH)
    record: dict[str, Tensor] = {"x": x}
    put(record, "shared_bottom", peers.SharedBottom(column, bottom_dnn_hidden_units=(6, 4), **tower), x)
    put(record, "mmoe", peers.MMOE(column, num_experts=3, **experts), x)
    put(record, "ple", peers.PLE(column, num_levels=1, **experts), x)
    made_with = ", ".join(f"{name} {version(name)}" for name in ("deepctr-torch", "torch"))
    tensors = {key: value.detach().clone().contiguous() for key, value in record.items()}
    path = Path(__file__).with_name("multi_domain_experts.safetensors")
    save_file(tensors, path, metadata={"made_with": made_with})
    path.chmod(0o644)


def load_deepctr() -> dict[str, Any]:
    """The models of several tasks alone: the package's own ``__init__`` asks the network for updates."""
    folder = Path(importlib.util.find_spec("deepctr_torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    for name in ("deepctr_torch", "deepctr_torch.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    names = {"inputs": "deepctr_torch.inputs", "multitask": "deepctr_torch.models.multitask"}
    return {short: importlib.import_module(name) for short, name in names.items()}


def put(record: dict[str, Tensor], case: str, peer: nn.Module, x: Tensor) -> None:
    """The answer and the weights of a peer."""
    for parameter in peer.parameters():
        nn.init.uniform_(parameter, -1.0, 1.0)
    record[f"{case}/y"] = peer.double()(x)
    for name, parameter in peer.named_parameters():
        record[f"{case}/{name}"] = parameter


if __name__ == "__main__":
    main()
