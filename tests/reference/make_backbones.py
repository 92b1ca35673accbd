"""Makes ``backbones.safetensors``: what DeepCTR-Torch's and FuxiCTR's layers answer for fixed inputs and weights.

Made with deepctr-torch 0.3.0, fuxictr 2.3.10 and torch 2.13.0 in an environment of its own:

    pip install torch==2.13.0 safetensors
    pip install --no-deps deepctr-torch==0.3.0 fuxictr==2.3.10
    python tests/reference/make_backbones.py

Keys are ``case/F/what``; weights keep the peer's own layout, the test moves them into ours. All in float64, so that
agreement means the same formula and not the same rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, WIDTH = 5, 4
FIELDS = (3, 6)  # either side of the switch from products pair by pair to batched matmuls

Record = dict[str, Tensor]


def main() -> None:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    deepctr, fuxictr = load_deepctr(), load_fuxictr()
    record: Record = {}
    for fields in FIELDS:
        x = record[f"x/{fields}"] = torch.randn(ROWS, fields, WIDTH)
        products(record, deepctr, fuxictr, x)
        cross(record, deepctr, fuxictr, x.flatten(1), fields)
        cin(record, deepctr, fuxictr, x)
        attention(record, deepctr, fuxictr, x)
        senet(record, deepctr, fuxictr, x)
        bilinear(record, deepctr, fuxictr, x)
    made_with = ", ".join(f"{name} {version(name)}" for name in ("deepctr-torch", "fuxictr", "torch"))
    tensors = {key: value.detach().clone().contiguous() for key, value in record.items()}
    path = Path(__file__).with_name("backbones.safetensors")
    save_file(tensors, path, metadata={"made_with": made_with})  # one key: the order of several changes
    path.chmod(0o644)


def load_deepctr() -> Any:
    """The layers alone: the package's own ``__init__`` asks the network for updates."""
    folder = Path(importlib.util.find_spec("deepctr_torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    package = types.ModuleType("deepctr_torch")
    package.__path__ = [str(folder)]
    sys.modules["deepctr_torch"] = package
    return importlib.import_module("deepctr_torch.layers.interaction")


def load_fuxictr() -> Any:
    """The layers alone: the package's own ``__init__`` needs far more than torch."""
    folder = Path(importlib.util.find_spec("fuxictr").submodule_search_locations[0])  # type: ignore[union-attr,index]
    layers = folder / "pytorch" / "layers"
    files = sorted([*(layers / "interactions").glob("*.py"), *(layers / "attentions").glob("*.py")])
    found = types.SimpleNamespace()
    wanted = {
        "bilinear_interaction",
        "compressed_interaction_net",
        "cross_net",
        "dot_product_attention",
        "inner_product",
    }
    for file in files:
        if file.stem in wanted | {"squeeze_excitation"}:
            spec = importlib.util.spec_from_file_location(f"fuxictr_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
            vars(found).update({k: v for k, v in vars(module).items() if isinstance(v, type)})
    return found


def randomised(module: nn.Module, low: float = -1.0) -> nn.Module:
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, low, 1.0)
    return module


def put(record: Record, case: str, peer: nn.Module, y: Tensor) -> None:
    """The answer and the weights of a peer's layer."""
    record[f"{case}/y"] = y
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            record[f"{case}/{name}"] = parameter


def products(record: Record, deepctr: Any, fuxictr: Any, x: Tensor) -> None:
    fields = x.shape[1]
    put(record, f"fm_deepctr/{fields}", nn.Identity(), deepctr.FM()(x))
    put(record, f"bi_deepctr/{fields}", nn.Identity(), deepctr.BiInteractionPooling()(x).squeeze(1))
    pieces = list(torch.split(x, 1, dim=1))
    put(record, f"inner_deepctr/{fields}", nn.Identity(), deepctr.InnerProductLayer()(pieces).squeeze(-1))
    for case, output in (("fm", "product_sum"), ("bi", "bi_interaction"), ("inner", "inner_product")):
        layer = fuxictr.InnerProductInteraction(fields, output=output)
        put(record, f"{case}_fuxictr/{fields}", nn.Identity(), layer(x))


def cross(record: Record, deepctr: Any, fuxictr: Any, x: Tensor, fields: int) -> None:
    layer = randomised(deepctr.CrossNet(x.shape[1], layer_num=3, parameterization="vector"))
    put(record, f"cross_deepctr/{fields}", layer, layer(x))
    layer = randomised(fuxictr.CrossNet(x.shape[1], 3))
    put(record, f"cross_fuxictr/{fields}", layer, layer(x))


def cin(record: Record, deepctr: Any, fuxictr: Any, x: Tensor) -> None:
    fields = x.shape[1]
    for split_half in (True, False):
        layer = randomised(deepctr.CIN(fields, (8, 6, 5), "relu", split_half))
        put(record, f"cin_deepctr_{'split' if split_half else 'whole'}/{fields}", layer, layer(x))
    # FuxiCTR's has no relu: with nothing below zero a relu does nothing
    layer = randomised(fuxictr.CompressedInteractionNet(fields, [8, 6]), low=0.0)
    put(record, f"cin_fuxictr/{fields}", layer, layer(x.abs()))


def attention(record: Record, deepctr: Any, fuxictr: Any, x: Tensor) -> None:
    fields = x.shape[1]
    for scaling in (True, False):
        layer = randomised(deepctr.InteractingLayer(WIDTH, head_num=2, scaling=scaling))
        put(record, f"attention_deepctr_{'scaled' if scaling else 'plain'}/{fields}", layer, layer(x))
    # FuxiCTR's wheel has the attention, its model zoo the maps around it: 3 heads of 5 from a width of 4
    maps = nn.ModuleDict({name: nn.Linear(WIDTH, 15, bias=False) for name in ("query", "key", "value", "residual")})
    randomised(maps)
    query, key, value = (maps[n](x).view(ROWS, fields, 3, 5).transpose(1, 2) for n in ("query", "key", "value"))
    mixed, _ = fuxictr.ScaledDotProductAttention()(query, key, value)
    y = (mixed.transpose(1, 2).reshape(ROWS, fields, 15) + maps["residual"](x)).relu()
    put(record, f"attention_fuxictr/{fields}", maps, y)


def senet(record: Record, deepctr: Any, fuxictr: Any, x: Tensor) -> None:
    fields = x.shape[1]
    for case, kind in (("senet_deepctr", deepctr.SENETLayer), ("senet_fuxictr", fuxictr.SqueezeExcitation)):
        layer = randomised(kind(fields, 3), low=-0.2)  # mostly positive, so that the bottleneck is not dead
        put(record, f"{case}/{fields}", layer, layer(x.abs()))


def bilinear(record: Record, deepctr: Any, fuxictr: Any, x: Tensor) -> None:
    fields = x.shape[1]
    for kind in ("all", "each", "interaction"):
        layer = randomised(deepctr.BilinearInteraction(fields, WIDTH, kind))
        put(record, f"bilinear_deepctr_{kind}/{fields}", layer, layer(x))
        layer = randomised(fuxictr.BilinearInteractionV2(fields, WIDTH, f"field_{kind}"))
        put(record, f"bilinear_fuxictr_{kind}/{fields}", layer, layer(x))
    assert record[f"bilinear_deepctr_all/{fields}/y"].shape[1] == len(list(combinations(range(fields), 2)))


if __name__ == "__main__":
    main()
